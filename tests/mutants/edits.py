"""Defects that are put in on purpose: each a change of a line or two that somebody could make.

`infect` has the changed source compiled at import time; nothing on disk is touched.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import CodeType
from typing import NamedTuple


class Edit(NamedTuple):
    """In the source of `module`, `old` (which stands there once) becomes `new`."""

    module: str
    old: str
    new: str


class Mutant(NamedTuple):
    """`tests`: what must fail then; "" stands for the simulator. There `by` is the one invariant
    that may catch it; "" stands for all."""

    name: str
    edits: tuple[Edit, ...]
    tests: str = ""
    by: str = ""


def mutant(name: str, *edits: tuple[str, str, str], tests: str = "", by: str = "") -> Mutant:
    return Mutant(name, tuple(Edit(*edit) for edit in edits), tests, by)


class MutantLoader(importlib.machinery.SourceFileLoader):
    """Compiles a module from its source with the edits applied; no byte code is used or left."""

    def __init__(self, name: str, path: str, edits: Sequence[Edit]) -> None:
        super().__init__(name, path)
        self._edits = edits

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path).decode()
        return compile(mutated(source, self._edits), self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(self, fullname: str, path: object, target: object = None) -> object:  # type: ignore[override]
        edits = [edit for edit in self._mutant.edits if edit.module == fullname]
        if not edits:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)  # type: ignore[arg-type]
        assert spec is not None
        assert spec.origin is not None
        spec.loader = MutantLoader(fullname, spec.origin, edits)
        return spec


def mutated(source: str, edits: Sequence[Edit]) -> str:
    """The source after all edits. Raises ValueError when one does not fit any more."""
    for edit in edits:
        if source.count(edit.old) != 1:
            raise ValueError(f"{edit.module} has {source.count(edit.old)} times {edit.old!r}")
        source = source.replace(edit.old, edit.new)
    return source


def infect(mutant: Mutant) -> None:
    """This process imports the mutant's code. Nothing of dengine may be imported yet."""
    loaded = [name for name in sys.modules if name.partition(".")[0] == "dengine"]
    assert not loaded, f"too late: {loaded}"
    sys.meta_path.insert(0, _Finder(mutant))
