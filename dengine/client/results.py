"""What the calls of the client return: small immutable records. Keys and values are bytes.

Every `revision` is the one of the whole state at which the answer holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dengine.client.targets import field_bytes

EventType = Literal["put", "delete", "expire"]


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
