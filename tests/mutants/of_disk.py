"""Mutants of what the simulator has its own of: opening LMDB, and the thread that writes the log.

They survive any seed; what the log does to a real disk is judged by a test under strace.
"""

from __future__ import annotations

from tests.mutants.edits import Mutant, mutant

DURABILITY = "tests/storage/test_durability.py"
ENVIRONMENT = "dengine.storage.environment"
LOG_WRITER = "dengine.node.log_writer"

MUTANTS: tuple[Mutant, ...] = (
    mutant(
        "commits of the log not synced",
        (ENVIRONMENT, "sync=durable,", "sync=False,"),
        tests=DURABILITY,
    ),
    mutant(
        "the page that makes a commit count not synced",
        (ENVIRONMENT, "sync=durable,", "sync=durable, metasync=False,"),
        tests=DURABILITY,
    ),
    mutant(
        "the name of a new environment's file not synced",
        (
            ENVIRONMENT,
            "sync_directory(path)\n            sync_directory(path.parent)",
            "sync_directory(path.parent)",
        ),
        tests=DURABILITY,
    ),
    mutant(
        "the name of a new environment not synced",
        (
            ENVIRONMENT,
            "sync_directory(path)\n            sync_directory(path.parent)",
            "sync_directory(path)",
        ),
        tests=DURABILITY,
    ),
    mutant(
        "the log's thread says that it has written before it has",
        (
            LOG_WRITER,
            "            try:\n                if ready.snapshot",
            "            self._loop.call_soon_threadsafe(self._written, ready, None, 0.0)\n"
            "            time.sleep(0.1)\n"
            "            try:\n                if ready.snapshot",
        ),
        (
            LOG_WRITER,
            "            self._loop.call_soon_threadsafe(self._written, ready, error, seconds)\n",
            "",
        ),
        tests=DURABILITY,
    ),
)
