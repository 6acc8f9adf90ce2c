"""Commands, what they answer, and their bytes in the log.

A batch is one log entry: a version byte, from version 2 on the log time (u64, big-endian), then a
msgpack array of byte strings, one encoded command each. Every command keeps its own frame, so a
command that cannot be decoded costs only itself and the leader never decodes what it merely passes
on. A batch of version 2 without commands is a tick: all that it says is what time it is.

A batch of version 1 means for ever what it meant to the release that knew no other: a member that
runs that release applies the same entry. So what came later is unreadable in it (see `_Txn1`), and
what version 1 knew has the same bytes in both.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

COMMAND_VERSION: Final = 2  # the newest batch format that this dengine can apply
TTL_S_MAX: Final = 315_360_000  # ten years


class Condition(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """What must hold for the key before a command may change it (If-Match, If-None-Match).

    Args:
        if_match: None: no such header. (): the key must exist ("*"). Otherwise its mod_revision
            must be one of these.
        if_none_match: the key must not exist.
    """

    if_match: tuple[int, ...] | None = None
    if_none_match: bool = False


class Put(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag="p"
):
    """A value that stays. It clears the TTL or lease that an earlier one of the key had."""

    key: bytes  # 1..511 bytes
    value: bytes  # up to 1 MiB
    condition: Condition | None = None


class ExpiringPut(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag="q"
):
    """A value that goes with its time, or with a lease: one of the two.

    Args:
        ttl_s: seconds of log time, 1 to `TTL_S_MAX`; 0: the lease decides.
        lease: id of the lease that the key is attached to; "": none.
    """

    key: bytes
    value: bytes
    condition: Condition | None = None
    ttl_s: int = 0
    lease: str = ""


class Delete(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag="d"
):
    key: bytes
    condition: Condition | None = None


class DeleteRange(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag="r"
):
    """Deletes every key with `start <= key < end`, all or nothing.

    Args:
        start: first key; b"" is the very first.
        end: first key that stays; None: none does.
        limit: when more than so many keys match, nothing is deleted.
    """

    start: bytes
    end: bytes | None
    limit: int


class Get(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag="g"
):
    """Reads a key: an operation of a transaction only."""

    key: bytes


Target = Literal["mod_revision", "version", "value", "exists"]
Relation = Literal["=", "!=", "<", "<=", ">", ">="]


class Compare(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """What must hold for a key before a transaction takes its first branch.

    Args:
        target: of the key. A key that does not exist has mod_revision and version 0, and no value:
            whatever is said of its value does not hold.
        operand: a number, bytes for `value`, a bool for `exists`.
    """

    key: bytes
    target: Target
    relation: Relation
    operand: int | bytes | bool


Operation = Put | ExpiringPut | Get | Delete | DeleteRange


class Txn(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag="x"
):
    """The operations of one branch, in order, all or none of them, as one change.

    Args:
        compare: all of it must hold for `success`, else it is `failure`.
        success, failure: each sees what those before it have done. A Put or Delete has no condition
            of its own here.
    """

    compare: tuple[Compare, ...]
    success: tuple[Operation, ...]
    failure: tuple[Operation, ...]


class LeaseGrant(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag="l"
):
    """A lease for `ttl_s` seconds of log time, 1 to `TTL_S_MAX`. The machine makes its id."""

    ttl_s: int


class LeaseKeepAlive(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag="k"
):
    """The lease's time begins anew."""

    lease: str


class LeaseRevoke(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag="v"
):
    """The lease ends, and the keys attached to it are deleted: many of them in several entries."""

    lease: str


Effect = Put | ExpiringPut | Delete | DeleteRange | Txn | LeaseGrant | LeaseKeepAlive | LeaseRevoke


class Once(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag="o"
):
    """A command that is carried out once however often it comes; the first result comes back.

    Args:
        key: the client of "CLIENT:N", or the whole of any other key: 1 to 128 visible ASCII
            characters.
        number: N; None for any other key.
        fingerprint: 16 bytes that tell this request from another one under the same key.
    """

    key: str
    number: int | None
    fingerprint: bytes
    command: Effect


Command = Effect | Once


class PutResult(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="p"):
    revision: int
    created: bool


class DeleteResult(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="d"):
    """`revision` is the store's afterwards; it has grown only when `deleted` is not 0."""

    revision: int
    deleted: int


class ConditionFailed(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="c"):
    current_revision: int | None  # mod_revision of the key; None: it does not exist


class TooMany(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="t"):
    """A range delete matched more than `limit` keys and deleted none."""

    limit: int


class TooMuch(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="b"):
    """What the command reads, replaces and deletes has more than `limit_bytes`, or it looks at keys
    more than `limit_keys` times; it did nothing."""

    limit_bytes: int
    limit_keys: int


class Deferred(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="w"):
    """The entry had work enough before it came to this command, which did nothing: propose it
    again. No client ever sees this."""


class NoLease(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="n"):
    """There is no such lease (any more); nothing was changed."""

    lease: str


class LeaseResult(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="l"):
    """Granted, or kept alive for another `ttl_s`."""

    lease: str
    ttl_s: int


class LeaseRevoked(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="v"):
    """`deleted` keys went at `revision`; `going`: others follow by themselves."""

    revision: int
    deleted: int
    going: bool


class Stale(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="s"):
    """Results of numbers up to `forgotten` are not known any more, so nothing was done."""

    forgotten: int


class Mismatch(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="m"):
    """Another request came under this key before; nothing was done."""


class Full(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="f"):
    """No more can be remembered for exactly-once, so nothing was done. `what`: "clients", "keys"
    or "bytes"."""

    what: str


class Invalid(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="i"):
    """The command broke a hard limit or could not be read; it changed nothing."""

    message: str


class GetResult(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="g"):
    """A key as an operation of a transaction has read it; all zero where there was none."""

    mod_revision: int = 0
    create_revision: int = 0
    version: int = 0
    value: bytes = b""
    expires_ms: int = 0
    lease: str = ""


OperationResult = PutResult | GetResult | DeleteResult


class TxnResult(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="x"):
    """`revision` is the store's afterwards; it has grown only when something was changed."""

    revision: int
    succeeded: bool
    results: tuple[OperationResult, ...]


Result = (
    PutResult
    | DeleteResult
    | TxnResult
    | LeaseResult
    | LeaseRevoked
    | ConditionFailed
    | TooMany
    | TooMuch
    | NoLease
    | Deferred
    | Stale
    | Mismatch
    | Full
    | Invalid
)


class _Txn1(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False, tag="x"
):
    """A transaction as version 1 knew it: of operations that never expire."""

    compare: tuple[Compare, ...]
    success: tuple[Put | Get | Delete | DeleteRange, ...]
    failure: tuple[Put | Get | Delete | DeleteRange, ...]


_Command1 = Put | Delete | DeleteRange | _Txn1

_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_command1_decoder: msgspec.msgpack.Decoder[_Command1] = msgspec.msgpack.Decoder(_Command1)
_frames_decoder = msgspec.msgpack.Decoder(list[bytes])
_result_decoder: msgspec.msgpack.Decoder[Result] = msgspec.msgpack.Decoder(Result)
_VERSION_1: Final = b"\x01"
_HEADER: Final = struct.Struct(">BQ")  # of version 2
_CLOCK_MAX: Final = (1 << 62) - 1


def encode_command(command: Command) -> bytes:
    """One command as bytes, ready for `encode_batch`."""
    return _encoder.encode(command)


def encode_batch(commands: Sequence[bytes], clock_ms: int | None = None) -> bytes:
    """The data of one log entry from encoded commands, which are not looked into.

    Args:
        clock_ms: the log time; None makes a batch of version 1, for clusters with members that
            know no other.
    """
    frames = _encoder.encode(commands)
    return (_VERSION_1 if clock_ms is None else _HEADER.pack(2, clock_ms)) + frames


def batch_version(data: bytes) -> int:
    """The format of a batch; 0 for what is none. More than `COMMAND_VERSION`: made by a newer
    release, and to be applied by none older.
    """
    return data[0] if data and data[0] < 0x80 else 0


def batch_clock_ms(data: bytes) -> int | None:
    """The log time that a batch carries; None for version 1, and for what is no batch."""
    if data[:1] != b"\x02" or len(data) < _HEADER.size:
        return None
    clock_ms: int = _HEADER.unpack_from(data)[1]
    return min(clock_ms, _CLOCK_MAX)


# msgspec lets a tag that is no UTF-8 through as UnicodeDecodeError, and deep nesting as the other.
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def decode_batch(data: bytes) -> list[Command | Invalid]:
    """Inverse of `encode_batch`, for any bytes at all.

    Returns:
        One item per command; `Invalid` stands for one that cannot be read, and a single `Invalid`
        for a whole batch that cannot. The messages are fixed texts: a result must not depend on
        the words of a library's version.
    """
    version = batch_version(data)
    if version not in (1, 2):
        return [Invalid("the batch is of no known version")]
    try:
        frames = _frames_decoder.decode(memoryview(data)[1 if version == 1 else _HEADER.size :])
    except _UNREADABLE:
        return [Invalid("the batch cannot be read")]
    decode = _decode1 if version == 1 else _command_decoder.decode
    commands: list[Command | Invalid] = []
    for frame in frames:
        try:
            commands.append(decode(frame))
        except _UNREADABLE:
            commands.append(Invalid("the command cannot be read"))
    return commands


def _decode1(frame: bytes) -> Command:
    command = _command1_decoder.decode(frame)
    if isinstance(command, _Txn1):
        return Txn(command.compare, command.success, command.failure)
    return command


def decode_command(data: bytes) -> Command | None:
    """Inverse of `encode_command`; None for anything else."""
    try:
        return _command_decoder.decode(data)
    except _UNREADABLE:
        return None


def needs_version_2(command: Command) -> bool:
    """Is this a command that a batch of version 1 cannot carry?"""
    if isinstance(command, Txn):
        return any(isinstance(o, ExpiringPut) for o in (*command.success, *command.failure))
    return not isinstance(command, Put | Delete | DeleteRange)


def makes_room(command: Command) -> bool:
    """Deletions and whatever concerns leases: low disks let them through a little longer."""
    if isinstance(command, Once):
        return makes_room(command.command)
    if isinstance(command, Txn):
        operations = (*command.success, *command.failure)
        return all(isinstance(o, Delete | DeleteRange | Get) for o in operations)
    return not isinstance(command, Put | ExpiringPut)


def encode_result(result: Result) -> bytes:
    """One result as bytes, for the way from the leader to the node that was asked."""
    return _encoder.encode(result)


def decode_result(data: bytes) -> Result:
    """Inverse of `encode_result`; raises `msgspec.MsgspecError` on anything else."""
    return _result_decoder.decode(data)


def prefix_end(prefix: bytes) -> bytes | None:
    """First key after all keys that begin with `prefix`; None when nothing can come after them."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else None
