"""Writing a file's dirty pages to the disk little by little, before the kernel does it at once.

The kernel leaves what was written in memory for half a minute and then writes all of it in one go.
Whatever another file on that disk has to sync in the meantime, a log above all, waits behind it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

STEP_BYTES: Final = 1024 * 1024  # what a sync of another file may have to wait for
# SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER
_WRITE_AND_WAIT: Final = 1 | 2 | 4

# What a disk or a file system says that could not write pages it had taken. Nothing else says so:
# a sandbox or an unusual kernel may not know the call at all.
LOST_PAGES: Final = frozenset((errno.EIO, errno.ENOSPC, errno.EDQUOT))

_sync_file_range = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def write_back(file: Path) -> Iterator[float]:
    """Write the dirty pages of `file`, as long as it is now, in steps of at most `STEP_BYTES`.

    This makes nothing durable: neither the file's length nor the disk's own cache is looked after
    (sync_file_range(2)). It takes no lock that a writer of the file needs.

    Yields:
        After each step the seconds that it took; next to nothing where no page was dirty.

    Raises:
        OSError: with a code of `LOST_PAGES` the disk did not take them; else it cannot be done.
    """
    if _sync_file_range is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fd = os.open(file, os.O_RDONLY)
    try:
        for position in range(0, os.fstat(fd).st_size, STEP_BYTES):
            started = time.perf_counter()
            if _sync_file_range(fd, position, STEP_BYTES, _WRITE_AND_WAIT):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
            yield time.perf_counter() - started
    finally:
        os.close(fd)
