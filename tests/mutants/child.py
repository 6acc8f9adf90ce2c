"""`python -m tests.mutants.child FILE ARGUMENTS`: FILE as a program, for tests that need one.

It runs the mutant's code where these tests are to catch one: what a process imports, it imports
itself, so that the plugin of the process that runs the tests is not enough.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys

if __name__ == "__main__":
    if "DENGINE_MUTANT" in os.environ:
        importlib.import_module("tests.mutants.plugin")
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
