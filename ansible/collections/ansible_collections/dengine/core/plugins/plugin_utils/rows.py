"""The one table of what was checked: a row has host, check, status, measured, limit, hint.

The hint is what to do next. Pure functions.
"""

from __future__ import annotations

import hashlib
from typing import Any

Row = dict[str, Any]


def row(host: str, check: str, measured: str, hint: str, limit: str = "") -> Row:
    return {
        "host": host,
        "check": check,
        "status": "FAILED",
        "measured": measured,
        "limit": limit,
        "hint": hint,
    }


def host_rows(
    found: dict[str, list[Row]],
    nodes: list[dict[str, Any]] | None = None,
    ways: dict[str, dict[str, Any]] | None = None,
) -> list[Row]:
    """The rows of `dengine_probe` by host, as rows of the one table.

    Rules of a firewall are hard to read: where all others have reached a host, as `ways` says, it
    lets them in.
    """
    reached = {n["host"] for n in nodes or [] if _is_reached(n["endpoint"], ways or {})}
    return [
        {**r, "status": "ok", "measured": f"{r['measured']}; the others reach it", "hint": ""}
        if r["check"] == "firewall" and r["status"] == "FAILED" and r["host"] in reached
        else r
        for r in ({"host": host, **r} for host, rows in found.items() for r in rows)
    ]


def _is_reached(endpoint: str, ways: dict[str, dict[str, Any]]) -> bool:
    tries = [way[endpoint] for way in ways.values() if endpoint in way]
    return bool(tries) and not any(way["error"] for way in tries)


def way_rows(
    nodes: list[dict[str, Any]], ways: dict[str, dict[str, Any]], limits: dict[str, Any]
) -> list[Row]:
    """A row per host and check `connect`, `rtt`, `clock_offset`: its way to the others."""
    rows = []
    by_endpoint = {n["endpoint"]: n["host"] for n in nodes}
    for host, found in ways.items():
        rtts: list[tuple[float, str]] = []
        offsets: list[tuple[float, str]] = []
        broken = []
        for endpoint, way in found.items():
            other = by_endpoint[endpoint]
            if way["error"]:
                broken.append(f"{other} ({endpoint}) {way['error']}")
                continue
            rtts.append((way["rtt_ms"], other))
            if way["offset_ms"] is not None:
                offsets.append((abs(way["offset_ms"]), other))
        rows.append(
            _judged(
                host,
                "connect",
                not broken,
                "; ".join(broken) or f"reaches {len(found)}",
                "TCP to every other node",
                "open the port in the firewall of the other host, and on the network between",
            )
        )
        for name, values, limit in (
            ("rtt", rtts, float(limits["rtt_ms"])),
            ("clock_offset", offsets, float(limits["clock_offset_ms"])),
        ):
            if values:
                worst, other = max(values)
                rows.append(
                    _judged(
                        host,
                        name,
                        worst <= limit,
                        f"{worst:g} ms to {other}",
                        f"{limit:g} ms",
                        "place the nodes nearer to each other"
                        if name == "rtt"
                        else "synchronize the clocks of both hosts",
                    )
                )
    return rows


def release_rows(releases: dict[str, str], coming: str) -> list[Row]:
    """A row for each host whose release would be another than the first one's.

    Args:
        releases: by host, in order of node id, the directory of the release in use, or "".
        coming: version that a host without one gets, or "" where that is not known yet.
    """
    versions = {
        host: path.rpartition("/")[2].partition("-")[0] if path else ""
        for host, path in releases.items()
    }
    first = next((host for host, version in versions.items() if version), "")
    if not first:
        return []
    limit = versions[first]
    rows = []
    for host, version in versions.items():
        if not (version or coming):
            continue
        new = "" if version else "would get "
        rows.append(
            _judged(
                host,
                "release",
                (version or coming) == limit,
                f"{new}{version or coming}",
                f"{limit}, as on {first}",
                f"run this from a checkout of version {limit}: one cluster, one release",
            )
        )
    return rows


def _judged(host: str, check: str, ok: bool, measured: str, limit: str, hint: str) -> Row:
    return {
        "host": host,
        "check": check,
        "status": "ok" if ok else "FAILED",
        "measured": measured,
        "limit": limit,
        "hint": "" if ok else hint,
    }


def secret_rows(
    found: dict[str, list[str]], wanted: list[str], facts: dict[str, dict[str, Any]]
) -> list[Row]:
    """A row for each host whose node has secrets: are they those of this run?

    Installing others would change nothing at once, for a node reads them when it starts: the first
    one to be restarted would then be alone, and the second would cost the quorum. Where no node
    runs and none ever did, nobody has read what lies there.

    Args:
        found: by host, SHA-256 of the files peer_secret and token, "" where there is none.
        wanted: the peer secret and the token that this run would install, each as a line.
        facts: by host, what `dengine_probe` says.
    """
    rows = []
    ours = [hashlib.sha256(f"{secret}\n".encode()).hexdigest() for secret in wanted]
    for host, digests in found.items():
        in_use = facts[host].get("process") or facts[host].get("identity")
        if not (any(digests) and in_use):
            continue
        pairs = zip(("peer_secret", "token"), digests, ours, strict=True)
        others = [name for name, there, here in pairs if there and there != here]
        rows.append(
            _judged(
                host,
                "secrets",
                not others,
                f"another {' and '.join(others)}" if others else "those of this run",
                "those of this run",
                "take back the change in the vault or secrets file: members with different secrets "
                "do not speak with each other; or stop all nodes and replace the files on all "
                "hosts (docs/operations.md, Secrets)",
            )
        )
    return rows


def security_rows(facts: dict[str, dict[str, Any]], wanted: bool) -> list[Row]:
    """A row for each host whose node runs: has it secrets, or none, as this run would have it?

    As with secrets: a file that says otherwise would change nothing at once, and each node that is
    restarted with it would speak with no other.

    Args:
        facts: by host, what `dengine_probe` says.
        wanted: is [security] to be in the configuration?
    """
    words = {True: "with [security]", False: "without [security]"}
    return [
        _judged(
            host,
            "security",
            found["security"] == wanted,
            words[found["security"]],
            words[wanted],
            "take dengine_security_enabled back; or all nodes at once: stop all, then expand.yml "
            '(docs/operations.md, "To change a secret")',
        )
        for host, found in facts.items()
        if found.get("process") and found.get("security") is not None
    ]


def skipping(rows: list[Row], skip: list[str]) -> list[Row]:
    """The same rows; a failure whose check is named in `skip` counts no more, and says so."""
    return [
        {**r, "status": "skipped"} if r["status"] == "FAILED" and r["check"] in skip else r
        for r in rows
    ]


def verdict(rows: list[Row]) -> list[str]:
    """What a person wants to read when nothing failed."""
    passed = [r for r in rows if r["status"] == "ok"]
    hosts = {r["host"] for r in rows}
    lines = [f"{len(passed)} checks passed on {len(hosts)} hosts"]
    return lines + [
        f"skipped by name: {r['check']} on {r['host']} ({r['measured']})"
        for r in rows
        if r["status"] == "skipped"
    ]


def failures(rows: list[Row]) -> list[Row]:
    return [r for r in rows if r["status"] == "FAILED"]


def table(rows: list[Row]) -> list[str]:
    """The rows as lines of text with aligned columns; hints stand below their row. Or nothing."""
    if not rows:
        return []
    names = ("host", "check", "status", "measured", "limit")
    cells = [[str(r.get(n, "")) for n in names] for r in rows]
    widths = [max(len(c) for c in column) for column in zip(names, *cells, strict=True)]
    lines = ["  ".join(n.ljust(w) for n, w in zip(names, widths, strict=True)).rstrip()]
    for cell, source in zip(cells, rows, strict=True):
        lines.append("  ".join(c.ljust(w) for c, w in zip(cell, widths, strict=True)).rstrip())
        if source.get("hint") and source["status"] == "FAILED":
            lines.append(f"    -> {source['hint']}")
    return lines
