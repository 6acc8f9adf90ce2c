"""Clients of a lab, a process inside its network: `python -m tests.lab.load SECRETS ENDPOINT...`.

Four writers write to every node that is ready, and a watch follows the membership. With the word
`patient` first, a writer that is told 503 tries the next node. Each line on
stdin begins a new phase with that name; the end of stdin ends the run. On stdout: one JSON object.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

from examples.ansible.load import Clients, Watch, Writer

WRITERS, PER_SECOND = 4, 250  # at most: at 4 ms each a writer has no time for more
PATIENCE_S = 5.0


def main(secrets: str, endpoints: list[str], patience_s: float) -> None:
    clients = Clients(endpoints, Path(secrets))
    watch = Watch(clients, endpoints[0])
    writers = [Writer(clients, f"w{i}", PER_SECOND, patience_s) for i in range(WRITERS)]
    for thread in (watch, *writers):
        thread.start()
    phases = [("start", time.monotonic(), [0] * WRITERS)]
    for line in sys.stdin:
        phases.append((line.strip(), time.monotonic(), [len(w.latencies_ms) for w in writers]))
    phases.append(("", time.monotonic(), [len(w.latencies_ms) for w in writers]))
    clients.stopping.set()
    for writer in writers:
        writer.join(20)
    found = {}
    for (name, began, low), (_, ended, high) in itertools.pairwise(phases):
        spans = (w.latencies_ms[a:b] for w, a, b in zip(writers, low, high, strict=True))
        latencies = sorted(ms for span in spans for ms in span)
        found[name] = {
            "seconds": ended - began,
            "writes": len(latencies),
            "p50_ms": percentile(latencies, 0.5),
            "p99_ms": percentile(latencies, 0.99),
            "max_ms": percentile(latencies, 1.0),
        }
    answer = {
        "phases": found,
        "failures": [failure for w in writers for failure in w.failures],
        "retries": sum(w.retries for w in writers),
        "last": dict(max(w.acknowledged.items()) for w in writers if w.acknowledged),
        "voters": watch.voters(),
        "ready": clients.ready,
    }
    print(json.dumps(answer))


def percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    patient = arguments[0] == "patient"
    main(arguments[patient], arguments[patient + 1 :], PATIENCE_S if patient else 0.0)
