"""How much damage for good a run may do: over all that is not repaired, a minority of the voters.

With more than that nodes may only stop (docs/correctness.md), and what was acknowledged may be lost
for good, so a schedule must never get there. Damage that nobody has read yet counts: a flipped bit
in a log may be met much later, when another node has lost its disk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field


@dataclass
class Budget:
    """Whose files are damaged.

    Attributes:
        marks: by node, what tells for each damage whether it is repaired.
    """

    marks: dict[int, list[Callable[[], bool]]] = field(default_factory=dict)

    def damaged(self) -> set[int]:
        """The nodes that have damage which is not known to be repaired."""
        for node_id in list(self.marks):
            self.marks[node_id] = [done for done in self.marks[node_id] if not done()]
            if not self.marks[node_id]:
                del self.marks[node_id]
        return set(self.marks)

    def spoil(self, node_id: int, repaired: Callable[[], bool]) -> None:
        """A node is damaged, until `repaired` says otherwise."""
        self.marks.setdefault(node_id, []).append(repaired)

    def forget(self, node_id: int) -> None:
        """Its files are gone, or all of them have been read and are sound."""
        self.marks.pop(node_id, None)

    def targets(self, voters: Collection[int], wished: Sequence[int]) -> list[int]:
        """Those of `wished`, in that order, that may be damaged now, all of them together."""
        damaged = self.damaged() & set(voters)
        room = (len(voters) - 1) // 2 - len(damaged)
        found = []
        for node_id in wished:
            if node_id in damaged:
                if room >= 0:
                    found.append(node_id)
            elif room > 0:
                found.append(node_id)
                room -= 1
        return found

    def may_remove(self, voters: Collection[int], node_id: int) -> bool:
        """Is at most a minority damaged when this voter is none any more?"""
        left = set(voters) - {node_id}
        return len(self.damaged() & left) <= (len(left) - 1) // 2
