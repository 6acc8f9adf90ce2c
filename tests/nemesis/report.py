"""What the runs have come to: a table for people, JSON, and a picture of each run.

Everything but the pictures is made of facts, one dictionary per run, which JSON can carry: so the
runs of several processes are reported together.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tests.nemesis.outcome import BROKEN_OFF, FAILED, OK, Outcome

Facts = dict[str, Any]

HEADINGS = (
    *("seed", "shape", "links", "verdict", "operations", "acknowledged", "unknown", "load"),
    *("longest gap", "leader after", "leader changes", "starts", "peak", "at rest", "faults"),
)
BUCKET_S = 0.5
LEFT, WIDTH, TOP, HEIGHT, LANE = 60, 1000, 50, 180, 20
COLOURS = ("#e45756", "#f2a13c", "#8a6fb0", "#54a24b", "#b279a2", "#9d755d", "#4c78a8", "#72b7b2")


def facts(outcome: Outcome) -> Facts:
    """Of one run. Times are seconds since its clients began."""
    plan, searched = outcome.plan, outcome.searched
    kinds = sorted({*outcome.drawn, *outcome.effective})
    return {
        "seed": plan.seed,
        "seconds": plan.seconds,
        "shape": plan.shape,
        "links": "proxied" if plan.proxied else "direct",
        "workloads": list(plan.workloads),
        "plan": plan.describe().splitlines(),
        "folder": str(outcome.folder),
        "verdict": outcome.verdict,
        "findings": outcome.problems,
        "broken_off": outcome.broken,
        "exits": outcome.exits,
        "lacking": outcome.lacking,
        "operations": outcome.operations,
        "answers": outcome.counts,
        "acknowledged_writes": len(outcome.acknowledged_at),
        "faults": {
            kind: {"drawn": outcome.drawn.get(kind, 0), "effective": outcome.effective.get(kind, 0)}
            for kind in kinds
        },
        "seen": outcome.seen,
        "besides": outcome.besides,
        "leader_changes": outcome.leader_changes,
        "load_s": round(outcome.load_s, 3),
        "longest_gap_s": round(outcome.longest_gap_s, 3),
        "leader_after_s": round(outcome.leader_after_s, 3),
        "starts": outcome.boots,
        "peak": outcome.peak._asdict(),
        "at_rest": outcome.rest._asdict(),
        "searched": {
            "keys": searched.keys,
            "operations": searched.operations,
            "left_out": searched.left_out,
        },
        "bands": [
            {
                "began_s": round(band.began, 2),
                "ended_s": round(band.ended, 2),
                "fault": band.text,
                "effective": band.effective,
            }
            for band in outcome.bands
        ],
    }


def summary(runs: Sequence[Facts]) -> Facts:
    """Of all runs together."""
    faults: dict[str, Counter[str]] = {}
    for run in runs:
        for kind, counts in run["faults"].items():
            faults.setdefault(kind, Counter({"drawn": 0, "effective": 0})).update(counts)
    besides: Counter[str] = Counter()
    for run in runs:
        besides.update(run["besides"])
    verdicts = Counter(run["verdict"] for run in runs)
    return {
        "runs": len(runs),
        "failed": verdicts[FAILED],
        "broken_off": verdicts[BROKEN_OFF],
        "minutes_under_load": round(sum(run["load_s"] for run in runs) / 60, 2),
        "operations": sum(run["operations"] for run in runs),
        "acknowledged_writes": sum(run["acknowledged_writes"] for run in runs),
        "besides": dict(besides),
        "faults": {kind: dict(counts) for kind, counts in sorted(faults.items())},
        "leader_changes": sum(run["leader_changes"] for run in runs),
        "searched_operations": sum(run["searched"]["operations"] for run in runs),
        "findings": [
            {"seed": run["seed"], "finding": finding} for run in runs for finding in run["findings"]
        ],
    }


def passed(runs: Sequence[Facts]) -> bool:
    """Nothing was found, and something was looked for."""
    return bool(runs) and all(run["verdict"] == OK for run in runs)


def write(runs: Sequence[Facts], directory: Path) -> Path:
    """Write report.md and report.json, whole or not at all; returns the first."""
    directory.mkdir(parents=True, exist_ok=True)
    whole = {"summary": summary(runs), "runs": list(runs)}
    _replace(directory / "report.json", json.dumps(whole, indent=1) + "\n")
    return _replace(directory / "report.md", as_text(runs))


def _replace(path: Path, text: str) -> Path:
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    return draft.rename(path)


def as_text(runs: Sequence[Facts]) -> str:
    """For people: the sums, the runs, the faults, and what went wrong."""
    total = summary(runs)
    lines = [
        f"# Nemesis: {total['runs']} runs, {total['failed']} failed"
        + (f", {total['broken_off']} broken off" if total["broken_off"] else ""),
        "",
        f"{total['minutes_under_load']:.1f} minutes under load, {total['operations']} operations, "
        f"{total['acknowledged_writes']} acknowledged writes, {total['leader_changes']} leader "
        f"changes, {len(total['findings'])} findings. {total['searched_operations']} operations "
        "were judged by the general search as well.",
        *_besides(total["besides"]),
        "",
        *_table([HEADINGS, *(_row(run) for run in runs)]),
        "",
        *_table([("fault", "drawn", "effective"), *_fault_rows(total["faults"])]),
    ]
    for run in runs:
        if run["verdict"] != OK or run["exits"] or run["lacking"]:
            lines += ["", f"## Seed {run['seed']}: {run['verdict']}", ""]
            lines += ["```", *run["plan"], "```", "", f"In {run['folder']}:", ""]
            lines += [f"- FAILED: {_indented(finding)}" for finding in run["findings"]]
            lines += [f"- broken off: {run['broken_off']}"] if run["broken_off"] else []
            lines += [f"- {_indented(text)}" for text in (*run["lacking"], *run["exits"])]
    return "\n".join([*lines, ""])


def _besides(counts: Mapping[str, int]) -> list[str]:
    """A paragraph on the workloads that not every plan asks for."""
    said = ", ".join(f"{count} {what}" for what, count in counts.items())
    return ["", f"Beside the registers and lists: {said}."] if said else []


def line(run: Facts) -> str:
    """One run in one line, for who looks on."""
    effective = sum(counts["effective"] for counts in run["faults"].values())
    drawn = sum(counts["drawn"] for counts in run["faults"].values())
    return (
        f"seed {run['seed']}: {run['verdict']}, {run['load_s']:.0f} s under load, "
        f"{run['operations']} operations, {run['acknowledged_writes']} acknowledged writes, "
        f"{drawn} faults ({effective} effective), {len(run['findings'])} findings"
    )


def _indented(text: str) -> str:
    """Of several lines, all of them belong to the item of a list."""
    return text.replace("\n", "\n  ")


def _fault_rows(faults: Mapping[str, Mapping[str, int]]) -> list[tuple[str, ...]]:
    rows = [(kind, str(n["drawn"]), str(n["effective"])) for kind, n in faults.items()]
    sums = [str(sum(n[what] for n in faults.values())) for what in ("drawn", "effective")]
    return [*rows, ("all", *sums)]


def _row(run: Facts) -> tuple[str, ...]:
    unknown = sum(run["answers"].get(name, 0) for name in ("unanswered", "504"))
    return (
        str(run["seed"]),
        run["shape"],
        run["links"],
        run["verdict"],
        str(run["operations"]),
        str(run["acknowledged_writes"]),
        str(unknown),
        f"{run['load_s']:.0f} s",
        f"{run['longest_gap_s']:.1f} s",
        f"{run['leader_after_s']:.1f} s",
        str(run["leader_changes"]),
        str(run["starts"]),
        _usage(run["peak"]),
        _usage(run["at_rest"]),
        ", ".join(f"{kind} {n['effective']}/{n['drawn']}" for kind, n in run["faults"].items()),
    )


def _usage(usage: Mapping[str, int]) -> str:
    return f"{usage['memory_bytes'] / 1e6:.0f} MB, {usage['descriptors']} files"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def picture(outcome: Outcome, path: Path) -> None:
    """Acknowledged writes and reads per second over time, and below each fault as a bar whose
    shadow lies over the curves; one without effect is hollow and casts none."""
    lanes = _lanes(outcome)
    end_s = max([outcome.load_s, BUCKET_S, *(band.ended for band in outcome.bands)])
    writes, reads = (_rates(t, end_s) for t in (outcome.acknowledged_at, outcome.read_at))
    top_rate = max([*writes, *reads, 1.0])
    height = TOP + HEIGHT + 40 + LANE * (max(lanes, default=-1) + 1)

    def x(moment_s: float) -> float:
        return LEFT + WIDTH * moment_s / end_s

    def curve(rates: Sequence[float], colour: str) -> str:
        points = " ".join(
            f"{x((number + 0.5) * BUCKET_S):.1f},{TOP + HEIGHT * (1 - rate / top_rate):.1f}"
            for number, rate in enumerate(rates)
        )
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="18" font-size="14">seed {outcome.plan.seed}, {outcome.plan.shape}: '
        f"{outcome.verdict}; {outcome.operations} operations</text>",
        '<text x="10" y="36" fill="#4c78a8">acknowledged writes per second</text>',
        '<text x="210" y="36" fill="#54a24b">reads per second</text>',
    ]
    for lane, band in zip(lanes, outcome.bands, strict=True):
        left, width = x(band.began), max(x(band.ended) - x(band.began), 2.0)
        y, colour = TOP + HEIGHT + 30 + lane * LANE, COLOURS[hash_of(band.text) % len(COLOURS)]
        if band.effective:
            parts.append(
                f'<rect x="{left:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT}" '
                f'fill="{colour}" fill-opacity="0.12"/>'
            )
        filled = 0.5 if band.effective else 0.0
        parts += [
            f'<rect x="{left:.1f}" y="{y}" width="{width:.1f}" height="{LANE - 5}" '
            f'fill="{colour}" fill-opacity="{filled}" stroke="{colour}" stroke-dasharray="3 2"/>',
            f'<text x="{left + 3:.1f}" y="{y + 11}">{escape(band.text)}</text>',
        ]
    parts += [curve(reads, "#54a24b"), curve(writes, "#4c78a8"), *_axes(end_s, top_rate)]
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def hash_of(text: str) -> int:
    """The same in every process, unlike hash()."""
    return sum(text.partition(":")[0].encode())


def _rates(moments: Sequence[float], end_s: float) -> list[float]:
    buckets = [0.0] * (int(end_s / BUCKET_S) + 1)
    for moment in moments:
        if 0 <= moment <= end_s:
            buckets[int(moment / BUCKET_S)] += 1 / BUCKET_S
    return buckets


def _lanes(outcome: Outcome) -> list[int]:
    """A lane for each band, in which no other label is in its way."""
    ends: list[float] = []
    found = []
    span_s = outcome.load_s or 1.0
    for band in outcome.bands:
        label_s = len(band.text) * 6 / WIDTH * span_s
        free = next((n for n, end in enumerate(ends) if end <= band.began), len(ends))
        if free == len(ends):
            ends.append(0.0)
        ends[free] = max(band.ended, band.began + label_s) + span_s / 200
        found.append(free)
    return found


def _axes(end_s: float, top_rate: float) -> list[str]:
    base = TOP + HEIGHT
    parts = [
        f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{base}" y2="{base}" stroke="#333"/>',
        f'<line x1="{LEFT}" x2="{LEFT}" y1="{TOP}" y2="{base}" stroke="#333"/>',
        f'<text x="{LEFT - 6}" y="{TOP + 8}" text-anchor="end">{top_rate:.0f}</text>',
        f'<text x="{LEFT - 6}" y="{base}" text-anchor="end">0</text>',
    ]
    every_s = max(5, round(end_s / 12 / 5) * 5)
    for moment_s in range(0, int(end_s) + 1, every_s):
        at = LEFT + WIDTH * moment_s / end_s
        parts.append(f'<text x="{at:.1f}" y="{base + 16}" text-anchor="middle">{moment_s} s</text>')
    return parts
