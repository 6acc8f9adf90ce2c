"""An illegal window for people: as text, and as an SVG timeline with a row per client."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from tests.linearizability.checker import FOREVER, Operation

ROW, LEFT, WIDTH, TOP = 34, 90, 1000, 40
COLOURS = {"read": "#4c78a8", "write": "#e45756", "cas": "#f2a13c", "delete": "#8a6fb0"}


def describe(op: Operation) -> str:
    """ "write(3)", "read -> 4", "cas((1, 2)) -> unknown"."""
    argument = "" if op.argument is None else f"({op.argument!r})"
    result = "unknown" if op.returned == FOREVER else repr(op.result)
    return f"{op.name}{argument} -> {result}"


def as_text(window: Sequence[Operation]) -> str:
    """One line per operation, in order of call, with its time span."""
    lines = [
        f"  client {op.client:>3}  {op.called:>12g} .. "
        f"{'never' if op.returned == FOREVER else format(op.returned, '12g'):>12}  {describe(op)}"
        for op in sorted(window, key=lambda op: op.called)
    ]
    return "\n".join(["no order of these operations explains their results:", *lines])


def write_svg(window: Sequence[Operation], path: Path, title: str = "") -> None:
    """Draw the window: a bar from call to return, open-ended when the outcome is unknown."""
    clients = sorted({op.client for op in window})
    start = min(op.called for op in window)
    known = [op.returned for op in window if op.returned != FOREVER] + [op.called for op in window]
    span = max(known) - start or 1

    def x(moment: float) -> float:
        return LEFT + WIDTH * 0.92 * (min(moment, start + span * 1.05) - start) / span

    height = TOP + ROW * len(clients) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20">{escape(title)}</text>',
    ]
    for row, client in enumerate(clients):
        y = TOP + row * ROW
        parts.append(f'<text x="10" y="{y + 17}">client {client}</text>')
        parts.append(
            f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y + 28}" y2="{y + 28}" stroke="#ddd"/>'
        )
        for op in window:
            if op.client == client:
                parts.append(_bar(op, x(op.called), x(op.returned), y))
    path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def _bar(op: Operation, left: float, right: float, y: float) -> str:
    width = max(right - left, 4)
    dash = ' stroke-dasharray="4 3"' if op.returned == FOREVER else ""
    colour = COLOURS.get(op.name, "#777")
    return (
        f'<rect x="{left:.1f}" y="{y + 2}" width="{width:.1f}" height="22" rx="3" '
        f'fill="{colour}" fill-opacity="0.25" stroke="{colour}"{dash}/>'
        f'<text x="{left + 4:.1f}" y="{y + 17}">{escape(describe(op))}</text>'
    )
