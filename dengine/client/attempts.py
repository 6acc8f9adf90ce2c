"""The attempts of one request: what is certain after them, and whether one more may be made.

No I/O and no clock, so that whoever sends requests decides alike: the client over HTTP
(`calls.py`), an app over calls on its own node (`embedded/calls.py`), the command line
(`cli/remote.py`).

A write may be sent again because it carries an `Idempotency-Key`, under which the cluster remembers
its result. It does so for `idempotency_window_s`, so a repetition must not come later than that:
once an attempt may have happened, none is sent more than REPEAT_FOR_S after it.

A node keeps the newest 1000 results of a client that numbers its requests, `CLIENT:N`, for at most
10 000 clients; and 100 000 results of keys that stand for themselves. So a client that makes a few
writes and goes away uses keys of the second kind, and one that stays numbers them.
"""

from __future__ import annotations

import copy
import os
import random
import secrets
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final, Literal

from dengine.errors import DengineError, Outcome, RateLimited, StaleRequest

# Well within the shortest `idempotency_window_s` that a cluster can have (config.py), for what is
# sent last may be under way for as long as a request can take.
REPEAT_FOR_S: Final = 300.0
PAUSE_S: Final = 0.05  # before the nodes are asked a second time; doubled with each round, up to
PAUSE_MAX_S: Final = 1.0
RATE_LIMITED_S: Final = 0.5  # at least, where a node asks for patience
# Under the key of this very request these are the state machine's own word on it (the first result
# comes back), so no other attempt can have ended differently.
VERDICTS: Final = (404, 412)

# A renewal may be carried out any number of times, and needs no key; a read changes nothing.
Kind = Literal["read", "renewal", "write"]

SINGLE_KEYS = 4  # the first writes of a client: most scripts make no more
WINDOW = 500  # of the 1000 results that are kept, so that nothing that waits ever falls out of it


class Attempts:
    """One request and what became of its attempts; times in seconds on any one clock.

    Args:
        key: of a write; takes another one where the cluster can remember no more of its sort.
    """

    def __init__(self, kind: Kind, key: Key | None = None) -> None:
        self._kind = kind
        self._key = key
        self._open: dict[Hashable, float] = {}  # may have happened or may still: when it was sent
        self._rounds = 0
        self.patience_s = 0.0  # what a node has asked for since the last pause

    def sent(self, attempt: Hashable, now: float) -> None:
        """`attempt`, which stands for one of them, is sent."""
        self._open[attempt] = now

    def did_nothing(self, attempt: Hashable) -> None:
        """It is certain that it did not happen, and will not."""
        self._open.pop(attempt, None)

    def refused(self, attempt: Hashable, error: DengineError) -> None:
        """It was answered with `error`."""
        if error.outcome == "none":
            self.did_nothing(attempt)
        if isinstance(error, RateLimited):
            self.patience_s = RATE_LIMITED_S
            full = error.details.get("full") == "keys"
            if full and self._key is not None and self.outcome == "none":
                self._key.renumber()

    @property
    def outcome(self) -> Outcome:
        """Of all attempts together, were no more heard of them."""
        return "unknown" if self._open and self._kind != "read" else "none"

    def may_send(self, now: float) -> bool:
        """May one more attempt be made, or could it be carried out a second time?"""
        return self.outcome == "none" or now < min(self._open.values()) + REPEAT_FOR_S

    def pause_s(self) -> float:
        """How long to wait before the next round; longer from round to round."""
        pause_s = min(PAUSE_S * 2.0**self._rounds, PAUSE_MAX_S) * random.uniform(0.5, 1.0)
        self._rounds = min(self._rounds + 1, 8)
        patience_s, self.patience_s = self.patience_s, 0.0
        return max(pause_s, patience_s)

    def certain(self, error: DengineError) -> DengineError:
        """`error` with the outcome of all attempts together: a copy, for others may have it too."""
        outcome = self.outcome
        if self._kind == "read":
            outcome = "none"
        elif isinstance(error, StaleRequest):
            outcome = "unknown"
        elif error.status in VERDICTS:
            outcome = error.outcome
        if error.outcome == outcome:
            return error
        other = copy.copy(error)
        other.outcome = outcome
        if outcome == "unknown":
            other.message = f"{error.message}; an earlier attempt may have happened"
            other.args = (other.message,)
        return other


# --- idempotency keys -----------------------------------------------------------------------------


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
