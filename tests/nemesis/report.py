"""What the runs have come to: a table for people, JSON, and a picture of each run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tests.nemesis.trial import Outcome

HEADINGS = (
    *("seed", "shape", "links", "verdict", "operations", "acknowledged", "unknown", "load"),
    *("longest gap", "leader after", "starts", "memory", "files", "faults"),
)
BUCKET_S = 0.5
LEFT, WIDTH, TOP, HEIGHT, LANE = 60, 1000, 50, 180, 20
COLOURS = ("#e45756", "#f2a13c", "#8a6fb0", "#54a24b", "#b279a2", "#9d755d", "#4c78a8", "#72b7b2")


def write(outcomes: Sequence[Outcome], directory: Path) -> Path:
    """Write report.md, report.json and run-SEED.svg; returns the first."""
    directory.mkdir(parents=True, exist_ok=True)
    for outcome in outcomes:
        picture(outcome, directory / f"run-{outcome.plan.seed}.svg")
    rows = json.dumps([_facts(outcome) for outcome in outcomes], indent=1)
    (directory / "report.json").write_text(rows + "\n", encoding="utf-8")
    report = directory / "report.md"
    report.write_text(as_text(outcomes), encoding="utf-8")
    return report


def as_text(outcomes: Sequence[Outcome]) -> str:
    failed = [outcome for outcome in outcomes if outcome.problems]
    total_s = sum(outcome.load_s for outcome in outcomes)
    operations = sum(outcome.operations for outcome in outcomes)
    counts = sum((Counter(outcome.faults) for outcome in outcomes), Counter[str]())
    lines = [
        f"# Nemesis: {len(outcomes)} runs, {len(failed)} failed",
        "",
        f"{total_s / 60:.1f} minutes under load, {operations} operations.",
        "",
        *_table([HEADINGS, *(_row(outcome) for outcome in outcomes)]),
        "",
        "Faults: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) + ".",
    ]
    for outcome in outcomes:
        if outcome.problems or outcome.exits or outcome.lacking:
            lines += ["", f"## Seed {outcome.plan.seed}", "", "```", outcome.plan.describe(), "```"]
            lines += ["", *(f"- FAILED: {problem}" for problem in outcome.problems)]
            lines += [f"- {text}" for text in (*outcome.lacking, *outcome.exits)]
    return "\n".join([*lines, ""])


def _row(outcome: Outcome) -> tuple[str, ...]:
    unknown = sum(outcome.counts.get(name, 0) for name in ("unanswered", "504"))
    return (
        str(outcome.plan.seed),
        outcome.plan.shape,
        "proxied" if outcome.plan.proxied else "direct",
        "FAILED" if outcome.problems else "ok",
        str(outcome.operations),
        str(len(outcome.acknowledged_at)),
        str(unknown),
        f"{outcome.load_s:.0f} s",
        f"{outcome.longest_gap_s:.1f} s",
        f"{outcome.leader_after_s:.1f} s",
        str(outcome.boots),
        f"{outcome.memory_bytes / 1e6:.0f} MB",
        str(outcome.descriptors),
        ", ".join(outcome.faults),
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _facts(outcome: Outcome) -> dict[str, object]:
    plan = outcome.plan
    return {
        "seed": plan.seed,
        "seconds": plan.seconds,
        "plan": plan.describe().splitlines(),
        "problems": outcome.problems,
        "exits": outcome.exits,
        "lacking": outcome.lacking,
        "operations": outcome.operations,
        "answers": outcome.counts,
        "acknowledged_writes": len(outcome.acknowledged_at),
        "faults": outcome.faults,
        "load_s": round(outcome.load_s, 3),
        "longest_gap_s": round(outcome.longest_gap_s, 3),
        "leader_after_s": round(outcome.leader_after_s, 3),
        "starts": outcome.boots,
        "memory_bytes": outcome.memory_bytes,
        "descriptors": outcome.descriptors,
        "bands": [
            {"began_s": round(b.began, 2), "ended_s": round(b.ended, 2), "fault": b.text}
            for b in outcome.bands
        ],
    }


def picture(outcome: Outcome, path: Path) -> None:
    """Acknowledged writes and reads per second over time, and below each fault as a bar whose
    shadow lies over the curves."""
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

    verdict = "FAILED" if outcome.problems else "ok"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="18" font-size="14">seed {outcome.plan.seed}, {outcome.plan.shape}: '
        f"{verdict}; {outcome.operations} operations</text>",
        '<text x="10" y="36" fill="#4c78a8">acknowledged writes per second</text>',
        '<text x="210" y="36" fill="#54a24b">reads per second</text>',
    ]
    for lane, band in zip(lanes, outcome.bands, strict=True):
        left, width = x(band.began), max(x(band.ended) - x(band.began), 2.0)
        y, colour = TOP + HEIGHT + 30 + lane * LANE, COLOURS[hash_of(band.text) % len(COLOURS)]
        parts += [
            f'<rect x="{left:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT}" '
            f'fill="{colour}" fill-opacity="0.12"/>',
            f'<rect x="{left:.1f}" y="{y}" width="{width:.1f}" height="{LANE - 5}" '
            f'fill="{colour}" fill-opacity="0.5"/>',
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
