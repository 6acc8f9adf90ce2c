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
from systems import Load

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


def _judge_growth(results: Results) -> list[str]:
    growth, measured = results.growth, None
    if growth is not None:
        measured = f"{len(growth.failures)} of {growth.acknowledged + len(growth.failures)}"
    met = growth is not None and not growth.failures and growth.acknowledged > 0
    return _judge("writes failed while 1 grows to 3 under load", "0", measured, met)


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
    """Each target of the design with what this run measured."""
    rows = [
        _judge_ratio(results, Load.PUT, 64, "baseline", 0.45),
        _judge_ratio(results, Load.PUT, 64, "etcd", 2.0),
        _judge_ratio(results, Load.GET_LINEARIZABLE, 64, "baseline", 0.5),
        _judge_ratio(results, Load.GET_LINEARIZABLE, 64, "etcd", 2.0),
        _judge_one_put(results),
        _judge_growth(results),
        _judge_failover(results),
    ]
    return _table(["measure", "must", "measured", "verdict"], rows, left=4)


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


def save(results: Results, directory: Path) -> None:
    """Write latest.md and latest.json, the latter with every round."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "latest.md").write_text(markdown(results), "utf-8")
    text = json.dumps(dataclasses.asdict(results), indent=1)
    (directory / "latest.json").write_text(text + "\n", "utf-8")
