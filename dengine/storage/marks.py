"""What lies beside a state and tells the next start whether it may be used."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from dengine.errors import StorageIO
from dengine.storage.environment import sync_directory

DAMAGED_MARK: Final = "DAMAGED"  # in the state's directory, or the log's: not to be used again
RUN_MARK: Final = "RUN"  # in the data directory: the boot that can trust the state as it is
FILES_TOO: Final = "the snapshots may be wrong as well"  # in DAMAGED


def distrust_state(path: Path) -> None:
    """Have the next start rebuild the state in directory `path`: unlike a log, it can be rebuilt.

    A disk that refuses even this has another error to tell, which ends the process.
    """
    try:
        (path / DAMAGED_MARK).touch(mode=0o600)
        sync_directory(path)
    except OSError:
        with suppress(OSError):  # a full disk still lets go of the mark that vouches for the state
            (path.parent / RUN_MARK).unlink()
            sync_directory(path.parent)


def forget_run(path: Path) -> None:
    """Before the last sync of the state in directory `path`. Only the process that asked is told
    that the disk has refused a page, which the kernel takes for written from then on: one that is
    killed at that very moment, or cannot write that down, could tell nobody, and this boot would
    trust the state.

    Raises StorageIO: do not ask then, and the pages stay what they are.
    """
    mark = path.parent / RUN_MARK
    try:
        mark.unlink(missing_ok=True)
    except OSError as error:
        raise StorageIO(f"cannot remove {mark}: {error.strerror}; check the disk") from error
