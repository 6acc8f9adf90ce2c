"""The parts of a transaction, as plain records that turn into the JSON of `POST /v1/txn`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dengine.client.targets import as_key, as_value, json_bytes

Target = Literal["mod_revision", "version", "value", "exists"]
Relation = Literal["=", "!=", "<", "<=", ">", ">="]


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition on one key.

    `operand` is bytes for "value", a bool for "exists" and a whole number for "mod_revision" and
    "version", which are 0 for a key that does not exist.

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
        fields: dict[str, Any] = json_bytes("key", as_key(self.key))
        fields |= {"target": self.target, "op": self.relation}
        if self.target == "value":
            if not isinstance(self.operand, bytes | bytearray | memoryview):
                raise TypeError("a value is compared with bytes")
            return fields | json_bytes("operand", bytes(self.operand))
        if not isinstance(self.operand, int):
            raise TypeError(f"{self.target} is compared with a number, or True and False")
        return fields | {"operand": self.operand}


@dataclass(frozen=True, slots=True)
class Put:
    """Store `value`; it expires after `ttl_s` whole seconds, or with the lease of that id."""

    key: str | bytes
    value: bytes
    ttl_s: int | None = None
    lease: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Its JSON in `POST /v1/txn`. Raises TypeError for a key or value that is none."""
        fields: dict[str, Any] = {"op": "put", **json_bytes("key", as_key(self.key))}
        fields |= json_bytes("value", as_value(self.value))
        if self.ttl_s is not None:
            fields["ttl"] = self.ttl_s
        if self.lease is not None:
            fields["lease"] = self.lease
        return fields


@dataclass(frozen=True, slots=True)
class Get:
    """Read a key as it is after the operations before this one."""

    key: str | bytes

    def to_json(self) -> dict[str, Any]:
        """Its JSON in `POST /v1/txn`. Raises TypeError for a key or value that is none."""
        return {"op": "get", **json_bytes("key", as_key(self.key))}


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key, if it is there."""

    key: str | bytes

    def to_json(self) -> dict[str, Any]:
        """Its JSON in `POST /v1/txn`. Raises TypeError for a key or value that is none."""
        return {"op": "delete", **json_bytes("key", as_key(self.key))}


@dataclass(frozen=True, slots=True)
class DeleteRange:
    """Delete all keys with `prefix`, or from `start` up to before `end`; `all` allows every key."""

    prefix: str | bytes | None = None
    start: str | bytes | None = None
    end: str | bytes | None = None
    all: bool = False

    def to_json(self) -> dict[str, Any]:
        """Its JSON in `POST /v1/txn`. Raises TypeError for a key or value that is none."""
        fields: dict[str, Any] = {"op": "delete_range"}
        for name in ("prefix", "start", "end"):
            bound = getattr(self, name)
            if bound is not None:
                fields |= json_bytes(name, as_key(bound))
        return fields | {"all": True} if self.all else fields


Operation = Put | Get | Delete | DeleteRange


def only_reads(operations: Sequence[Operation]) -> bool:
    """Does a transaction of these change nothing? Then it is repeated without a key, under which
    what it reads would have to be remembered.
    """
    return all(isinstance(operation, Get) for operation in operations)
