"""The attempts of one request: what is certain after them, and whether one more may be made.

No I/O and no clock, so that whoever sends requests decides alike: the client over HTTP
(`pursuit.py`), an app over calls on its own node (`embedded/calls.py`), the command line
(`cli/remote.py`).

A write may be sent again because it carries an `Idempotency-Key`, under which the cluster remembers
its result. It does so for `idempotency_window_s`, so a repetition must not come later than that:
once an attempt may have happened, none is sent more than REPEAT_FOR_S after it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Hashable
from typing import Final, Literal

from dengine.client.idempotency import Key
from dengine.errors import DengineError, Outcome, RateLimited, StaleRequest

# Well within the shortest `idempotency_window_s` that a cluster can have (config.py), for what is
# sent last may be under way for as long as a request can take.
REPEAT_FOR_S: Final = 300.0
PAUSE_S: Final = 0.05  # before the nodes are asked a second time; doubled with each round, up to
PAUSE_MAX_S: Final = 1.0
RATE_LIMITED_S: Final = 0.5  # at least, where a node asks for patience
# Under the key of this very request these are the state machine's own word on it (DESIGN 5: the
# first result comes back), so no other attempt can have ended differently.
VERDICTS: Final = (404, 412)

# A renewal may be carried out any number of times, and needs no key; a read changes nothing.
Kind = Literal["read", "renewal", "write"]


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
            if self._key is not None and self.outcome == "none":
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
