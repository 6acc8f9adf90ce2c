"""The steps on disk of every path, in the order in which they happen.

A site is a kind of call on one file. The full sweep goes through all its occurrences until one is
not reached any more; `about` only tells the sample how many there are. `test_the_list_is_complete`
fails when a path makes a call that is not listed here.
"""

from __future__ import annotations

from typing import Final, NamedTuple

# Every call with which a process can change what is on disk. Not sync_file_range, which writes what
# the kernel would write by itself, at times that nothing depends on.
CHANGING: Final = (
    "open,openat,creat,write,pwrite64,writev,pwritev,pwritev2,fsync,fdatasync,msync,"
    "truncate,ftruncate,fallocate,rename,renameat,renameat2,unlink,unlinkat,"
    "rmdir,mkdir,mkdirat,link,linkat,symlink,symlinkat"
)
WRITES: Final = "write,pwrite64,writev,pwritev"
SYNCS: Final = "fsync,fdatasync"
REMOVES: Final = "unlink,unlinkat,rmdir"


class Site(NamedTuple):
    """One step.

    Attributes:
        file: what is touched, by the name that a scenario gives a path to.
        syscalls: as strace takes them.
        who: "writer" (the subprocess) or "node".
        about: occurrences to expect.
        new_thread: done by a thread that may not be there yet when strace attaches.
        ends: what a node makes of an error here: True exits 74, False goes on, None either.
    """

    file: str
    syscalls: str
    who: str = "writer"
    about: int = 1
    ends: bool | None = True
    new_thread: bool = False

    @property
    def name(self) -> str:
        return f"{self.syscalls.split(',')[0]} {self.file}"


# Of the first snapshot, taken or fetched.
FIRST: Final = (
    Site("snapshots/ made", "mkdir"),
    Site("parent of snapshots/", SYNCS),
)

TAKE: Final = (
    Site("partial", "openat"),
    Site("partial", WRITES, about=15),
    Site("partial", SYNCS),
    Site("partial", "rename"),
    Site("snapshots/", SYNCS),
    Site("oldest snapshot", REMOVES, "node", ends=False, new_thread=True),
)

PURGE: Final = (
    Site("log", WRITES, "node", about=5),
    Site("log", SYNCS, "node"),
)

# What an install does after the state is unpacked, and what any start does before it serves.
_ADOPT: Final = (
    Site("CURRENT.tmp", "openat", "node"),
    Site("CURRENT.tmp", WRITES, "node"),
    Site("CURRENT.tmp", SYNCS, "node"),
    Site("CURRENT.tmp", "rename", "node"),
    Site("CLEAN", REMOVES, "node"),
    Site("RUN.tmp", "openat", "node", about=2),
    Site("RUN.tmp", WRITES, "node", about=2),
    Site("RUN.tmp", SYNCS, "node", about=2),
    Site("RUN.tmp", "rename", "node", about=2),
    Site("directory", SYNCS, "node", about=8),
    Site("new state UNPACKED", REMOVES, "node"),
    Site("new state/", SYNCS, "node", about=2, ends=None),
    Site("old state/", REMOVES, "node", about=3, ends=False),
)


def _unpack(who: str, state: str = "new state") -> tuple[Site, ...]:
    return (
        Site(f"{state}/", "mkdir", who, ends=None),  # the last one finds it there already
        # One of these opens is only for reading, and LMDB tries that one twice.
        Site(f"{state} data", "openat", who, about=2, ends=None),
        Site(f"{state} data", WRITES, who, about=15),
        Site(f"{state} data", SYNCS, who),
        Site(f"{state} data", "truncate", who, about=2),
        Site(f"{state} lock", "openat", who),
        Site(f"{state} lock", WRITES + ",ftruncate", who),
        Site(f"{state} UNPACKED", "openat", who),
        Site(f"{state}/", SYNCS, who),
    )


INSTALL: Final = (
    Site("fetched", "openat", about=2),
    Site("fetched", "ftruncate"),
    Site("fetched", WRITES, about=8),
    Site("fetched", SYNCS),
    *_unpack("writer"),
    *_ADOPT,
    Site("fetched", "rename", "node"),
    Site("snapshots/", SYNCS, "node"),
    Site("log", WRITES, "node", about=6),
    Site("log", SYNCS, "node"),
)

REBUILD: Final = (
    Site("OPENING", "openat", "node"),
    Site("OPENING", REMOVES, "node", ends=False),
    Site("log/", "mkdir", "node", ends=None),
    Site("log lock", "openat", "node"),
    *_unpack("node"),
    *_ADOPT,
)

# First an empty state takes the place of the wrong one ("old"), then one that a subprocess unpacks
# from the newest snapshot ("newest") that of the empty one ("new"). The first is done by the loop,
# the second by the thread that writes the log, and calls are counted per thread.
DISTRUST: Final = (
    # The mark; the node has stepped down by now, and where it cannot be written it tries again.
    Site("old state DAMAGED.tmp", "openat", "node", ends=False, new_thread=True),
    Site("old state DAMAGED.tmp", SYNCS, "node", ends=False, new_thread=True),
    Site("old state DAMAGED.tmp", "rename", "node", ends=False, new_thread=True),
    # Where making it fails that is tried again; opening it must not fail.
    Site("new state/", "mkdir", "node", about=2, ends=None, new_thread=True),
    Site("new state/", SYNCS, "node", ends=False, new_thread=True),
    Site("new state data", "openat", "node", ends=None),
    Site("new state data", WRITES, "node", about=2, ends=None),
    Site("new state lock", "openat", "node"),
    Site("new state lock", WRITES + ",ftruncate", "node"),
    Site("old state/", REMOVES, "node", about=2, ends=False, new_thread=True),
    *_unpack("writer", "newest state"),
    Site("CURRENT.tmp", "openat", "node"),
    Site("CURRENT.tmp", WRITES, "node"),
    Site("CURRENT.tmp", SYNCS, "node"),
    Site("CURRENT.tmp", "rename", "node"),
    Site("CLEAN", REMOVES, "node"),
    Site("RUN.tmp", "openat", "node"),
    Site("RUN.tmp", WRITES, "node"),
    Site("RUN.tmp", SYNCS, "node"),
    Site("RUN.tmp", "rename", "node"),
    Site("directory", SYNCS, "node", about=8),
    Site("newest state UNPACKED", REMOVES, "node"),
    Site("new state/", REMOVES, "node", about=3, ends=False),
)
