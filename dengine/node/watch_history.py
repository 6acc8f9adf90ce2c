"""The history as those read it who catch up: in pieces, each decoded once for all who need it."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from operator import itemgetter
from typing import Final

from dengine.kv.store import Change
from dengine.storage.state_store import StateStore

PIECES_MAX: Final = 8  # kept, for others who come to the same place
PIECES_BYTES_MAX: Final = 16 * 1024 * 1024  # of their records; a larger one is kept alone

_revision_of = itemgetter(0)


class Piece:
    """Some records of the history: what the revisions from `first` to `last` have changed."""

    __slots__ = ("changes", "first", "last", "size")

    def __init__(self, changes: Sequence[Change], size: int) -> None:
        self.changes = changes
        self.first, self.last = changes[0][0], changes[-1][0]
        self.size = size

    def from_revision(self, revision: int) -> Sequence[Change]:
        """Those from `revision` on."""
        return self.changes[bisect_left(self.changes, revision, key=_revision_of) :]


class History:
    """Reads pieces, and keeps a few."""

    def __init__(self, state: StateStore) -> None:
        self._state = state
        self._pieces: deque[Piece] = deque()  # used last at the end

    def forget(self) -> None:
        """The state is another one."""
        self._pieces.clear()

    def at(self, revision: int, revisions: int, size: int) -> Piece | None:
        """The piece with `revision` in it; None: the history has no such revision.

        Args:
            revisions, size: where it has to be read, it ends with the record that comes to so many
                revisions, or to about so many bytes.
        """
        for piece in self._pieces:
            if piece.first <= revision <= piece.last:
                self._pieces.remove(piece)
                self._pieces.append(piece)
                return piece
        changes, read = self._state.history(revision, revisions, size)
        if not changes or not changes[0][0] <= revision <= changes[-1][0]:
            return None
        piece = Piece(changes, read)
        self._pieces.append(piece)
        while len(self._pieces) > 1 and (
            len(self._pieces) > PIECES_MAX
            or sum(kept.size for kept in self._pieces) > PIECES_BYTES_MAX
        ):
            self._pieces.popleft()
        return piece
