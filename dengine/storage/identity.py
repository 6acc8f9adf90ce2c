"""identity.json: who a data directory is."""

from __future__ import annotations

from pathlib import Path

import msgspec
from zlib_ng.zlib_ng import crc32

from dengine.errors import DataCorruption, IdentityError, StorageIO
from dengine.raft.membership import decode_membership

FORMAT = 1


class Identity(msgspec.Struct, frozen=True):
    """Who a data directory is. `format`, `node_id` and, until it is found to be an old copy,
    `incarnation` are for good."""

    format: int
    node_id: int
    incarnation: int  # 63 random bits, never 0; a hexadecimal string in the file
    cluster_id: str = ""  # "" until it belongs to a cluster
    address: str = ""
    removed: str | None = None  # why the cluster removed this incarnation
    stickiness_ms: int = 0  # for how long a leader may count on no vote of it for another one
    pledge: bytes = b""  # the first membership it is bound to; b"" once it belongs to a cluster


class _IdentityFile(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The JSON in identity.json; 63-bit numbers are strings since many readers round them, and
    `pledge` is hexadecimal. `checksum` is the CRC-32 of all that comes before it, in the most
    compact form; a file without one is older than that."""

    format: int
    node_id: int
    incarnation: str
    cluster_id: str
    address: str
    removed: str | None
    stickiness_ms: int = 0
    pledge: str = ""
    checksum: str = ""


def identity_text(identity: Identity) -> str:
    """What the file holds; `read_identity` is the inverse."""
    fields = msgspec.structs.asdict(identity)
    fields["incarnation"] = f"{identity.incarnation:016x}"
    fields["pledge"] = identity.pledge.hex()
    file = _IdentityFile(**fields)
    file.checksum = _checksum(file)
    return msgspec.json.format(msgspec.json.encode(file), indent=2).decode() + "\n"


def _checksum(file: _IdentityFile) -> str:
    return f"{crc32(msgspec.json.encode(msgspec.structs.replace(file, checksum=''))):08x}"


def read_identity(file: Path) -> Identity:
    """What an identity.json says. Raises DataCorruption, IdentityError, StorageIO."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise StorageIO(f"cannot read {file}: {error.strerror}") from error
    try:
        found = msgspec.json.decode(data, type=_IdentityFile)
        incarnation = int(found.incarnation, 16)
        pledge = bytes.fromhex(found.pledge)
        if pledge:
            decode_membership(pledge)
    except (msgspec.MsgspecError, ValueError) as error:
        raise _damaged(file, str(error)) from error
    if found.format != FORMAT:
        raise IdentityError(
            f"{file} has format {found.format}, this dengine reads format {FORMAT}: "
            "start the version that wrote it"
        )
    if found.checksum and found.checksum != _checksum(found):
        raise _damaged(file, "its checksum is that of another content")
    return Identity(
        found.format,
        found.node_id,
        incarnation,
        found.cluster_id,
        found.address,
        found.removed,
        found.stickiness_ms,
        pledge,
    )


def _damaged(file: Path, what: str) -> DataCorruption:
    return DataCorruption(
        f"{file} is damaged ({what}): restore it, or remove {file.parent}, and the node joins anew",
        file=str(file),
    )
