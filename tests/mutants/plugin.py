"""`DENGINE_MUTANT=NAME pytest -p tests.mutants.plugin`: these tests run the mutant's code."""

from __future__ import annotations

import os

from tests.mutants.edits import infect
from tests.mutants.mutations import BY_NAME

infect(BY_NAME[os.environ["DENGINE_MUTANT"]])
