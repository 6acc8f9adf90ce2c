"""The house rules that no linter knows: which package may import which, purity, and size."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dengine"

# Who may import whom (ARCHITECTURE.md, "The map"); importing oneself is always allowed. The names
# are those of the packages and modules directly below dengine/.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "log": set(),
    "security": {"errors"},
    "raft": {"errors"},
    "kv": {"errors"},
    "config": {"errors", "raft", "security"},
    "storage": {"errors", "raft", "kv", "security"},
    "node": {"errors", "raft", "kv", "storage", "config", "log", "security"},
    "api": {"errors", "raft", "kv", "storage", "node", "config", "log", "security"},
    "client": {"errors"},
    "cli": {
        *("errors", "raft", "kv", "storage", "node", "api", "client", "config", "log", "security")
    },
    "embedded": {"errors", "kv", "node", "api", "client", "config"},
    "engine": {"errors", "kv", "embedded", "client", "config"},
    "snapshot_writer": {"errors", "raft", "storage", "security"},  # a process of its own
    "__main__": {"cli"},
    "__init__": {"engine"},  # when it is asked for, and not before
}
PURE = ("raft", "kv")
# Same inputs, same outputs: what cannot know the time, the machine, chance or the outside. Whatever
# else a change needs is a decision, and belongs here with it.
PURE_MODULES = {
    "__future__", "collections", "collections.abc", "dataclasses", "enum", "hashlib", "heapq",
    "msgspec", "operator", "struct", "typing",
}  # fmt: skip
REACHING_OUT = {
    "__builtins__", "__import__", "__loader__", "breakpoint", "compile", "eval", "exec", "globals",
    "hash", "input", "open", "print", "vars",
}  # fmt: skip
ASYNC_LAYERS = {"node", "api", "cli", "client", "embedded", "engine"}
ONLY_IMPORTER = {"lmdb": "storage", "uvloop": "cli"}
MAX_FILE_LINES = 500
LONG_FILES = {"raft/raft.py"}  # every transition of the protocol in one place, on purpose
MAX_FUNCTION_LINES = 70

FILES = sorted(PACKAGE.rglob("*.py"))


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module as (dotted name, line), also those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the arrows"
            if node.module == "dengine":  # `from dengine import config` names a module
                yield from ((f"dengine.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield str(node.module), node.lineno


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def path(request: pytest.FixtureRequest) -> Path:
    file: Path = request.param
    return file


def test_imports_point_one_way(path: Path) -> None:
    """A package uses what lies below it and nothing else, so each can be read without the rest."""
    here = layer(path)
    assert here in ARROWS, f"dengine/{here} is new: add it, and what it may import, to ARROWS"
    for name, line in imports(parsed(path)):
        if name == "dengine" or not name.startswith("dengine."):
            continue
        there = name.split(".")[1]
        if there == "__version__":
            continue
        assert there == here or there in ARROWS[here], (
            f"{path}:{line}: {here} must not import {there}"
        )


def impurities(tree: ast.AST, here: str) -> Iterator[tuple[str, int]]:
    """What could make two runs differ in a module of the package `here`, as (what, line)."""
    allowed = {"dengine.errors", f"dengine.{here}"}
    for name, line in imports(tree):
        own = ".".join(name.split(".")[:2]) in allowed
        if not own and name not in PURE_MODULES and name != "random":
            yield f"imports {name}", line
    # random.Random names the type of what the owner hands in, seeded; all else is chance.
    types = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "Random"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "random" and alias.asname is not None:
                    yield "hides random behind another name", node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "random":
            if [(alias.name, alias.asname) for alias in node.names] != [("Random", None)]:
                yield "imports more of random than its type", node.lineno
        elif isinstance(node, ast.Name) and node.id == "random" and id(node) not in types:
            yield "uses the global random", node.lineno
        elif isinstance(node, ast.Name) and node.id in REACHING_OUT:
            yield f"uses {node.id}", node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("random.Random", "Random"):
            yield "makes its own random numbers", node.lineno


def test_raft_and_kv_are_pure(path: Path) -> None:
    """Replaying the same inputs gives the same outputs: no clock, no chance, no outside world."""
    if layer(path) in PURE:
        found = [f"{path}:{line}: {what}" for what, line in impurities(parsed(path), layer(path))]
        assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import time",
        "import os.path",
        "import asyncio as a",
        "import importlib",
        "import ctypes",
        "import contextvars",
        "import hashlib, secrets",
        "import random as r",
        "import random; random.random()",
        "import random; r = random",
        "import random; random.Random()",
        "from random import Random; Random(1)",
        "from random import Random as R",
        "from random import SystemRandom",
        "from random import Random, choice",
        "from time import monotonic",
        "from collections.abc import Sequence; from zoneinfo import ZoneInfo",
        "from dengine.kv.commands import Command",
        "from dengine import storage",
        "def f():\n    import socket",
        "read = open",
        "__import__('time')",
        "__builtins__['open']",
        "eval('1')",
        "print(1)",
        "hash('differs from run to run')",
    ],
)
def test_what_is_impure_is_found(code: str) -> None:
    assert list(impurities(ast.parse(code), "raft")), code


def test_what_is_pure_is_let_through() -> None:
    code = (
        "import enum, random\nfrom random import Random\nfrom collections.abc import Sequence\n"
        "import msgspec\nfrom dengine.errors import Conflict\n"
        "from dengine.raft.types import Entry\n"
        "def f(rng: random.Random, other: Random) -> float: return rng.random()"
    )
    assert list(impurities(ast.parse(code), "raft")) == []


def test_async_stays_at_the_edge(path: Path) -> None:
    """Only the layers that do input and output know about the event loop."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith):
            assert layer(path) in ASYNC_LAYERS, f"{path}:{node.lineno}: async in {layer(path)}"


def test_one_importer_each(path: Path) -> None:
    """LMDB is behind storage, and only the command line picks an event loop."""
    for name, line in imports(parsed(path)):
        owner = ONLY_IMPORTER.get(name.split(".")[0])
        assert owner in (None, layer(path)), f"{path}:{line}: only {owner} imports {name}"


def test_nothing_is_unpickled(path: Path) -> None:
    """Bytes from another machine or from disk must never become code."""
    for name, line in imports(parsed(path)):
        assert name not in ("pickle", "marshal", "shelve", "dill"), f"{path}:{line}: {name}"


FORKING = {"fork", "forkpty", "ProcessPoolExecutor", "multiprocessing", "preexec_fn"}


def test_nothing_forks(path: Path) -> None:
    """A copy of a process has its locks as they were, and LMDB's environment may not be in two.

    `dengine lock` alone runs something before its command begins, and is no node.
    """
    for node in ast.walk(parsed(path)):
        named = {getattr(node, field, None) for field in ("id", "attr", "arg", "module", "name")}
        if path.relative_to(PACKAGE) == Path("cli/holding.py"):
            named.discard("preexec_fn")
        assert not FORKING & named, f"{path}: {FORKING & named}"


def test_files_and_functions_stay_small(path: Path) -> None:
    """A file has an end, and a function fits on a screen."""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    if str(path.relative_to(PACKAGE)) not in LONG_FILES:
        assert lines < MAX_FILE_LINES, f"{path} has {lines} lines: split it by responsibility"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, (
                f"{path}:{node.lineno}: {node.name} has {length} lines"
            )


def test_every_module_says_what_it_is_for(path: Path) -> None:
    """The first lines of a file tell a newcomer why it exists."""
    assert ast.get_docstring(parsed(path)), f"{path} has no docstring"
