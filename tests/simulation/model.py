"""What the committed log says: the result of every command, and what every revision has changed.

The log is carried out by the real state machine, and nothing here judges that machine: it is
compared, command by command, with its twin (keys.py) and a count kept by hand (promises.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from dengine.kv.commands import (
    Command,
    Compare,
    Deferred,
    Delete,
    DeleteRange,
    DeleteResult,
    Full,
    LeaseRevoked,
    Once,
    OperationResult,
    Put,
    PutResult,
    Result,
    Txn,
    TxnResult,
    batch_clock_ms,
    decode_batch,
)
from dengine.kv.machine import apply_batch
from dengine.kv.store import TABLES, Event, Record, Rules, Table, Totals
from dengine.raft.membership import decode_membership
from dengine.raft.types import Entry, EntryKind
from dengine.storage.state_view import rules_of
from tests.simulation.environment import Table as SortedTable
from tests.simulation.violation import violated

MARKS: Final = 1 << 40  # more than any revision


def mark_of(command: Command) -> bytes:
    """Tells apart all requests of a run: a put by its value, a range delete by its limit, a
    deletion by a revision that cannot be, a transaction by a key that it compares first and that
    never is, and what may be sent again by the key under which it is."""
    if isinstance(command, Once):
        return once_mark(command.key, command.number)
    if isinstance(command, Put):
        return command.value
    if isinstance(command, Txn):
        return command.compare[0].key
    if isinstance(command, Delete):
        assert command.condition is not None
        assert command.condition.if_match is not None
        return b"d%d" % (command.condition.if_match[-1] - MARKS)
    assert isinstance(command, DeleteRange), command
    return b"-%d" % command.limit


def marking(mark: int) -> Compare:
    """What makes a transaction one of a kind. It always holds."""
    return Compare(b"#%d" % mark, "exists", "=", False)


def once_mark(key: str, number: int | None) -> bytes:
    """Of a request under an idempotency key."""
    return f"#{key}:{number}".encode()


class Outcome(NamedTuple):
    """One command of an entry. `events` are what it has changed; None: nothing."""

    mark: bytes
    command: Command
    result: Result
    events: Sequence[Event] | None


class Step(NamedTuple):
    """One entry of commands.

    Attributes:
        clock_ms: the log time that it carries; None for the format that has none.
        ended: what time has changed before the commands had their turn; None: nothing.
        left: the keys that were changed, and what they are since; None: nothing.
        revision: of the store, since.
    """

    index: int
    term: int
    clock_ms: int | None
    ended: Sequence[Event] | None
    outcomes: list[Outcome]
    left: dict[bytes, Record | None]
    revision: int


class _View:
    """The state machine's view of plain tables in memory; `touched` are the keys that changed."""

    def __init__(self) -> None:
        self.records = SortedTable()
        self.tables = {name: SortedTable() for name in TABLES}
        self.totals: Totals | None = None
        self.touched: dict[bytes, None] = {}
        self.changes: dict[int, Sequence[Event]] = {}

    def get(self, key: bytes) -> Record | None:
        return self.records.data.get(key)  # type: ignore[return-value]

    def put(self, key: bytes, record: Record) -> None:
        self.records.put(key, record)  # type: ignore[arg-type]
        self.touched[key] = None

    def get_many(self, keys: Sequence[bytes], size: int | None) -> list[Record | None]:
        found: list[Record | None] = []
        for key in keys:
            found.append(self.get(key))
            if size is not None and sum(len(r.value) for r in found if r) > size:
                break
        return found

    def put_many(self, keys: Sequence[bytes], records: Sequence[Record]) -> None:
        for key, record in zip(keys, records, strict=True):
            self.put(key, record)

    def delete(self, key: bytes) -> None:
        self.records.delete(key)
        self.touched[key] = None

    def scan(self, start: bytes, end: bytes | None) -> Iterator[bytes]:
        keys = self.records.keys
        last = len(keys) if end is None else bisect_left(keys, end)
        return iter(keys[bisect_left(keys, start) : last])

    def read(self, table: Table, key: bytes) -> bytes | None:
        return self.tables[table].data.get(key)

    def write(self, table: Table, key: bytes, data: bytes) -> None:
        self.tables[table].put(key, data)

    append = write

    def remove(self, table: Table, key: bytes) -> bytes | None:
        data = self.tables[table].data.get(key)
        if data is not None:
            self.tables[table].delete(key)
        return data

    def first(self, table: Table, start: bytes) -> tuple[bytes, bytes] | None:
        rows = self.tables[table]
        place = bisect_left(rows.keys, start)
        if place == len(rows.keys):
            return None
        return rows.keys[place], rows.data[rows.keys[place]]

    def changed(self, revision: int, events: Sequence[Event]) -> None:
        self.changes[revision] = list(events)


class Model:
    """Grows with the committed log.

    Attributes:
        answers: to every command, by its mark: one for each time that it was carried out, or found
            to have been.
        index_of: the first entry that a command is in.
        revision: after the last entry.
    """

    def __init__(self) -> None:
        self.answers: dict[bytes, list[Result]] = {}
        self.index_of: dict[bytes, int] = {}
        self.revision = 0
        self._view = _View()
        self._rules = Rules()
        self._revisions = [0]  # after each entry, by its index

    def committed(self, entry: Entry) -> Step | None:
        """Carry out the next entry; None for one that is not of commands. Each of them is known
        only after `take_in`."""
        step = None
        if entry.kind is EntryKind.CONFIG:
            self._rules = rules_of(decode_membership(entry.data))
        elif entry.kind is EntryKind.NORMAL:
            step = self._carry_out(entry)
        self._revisions.append(self.revision)
        return step

    def _carry_out(self, entry: Entry) -> Step:
        view, before = self._view, self.revision
        self.revision, results = apply_batch(entry.data, view, before, self._rules, entry.index)
        left = {key: view.get(key) for key in view.touched}
        view.touched.clear()
        revisions = range(before + 1, self.revision + 1)
        new = {r: view.changes[r] for r in revisions if r in view.changes}
        made = [_revision_made(result) for result in results]
        if not {*new, *made}.issuperset(revisions):
            violated("13 revisions", f"entry {entry.index} leaves a revision out")
        ended = new.pop(before + 1, None) if before + 1 not in made else None
        commands = decode_batch(entry.data)
        outcomes = [
            Outcome(mark_of(command), command, result, new.pop(revision, None))
            for command, result, revision in zip(commands, results, made, strict=True)
        ]
        if new:
            violated("13 revisions", f"entry {entry.index}: {list(new)} are of no command")
        clock_ms = batch_clock_ms(entry.data)
        return Step(entry.index, entry.term, clock_ms, ended, outcomes, left, self.revision)

    def take_in(self, outcome: Outcome, index: int) -> None:
        """A command of entry `index` is known from here on. What was put off does not count yet."""
        if not isinstance(outcome.result, Deferred):
            self.index_of.setdefault(outcome.mark, index)
            self.answers.setdefault(outcome.mark, []).append(outcome.result)

    def result(self, mark: bytes) -> Result | None:
        """What a command has come to; None: nothing (yet)."""
        answers = self.answers.get(mark, ())
        return next((answer for answer in answers if not isinstance(answer, Full)), None)

    def revision_at(self, index: int) -> int:
        """After entry `index`."""
        return self._revisions[index]

    def changed_by(self, revision: int) -> Sequence[Event]:
        """Nothing, for one that was made in the format that records no events."""
        return self._view.changes.get(revision, ())

    @property
    def compacted(self) -> int:
        """The newest revision that the history does not have any more."""
        totals = self._view.totals
        return self.revision if totals is None else totals.history_first - 1


def _revision_made(result: Result | OperationResult) -> int:
    """By the command that came to this, when it was carried out; 0: none."""
    if isinstance(result, TxnResult):
        return result.revision if any(map(_revision_made, result.results)) else 0
    if isinstance(result, DeleteResult | LeaseRevoked):
        return result.revision if result.deleted else 0
    return result.revision if isinstance(result, PutResult) else 0
