"""kill -9 at any instant, a disk that refuses, bits that flip anywhere: real processes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from dengine.raft.types import Entry, HardState, MemberId
from dengine.storage.log_store import LogStore
from dengine.storage.state_store import StateStore
from tests.kv.twin import Twin
from tests.storage.child import commands, digest, entry

CHILD = Path(__file__).with_name("child.py")
ROOT = CHILD.parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
DEADLINE_S = 60


def killed_at_random(rng: random.Random, *arguments: str) -> list[list[str]]:
    """Run the child, SIGKILL it at a random instant, return the words of every line it said."""
    child = subprocess.Popen(
        [sys.executable, str(CHILD), *arguments],
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
        text=True,
    )
    assert child.stdout is not None
    lines = []
    try:
        for _ in range(rng.randint(1, 60)):
            lines.append(child.stdout.readline())
        # The instant of the kill is what is drawn, not a wait for something.
        until = time.perf_counter() + rng.random() * 0.003
        while time.perf_counter() < until:
            pass
    finally:
        child.kill()
    lines += child.stdout.readlines()
    child.wait(DEADLINE_S)
    child.stdout.close()
    return [line.split() for line in lines if line.endswith("\n")]


def test_kill_9_loses_nothing_acknowledged_from_the_log(tmp_path: Path) -> None:
    """After any kill the log holds exactly the acknowledged saves, or also the one in flight."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    entries: list[Entry] = []
    hard_state = HardState()
    acknowledged = 0
    for _ in range(20):
        pending: tuple[HardState, list[Entry]] | None = None
        for word, *numbers in killed_at_random(
            rng, "save", str(tmp_path / "log"), str(rng.random())[2:]
        ):
            if word == "try":
                first, count, term, voted_id, commit = map(int, numbers)
                kept = entries[: first - 1] if count else entries
                new = [entry(index, term) for index in range(first, first + count)]
                pending = (HardState(term, MemberId(voted_id, 7), commit), kept + new)
            else:
                assert pending is not None
                (hard_state, entries), pending = pending, None
                acknowledged += 1
        store = LogStore(tmp_path / "log")
        found = list(store.entries(1, store.last_index() + 1, 2**40)) if store.last_index() else []
        outcome = (store.load()[0], found)
        store.close()
        assert outcome in ((hard_state, entries), pending), f"seed {seed}"
        hard_state, entries = outcome
    assert acknowledged > 100, "the test must have had something to lose"


def test_kill_9_leaves_the_state_at_an_entry(tmp_path: Path) -> None:
    """The state is that of exactly `applied` entries, never less than was answered for."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    twin, applied = Twin(), 0
    for _ in range(12):
        said = killed_at_random(rng, "apply", str(tmp_path / "state"), str(rng.random())[2:])
        answered = max([applied, *(int(number) for _, number in said)])
        store = StateStore(tmp_path / "state")
        assert store.applied.index >= answered, f"seed {seed}"
        while applied < store.applied.index:
            applied += 1
            for command in commands(applied):
                twin.apply(command)
        assert dict(store.page(b"", None, 1000, False).items) == twin.records, f"seed {seed}"
        assert store.revision == twin.revision
        store.close()
    assert applied > 50, "the test must have had something to lose"


def test_a_disk_that_refuses_is_no_acknowledgement(tmp_path: Path) -> None:
    """The save that fails is not there later, those before are, and no other is tried."""
    LogStore(tmp_path / "log").close()
    child = subprocess.run(
        [sys.executable, str(CHILD), "full", str(tmp_path / "log"), "1000000"],
        capture_output=True,
        env=ENVIRONMENT,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    *done, refused = child.stdout.splitlines()
    assert len(done) > 10
    assert "an earlier write failed" in refused
    store = LogStore(tmp_path / "log")
    assert f"done {store.last_index()}" == done[-1]
    assert store.load()[0] == HardState(1)
    store.close()


def test_flipped_bits_never_give_a_wrong_log(tmp_path: Path) -> None:
    """Wherever a bit flips, the log is refused, or what it holds is not touched by it."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    path = tmp_path / "log"
    store = LogStore(path)
    for index in range(1, 60):
        store.save(HardState(2, MemberId(1, 1), index - 1), [entry(index, 2)])
    sound = digest(store)
    store.close()
    file = path / "data.mdb"
    content = file.read_bytes()
    headers = [page + rng.randrange(200) for page in range(0, len(content), 4096)]
    positions = rng.sample(headers, 20) + rng.sample(range(len(content)), 20)
    refused = 0
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        child = subprocess.run(
            [sys.executable, str(CHILD), "verify", str(path)],
            capture_output=True,
            env=ENVIRONMENT,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        said = child.stdout.strip()
        assert said == sound or said.startswith("damaged"), f"seed {seed} {position}: {child}"
        refused += said != sound
    assert refused > 10
