"""The results of a run: medians, ratios, the verdict against the targets, tables for people."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from drills import Growth
from load import Round
from size_drills import Sized
from state_drills import LargeState, ManyKeys, Seen
from systems import Load
from watch_drills import Watched

QUIET_PERCENT = 20.0
MET, MISSED, NOT_MEASURED = "met", "MISSED", "not measured"


@dataclass
class Case:
    """All rounds of one load on one system; round n of every system ran side by side."""

    load: Load
    connections: int
    system: str
    rounds: list[Round] = field(default_factory=list)

    def median(self, value: Callable[[Round], float]) -> float:
        """Median of one figure over the rounds."""
        return statistics.median(value(each) for each in self.rounds)

    @property
    def busy_rounds(self) -> int:
        """Rounds during which other processes took more than `QUIET_PERCENT` of a core."""
        return sum(each.others_percent > QUIET_PERCENT for each in self.rounds)

    def ratio_to(self, other: Case | None) -> float | None:
        """Median over the rounds of our operations per second divided by the other's."""
        if other is None or other is self:
            return None
        rounds = zip(self.rounds, other.rounds, strict=True)
        ratios = [ours.ops_per_s / beside.ops_per_s for ours, beside in rounds if beside.ops_per_s]
        return statistics.median(ratios) if ratios else None


@dataclass
class Results:
    """Everything one run found out; `broken` says what of the run itself failed."""

    machine: dict[str, str]
    options: dict[str, str]
    cases: list[Case] = field(default_factory=list)
    failover_s: dict[str, list[float]] = field(default_factory=dict)
    growth: Growth | None = None
    large_state: LargeState | None = None
    many_keys: ManyKeys | None = None
    watched: Watched | None = None
    sizes: list[Sized] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def case(self, load: Load, connections: int, system: str) -> Case | None:
        """The case of these three, or None when it did not run."""
        for case in self.cases:
            if (case.load, case.connections, case.system) == (load, connections, system):
                return case if case.rounds else None
        return None


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table that also lines up in a terminal; the first `left` columns flush left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} x"


def _per_node(case: Case, figures: Callable[[Round], list[float]]) -> str:
    columns = zip(*(figures(each) for each in case.rounds), strict=True)
    return " ".join(f"{statistics.median(column):.0f}" for column in columns)


def _case_row(results: Results, case: Case) -> list[str]:
    def ratio(system: str) -> str:
        return _times(case.ratio_to(results.case(case.load, case.connections, system)))

    return [
        str(case.load),
        str(case.connections),
        case.system,
        f"{case.median(lambda r: r.ops_per_s):.0f}",
        ratio("baseline"),
        ratio("etcd"),
        f"{case.median(lambda r: r.p50_ms):.2f}",
        f"{case.median(lambda r: r.p99_ms):.2f}",
        _per_node(case, lambda r: r.cpu_percent),
        _per_node(case, lambda r: r.rss_mib),
        f"{max(r.others_percent for r in case.rounds):.0f}",
        str(sum(r.failed for r in case.rounds)),
    ]


def load_table(results: Results) -> str:
    """One row per load, number of connections and system."""
    header = ["load", "conns", "system", "ops/s", "to baseline", "to etcd", "p50 ms", "p99 ms"]
    header += ["CPU % per node", "RSS MiB per node", "others %", "failed"]
    rows = [_case_row(results, case) for case in results.cases if case.rounds]
    return _table(header, rows, left=3)


def _quiet_line(results: Results) -> str:
    """How often other processes were in the way: ratios from a busy machine mean little."""
    rounds = sum(len(case.rounds) for case in results.cases)
    busy = sum(case.busy_rounds for case in results.cases)
    line = (
        f"Rounds with more than {QUIET_PERCENT:.0f} % of a core used by others: {busy} of {rounds}."
    )
    if busy:
        line += " Their rows (see others %, the worst round) do not compare with other runs."
    return line


def _judge(
    measure: str, must: str, measured: str | None, met: bool, cases: Sequence[Case] = ()
) -> list[str]:
    if measured is None:
        return [measure, must, "", NOT_MEASURED]
    busy = " (busy machine)" if any(case.busy_rounds for case in cases) else ""
    return [measure, must, measured, (MET if met else MISSED) + busy]


def _judge_ratio(
    results: Results, load: Load, connections: int, other: str, at_least: float
) -> list[str]:
    ours = results.case(load, connections, "dengine")
    beside = results.case(load, connections, other)
    ratio = ours.ratio_to(beside) if ours else None
    measure = f"{load}, {connections} connections, against {other}"
    met = ratio is not None and ratio >= at_least
    cases = [case for case in (ours, beside) if case]
    return _judge(measure, f">= {at_least:g} x", _times(ratio) or None, met, cases)


def _judge_one_put(results: Results) -> list[str]:
    ours, etcd = (results.case(Load.PUT, 1, name) for name in ("dengine", "etcd"))
    if ours is None or etcd is None:
        return _judge("PUT, 1 connection, median", "<= etcd's", None, False)
    ours_ms, etcd_ms = (case.median(lambda r: r.p50_ms) for case in (ours, etcd))
    measured = f"{ours_ms:.2f} ms; etcd {etcd_ms:.2f} ms"
    met = ours_ms <= etcd_ms
    return _judge("PUT, 1 connection, median", "<= etcd's", measured, met, [ours, etcd])


def _judge_growth(measure: str, growth: Growth | None) -> list[str]:
    measured = None
    if growth is not None:
        measured = f"{len(growth.failures)} of {growth.acknowledged + len(growth.failures)}"
    met = growth is not None and not growth.failures and growth.acknowledged > 0
    return _judge(measure, "0", measured, met)


def _judge_snapshot(large: LargeState | None) -> list[list[str]]:
    """p99 of PUT, and the stalls of the loop, against the quiet p99 of PUT in the same run."""
    size = "1 GiB" if large is None else f"{large.state_bytes / 2**30:g} GiB"
    measures = (f"PUT p99 while a snapshot of {size} is written", "event loop stall p99 meanwhile")
    must = "<= 2 x quiet PUT p99"
    quiet_ms = large.quiet_p99_ms if large is not None else None
    if large is None or large.during is None or quiet_ms is None:
        return [_judge(measure, must, None, False) for measure in measures]
    rows = []
    for measure, found_ms in zip(
        measures, (large.during.p99_ms, large.during.stall_p99_ms), strict=True
    ):
        measured = f"{found_ms:.1f} ms; quiet {quiet_ms:.1f} ms: {found_ms / quiet_ms:.2f} x"
        rows.append(_judge(measure, must, measured, found_ms <= 2 * quiet_ms))
    return rows


def _judge_join(large: LargeState | None) -> list[str]:
    measured = f"{len(large.transfers)} of 2" if large and large.growth else None
    met = large is not None and len(large.transfers) == 2
    return _judge("joiners that got there by snapshot", "2 of 2", measured, met)


def _judge_memory(many: ManyKeys | None) -> list[str]:
    idle_mib = many.idle_mib[0] if many is not None else 0.0
    measured = f"{idle_mib:.0f} MB" if idle_mib else None
    return _judge("resident memory of an idle node", "<= 90 MB", measured, idle_mib <= 90)


def _judge_idle_watchers(watched: Watched | None) -> list[str]:
    ratio = watched.idle_ratio if watched is not None else None
    measure = f"PUT beside {watched.watchers if watched else 1000} idle watchers, against none"
    return _judge(measure, ">= 0.9 x", _times(ratio) or None, ratio is not None and ratio >= 0.9)


def _gaps(gaps: list[float] | None) -> str | None:
    if not gaps:
        return None
    return f"median {statistics.median(gaps):.2f} s, worst {max(gaps):.2f} s"


def _judge_failover(results: Results) -> list[str]:
    gaps = results.failover_s.get("dengine", [])
    measured, etcd = _gaps(gaps), _gaps(results.failover_s.get("etcd"))
    met = bool(gaps) and statistics.median(gaps) <= 1.5 and max(gaps) <= 2.5
    if measured and etcd:
        measured += f"; etcd {etcd}"
    must = "median <= 1.5 s, worst <= 2.5 s"
    return _judge("kill -9 of the leader to the next acknowledged write", must, measured, met)


def verdict_table(results: Results) -> str:
    """Each target (bench/README.md) with what this run measured."""
    large = results.large_state
    rows = [
        _judge_ratio(results, Load.PUT, 64, "baseline", 0.45),
        _judge_ratio(results, Load.PUT, 64, "etcd", 2.0),
        _judge_ratio(results, Load.GET_LINEARIZABLE, 64, "baseline", 0.5),
        _judge_ratio(results, Load.GET_LINEARIZABLE, 64, "etcd", 2.0),
        _judge_one_put(results),
        _judge_ratio(results, Load.TXN, 64, "etcd", 3.0),
        _judge_growth("writes failed while 1 grows to 3 under load", results.growth),
        _judge_failover(results),
        *_judge_snapshot(large),
        _judge_growth("writes failed while 1 grows to 3 by snapshots", large and large.growth),
        _judge_join(large),
        _judge_memory(results.many_keys),
        _judge_idle_watchers(results.watched),
    ]
    return _table(["measure", "must", "measured", "verdict"], rows, left=4)


def _seen_row(when: str, seen: Seen) -> list[str]:
    figures = (seen.p50_ms, seen.p99_ms, seen.max_ms)
    stalls = (seen.stall_p50_ms, seen.stall_p99_ms, seen.stall_max_ms)
    return [
        when,
        f"{seen.seconds:.0f}",
        f"{seen.ops_per_s:.0f}",
        *(f"{figure:.1f}" for figure in (*figures, *stalls)),
        str(seen.failed),
    ]


def snapshot_table(large: LargeState) -> str:
    """PUT and the loop's stalls before, during and after a snapshot."""
    header = ["snapshot", "s", "ops/s", "p50 ms", "p99 ms", "max ms"]
    header += ["stall p50", "stall p99", "stall max", "failed"]
    rounds = (("before", large.before), ("during", large.during), ("after", large.after))
    return _table(header, [_seen_row(when, seen) for when, seen in rounds if seen], left=1)


def _large_lines(large: LargeState) -> list[str]:
    mib = large.file_bytes / 2**20
    lines = [
        f"- large state: {large.state_bytes / 2**20:.0f} MiB of values of 64 KiB, written over "
        f"HTTP in {large.load_s:.1f} s; snapshot file {mib:.0f} MiB"
    ]
    if large.growth is not None:
        lines.append(
            f"- growth 1 to 3 by snapshots: {large.growth.acknowledged} writes acknowledged, "
            f"{len(large.growth.failures)} failed, longest {large.growth.longest_ms:.0f} ms; three "
            f"voters after {large.growth.three_voters_after_s:.1f} s"
        )
        lines += [f"  - failed: {failure}" for failure in large.growth.failures[:10]]
    lines += [
        f"  - node {each.node}: received in {each.received_s:.1f} s "
        f"({mib / max(each.received_s, 0.001):.0f} MiB/s, two transfers at once), "
        f"verified, unpacked and installed after {each.installed_s:.1f} s"
        for each in large.transfers
    ]
    if large.copy_s:
        lines.append(
            f"  - beside it, cp + fsync of the same file on the same disk: {large.copy_s:.1f} s "
            f"({mib / large.copy_s:.0f} MiB/s)"
        )
    if large.take_s:
        lines.append(f"- snapshot under load: verified and durable after {large.take_s:.1f} s")
    return lines


def _keys_lines(many: ManyKeys) -> list[str]:
    lines = [
        f"- {many.keys} keys with values of {many.value_bytes} bytes, written with the node's own "
        f"stores in {many.build_s:.1f} s; bytes per key: state {many.state_bytes_per_key:.0f}, "
        f"log {many.log_bytes_per_key:.0f}, snapshot {many.snapshot_bytes_per_key:.0f}",
        f"- resident MiB (and of that not pages of mapped files): idle {_mib(many.idle_mib)}, "
        f"with all keys {_mib(many.full_mib)}",
    ]
    if many.rebuilt_s:
        lines.append(
            f"- restart until ready, log of {many.log_entries} entries: after a clean stop "
            f"{many.clean_s:.1f} s, after kill -9 {many.killed_s:.1f} s, after a machine stop "
            f"(rebuilt from the snapshot and about {many.entries_after} entries) "
            f"{many.rebuilt_s:.1f} s"
        )
    return lines


def _watched_line(watched: Watched) -> str:
    peak_mib = max(watched.during_mib)
    return (
        f"- {watched.watchers} watchers on the leader, {watched.stalled} of which take nothing: "
        f"{watched.changes} changes of 1 KiB, {watched.events} events delivered to the others, p50 "
        f"{watched.p50_ms:.1f} ms, p99 {watched.p99_ms:.1f} ms, longest {watched.max_ms:.1f} ms "
        "from before the PUT; those who took nothing, of 64 KiB each time, were dropped after "
        f"{watched.dropped_s:.0f} s; resident {watched.before_mib:.0f} MiB before, at most "
        f"{peak_mib:.0f} MiB"
    )


def size_table(sizes: Sequence[Sized]) -> str:
    """PUT, GET and a listing by pages of 1000, by the number of keys that there are."""
    header = ["keys", "PUT/s", "p99 ms", "GET/s", "p99 ms", "listed", "s", "page ms"]
    rows = [
        [
            str(each.keys),
            f"{each.put.ops_per_s:.0f}",
            f"{each.put.p99_ms:.1f}",
            f"{each.get.ops_per_s:.0f}",
            f"{each.get.p99_ms:.1f}",
            str(each.listed),
            f"{each.list_s:.2f}",
            f"{statistics.median(each.pages_ms):.1f}",
        ]
        for each in sizes
        if each.put is not None and each.get is not None and each.pages_ms
    ]
    return _table(header, rows, left=0)


def _mib(sizes: tuple[float, float]) -> str:
    return f"{sizes[0]:.0f} ({sizes[1]:.0f})"


def _drill_lines(results: Results) -> list[str]:
    lines = [
        f"- failover, {name}: {len(gaps)} rounds, {_gaps(gaps)}; each: "
        + " ".join(f"{gap:.2f}" for gap in gaps)
        for name, gaps in results.failover_s.items()
    ]
    growth = results.growth
    if growth is not None:
        lines.append(
            f"- growth 1 to 3: {growth.acknowledged} writes acknowledged, {len(growth.failures)} "
            f"failed, longest {growth.longest_ms:.0f} ms; three voters after "
            f"{growth.three_voters_after_s:.1f} s"
        )
        lines += [f"  - failed: {failure}" for failure in growth.failures[:10]]
    if results.large_state is not None:
        lines += _large_lines(results.large_state)
    if results.many_keys is not None:
        lines += _keys_lines(results.many_keys)
    if results.watched is not None and results.watched.events:
        lines.append(_watched_line(results.watched))
    return lines


def markdown(results: Results) -> str:
    """The whole report; readable as it is in a terminal."""
    facts = [f"- {name}: {value}" for name, value in (results.machine | results.options).items()]
    broken = [f"- BROKEN: {message}" for message in results.broken]
    parts = ["# Benchmark", "\n".join(facts)]
    if any(case.rounds for case in results.cases):
        parts += [load_table(results), NOTES, _quiet_line(results)]
    if drills := _drill_lines(results):
        parts.append("\n".join(drills))
    if results.large_state is not None and results.large_state.before is not None:
        parts += [snapshot_table(results.large_state), SNAPSHOT_NOTES]
    if results.sizes:
        parts += [size_table(results.sizes), SIZE_NOTES]
    parts.append(verdict_table(results))
    if broken:
        parts.append("\n".join(broken))
    return "\n\n".join(parts) + "\n"


NOTES = (
    "Medians over the rounds; a ratio is the median of the ratios of rounds that ran one after "
    "the other. All load goes to the leader; per node, the leader comes first, CPU in percent of "
    "one core. etcd through its JSON gateway: beside GET eventual its serializable range, beside "
    "GET lease its linearizable one (it has no lease reads)."
)


SIZE_NOTES = (
    "One node alone with that many keys of 256 bytes, 64 connections; PUT and GET linearizable "
    "over all of them. The listing takes pages of 1000 one after the other, values included."
)


SNAPSHOT_NOTES = (
    "PUT at full rate over 64 connections to the leader of three nodes; the snapshot is the "
    "leader's. stall: milliseconds that GET /livez took on a connection of its own, asked for "
    "every 5 ms from outside. It is answered from memory, so it takes as long as the event loop "
    "(or the process, for a core) lets it wait."
)


def save(results: Results, directory: Path) -> None:
    """Write latest.md and latest.json, the latter with every round."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "latest.md").write_text(markdown(results), "utf-8")
    text = json.dumps(dataclasses.asdict(results), indent=1)
    (directory / "latest.json").write_text(text + "\n", "utf-8")
