"""Keys and bytes of the machine's own tables.

    table     key                                  data
    due       group (u8), time (u64), kind, name   the name
    leases    id                                   TTL (u64, s), time (u64), going (u8)
    attached  id, 0, name of the user's key        the user's key
    history   last revision of an entry (u64)      all changes of that entry
    clients   name                                 results kept (u32), forgotten (u64), time (u64)
    results   name, 0, number (u64)                fingerprint (16 bytes), result
    opaque    key                                  time (u64), fingerprint, result

Times are log times in milliseconds. In a table's key a name of more than 64 bytes is replaced by a
digest, for LMDB's keys end at 511 bytes; a cryptographic one, or somebody could make two keys that
are due at the same moment and lose one of them from the index.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from hashlib import blake2b
from typing import Final, NamedTuple

from dengine.kv.store import View

KEY, LEASE, CLIENT, OPAQUE = b"k", b"l", b"c", b"o"
ENDING, FORGETTING = b"\0", b"\1"  # groups of what is due: keys and leases; all that is remembered
DUE_GROUPS: Final = (ENDING, FORGETTING)
_SHORT: Final = 64

_LEASE: Final = struct.Struct(">QQB")
_CLIENT: Final = struct.Struct(">IQQ")
_NUMBER: Final = struct.Struct(">Q")
FINGERPRINT_BYTES: Final = 16

number_key = _NUMBER.pack


def key_number(key: bytes) -> int:
    """The number that a key begins with."""
    number: int = _NUMBER.unpack_from(key)[0]
    return number


def _name(kind: bytes, name: bytes) -> bytes:
    """Unambiguous: the kind in upper case marks a digest."""
    if len(name) <= _SHORT:
        return kind + name
    return kind.upper() + blake2b(name, digest_size=16).digest()


# --- what is due ----------------------------------------------------------------------------------


class Due(NamedTuple):
    """Something whose time comes at `at_ms`; `at` is its key in the table."""

    at_ms: int
    kind: bytes  # KEY, LEASE, CLIENT or OPAQUE
    name: bytes
    at: bytes


def due_at(view: View, group: bytes, start: bytes = b"") -> Due | None:
    """The first of a group that is due, at or after the table's key `start`."""
    found = view.first("due", start or group)
    if found is None or not found[0].startswith(group):
        return None
    return Due(due_ms(found[0]), found[0][9:10].lower(), found[1], found[0])


def due_ms(key: bytes) -> int:
    """The time in a key of the table."""
    at_ms: int = _NUMBER.unpack_from(key, 1)[0]
    return at_ms


def set_due(view: View, at_ms: int, kind: bytes, name: bytes) -> None:
    view.write("due", _due_key(at_ms, kind, name), name)


def clear_due(view: View, at_ms: int, kind: bytes, name: bytes) -> None:
    view.remove("due", _due_key(at_ms, kind, name))


def _due_key(at_ms: int, kind: bytes, name: bytes) -> bytes:
    group = ENDING if kind in (KEY, LEASE) else FORGETTING
    return group + _NUMBER.pack(at_ms) + _name(kind, name)


# --- leases ---------------------------------------------------------------------------------------

ALIVE, EXPIRING, REVOKED = 0, 1, 2


class Lease(NamedTuple):
    """`going`: ALIVE; else it holds nobody any more, and its keys are being deleted."""

    ttl_s: int
    expires_ms: int
    going: int = ALIVE

    def is_alive(self, clock_ms: int) -> bool:
        """May somebody still use it? One that is due has ended, also where the keys of others that
        are due have to be deleted first."""
        return self.going == ALIVE and clock_ms < self.expires_ms


def encode_lease(lease: Lease) -> bytes:
    return _LEASE.pack(*lease)


def decode_lease(data: bytes) -> Lease:
    return Lease(*_LEASE.unpack(data))


def lease_of(view: View, lease_id: str) -> Lease | None:
    data = view.read("leases", lease_id.encode()) if may_be_lease(lease_id) else None
    return None if data is None else decode_lease(data)


def may_be_lease(lease_id: str) -> bool:
    """Such an id fits into the tables' keys; no other was ever given out."""
    return 0 < len(lease_id) <= _SHORT and lease_id.isascii() and lease_id.isprintable()


def attached_prefix(lease_id: str) -> bytes:
    return lease_id.encode() + b"\0"


def attach(view: View, lease_id: str, key: bytes) -> None:
    view.write("attached", attached_prefix(lease_id) + _name(KEY, key), key)


def detach(view: View, lease_id: str, key: bytes) -> None:
    view.remove("attached", attached_prefix(lease_id) + _name(KEY, key))


def attached(view: View, lease_id: str) -> Iterator[bytes]:
    """The keys that the lease holds. Each may be detached before the next is asked for."""
    prefix = start = attached_prefix(lease_id)
    while (found := view.first("attached", start)) is not None and found[0].startswith(prefix):
        yield found[1]
        start = found[0] + b"\0"


# --- exactly once ---------------------------------------------------------------------------------


class Client(NamedTuple):
    """A client that numbers its requests: `kept` results are known, none up to `forgotten`."""

    kept: int
    forgotten: int
    used_ms: int


def encode_client(client: Client) -> bytes:
    return _CLIENT.pack(*client)


def decode_client(data: bytes) -> Client:
    return Client(*_CLIENT.unpack(data))


def result_key(client: bytes, number: int) -> bytes:
    return client + b"\0" + _NUMBER.pack(number)


def result_number(key: bytes) -> int:
    """The number in a key of the table."""
    number: int = _NUMBER.unpack_from(key, len(key) - 8)[0]
    return number
