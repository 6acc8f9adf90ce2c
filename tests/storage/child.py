"""What the storage tests run in processes of their own, to be killed, refused or damaged.

child.py lock ROOT NODE_ID          hold the directory until stdin ends
child.py save PATH SEED             write the log for ever; say what is tried and what is done
child.py apply PATH SEED            the same with the state
child.py full PATH BYTES            save until the file may not grow beyond BYTES
child.py verify PATH                open the log and print a digest of all that is in it
child.py acknowledge ROOT           open the directory and write its log as a node does; say what
                                    would be acknowledged
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from dengine.errors import DataCorruption, StorageIO
from dengine.kv.commands import Command, Delete, DeleteRange, Put, encode_batch, encode_command
from dengine.node.log_writer import LogWriter
from dengine.raft.membership import Member, Membership, Settings, found
from dengine.raft.raft import Ready
from dengine.raft.types import Entry, EntryKind, HardState, LogId, MemberId
from dengine.storage.directory import DataDirectory
from dengine.storage.log_store import LogStore
from dengine.storage.state_store import StateStore


def entry(index: int, term: int) -> Entry:
    """The one entry that the tests put at this position in this term."""
    rng = random.Random(index * 1_000_003 + term)
    kind = rng.choice([EntryKind.NORMAL] * 6 + [EntryKind.NOOP, EntryKind.CONFIG])
    if kind is EntryKind.CONFIG:
        member = Member(MemberId(index, term), f"10.0.0.1:{index}")
        return Entry(index, term, kind, found("c", [member], Settings()).encode())
    size = rng.choice([0, 1, 300, 4000, 4080, 20_000]) if kind is EntryKind.NORMAL else 0
    return Entry(index, term, kind, rng.randbytes(size))


def commands(index: int) -> list[Command]:
    """The commands that the tests apply at this index."""
    rng = random.Random(index)
    made: list[Command] = []
    for _ in range(rng.randint(0, 8)):
        key = b"key-%d" % rng.randint(0, 40)
        match rng.randint(0, 9):
            case 0:
                made.append(DeleteRange(key, None, 3))
            case 1 | 2:
                made.append(Delete(key))
            case _:
                made.append(Put(key, rng.randbytes(rng.choice([0, 10, 3000, 9000]))))
    return made


def normal_entry(index: int) -> Entry:
    data = encode_batch([encode_command(command) for command in commands(index)])
    return Entry(index, 1, EntryKind.NORMAL, data)


def digest(store: LogStore) -> str:
    """Everything a log holds, as a short text."""
    hard_state, configs = store.load()
    entries = store.entries(1, store.last_index() + 1, 2**40) if store.last_index() else ()
    return hashlib.sha256(repr((hard_state, configs, entries)).encode()).hexdigest()


def say(text: str) -> None:
    print(text, flush=True)


def lock(root: str, node_id: str) -> None:
    directory = DataDirectory.open(Path(root), int(node_id))
    say("locked")
    sys.stdin.read()
    directory.close()


def save(path: str, seed: str) -> None:
    rng = random.Random(int(seed))
    store = LogStore(Path(path))
    hard_state, _ = store.load()
    while True:
        last, term = store.last_index(), hard_state.term
        first = last + 1
        if rng.random() < 0.2:
            term += 1
            first = max(1, first - rng.randint(0, 4))
        count = rng.choice([0, 1, 1, 1, 2, 5])
        voted_id = rng.randint(1, 3)
        hard_state = HardState(term, MemberId(voted_id, 7), last)
        say(f"try {first} {count} {term} {voted_id} {last}")
        store.save(hard_state, [entry(index, term) for index in range(first, first + count)])
        say("done")


def apply(path: str, seed: str) -> None:
    rng = random.Random(int(seed))
    store = StateStore(Path(path))
    while True:
        first = store.applied.index + 1
        last = first + rng.choice([0, 0, 1, 4])
        store.apply([normal_entry(index) for index in range(first, last + 1)])
        say(f"done {last}")


def full(path: str, limit: str) -> None:
    """A disk that takes no more: the kernel fails each write beyond the limit with EFBIG."""
    store = LogStore(Path(path))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), most))
    while True:
        index = store.last_index() + 1
        try:
            store.save(HardState(1), [Entry(index, 1, EntryKind.NORMAL, b"x" * 20_000)])
        except StorageIO:
            break
        say(f"done {index}")
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        store.save(HardState(9), ())
    except StorageIO as error:
        say(f"refused {error}")


def verify(path: str) -> None:
    try:
        store = LogStore(Path(path))
        say(digest(store))
    except DataCorruption as error:
        say(f"damaged {error.details.get('index')} {error}")


def acknowledge(root: str) -> None:
    directory = DataDirectory.open(Path(root), 1)
    store = LogStore(directory.log_path)
    say("opened")
    term, last = store.load()[0].term + 1, store.last_index()
    vote = HardState(term, MemberId(1, 7), last)
    sizes = (1, 300, 20_000)  # the last has pages of its own
    entries = [Entry(last + n, term, EntryKind.NORMAL, b"x" * s) for n, s in enumerate(sizes, 1)]
    replaced = Entry(last + len(sizes), term + 1, EntryKind.NORMAL, b"y")
    asyncio.run(_written(store, [(vote, []), (None, entries), (HardState(term + 1), [replaced])]))
    store.purge_to = last + 1
    store.purge_step()
    say("purged")
    store.reset(HardState(term + 2), LogId(last + 9, term + 2), Membership())
    say("reset")
    store.close()
    directory.close()


async def _written(store: LogStore, saves: list[tuple[HardState | None, list[Entry]]]) -> None:
    """Each by the log's own thread, one after the other."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Queue[BaseException | None] = asyncio.Queue()

    def written(_ready: Ready, error: BaseException | None, _seconds: float) -> None:
        say("written")
        ended.put_nowait(error)

    writer = LogWriter(store, lambda ready: None, loop, written, ended.put_nowait)
    for hard_state, entries in saves:
        writer.submit(Ready(1, (), hard_state, entries, (), (), (), ()))
        if error := await ended.get():
            raise error
    writer.stop(60)


MODES: dict[str, Callable[..., None]] = {
    "lock": lock,
    "save": save,
    "apply": apply,
    "full": full,
    "verify": verify,
    "acknowledge": acknowledge,
}

if __name__ == "__main__":
    MODES[sys.argv[1]](*sys.argv[2:])
