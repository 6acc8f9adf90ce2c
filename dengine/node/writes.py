"""Writes: what is asked of a command before it may enter the log, and its way to the leader.

The API and the command line check what they are given for the sake of a good message. What must
never get into a log is stopped here, whoever sends it.
"""

from __future__ import annotations

import asyncio
from hashlib import blake2b

import msgspec

from dengine.config import Limits
from dengine.errors import (
    ClusterUnavailable,
    DiskFull,
    InvalidRequest,
    LeaderChanged,
    NotFound,
    NotLeader,
    TooLarge,
)
from dengine.kv.commands import (
    COMMAND_VERSION,
    Command,
    Compare,
    Delete,
    Effect,
    ExpiringPut,
    Get,
    LeaseKeepAlive,
    LeaseRevoke,
    Once,
    Put,
    Result,
    Txn,
    decode_command,
    decode_result,
    encode_command,
    makes_room,
    needs_version_2,
)
from dengine.kv.once import KEY_CHARACTERS_MAX, is_key
from dengine.kv.tables import may_be_lease
from dengine.node.cycle import Cycle
from dengine.node.forwarding import Forwarding
from dengine.node.leading import RETRY_S, AtLeader
from dengine.node.proposals import COMMAND_BYTES_MAX
from dengine.node.room import Room
from dengine.raft.types import MemberId

_AnyPut = Put | ExpiringPut


class OnceKey(msgspec.Struct, frozen=True):
    """An idempotency key.

    Args:
        key: the client of "CLIENT:N", or any other key.
        number: N; None for any other key.
        fingerprint: 16 bytes that tell this request from others; b"": the command itself does.
    """

    key: str
    number: int | None = None
    fingerprint: bytes = b""


def parse_once(text: str, fingerprint: bytes = b"") -> OnceKey:
    """The key in `text`, which is "CLIENT:N" or any other.

    Raises:
        InvalidRequest: it is not 1 to 128 visible ASCII characters.
    """
    if not is_key(text):
        raise InvalidRequest(
            f"an idempotency key has 1 to {KEY_CHARACTERS_MAX} visible ASCII characters"
        )
    client, colon, number = text.rpartition(":")
    if colon and client and number.isdigit() and number[0] != "0" and int(number) < 2**63:
        return OnceKey(client, int(number), fingerprint)
    return OnceKey(text, None, fingerprint)


class Writes:
    """The way of every command into the log.

    Args:
        cycle: that of this node.
        room: of the disk under the data directory.
    """

    def __init__(
        self,
        limits: Limits,
        cycle: Cycle,
        at_leader: AtLeader,
        forwarding: Forwarding,
        room: Room,
    ) -> None:
        self._limits = limits
        self._cycle = cycle
        self._raft = cycle.raft
        self._at_leader = at_leader
        self._forwarding = forwarding
        self._room = room
        self._loop = asyncio.get_running_loop()
        self._disk_low = self._disk_full = False

    def look_at_disk(self) -> None:
        """Now and then: below the reserve only what makes room is taken, below half of it
        nothing."""
        self._disk_low = not self._room.has(0)
        self._disk_full = self._disk_low and not self._room.has_half()
        self._cycle.may_tick = not self._disk_full

    async def write(self, command: Effect, deadline: float, once: OnceKey | None = None) -> Result:
        """Commit `command` through the leader, wherever that is, and return its result.

        Args:
            deadline: on the event loop's clock.
            once: carry it out once however often it is sent with this key.

        Raises:
            InvalidRequest, TooLarge: it may not enter a log.
            ClusterUnavailable: some member is too old for it.
            DengineError: `outcome` says whether it may still happen.
        """
        self._check(command)
        whole: Command = command
        if once is not None:
            fingerprint = once.fingerprint or _fingerprint(encode_command(command))
            whole = Once(once.key, once.number, fingerprint, command)
        self._require_version(whole)
        data = encode_command(whole)
        _require_size(data)
        try:
            if self._raft.may_propose:  # the common case, without a detour
                return await self.write_here(data, deadline)
        except (NotLeader, LeaderChanged) as error:
            if error.outcome != "none":
                raise

        async def forward(leader: MemberId) -> Result:
            return decode_result(await self._forwarding.ask(leader, "write", data, deadline))

        return await self._at_leader.do(lambda: self.write_here(data, deadline), forward, deadline)

    def write_here(self, data: bytes, deadline: float) -> asyncio.Future[Result]:
        """Queue an encoded command on this node, which leads or is about to be refused.

        Raises:
            DiskFull, TooLarge, RateLimited, ClusterUnavailable: nothing was queued.
        """
        _require_size(data)
        if self._cycle.command_version < COMMAND_VERSION:
            # Another node may know of a membership that allows it, and that this one never gets.
            command = decode_command(data)
            if command is not None:
                self._require_version(command)
        if self._disk_low:
            self._require_room(data)
        future: asyncio.Future[Result] = self._loop.create_future()
        self._cycle.proposals.add(data, future, deadline)
        self._cycle.wake_to_propose()
        return future

    async def version_2_applied(self, what: str, deadline: float) -> None:
        """Return once this node has applied an entry of version 2, which a leader proposes as soon
        as every member can apply it. Raises ClusterUnavailable."""
        while not self._cycle.records:
            self._require_version_2(what)
            if self._loop.time() >= deadline:
                raise ClusterUnavailable(
                    f"{what} needs an entry of the new format, and no leader has committed one "
                    "yet: try again"
                )
            await asyncio.sleep(RETRY_S)

    def _require_version_2(self, what: str) -> None:
        """Raises ClusterUnavailable while not every member can do `what`."""
        if self._cycle.command_version >= COMMAND_VERSION:
            return
        members = self._raft.membership.members
        if not members:
            raise ClusterUnavailable("this node does not belong to a cluster yet")
        old = [str(m.id.id) for m in members if m.command_version < COMMAND_VERSION]
        raise ClusterUnavailable(
            f"{what} needs a newer release on every member, and node {', '.join(old)} has an "
            "older one: upgrade it and try again"
        )

    def _require_version(self, command: Command) -> None:
        if type(command) is Put or self._cycle.command_version >= COMMAND_VERSION:
            return
        if needs_version_2(command):
            self._require_version_2("this request")

    def _require_room(self, data: bytes) -> None:
        command = decode_command(data)
        if not self._disk_full and command is not None and makes_room(command):
            return
        raise DiskFull(
            f"less than {self._limits.reserve_bytes} bytes are free under {self._room.path} "
            "(limits.reserve_bytes): free some space"
        )

    def _check(self, command: Effect) -> None:
        """The `[limits]` of the configuration, for who comes with a command, not a request."""
        if isinstance(command, _AnyPut):
            self._check_key(command.key)
            if len(command.value) > self._limits.value_bytes:
                raise TooLarge(
                    f"the value has {len(command.value)} bytes; at most "
                    f"{self._limits.value_bytes} are allowed"
                )
            if isinstance(command, ExpiringPut) and command.lease:
                self._check_lease(command.lease)
        elif isinstance(command, Delete):
            self._check_key(command.key)
        elif isinstance(command, LeaseKeepAlive | LeaseRevoke):
            self._check_lease(command.lease)
        elif isinstance(command, Txn):
            key_bytes, value_bytes = self._limits.key_bytes, self._limits.value_bytes
            for part in (*command.compare, *command.success, *command.failure):
                if type(part) is Put:  # one that is in order needs no words
                    if not 1 <= len(part.key) <= key_bytes or len(part.value) > value_bytes:
                        self._check(part)
                elif isinstance(part, Compare | Get):
                    self._check_key(part.key)
                elif isinstance(part, ExpiringPut | Delete):
                    self._check(part)

    @staticmethod
    def _check_lease(lease_id: str) -> None:
        if not may_be_lease(lease_id):
            raise NotFound(f"there is no lease {lease_id[:64]!r}: no id looks like that")

    def _check_key(self, key: bytes) -> None:
        if not key:
            raise InvalidRequest("the key is empty: a key has 1 to 511 bytes")
        if len(key) > self._limits.key_bytes:
            raise TooLarge(
                f"the key has {len(key)} bytes; at most {self._limits.key_bytes} are allowed"
            )


def _require_size(data: bytes) -> None:
    """Whatever the limits say: a larger one fits neither into an entry nor into a frame."""
    if len(data) > COMMAND_BYTES_MAX:
        raise TooLarge(
            f"the request has {len(data)} bytes as a command; {COMMAND_BYTES_MAX} fit into an "
            "entry of the log: split it"
        )


def _fingerprint(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()
