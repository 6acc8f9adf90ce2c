"""Commands, what they answer, and their bytes in the log.

A batch is one log entry: a version byte, then a msgpack array of byte strings, one encoded command
each. Every command keeps its own frame, so a command that cannot be decoded costs only itself and
the leader never decodes what it merely passes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

BATCH_VERSION: Final = 1


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
    key: bytes  # 1..511 bytes
    value: bytes  # up to 1 MiB
    condition: Condition | None = None


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


Operation = Put | Get | Delete | DeleteRange


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


Command = Put | Delete | DeleteRange | Txn


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


class Invalid(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="i"):
    """The command broke a hard limit or could not be read; it changed nothing."""

    message: str


class GetResult(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="g"):
    """A key as an operation of a transaction has read it; all zero where there was none."""

    mod_revision: int = 0
    create_revision: int = 0
    version: int = 0
    value: bytes = b""


OperationResult = PutResult | GetResult | DeleteResult


class TxnResult(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="x"):
    """`revision` is the store's afterwards; it has grown only when something was changed."""

    revision: int
    succeeded: bool
    results: tuple[OperationResult, ...]


Result = PutResult | DeleteResult | TxnResult | ConditionFailed | TooMany | Invalid

_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_frames_decoder = msgspec.msgpack.Decoder(list[bytes])
_result_decoder: msgspec.msgpack.Decoder[Result] = msgspec.msgpack.Decoder(Result)
_VERSION_BYTE: Final = bytes([BATCH_VERSION])


def encode_command(command: Command) -> bytes:
    """One command as bytes, ready for `encode_batch`."""
    return _encoder.encode(command)


def encode_batch(commands: Sequence[bytes]) -> bytes:
    """The data of one log entry from encoded commands, which are not looked into."""
    return _VERSION_BYTE + _encoder.encode(commands)


# msgspec lets a tag that is no UTF-8 through as UnicodeDecodeError, and deep nesting as the other.
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def decode_batch(data: bytes) -> list[Command | Invalid]:
    """Inverse of `encode_batch`, for any bytes at all.

    Returns:
        One item per command; `Invalid` stands for one that cannot be read, and a single `Invalid`
        for a whole batch that cannot. The messages are fixed texts: a result must not depend on
        the words of a library's version.
    """
    if data[:1] != _VERSION_BYTE:
        return [Invalid(f"the batch is not of version {BATCH_VERSION}")]
    try:
        frames = _frames_decoder.decode(memoryview(data)[1:])
    except _UNREADABLE:
        return [Invalid("the batch cannot be read")]
    commands: list[Command | Invalid] = []
    for frame in frames:
        try:
            commands.append(_command_decoder.decode(frame))
        except _UNREADABLE:
            commands.append(Invalid("the command cannot be read"))
    return commands


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
