"""The records of a state as they lie on disk, each with a CRC-32 over its key and itself.

    database  key            record
    keys      the user's     layout (u8), create_revision, mod_revision, version (u64 each); of
                             layout 1 a time (u64), of layout 2 a length (u8) and a lease's id;
                             value
    meta      b"applied"     index and term of the last entry applied, revision (u64 each), the
                             state hash (16 bytes)
    meta      b"membership"  the last applied CONFIG entry's data
    meta      b"totals"      kv/store.py: Totals; from the first entry of version 2 on
    others                   kv/tables.py

The state hash is the sum, modulo 2^128, of a hash of every record but `applied`. A sum is kept up
to date by adding what comes and subtracting what goes (Bellare and Micciancio, "A New Paradigm for
Collision-Free Hashing", 1997; against accidents, not against forgers, so a fast hash will do).
Equal entries must give equal hashes on every member; see node/agreement.py. A database that is
empty or missing adds nothing, so a state of the release before has the hash that it had there.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec
from xxhash import xxh3_128_intdigest
from zlib_ng.zlib_ng import crc32

from dengine.kv.store import TABLES, Record, Table
from dengine.raft.types import LogId
from dengine.storage.environment import CRC_BYTES, CRC_RESIDUE, pack_crc

APPLIED_KEY: Final = b"applied"
MEMBERSHIP_KEY: Final = b"membership"
TOTALS_KEY: Final = b"totals"
DATABASES_MAX: Final = 16
# By name, and as the hash tells them apart. The first two are in every state.
DATABASES: Final = {
    b"keys": 0,
    b"meta": 1,
    **{name.encode(): number for number, name in enumerate(TABLES, start=2)},
}
KEYS, META = DATABASES[b"keys"], DATABASES[b"meta"]
REQUIRED: Final = (b"keys", b"meta")
_HASH_MASK: Final = (1 << 128) - 1

_RECORD: Final = struct.Struct("<BQQQ")
_APPLIED: Final = struct.Struct("<QQQ16s")
_TIME: Final = struct.Struct("<Q")
_PLAIN, _EXPIRES, _LEASED = 0, 1, 2  # layouts

_VALUE: Final = slice(_RECORD.size, -CRC_BYTES)  # where a plain record has it

_pack_record = _RECORD.pack
_unpack_record = _RECORD.unpack_from


class StateDigest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a state is after an entry, in a few bytes; equal on all members that applied it."""

    index: int
    revision: int
    state_hash: bytes  # 16 bytes


def number_of(table: Table) -> int:
    """The table's number in `DATABASES`."""
    return DATABASES[table.encode()]


def record_hash(database: int, key: bytes, raw: bytes) -> int:
    """128 bits of one record; the seed keeps databases apart, and where a key ends.

    Args:
        database: its number in `DATABASES`.
        raw: the whole record, CRC included.
    """
    return xxh3_128_intdigest(key + raw, database << 16 | len(key))


def row_hash(key: bytes, row: bytes) -> int:
    """`record_hash` of an `encode_row`."""
    return xxh3_128_intdigest(row, len(key))  # for KEYS is 0


def sum_bytes(record_hashes: int) -> bytes:
    """A sum of `record_hash`es, which may be negative or large, as the state hash: 16 bytes."""
    return (record_hashes & _HASH_MASK).to_bytes(16, "big")


def signed(key: bytes, data: bytes) -> bytes:
    """The record that holds `data` under `key`."""
    return data + pack_crc(crc32(data, crc32(key)))


def is_sound(key: bytes, raw: bytes | memoryview) -> bool:
    """Is it the record that was written under `key`?"""
    return crc32(raw, crc32(key)) == CRC_RESIDUE


def encode_row(key: bytes, record: Record) -> bytes:
    """The key, and right after it the whole record in the database `keys`: what its hash is made
    of, so that nothing needs to be copied for that."""
    layout, more = _PLAIN, b""
    if record.expires_ms:
        layout, more = _EXPIRES, _TIME.pack(record.expires_ms)
    elif record.lease:
        lease = record.lease.encode()
        layout, more = _LEASED, bytes([len(lease)]) + lease
    head = _pack_record(layout, record.create_revision, record.mod_revision, record.version)
    row = b"".join((key, head, more, record.value))
    return row + pack_crc(crc32(row))


def decode_record(raw: bytes | memoryview, keys_only: bool = False) -> Record | int:
    """The record in an `encode_row`, without the key, if it is sound; else its unknown layout."""
    layout, create_revision, mod_revision, version = _unpack_record(raw)
    if not layout and type(raw) is bytes and not keys_only:  # nearly all of them: without a detour
        return Record(create_revision, mod_revision, version, raw[_VALUE])
    start, expires_ms, lease = _RECORD.size, 0, ""
    if layout == _EXPIRES:
        expires_ms = _TIME.unpack_from(raw, start)[0]
        start += _TIME.size
    elif layout == _LEASED:
        end = start + 1 + raw[start]
        lease = str(raw[start + 1 : end], "ascii")
        start = end
    elif layout != _PLAIN:
        return int(layout)
    value = b"" if keys_only else bytes(raw[start:-CRC_BYTES])
    return Record(create_revision, mod_revision, version, value, expires_ms, lease)


def encode_applied(applied: LogId, revision: int, state_hash: int) -> bytes:
    """The `applied` record."""
    data = _APPLIED.pack(applied.index, applied.term, revision, sum_bytes(state_hash))
    return signed(APPLIED_KEY, data)


def read_applied(raw: bytes) -> tuple[LogId, StateDigest] | None:
    """The `applied` record as stored; None when it is damaged or of another layout."""
    if not is_sound(APPLIED_KEY, raw) or len(raw) != _APPLIED.size + CRC_BYTES:
        return None
    index, term, revision, state_hash = _APPLIED.unpack_from(raw)
    return LogId(index, term), StateDigest(index, revision, state_hash)
