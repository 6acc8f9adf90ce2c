"""The paths that are swept: how to get to each, when it is done, which files it touches.

A path is walked again and again on the same nodes: every point starts from what the restart after
the one before has left, so that what recovery makes is recovered from, too.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lmdb

from dengine.storage.snapshot_file import verify
from tests.cluster import (
    UNREACHABLE,
    Cluster,
    ServeProcess,
    config_text,
    free_port,
    static_cluster,
    wait_for,
)

# Snapshots only on request, so that nothing happens but what is swept; and little history, or each
# walk would write more than the one before, and a sweep of all its writes never ended.
QUIET = """founding_wait_ms = 0
[raft.snapshot]
retained_log_entries = 0
chunk_bytes = 4096
[kv]
history_revisions = 10
"""
KEYS = 40
VALUE_BYTES = 400


class Scenario:
    """One path on real nodes. `victim` is the node that suffers.

    Attributes:
        acknowledged: what every node must hold, no more and no less.
        walked_once: each walk needs new nodes.
    """

    walked_once = False

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.acknowledged: dict[str, str] = {}
        self._round = itertools.count(1)

    @property
    def victim(self) -> ServeProcess:
        raise NotImplementedError

    def prepare(self) -> None:
        """Bring the nodes to right before the path; the victim runs, or is stopped by SIGSTOP."""
        raise NotImplementedError

    def files(self) -> Mapping[str, Path]:
        """The paths behind the names of `sites.py`, after `prepare`."""
        raise NotImplementedError

    def go(self) -> None:
        """Set the victim off."""
        raise NotImplementedError

    def done(self) -> bool:
        """Has the path been walked to its end?"""
        raise NotImplementedError

    def again(self) -> None:
        """The subprocess has failed: try once more, where the node does not do that by itself."""

    def provoke(self) -> None:
        """Have the node meet what has just gone wrong, where it does not do that by itself."""

    def write(self, node: ServeProcess, count: int) -> None:
        number = next(self._round)
        for key in range(count):
            name, value = f"key{key % KEYS:03d}", f"{number}.{key}.".ljust(VALUE_BYTES, "x")
            reply = node.put(name, value)
            assert reply.ok, reply
            self.acknowledged[name] = value

    def restart(self) -> None:
        self.victim.prefix = ()
        if not self.victim.running:
            self.victim.start()
        wait_for(self.victim.ready, f"node {self.victim.node_id} to be ready")

    def check(self) -> None:
        """Nothing acknowledged is lost, one good state, nothing left over, everybody agrees."""
        self.cluster.wait_leader()
        self.cluster.wait_applied()
        for node in self.cluster.running():
            assert node.items("") == self.acknowledged, f"node {node.node_id} holds something else"
        directory = self.victim.directory
        wait_for(lambda: not litter(directory), f"a tidy {directory}", 5)
        for file in directory.glob("snapshots/*.dsnap"):
            verify(file)
        assert "Traceback" not in self.victim.output()


class TakeAndPurge(Scenario):
    """A single node takes a snapshot, drops the oldest one, and purges its log."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        port = free_port()
        cluster.node(1, config_text(1, {1: port}, 2, 2, QUIET), port).start()
        cluster.wait_leader()
        self._purge_to = 0

    @property
    def victim(self) -> ServeProcess:
        return self.cluster.nodes[1]

    def prepare(self) -> None:
        while len(_view(self.victim)["snapshots"]) < 3:
            self.write(self.victim, KEYS)
            _take(self.victim)
        wait_for(lambda: _view(self.victim)["job"] is None, "the writer to rest")
        # Each purge ends where the last snapshot is by now.
        self._purge_to = _view(self.victim)["snapshots"][-1]["index"]
        self.write(self.victim, KEYS)

    def files(self) -> Mapping[str, Path]:
        return self._files(_view(self.victim)["snapshots"][0]["file"])

    def _files(self, oldest: str) -> Mapping[str, Path]:
        status = self.victim.status()
        directory = self.victim.directory
        snapshots = directory / "snapshots"
        name = f"snapshot-{status['term']}-{status['last_applied']}.dsnap"
        return {
            "snapshots/": snapshots,
            "partial": snapshots / f"{name}.partial",
            "oldest snapshot": snapshots / oldest,
            "snapshots/ made": snapshots,
            "parent of snapshots/": directory,
            **state_files(directory),
        }

    def go(self) -> None:
        # Its end is not waited for: the node may not live long enough to tell.
        reply = self.victim.request("POST", "/v1/snapshots", b"", {"Dengine-Timeout-Ms": "100"})
        assert reply.status in (200, 202, 503), reply

    def again(self) -> None:
        self.write(self.victim, 1)  # so that it is another file
        _take(self.victim)

    def provoke(self) -> None:
        """Purging happens in the background: the next write must not be acknowledged."""
        key, value = next(iter(self.acknowledged.items()))  # whatever comes of it, nothing changes
        with contextlib.suppress(*UNREACHABLE):
            assert not self.victim.put(key, value).ok

    def done(self) -> bool:
        return durable_purged_index(self.victim) >= self._purge_to


class TakeFirst(TakeAndPurge):
    """The same while there is no directory for snapshots yet."""

    def prepare(self) -> None:
        self.victim.kill()
        shutil.rmtree(self.victim.directory / "snapshots", ignore_errors=True)
        self.restart()
        self.cluster.wait_leader()
        self.write(self.victim, KEYS)

    def files(self) -> Mapping[str, Path]:
        return self._files("")

    def done(self) -> bool:
        return bool(_view(self.victim)["snapshots"])


class Install(Scenario):
    """A voter of three needs entries that the leader has purged: fetch, unpack, switch, reset."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        static_cluster(cluster, 1, 2, 3, extra=QUIET)
        self._behind = 0

    @property
    def victim(self) -> ServeProcess:
        return self.cluster.nodes[3]

    def prepare(self) -> None:
        leader = self.cluster.wait_leader()
        if leader is self.victim:
            reply = leader.call("POST", "/v1/cluster/leader", {"id": 1})
            assert reply.ok, reply
            leader = wait_for(
                lambda: n if (n := self.cluster.wait_leader()) is not self.victim else None,
                "another leader",
            )
        self._behind = self.victim.status()["last_index"]
        self.victim.signal(signal.SIGSTOP)
        self.write(leader, KEYS)
        _take(leader)
        self.write(leader, 3)
        self._ref = _take(leader)
        wait_for(
            lambda: _view(leader)["purged_index"] > self._behind,
            "the leader to have purged what the victim needs",
        )

    def files(self) -> Mapping[str, Path]:
        directory = self.victim.directory
        snapshots = directory / "snapshots"
        return {
            "fetched": snapshots / f"fetch-{self._ref['sha256']}.partial",
            "snapshots/": snapshots,
            "snapshots/ made": snapshots,
            "parent of snapshots/": directory,
            **state_files(directory),
        }

    def go(self) -> None:
        self.victim.signal(signal.SIGCONT)

    def done(self) -> bool:
        return self.victim.status()["last_applied"] >= self._ref["index"] and (
            _view(self.victim)["job"] is None
        )


class InstallFirst(Install):
    """The same while there is no directory for snapshots yet, as after no other walk."""

    walked_once = True


class Rebuild(Scenario):
    """A start that cannot trust the state builds it again from a snapshot and the log."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        port = free_port()
        cluster.node(1, config_text(1, {1: port}, 2, 2, QUIET), port).start()
        cluster.wait_leader()
        self.write(self.victim, KEYS)
        _take(self.victim)

    @property
    def victim(self) -> ServeProcess:
        return self.cluster.nodes[1]

    def prepare(self) -> None:
        self.write(self.victim, 5)
        self.victim.kill()
        (self.victim.directory / "RUN").unlink()  # as after a power loss

    def files(self) -> Mapping[str, Path]:
        return state_files(self.victim.directory)

    def go(self) -> None:
        self.victim.start()

    def done(self) -> bool:
        return self.victim.ready()


class Distrust(Scenario):
    """A running node alone finds its state damaged, throws it away, and unpacks its own newest
    snapshot, for the log begins later than entry 1."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        port = free_port()
        cluster.node(1, config_text(1, {1: port}, 2, 2, QUIET), port).start()
        cluster.wait_leader()
        for _ in range(2):
            self.write(self.victim, KEYS)
            _take(self.victim)
        wait_for(lambda: _view(self.victim)["purged_index"], "a purged log")

    @property
    def victim(self) -> ServeProcess:
        return self.cluster.nodes[1]

    def prepare(self) -> None:
        self.write(self.victim, 5)
        wait_for(lambda: _view(self.victim)["job"] is None, "the writer to rest")
        self._state = state_number(self.victim.directory)

    def files(self) -> Mapping[str, Path]:
        newest = self.victim.directory / f"state-{self._state + 2}"
        return {
            "old state DAMAGED.tmp": self.victim.directory / f"state-{self._state}" / "DAMAGED.tmp",
            "newest state/": newest,
            "newest state data": newest / "data.mdb",
            "newest state lock": newest / "lock.mdb",
            "newest state UNPACKED": newest / "UNPACKED",
            **state_files(self.victim.directory),
        }

    def go(self) -> None:
        """A value rots, in every copy of it, and somebody reads all."""
        file = self.victim.directory / f"state-{self._state}" / "data.mdb"
        data, value = file.read_bytes(), self.acknowledged["key000"].encode()
        with file.open("r+b") as stream:
            for found in re.finditer(re.escape(value), data):
                stream.seek(found.start() + VALUE_BYTES // 2)
                stream.write(b"!")
        reply = self.victim.request("POST", "/v1/snapshots", b"", {"Dengine-Timeout-Ms": "100"})
        assert reply.status in (202, 503), reply

    def done(self) -> bool:
        return state_number(self.victim.directory) >= self._state + 2 and self.victim.ready()

    def restart(self) -> None:
        """Until it has read its state through: before that it may not know yet that it is wrong."""
        said = len(self.victim.output())
        super().restart()
        sound = "the state was read through and is sound"
        wait_for(lambda: sound in self.victim.output()[said:], "the state to be checked", 60)
        wait_for(self.victim.ready, "the node to be ready")


PATHS: dict[str, type[Scenario]] = {
    "first take": TakeFirst,
    "take": TakeAndPurge,
    "purge": TakeAndPurge,
    "first install": InstallFirst,
    "install": Install,
    "rebuild": Rebuild,
    "distrust": Distrust,
}


def state_number(directory: Path) -> int:
    """Of the state in use."""
    return int((directory / "CURRENT").read_text(encoding="utf-8").partition("-")[2])


def state_files(directory: Path) -> dict[str, Path]:
    """What changes when the state in use is replaced by the next one."""
    number = state_number(directory)
    current, new = f"state-{number}", directory / f"state-{number + 1}"
    return {
        "directory": directory,
        "CURRENT.tmp": directory / "CURRENT.tmp",
        "CLEAN": directory / "CLEAN",
        "RUN.tmp": directory / "RUN.tmp",
        "OPENING": directory / "OPENING",
        "old state/": directory / current,
        "new state/": new,
        "new state data": new / "data.mdb",
        "new state lock": new / "lock.mdb",
        "new state UNPACKED": new / "UNPACKED",
        "old state data": directory / current / "data.mdb",
        "log": directory / "log" / "data.mdb",
        "log/": directory / "log",
        "log lock": directory / "log" / "lock.mdb",
    }


def litter(directory: Path) -> list[str]:
    """What should not lie in a data directory once its node has settled."""
    current = (directory / "CURRENT").read_text(encoding="utf-8").strip()
    data = {"data.mdb", "lock.mdb"}
    allowed: dict[str, set[str]] = {
        "": {"LOCK", "identity.json", "CURRENT", "RUN", "log", "snapshots", current},
        "log": data,
        current: data,
    }
    found = []
    for path in directory.rglob("*"):
        parent = str(path.relative_to(directory).parent).removesuffix(".")
        good = path.suffix == ".dsnap" if parent == "snapshots" else path.name in allowed[parent]
        if not good:
            found.append(str(path.relative_to(directory)))
    return found


def durable_purged_index(node: ServeProcess) -> int:
    """Up to where the log on disk has been purged; its head says so (see log_store.py)."""
    path = str(node.directory / "log")
    with lmdb.open(path, readonly=True, lock=False, map_size=1 << 40) as log, log.begin() as txn:
        head = txn.get(b"a")
        assert head is not None
        return int.from_bytes(head[9:17], "little")


def _view(node: ServeProcess) -> dict[str, Any]:
    reply = node.call("GET", "/v1/snapshots")
    assert reply.ok, reply
    view: dict[str, Any] = reply.json()
    return view


def _take(node: ServeProcess) -> dict[str, Any]:
    # 202: another member's turn has not ended yet, perhaps because it was killed in the middle.
    reply = wait_for(
        lambda: r if (r := node.request("POST", "/v1/snapshots", b"")).status != 202 else None,
        "a snapshot to be taken",
        30,
    )
    assert reply.status == 200, reply
    taken: dict[str, Any] = reply.json()["snapshot"]
    return taken
