"""All mutants, by what must find them.

of_raft.py, of_node.py and of_kv.py: the simulator, within 500 seeds, where they name no test;
of_disk.py, of_progress.py and of_rare.py: the tests of the line.
"""

from __future__ import annotations

from tests.mutants import of_disk, of_kv, of_node, of_progress, of_raft, of_rare
from tests.mutants.edits import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *of_raft.MUTANTS,
    *of_node.MUTANTS,
    *of_kv.MUTANTS,
    *of_disk.MUTANTS,
    *of_progress.MUTANTS,
    *of_rare.MUTANTS,
)
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
