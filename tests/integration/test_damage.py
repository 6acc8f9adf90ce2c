"""Bits that flip and files that end early on one node: found, repaired, and nobody else notices.

Three nodes: the damaged one gets back what it lost from its own snapshot and log, or from the
others. One node alone: it recovers from what it has, or stops with a sentence. Never a wrong
answer, never a trace.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dengine.storage.log_store import LogStore
from tests.cluster import (
    ROOT,
    UNREACHABLE,
    Cluster,
    ServeProcess,
    Writer,
    config_text,
    free_port,
    joiner,
    static_cluster,
    wait_for,
)
from tests.storage.states import signed_anew

ROUNDS = 12 if os.environ.get("DENGINE_CRASH_SWEEP") else 1
DATA_CORRUPTION = 65  # exit code
START_LIMIT = 6  # a node that needs more of them repairs nothing, whatever systemd would allow
_UNIT = (ROOT / "systemd" / "dengine.service").read_text(encoding="utf-8")
NEVER_RESTARTED = {
    int(code)
    for code in re.findall(r"^RestartPreventExitStatus=(.*)$", _UNIT, re.MULTILINE)[0].split()
}
QUIET = """founding_wait_ms = 0
[raft.snapshot]
retained_log_entries = 20
chunk_bytes = 4096
"""
KEYS = 60
VALUE_BYTES = 500
VALUE = re.compile(rb"[abc]\.\d+\.xxxx")


def fill(node: ServeProcess, prefix: str) -> dict[str, str]:
    """Write `KEYS` keys, each of which fills a good part of a page."""
    values = {f"{prefix}{n:03d}": f"{prefix}.{n}.".ljust(VALUE_BYTES, "x") for n in range(KEYS)}
    for key, value in values.items():
        reply = node.put(key, value)
        assert reply.ok, reply
    return values


def take(node: ServeProcess) -> dict[str, Any]:
    reply = node.request("POST", "/v1/snapshots", b"")
    assert reply.status == 200, reply
    taken: dict[str, Any] = reply.json()["snapshot"]
    return taken


def snapshots(node: ServeProcess) -> dict[str, Any]:
    view: dict[str, Any] = node.call("GET", "/v1/snapshots").json()
    return view


def state_of(node: ServeProcess) -> Path:
    """The data file of the state in use."""
    current = (node.directory / "CURRENT").read_text(encoding="utf-8").strip()
    return node.directory / current / "data.mdb"


def log_of(node: ServeProcess) -> Path:
    return node.directory / "log" / "data.mdb"


def newest_snapshot(node: ServeProcess) -> Path:
    files = list((node.directory / "snapshots").glob("*.dsnap"))
    return max(files, key=lambda file: int(file.stem.split("-")[2]))


def flip(file: Path, rng: random.Random, *, start: int = 0) -> None:
    """Flip one bit of a byte that is not zero: zeros are mostly space that nobody uses."""
    data = bytearray(file.read_bytes())
    used = [at for at in range(start, len(data)) if data[at]]
    position, bit = rng.choice(used), rng.randrange(8)
    data[position] ^= 1 << bit
    with file.open("r+b") as stream:  # in place: whoever has it mapped sees it, too
        stream.seek(position)
        stream.write(data[position : position + 1])
    print(f"flipped bit {bit} of byte {position} of {file}")


def flip_value(file: Path, rng: random.Random, among: Sequence[bytes] = ()) -> None:
    """Flip a bit inside a stored value, in every copy of it: certain to be missed by LMDB.

    `among`: those that the file still holds; pages that are free have old ones, too.
    """
    data = file.read_bytes()
    wanted = rng.choice(among or VALUE.findall(data))
    position = data.find(wanted)
    with file.open("r+b") as stream:
        while position >= 0:
            stream.seek(position + 20)
            stream.write(bytes([data[position + 20] ^ 1]))
            position = data.find(wanted, position + 1)
    print(f"flipped a bit of the value {wanted!r} in {file}")


def cut(file: Path, rng: random.Random) -> None:
    """The file ends somewhere else than it should."""
    size = rng.randrange(file.stat().st_size)
    os.truncate(file, size)
    print(f"cut {file} to {size} bytes")


def empty(file: Path, rng: random.Random) -> None:
    """Nothing is left of it: a file system that is mended may leave a file so."""
    os.truncate(file, 0)
    print(f"emptied {file}")


DAMAGES = {"flip": flip, "value": flip_value, "cut": cut, "empty": empty}
FILES = {"state": state_of, "log": log_of, "snapshot": newest_snapshot}


class Supervisor:
    """Starts a node again when it has stopped, as systemd/dengine.service does and no more often:
    what a node cannot repair within so many starts is a crash loop, and a person is called.
    """

    def __init__(self, node: ServeProcess) -> None:
        self.node = node
        self._starts = 0

    def start(self) -> None:
        """A person starts it: what was counted before does not matter any more."""
        self._starts = 1
        self.node.start()

    def sees_it_run(self) -> bool:
        if self.node.running:
            return True
        code, said = self.node.wait_exit(), self.node.lines()[-1]
        print(f"it stopped with {code}: {said}")
        assert code not in NEVER_RESTARTED, f"it waits for a person:\n{self.node.tail()}"
        assert self._starts < START_LIMIT, f"a crash loop:\n{self.node.tail()}"
        self._starts += 1
        self.node.start()
        return False

    def wait_ready(self) -> None:
        wait_for(lambda: self.sees_it_run() and self.node.ready(), "the node to be ready", 60)


class Three:
    """Three voters with data, two snapshots on each and a purged log; the third gets damaged."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = static_cluster(cluster, 1, 2, 3, extra=QUIET)
        self.victim = cluster.nodes[3]
        self.supervisor = Supervisor(self.victim)
        leader = cluster.wait_leader()
        self.values = fill(leader, "a")
        cluster.wait_applied()
        for node in cluster.nodes.values():
            take(node)
        self.values |= fill(leader, "b")
        cluster.wait_applied()
        for node in cluster.nodes.values():
            take(node)
            wait_for(lambda node=node: snapshots(node)["purged_index"] > 30, "a purged log")
        self.values |= fill(leader, "c")
        cluster.wait_applied()

    def down(self) -> None:
        """Stop the victim without ceremony, and lead with another node."""
        self.victim.kill()
        self.others_lead()

    def others_lead(self) -> None:
        self.cluster.wait_leader(among=[self.cluster.nodes[1], self.cluster.nodes[2]])

    def writers(self) -> list[Writer]:
        return [Writer(self.cluster.nodes[i], f"w{i}", pause_s=0.01).start() for i in (1, 2)]

    def settled(self, writers: list[Writer]) -> None:
        """The victim votes again and all three hold the same; the writers never noticed."""
        for writer in writers:
            writer.wait_more(5)
        self.cluster.wait_voters(1, 2, 3, deadline_s=40)
        self.supervisor.wait_ready()
        for writer in writers:
            assert not writer.stop().failures
        self.cluster.wait_applied()
        truth = self.cluster.nodes[1].items("")
        assert self.values.items() <= truth.items()
        assert self.cluster.nodes[2].items("") == truth
        read_all(self.supervisor, truth)
        self.cluster.assert_everywhere(*writers)
        assert "Traceback" not in self.victim.output()


@pytest.mark.timeout(1800)
def test_damage_to_one_of_three_is_repaired(cluster: Cluster, rng: random.Random) -> None:
    """Round after round a file of a stopped node is damaged. Started again it finds that, repairs
    itself, votes again and holds what the others hold, while their clients notice nothing."""
    three = Three(cluster)
    victim = three.victim
    rounds = [(what, how) for what in FILES for how in DAMAGES] * ROUNDS
    rng.shuffle(rounds)
    if ROUNDS == 1:
        del rounds[5:]  # the full target has them all
    for number, (what, how) in enumerate(rounds):
        print(f"round {number}: {how} in the {what}")
        three.values |= fill(cluster.wait_leader(), "c")  # into the log
        three.down()
        file = FILES[what](victim)
        writers = three.writers()
        DAMAGES[how](file, rng)
        said = len(victim.output())
        three.supervisor.start()
        three.supervisor.wait_ready()
        wait_checked(three.supervisor, said)
        if what == "snapshot":
            wait_for(lambda s=said: "put aside" in victim.output()[s:], "the damage to be found")
            assert not file.exists()
        three.settled(writers)
        take(victim)


def wait_checked(supervisor: Supervisor, said: int) -> None:
    """Wait until a node that started with `said` characters of output has read its state through,
    or has built another one: a key that rots is not found, and only the sum of all shows it."""

    def checked() -> bool:
        found = ("the state was read through", "snapshot up to entry", "rebuilt from", "rebuilding")
        output = supervisor.node.output()[said:]
        return supervisor.sees_it_run() and any(text in output for text in found)

    wait_for(checked, "the state to have been checked", 30)


def read_all(supervisor: Supervisor, truth: dict[str, str]) -> None:
    """Read every key until all can be read. A refusal will pass; a wrong value is the end."""
    node = supervisor.node

    def complete() -> bool:
        if not supervisor.sees_it_run():
            return False
        with contextlib.suppress(*UNREACHABLE):  # it may meet the damage just now
            for key, value in truth.items():
                reply = node.get(key, "eventual")
                assert not reply.ok or reply.body.decode() == value, f"{key}: {reply}"
                assert reply.status != 404, f"{key} is lost"
                if not reply.ok:
                    return False
            return node.items("") == truth
        return False

    wait_for(complete, f"node {node.node_id} to answer for every key", 30)


def test_a_damaged_snapshot_of_a_running_node_is_never_installed(
    cluster: Cluster, rng: random.Random
) -> None:
    """The leader's newest file rots while it runs, and a follower needs just that one: what
    arrives damaged is not installed, and the follower gets there."""
    three = Three(cluster)
    three.down()
    leader = cluster.wait_leader()
    three.values |= fill(leader, "d")
    take(leader)
    three.values |= fill(leader, "e")
    take(leader)
    wait_for(lambda: snapshots(leader)["purged_index"] > 182, "a log purged beyond the victim's")
    flip(newest_snapshot(leader), rng, start=2000)  # behind its header
    writers = three.writers()
    three.supervisor.start()
    three.settled(writers)


@pytest.mark.timeout(180)
def test_a_snapshot_that_was_rotten_when_it_was_made_keeps_nobody_out(cluster: Cluster) -> None:
    """The state has rotted between its check and its copy, so that the file itself is in order. A
    node that joins cannot use it; the leader finds that out, and writes another one."""
    first, values = single(cluster)
    first.kill()
    rotten = signed_anew(newest_snapshot(first), lambda file: flip_value(file, random.Random(1)))
    first.start()
    cluster.wait_leader()
    wait_for(
        lambda: rotten.sha256 in [each["sha256"] for each in snapshots(first)["snapshots"]],
        "the file to be verified",
    )
    second = joiner(cluster, 2, QUIET).start()
    wait_for(lambda: "snapshot up to entry" in second.output(), "an installed snapshot", 60)
    cluster.wait_applied()
    assert second.items("") == first.items("") == values
    assert f"{rotten.path.name} is damaged" in first.output()
    assert rotten.sha256 not in [each["sha256"] for each in snapshots(first)["snapshots"]]
    assert not list((second.directory / "snapshots").glob("*.partial"))


def single(cluster: Cluster) -> tuple[ServeProcess, dict[str, str]]:
    """One node with two snapshots and a purged log."""
    port = free_port()
    node = cluster.node(1, config_text(1, {1: port}, 2, 2, QUIET), port).start()
    cluster.wait_leader()
    values = fill(node, "a")
    take(node)
    values |= fill(node, "b")
    take(node)
    wait_for(lambda: snapshots(node)["purged_index"] > 30, "a purged log")
    values |= fill(node, "c")
    return node, values


@pytest.mark.timeout(600)
def test_a_single_node_recovers_its_state_from_snapshot_and_log(
    cluster: Cluster, rng: random.Random
) -> None:
    """Whatever happens to the state of a node without others: the snapshot and the log have it."""
    node, values = single(cluster)
    supervisor = Supervisor(node)
    for how in list(DAMAGES) * ROUNDS:
        node.kill()
        DAMAGES[how](state_of(node), rng)
        said = len(node.output())
        supervisor.start()
        supervisor.wait_ready()
        wait_checked(supervisor, said)
        read_all(supervisor, values)
        assert node.put("a000", values["a000"]).ok
        assert "Traceback" not in node.output()


@pytest.mark.timeout(600)
def test_a_single_node_with_a_damaged_log_stops_and_says_what_to_do(
    cluster: Cluster, rng: random.Random
) -> None:
    """Nobody else has what the log held: exit code 65, the file, and the way out; or the damage
    was where nothing is kept, and everything is there."""
    node, values = single(cluster)
    supervisor = Supervisor(node)
    assert node.stop() == 0
    aside = node.directory.with_name("sound")
    shutil.copytree(node.directory, aside)

    def put_back() -> None:
        """All of it: a start may have written to what was damaged, or noted that it is."""
        shutil.rmtree(node.directory)
        shutil.copytree(aside, node.directory)

    with contextlib.closing(LogStore(log_of(node).parent)) as log:
        entries = log.entries(log.first_index(), log.last_index() + 1, 2**30)
    among = VALUE.findall(b"".join(entry.data for entry in entries))
    stops = 0
    for how in list(DAMAGES) * ROUNDS:
        put_back()
        if how == "value":
            flip_value(log_of(node), rng, among)
        else:
            DAMAGES[how](log_of(node), rng)
        supervisor.start()
        wait_for(lambda: node.ready() or not node.running, "the node to be ready or to stop")
        if node.running:
            assert how != "value"
            read_all(supervisor, values)
            assert node.stop() == 0
            continue
        stops += 1
        assert node.wait_exit() == DATA_CORRUPTION
        said = node.lines()[-1]
        assert str(log_of(node).relative_to(node.cwd)) in said
        assert "dengine repair" in said
        assert "Traceback" not in node.output()
    assert stops
    put_back()
    supervisor.start()
    read_all(supervisor, values)
