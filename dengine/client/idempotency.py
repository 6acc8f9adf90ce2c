"""Idempotency keys: what lets a write be sent again without happening twice.

A node keeps the newest 1000 results of a client that numbers its requests, `CLIENT:N`, for at most
10 000 clients; and 100 000 results of keys that stand for themselves (DESIGN 5). So a client that
makes a few writes and goes away uses keys of the second kind, and one that stays numbers them.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field

SINGLE_KEYS = 4  # the first writes of a client: most scripts make no more
WINDOW = 500  # of the 1000 results that are kept, so that nothing that waits ever falls out of it


@dataclass(slots=True)
class _Session:
    """One client id and its numbers, which grow by one."""

    client_id: str = field(default_factory=lambda: secrets.token_hex(16))
    issued: int = 0
    waiting: set[int] = field(default_factory=set)


class IdempotencyKeys:
    """Hands out a key for every write. A forked process never continues its parent's numbers."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._single = 0
        self._session = _Session()

    def take(self) -> Key:
        """The key of a new write; `Key.done()` when that write has ended."""
        if os.getpid() != self._pid:
            self._begin()
        if self._single < SINGLE_KEYS:
            self._single += 1
            return Key(single_key(), self)
        key = Key("", self)
        self.renumber(key)
        return key

    def renumber(self, key: Key) -> None:
        """Make `key` the next one of a client that numbers its requests."""
        session = self._session
        if session.waiting and session.issued - min(session.waiting) >= WINDOW:
            # One write waits for long while others go on. Its result must not be pushed out by
            # theirs, so these begin anew as another client.
            session = self._session = _Session()
        session.issued += 1
        session.waiting.add(session.issued)
        key.text = f"{session.client_id}:{session.issued}"
        key.session, key.number = session, session.issued


def single_key() -> str:
    """A key that stands for itself."""
    return f"once-{secrets.token_hex(16)}"


@dataclass(slots=True)
class Key:
    """The `Idempotency-Key` of one write, for all its attempts.

    Args:
        keys: where it comes from; None: from the caller, who wants this very one.
    """

    text: str
    keys: IdempotencyKeys | None = None
    session: _Session | None = None
    number: int = 0

    def renumber(self) -> None:
        """The cluster remembers as many keys that stand for themselves as it can (it says 429 to
        them): use one of the other kind. Only for a write that certainly did not happen so far.
        """
        if self.keys is not None and self.session is None:
            self.keys.renumber(self)

    def done(self) -> None:
        """The write has ended, whatever became of it."""
        if self.session is not None:
            self.session.waiting.discard(self.number)
