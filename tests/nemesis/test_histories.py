"""Both judges of histories, on what clients of a simulated register have seen."""

from __future__ import annotations

import heapq
import random
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.linearizability.checker import FOREVER, Operation
from tests.nemesis import histories
from tests.nemesis.histories import (
    SEARCHED_OPERATIONS,
    SEARCHED_UNKNOWN,
    Contradiction,
    contradictions,
    search,
)
from tests.nemesis.workload import CLIENTS, Records


def seen(seed: int, count: int, unknown: int = 0) -> list[Operation]:
    """What clients of one key have seen, which took effect at one moment each; so many of the
    changes were never answered, and half of these did not happen."""
    rng = random.Random(seed)
    free = [(rng.random(), client) for client in range(CLIENTS)]
    known: dict[int, int | None] = dict.fromkeys(range(CLIENTS))
    calls = []  # (effect, called, returned, client, name)
    for _ in range(count):
        called, client = heapq.heappop(free)
        effect = called + rng.expovariate(2)
        returned = effect + rng.expovariate(2)
        heapq.heappush(free, (returned + rng.expovariate(1), client))
        name = rng.choice(("read", "read", "write", "cas"))
        calls.append((effect, called, returned, client, name))
    changes = [call for call in calls if call[4] != "read"]
    lost = set(rng.sample(changes, min(unknown, len(changes))))
    revision, version, value = 7, 0, None
    found = []
    for number, call in enumerate(sorted(calls)):
        _, called, returned, client, name = call
        revision += rng.randrange(4)  # by changes of other keys
        expected, new = known[client], f"v{number}"
        if call in lost and rng.random() < 0.5:
            argument = new if name == "write" else (expected, new)
            found.append(Operation(client, called, FOREVER, name, argument))
            continue
        if name == "read":
            argument, result = None, (version, value)
            known[client] = version or None
        elif name == "write" or expected == (version or None):
            argument = new if name == "write" else (expected, new)
            revision += 1
            version = result = known[client] = revision
            value = new
        else:
            argument, result = (expected, new), ("is", version or None)
            known[client] = None
        if call in lost:
            returned, result, known[client] = FOREVER, None, None
        found.append(Operation(client, called, returned, name, argument, result))
    return found


def recorded(history: list[Operation]) -> Records:
    records = Records()
    records.history["r/0"] = history
    return records


def stale(history: list[Operation]) -> list[Operation]:
    """The same, and one more read after all of it that shows what was there half way."""
    reads = [op for op in history if op.name == "read" and op.result[1] is not None]
    end = max(op.returned for op in history if op.returned != FOREVER)
    old = sorted(reads, key=lambda op: op.called)[len(reads) // 2]
    return [*history, Operation(99, end + 1, end + 2, "read", None, old.result)]


@pytest.mark.parametrize("unknown", [0, 3, SEARCHED_UNKNOWN])
def test_both_judges_pass_a_sound_history(unknown: int) -> None:
    for seed in range(10):
        history = seen(seed, 150, unknown)
        assert contradictions(recorded(history)) == [], f"seed {seed}"
        searched = search({"r/0": history})
        assert (searched.contradictions, searched.problems) == ([], []), f"seed {seed}"
        assert (searched.keys, searched.left_out) == (1, [])


@pytest.mark.parametrize("unknown", [0, 3])
def test_both_judges_find_one_stale_read(unknown: int) -> None:
    """Neither needs the other."""
    for seed in range(10):
        history = stale(seen(seed, 150, unknown))
        assert contradictions(recorded(history)), f"seed {seed}"
        assert search({"r/0": history}).contradictions, f"seed {seed}"


def test_the_search_also_finds_a_lie_about_the_revision() -> None:
    """Somebody is told a revision for a value that has another one: the exact judge takes it for
    the order, the search for an answer like any other."""
    history = [
        Operation(0, 0, 1, "write", "a", 5),
        Operation(1, 2, 3, "write", "b", 6),
        Operation(2, 4, 5, "read", None, (7, "b")),
    ]
    assert contradictions(recorded(history))
    assert search({"r/0": history}).contradictions


def test_the_largest_history_that_is_searched_takes_no_time() -> None:
    """Else the limits would have to be lower: a run has dozens of such keys."""
    began = time.process_time()
    history = seen(3, SEARCHED_OPERATIONS, SEARCHED_UNKNOWN)
    searched = search({"r/0": history})
    assert searched.keys == 1
    assert searched.problems == searched.contradictions == []
    assert time.process_time() - began < 5


def test_what_is_too_large_for_the_search_is_said() -> None:
    """It is left to the exact judge, and the report says how much was not searched."""
    long = seen(1, SEARCHED_OPERATIONS + 1)
    doubtful = seen(2, 200, SEARCHED_UNKNOWN + 1)
    searched = search({"r/0": long, "r/1": doubtful, "r/2": seen(3, 20)})
    assert searched.left_out == ["r/0", "r/1"]
    assert (searched.keys, searched.operations) == (1, 20)


def test_no_verdict_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that runs out of time is a finding of the run."""
    monkeypatch.setattr(histories, "SEARCHED_OPERATIONS", 10_000)
    searched = search({"r/0": seen(1, 5000)}, limit_s=0.0)
    assert "no verdict" in searched.problems[0]
    assert "5000 operations" in searched.problems[0]


def test_a_contradiction_is_drawn(tmp_path: Path) -> None:
    """As an SVG that a browser shows: every operation is in it, long values are cut."""
    long = "x" * 5000
    window = (
        Operation(0, 0, 1, "write", "a", 5),
        Operation(1, 2, FOREVER, "cas", (5, long)),
        Operation(2, 4, 5, "read", None, (0, None)),
    )
    contradiction = Contradiction("r/0", "revision", window)
    first, second = contradiction.draw(tmp_path), contradiction.draw(tmp_path)
    assert first.name == "contradiction-r-0.svg"
    assert second != first
    tree = ET.parse(first)
    assert tree.getroot().tag.endswith("svg")
    drawn = first.read_text(encoding="utf-8")
    assert all(client in drawn for client in ("client 0", "client 1", "client 2"))
    assert long not in drawn
    assert long not in str(contradiction)
    assert "key r/0 is not linearizable, by revision" in str(contradiction)
