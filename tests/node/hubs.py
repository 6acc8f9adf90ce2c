"""A hub without a state behind it, for what its readers do with what they are told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from dengine.kv.store import DELETE, PUT, Event, Record
from dengine.node.watch_hub import Changes, Message, Selection, Watch, WatchHub


def bare_hub() -> WatchHub:
    state: Any = SimpleNamespace(
        path=Path(), revision=0, totals=None, keep_changes=False, take_changes=list
    )
    return WatchHub(cast(Any, state), 1000, lambda error: None)


def told(hub: WatchHub, *messages: Message) -> Watch:
    """A watch for which these wait, behind its first progress."""
    watch = hub.open(Selection(b"", True), None, prev=True)
    for message in messages:
        assert watch.push(message), "no room"
    return watch


def change_of(revision: int, count: int, name: str = "k", value: bytes = b"") -> Changes:
    """So many events of all sorts, with keys that begin with `name`."""
    first, now = (Record(made, revision, 1, value + b"%d" % made) for made in (5, revision))
    binary = Record(5, revision, 1, value + b"\xff")
    sorts = (
        (DELETE, "", None, first),
        (PUT, "\N{SNOWMAN}", now, None),
        (PUT, "", first, binary),
    )
    events = []
    for n in range(count):
        kind, mark, record, prev = sorts[n % 3]
        events.append(Event(kind, f"{name}/{mark}{n}".encode(), record, prev))
    return Changes(revision, events, prev=True)
