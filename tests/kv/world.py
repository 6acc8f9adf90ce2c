"""A state machine over plain dicts, driven entry by entry at log times that a test chooses."""

from __future__ import annotations

from dengine.kv.commands import Command, Result, encode_batch, encode_command
from dengine.kv.machine import apply_batch
from dengine.kv.store import KINDS, Rules
from tests.kv.twin import DictView

RULES = Rules(cluster_id="c0ffee00c0ffee00", idempotency_window_ms=60_000)


class World:
    """One member's machine. `revision` and `clock_ms` are those after the last entry."""

    def __init__(self, rules: Rules = RULES) -> None:
        self.view = DictView()
        self.rules = rules
        self.revision = 0
        self.index = 0
        self.clock_ms = 1_000

    def entry(self, *commands: Command, after_ms: int = 0) -> list[Result]:
        """The results of the next entry, `after_ms` after the one before."""
        self.clock_ms += after_ms
        self.index += 1
        data = encode_batch([encode_command(c) for c in commands], self.clock_ms)
        self.revision, results = apply_batch(data, self.view, self.revision, self.rules, self.index)
        return results

    def one(self, command: Command, after_ms: int = 0) -> Result:
        (result,) = self.entry(command, after_ms=after_ms)
        return result

    @property
    def keys(self) -> list[bytes]:
        return sorted(self.view.records)

    def events(self) -> list[tuple[int, list[tuple[str, bytes]]]]:
        """What was changed since the last call, by revision."""
        changes, self.view.changes = self.view.changes, []
        return [(r, [(KINDS[e.kind], e.key) for e in events]) for r, events in changes]
