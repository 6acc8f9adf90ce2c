"""Damage to the files of a node that is down."""

from __future__ import annotations

import os
import random
from pathlib import Path


def file_of(directory: Path, part: str) -> Path | None:
    """The file that holds the "log", the "state" or the newest "snapshot"; None: there is none."""
    if part == "log":
        return directory / "log" / "data.mdb"
    if part == "state":
        current = (directory / "CURRENT").read_text(encoding="utf-8").strip()
        return directory / current / "data.mdb"
    snapshots = (directory / "snapshots").glob("*.dsnap")
    return max(snapshots, key=lambda file: int(file.stem.split("-")[2]), default=None)


def flip(file: Path, rng: random.Random) -> str:
    """Flip one bit of a byte that is not zero, for zeros are mostly space that nobody uses.

    Returns:
        What was done, for people.
    """
    data = file.read_bytes()
    used = [position for position, byte in enumerate(data) if byte]
    position, bit = rng.choice(used), rng.randrange(8)
    with file.open("r+b") as stream:
        stream.seek(position)
        stream.write(bytes([data[position] ^ 1 << bit]))
    return f"bit {bit} of byte {position} of {file.parent.name}/{file.name}"


def cut_short(file: Path, rng: random.Random) -> str:
    """Let the file end somewhere before its end, as one may that a file system has mended.

    Returns:
        As `flip`.
    """
    size = rng.randrange(file.stat().st_size)
    os.truncate(file, size)
    return f"{file.parent.name}/{file.name} ends after {size} bytes"
