"""The report of a run as Markdown. Pure; the JSON is the same dictionary."""

from __future__ import annotations

import itertools
from typing import Any


def markdown(report: dict[str, Any]) -> str:
    """What happened, for a person."""
    lines = [f"# {report['title']}", "", report["verdict"], ""]
    lines += [f"- {name}: {value}" for name, value in report.get("facts", {}).items()]
    if report.get("members"):
        lines += ["", "## Members", ""]
        lines += _table(
            ["node", "address", "zone", "role", "status", "behind"],
            [
                [m["id"], m["address"], m["zone"], m["role"], m["status"], m["lag"]]
                for m in sorted(report["members"], key=lambda m: m["id"])
            ],
        )
    if report.get("phases"):
        lines += ["", "## Time", ""]
        lines += _table(
            ["phase", "seconds"], [[p["name"], f"{p['seconds']:.1f}"] for p in report["phases"]]
        )
    if report.get("preflight"):
        lines += ["", "## Preflight", ""]
        lines += _table(
            ["host", "check", "status", "measured", "limit"],
            [
                [r["host"], r["check"], r["status"], r["measured"], r["limit"]]
                for r in report["preflight"]
            ],
        )
    if report.get("problems"):
        lines += ["", "## Problems", ""]
        lines += [f"- {p}" for p in report["problems"]]
    return "\n".join(lines) + "\n"


def phases(marks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds of each phase from marks {name, at} that stand at the phases' ends."""
    return [
        {"name": now["name"], "seconds": round(now["at"] - before["at"], 1)}
        for before, now in itertools.pairwise(marks)
    ]


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    def line(cells: list[Any]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"

    return [line(head), line(["---"] * len(head)), *(line(r) for r in rows)]
