"""Clients of a lab, a process inside its network: `python -m tests.lab.load SECRETS ENDPOINT...`.

Four writers, of two connections each, write to every node that is ready, and a watch follows the
membership. Each line on stdin begins a new phase with that name; the end of stdin ends the run. On
stdout: one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from examples.ansible.load import Clients, Watch, Writer

WRITERS, CONNECTIONS = 4, 2
KEPT = 50  # of what each connection wrote, for a look whether it is there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--patience-s", type=float, default=0.0, help="how long a write may try node after node"
    )
    parser.add_argument("--per-second", type=int, required=True, help="at most, of each writer")
    parser.add_argument("secrets", type=Path)
    parser.add_argument("endpoints", nargs="+")
    args = parser.parse_args()
    clients = Clients(args.endpoints, args.secrets)
    watch = Watch(clients, args.endpoints[0])
    per_second = args.per_second / CONNECTIONS
    names = [f"w{i}{chr(97 + j)}" for i in range(WRITERS) for j in range(CONNECTIONS)]
    writers = [Writer(clients, name, per_second, args.patience_s) for name in names]
    for thread in (watch, *writers):
        thread.start()
    phases = [("start", time.monotonic(), [0] * len(writers))]
    for line in sys.stdin:
        phases.append((line.strip(), time.monotonic(), [len(w.latencies_ms) for w in writers]))
    phases.append(("", time.monotonic(), [len(w.latencies_ms) for w in writers]))
    clients.stopping.set()
    for writer in writers:
        writer.join(20)
    found = {}
    for (name, began, low), (_, ended, high) in itertools.pairwise(phases):
        spans = [w.latencies_ms[a:b] for w, a, b in zip(writers, low, high, strict=True)]
        counts = list(map(len, spans))
        by_writer = [sum(counts[i : i + CONNECTIONS]) for i in range(0, len(counts), CONNECTIONS)]
        latencies = sorted(ms for span in spans for ms in span)
        found[name] = {
            "seconds": ended - began,
            "writes": len(latencies),
            "least_per_s": min(by_writer) / (ended - began),
            "p50_ms": percentile(latencies, 0.5),
            "p99_ms": percentile(latencies, 0.99),
            "max_ms": percentile(latencies, 1.0),
        }
    answer = {
        "phases": found,
        "failures": [failure for w in writers for failure in w.failures],
        "retries": by_endpoint(writers),
        "acknowledged": sum(len(w.acknowledged) for w in writers),
        "kept": dict(pair for w in writers for pair in evenly(sorted(w.acknowledged.items()))),
        "last": dict(max(w.acknowledged.items()) for w in writers if w.acknowledged),
        "voters": watch.voters(),
        "ready": clients.ready,
    }
    print(json.dumps(answer))


def by_endpoint(writers: Sequence[Writer]) -> dict[str, Counter[str]]:
    """How often they tried again, by the endpoint that was left for another and the reason."""
    found: dict[str, Counter[str]] = {}
    for writer in writers:
        for (endpoint, reason), count in writer.retries.items():
            found.setdefault(endpoint, Counter())[reason] += count
    return found


def evenly(pairs: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    """All of them, or `KEPT` in equal steps up to the last one."""
    count = min(len(pairs), KEPT)
    return [pairs[len(pairs) * i // count - 1] for i in range(1, count + 1)]


def percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


if __name__ == "__main__":
    main()
