"""What a power cut would leave on a disk, and who counts on more than that.

A log that has lost its beginning is worth nothing without a snapshot, and a promise nothing when it
was made under a name that may be forgotten. Both are judged by the image that is durable, at the
moment at which somebody begins to rely on it; files are read once for each content.
"""

from __future__ import annotations

import hashlib
import json
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dengine.errors import DataCorruption
from dengine.node.founding import pledge_of
from dengine.node.wire import Pledge
from dengine.raft.membership import decode_membership
from dengine.raft.types import LogId, MemberId
from dengine.storage.snapshot_file import SUFFIX, SnapshotHeader
from dengine.storage.snapshot_frames import DIGEST_BYTES, PARTIAL_SUFFIX, read_header_bytes
from tests.simulation.disk import Inode
from tests.simulation.violation import violated

if TYPE_CHECKING:
    from tests.simulation.machine import Machine
    from tests.simulation.world import World


class Durability:
    """The checks; O(1) as long as nothing has changed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._purged: dict[int, int] = {}  # machine id -> where its log began when last looked at
        self._read: dict[tuple[int, int], tuple[bytes, LogId | None]] = {}
        self._identities: dict[int, tuple[bytes, tuple[int, str]]] = {}
        self._said: dict[int, tuple[object, tuple[int, str]]] = {}  # by which process, and what

    def log_changed(self, machine: Machine) -> None:
        """Invariant 9: what the log does not have any more is in a snapshot that stays.

        A machine whose data has rotted may have given up its snapshots, or its log: the others
        have what it needs.
        """
        purged = self._world.checker.purged(machine)
        if purged == self._purged.get(machine.id, 0):
            return
        self._purged[machine.id] = purged
        if purged and machine.id not in self._world.faults.ever_damaged:
            kept = [log_id for log_id in self._snapshots(machine, SUFFIX) if log_id.index >= purged]
            if not kept:
                violated(
                    "9 purge",
                    f"the log of node {machine.id} begins after entry {purged}, and no snapshot up "
                    "to there would survive a power cut",
                )

    def installing(self, machine: Machine, log_id: LogId) -> None:
        """A snapshot up to `log_id` begins to take the place of the state."""
        if machine.id in self._world.faults.ever_damaged:
            return
        found = self._snapshots(machine, SUFFIX) + self._snapshots(machine, PARTIAL_SUFFIX)
        if log_id not in found:
            violated(
                "9 install",
                f"node {machine.id} installs a snapshot up to {log_id} that would not survive a "
                "power cut",
            )

    def says(self, machine: Machine, incarnation: int, cluster_id: str) -> None:
        """Invariant 7: nobody gives a name that he may forget."""
        raw = self._identity(machine)
        known = self._identities.get(machine.id)
        if known is None or known[0] is not raw:
            fields = json.loads(raw)
            known = (raw, (int(fields["incarnation"], 16), fields["cluster_id"]))
            self._identities[machine.id] = known
        said = (machine.process, (incarnation, cluster_id))
        if known[1] == said[1]:
            self._said[machine.id] = said
        elif self._said.get(machine.id) != said:
            # Else it has just taken another name, which the disk has, and is about to end: told
            # twice at once that its directory is an old copy, it may still give its old one.
            violated(
                "7 identity",
                f"node {machine.id} says that it is incarnation {incarnation:x} in "
                f"{cluster_id!r}, and its disk says {known[1]}",
            )

    def pledges(self, machine: Machine, pledge: Pledge) -> None:
        """Invariant 7: nobody may forget what it is bound to, for the others found by that."""
        fields = json.loads(self._identity(machine))
        on_disk = bytes.fromhex(fields.get("pledge", ""))
        if on_disk and pledge_of(decode_membership(on_disk)) == pledge:
            return
        process, (incarnation, _) = self._said.get(machine.id, (None, (0, "")))
        renamed = process is machine.process and int(fields["incarnation"], 16) != incarnation
        # It may just have taken another name, as above: what the old one was bound to goes with it,
        # and those who found with that have one founder who never comes.
        if not (renamed and MemberId(machine.id, incarnation) in pledge.founders):
            violated("7 identity", f"node {machine.id} may forget that it is bound to {pledge}")

    def _identity(self, machine: Machine) -> bytes:
        """Its identity.json after a power cut."""
        node = machine.disk.durable(("data", str(machine.id), "identity.json"))
        raw = None if node is None else node.synced
        if raw is None:
            violated("7 identity", f"node {machine.id} says who it is and may forget it")
        return raw

    def _snapshots(self, machine: Machine, suffix: str) -> list[LogId]:
        """The sound ones whose content and name are durable."""
        place = ("data", str(machine.id), "snapshots")
        directory = machine.disk.durable(place)
        found = []
        for name in sorted(directory.synced_names) if directory is not None else ():
            if name.endswith(suffix):
                node = machine.disk.durable((*place, name))
                log_id = None if node is None else self._log_id(machine, node)
                if log_id is not None:
                    found.append(log_id)
        return found

    def _log_id(self, machine: Machine, node: Inode) -> LogId | None:
        """Of what is durable in a file; None where that is no whole snapshot."""
        raw = node.synced
        if raw is None or raw != node.content:
            return None
        known = self._read.get((machine.id, node.number))
        if known is None or known[0] is not raw:
            known = self._read[(machine.id, node.number)] = (raw, _sound(raw))
        return known[1]


def _sound(raw: bytes) -> LogId | None:
    body, digest = raw[:-DIGEST_BYTES], raw[-DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        return None
    try:
        encoded = read_header_bytes(Path("snapshot"), BytesIO(raw), hashlib.sha256())
        return msgspec.msgpack.decode(encoded, type=SnapshotHeader).log_id
    except (DataCorruption, msgspec.MsgspecError):
        return None
