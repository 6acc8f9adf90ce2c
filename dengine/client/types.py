"""What the calls of the client take, return and raise: small immutable records, listings, which are
fetched page by page, and errors that no node tells. Keys and values are bytes.

Every `revision` is the one of the whole state at which the answer holds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dengine.client.encoding import (
    Paging,
    as_key,
    as_seconds,
    as_value,
    field_bytes,
    selection,
    sent_bytes,
)
from dengine.errors import DengineError, InvalidRequest

EventType = Literal["put", "delete", "expire"]
Target = Literal["mod_revision", "version", "value", "exists"]
Relation = Literal["=", "!=", "<", "<=", ">", ">="]


# --- errors ---------------------------------------------------------------------------------------


class ClientClosed(DengineError):
    """The client was closed before or during the call. `outcome` says what became of that."""

    name = "client_closed"


class LeaseLost(DengineError):
    """The lease has ended, or may have: it could not be renewed in time. Its keys are gone."""

    name = "lease_lost"


class LockLost(LeaseLost):
    """The lock, or the leadership, may belong to somebody else by now."""

    name = "lock_lost"


# --- a transaction --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition on one key.

    `operand` is bytes for "value", a bool for "exists" and a whole number for "mod_revision" and
    "version", which are 0 for a key that does not exist. Such a key has no value: whatever is
    compared with that does not hold, "!=" neither.

    Example:
        holds = Compare("accounts/a", "value", "=", b"5")
        absent = Compare("accounts/b", "exists", "=", False)
        result = await client.txn([absent, holds])
        assert not result.succeeded
    """

    key: str | bytes
    target: Target
    relation: Relation
    operand: bytes | int | bool

    def to_json(self) -> dict[str, Any]:
        """Its JSON in `POST /v1/txn`. Raises TypeError for a key or value that is none."""
        fields: dict[str, Any] = sent_bytes("key", as_key(self.key))
        fields |= {"target": self.target, "op": self.relation}
        operand = self.sound_operand()
        if isinstance(operand, bytes):
            return fields | sent_bytes("operand", operand)
        return fields | {"operand": operand}

    def sound_operand(self) -> bytes | int | bool:
        """The operand, of the type that its target has.

        Raises:
            TypeError: it has another one.
            InvalidRequest: no number is that large.
        """
        if self.target == "value":
            if not isinstance(self.operand, bytes | bytearray | memoryview):
                raise TypeError("a value is compared with bytes")
            return bytes(self.operand)
        if not isinstance(self.operand, int):
            raise TypeError(f"{self.target} is compared with a number, or True and False")
        if not -(2**63) <= self.operand < 2**63:
            raise InvalidRequest(f"{self.target} is compared with a number from -2^63 to 2^63-1")
        return self.operand


class HasId(Protocol):
    """A lease of either client, or of an engine."""

    @property
    def id(self) -> str: ...


def lease_id(lease: HasId | str) -> str:
    """The cluster's name for `lease`.

    Raises:
        TypeError: it is no lease.
        InvalidRequest: it is empty.
    """
    name = lease if isinstance(lease, str) else getattr(lease, "id", None)
    if not isinstance(name, str):
        raise TypeError(f"a lease is a Lease or its id, not {type(lease).__name__}")
    if not name:
        raise InvalidRequest("the lease is empty: it is the id of a lease")
    return name


@dataclass(frozen=True, slots=True)
class Put:
    """Store `value`; it expires after `ttl_s` whole seconds, or with that lease, or of that id."""

    key: str | bytes
    value: bytes
    ttl_s: int | None = None
    lease: HasId | str | None = None

    def to_json(self) -> dict[str, Any]:
        """Its JSON in `POST /v1/txn`.

        Raises:
            TypeError: the key, the value or the lease is none.
            ValueError: `ttl_s` is no whole number of seconds above 0, or stands beside a lease.
        """
        fields: dict[str, Any] = {"op": "put", **sent_bytes("key", as_key(self.key))}
        fields |= sent_bytes("value", as_value(self.value))
        if self.ttl_s is not None and self.lease is not None:
            raise ValueError("a value ends with ttl_s or with a lease: give one of them")
        if self.ttl_s is not None:
            fields["ttl"] = as_seconds(self.ttl_s, "ttl_s")
        if self.lease is not None:
            fields["lease"] = lease_id(self.lease)
        return fields


@dataclass(frozen=True, slots=True)
class Get:
    """Read a key as it is after the operations before this one."""

    key: str | bytes

    def to_json(self) -> dict[str, Any]:
        """Its JSON in `POST /v1/txn`. Raises TypeError for a key or value that is none."""
        return {"op": "get", **sent_bytes("key", as_key(self.key))}


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key, if it is there."""

    key: str | bytes

    def to_json(self) -> dict[str, Any]:
        """Its JSON in `POST /v1/txn`. Raises TypeError for a key or value that is none."""
        return {"op": "delete", **sent_bytes("key", as_key(self.key))}


@dataclass(frozen=True, slots=True)
class DeleteRange:
    """Delete all keys with `prefix`, or from `start` up to before `end`; `all` allows every key."""

    prefix: str | bytes | None = None
    start: str | bytes | None = None
    end: str | bytes | None = None
    all: bool = False

    def to_json(self) -> dict[str, Any]:
        """Its JSON in `POST /v1/txn`. Raises TypeError, and ValueError for a prefix and bounds."""
        fields: dict[str, Any] = {"op": "delete_range"}
        for name, bound in selection(self.prefix, self.start, self.end).items():
            fields |= sent_bytes(name, bound)
        return fields | {"all": True} if self.all else fields


Operation = Put | Get | Delete | DeleteRange


def txn_parts(
    compare: Iterable[Compare], success: Iterable[Operation], failure: Iterable[Operation]
) -> dict[str, tuple[Any, ...]]:
    """The parts of a transaction by name, each read once: an iterator would be empty afterwards.

    Raises:
        TypeError: there is something else among them.
    """
    parts = {"compare": tuple(compare), "success": tuple(success), "failure": tuple(failure)}
    for name, part in parts.items():
        for item in part:
            if name == "compare" and not isinstance(item, Compare):
                raise TypeError(f"a comparison is a Compare, not {item!r}")
            if name != "compare" and not isinstance(item, Operation):
                raise TypeError(f"an operation is a Put, Get, Delete or DeleteRange, not {item!r}")
    return parts


def only_reads(operations: Sequence[Operation]) -> bool:
    """Does a transaction of these change nothing? Then it is repeated without a key, under which
    what it reads would have to be remembered.
    """
    return all(isinstance(operation, Get) for operation in operations)


# --- what calls return ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PutResult:
    """A value was stored. `created`: there was no such key before."""

    revision: int
    created: bool

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> PutResult:
        return PutResult(int(fields["revision"]), bool(fields["created"]))


@dataclass(frozen=True, slots=True)
class DeleteResult:
    """`deleted` keys are gone; with 0 of them nothing has changed."""

    revision: int
    deleted: int

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> DeleteResult:
        return DeleteResult(int(fields["revision"]), int(fields["deleted"]))


@dataclass(frozen=True, slots=True)
class Value:
    """A key as `get` found it. `ttl_s`: seconds until it expires, None if it does not."""

    key: bytes
    value: bytes
    mod_revision: int
    revision: int
    ttl_s: float | None = None

    @staticmethod
    def parse(key: bytes, value: bytes, headers: Mapping[str, str]) -> Value:
        ttl = headers.get("Dengine-TTL")
        return Value(
            key,
            value,
            int(headers["ETag"].strip('"')),
            int(headers["Dengine-Revision"]),
            None if ttl is None else float(ttl),
        )


@dataclass(frozen=True, slots=True)
class Item:
    """A key as listings and transactions show it. `value` is b"" where only keys were asked for."""

    key: bytes
    value: bytes
    mod_revision: int
    create_revision: int
    version: int
    ttl_s: float | None = None
    lease: str | None = None

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> Item:
        """Raises KeyError, TypeError or ValueError where `fields` are no item."""
        key = field_bytes(fields, "key")
        if key is None:
            raise ValueError("an item without a key")
        lease = fields.get("lease")
        return Item(
            key,
            field_bytes(fields, "value") or b"",
            int(fields["mod_revision"]),
            int(fields["create_revision"]),
            int(fields["version"]),
            fields.get("ttl"),
            None if lease is None else str(lease),
        )


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a listing, all of it as of `revision`. `next` continues it, None at the end."""

    revision: int
    items: tuple[Item, ...]
    next: str | None

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> Page:
        items = tuple(Item.parse(item) for item in fields["items"])
        return Page(int(fields["revision"]), items, fields["next"])


@dataclass(frozen=True, slots=True)
class OperationResult:
    """One operation of a transaction: what of `created`, `deleted` and `item` it has to tell."""

    op: str
    created: bool = False
    deleted: int = 0
    item: Item | None = None

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> OperationResult:
        item = fields.get("item")
        return OperationResult(
            str(fields["op"]),
            bool(fields.get("created", False)),
            int(fields.get("deleted", 0)),
            None if item is None else Item.parse(item),
        )


@dataclass(frozen=True, slots=True)
class TxnResult:
    """`results` belong, one by one, to the operations of the branch that was carried out."""

    revision: int
    succeeded: bool
    results: tuple[OperationResult, ...]

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> TxnResult:
        results = tuple(OperationResult.parse(result) for result in fields["results"])
        return TxnResult(int(fields["revision"]), bool(fields["succeeded"]), results)


@dataclass(frozen=True, slots=True)
class LeaseInfo:
    """A lease as the cluster knows it: granted for `ttl_s`, ends in `remaining_s`; its keys."""

    id: str
    ttl_s: float
    remaining_s: float | None
    keys: tuple[bytes, ...]

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> LeaseInfo:
        remaining = fields.get("remaining")
        named = ({"key": k} if isinstance(k, str) else k for k in fields.get("keys") or ())
        keys = (field_bytes(fields, "key") for fields in named)
        return LeaseInfo(
            str(fields["id"]),
            float(fields["ttl"]),
            None if remaining is None else float(remaining),
            tuple(key for key in keys if key is not None),
        )


@dataclass(frozen=True, slots=True)
class Event:
    """One key changed. `value` is None unless it was put; `prev` is what it was before, if asked
    for and if it was. `created`: there was no such key before.
    """

    type: EventType
    key: bytes
    value: bytes | None
    prev: bytes | None = None
    created: bool = False

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> Event:
        key = field_bytes(fields, "key")
        if key is None:
            raise ValueError("an event without a key")
        kind = fields["type"]
        if kind not in ("put", "delete", "expire"):
            raise ValueError(f"an event of the unknown type {kind!r}")
        before = field_bytes(fields, "prev")
        value = (field_bytes(fields, "value") or b"") if kind == "put" else None
        return Event(kind, key, value, before, bool(fields.get("created", False)))


@dataclass(frozen=True, slots=True)
class Change:
    """Everything of what is watched that changed at one revision, as one."""

    revision: int
    events: tuple[Event, ...]

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> Change:
        return Change(int(fields["revision"]), tuple(Event.parse(e) for e in fields["events"]))


# --- listings -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Listing:
    """The keys of a range, in order: iterate over it, over its `pages()`, or await `all()`.

    Each page is consistent in itself and names its revision. The whole is not one snapshot: a key
    that changes while the pages are read shows the state that its page had.

    Example:
        async for item in client.list(prefix="config/"):
            print(item.key, item.value)
        assert [i.key for i in await client.list(prefix="config/").all()] == []
    """

    _fetch: Callable[[int | None, str | None], Awaitable[Page]]
    _limit: int | None

    async def __aiter__(self) -> AsyncIterator[Item]:
        async for page in self.pages():
            for item in page.items:
                yield item

    async def pages(self) -> AsyncIterator[Page]:
        """The pages as they come; there is always at least one. Errors are those of `list`."""
        paging = Paging(self._limit)
        while not paging.over:
            try:
                page = await self._fetch(paging.limit, paging.after)
            except InvalidRequest as error:
                if not paging.take_less(error):
                    raise
                continue
            paging.took(len(page.items), page.next)
            yield page

    async def all(self) -> list[Item]:
        """All items. As large as the range: iterate instead where that may be much."""
        return [item async for item in self]
