"""What the documentation of `Engine` shows works, and who knows the client knows the engine."""

from __future__ import annotations

import asyncio
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
import uvloop

import dengine.client
from dengine import engine as embedded_mode
from dengine.client.client import Client
from dengine.embedded import reads
from tests.client.test_package import documented, example
from tests.engine.apps import PATIENT_S, alone, on

NAMES: dict[str, Any] = {name: getattr(dengine.client, name) for name in dir(dengine.client)}
EXAMPLES = {
    name: code
    for module in (embedded_mode, reads)
    for name, item in documented(module)
    if (code := example(item)) is not None
}


def public(cls: type[Any]) -> dict[str, Any]:
    return {n: v for n, v in vars(cls).items() if not n.startswith("_") and inspect.isfunction(v)}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them runs, on an engine that is empty before it."""
    monkeypatch.chdir(tmp_path)
    code = f"async def example():\n{textwrap.indent(EXAMPLES[name], '    ')}"

    async def app() -> None:
        async with alone(tmp_path / "given") as engine:
            await engine.wait_ready(PATIENT_S)
            space = {**NAMES, "dengine": dengine, "asyncio": asyncio, "engine": engine}
            exec(compile(code, name, "exec"), space)
            await space["example"]()

    on(uvloop.new_event_loop, app)


def test_every_call_has_an_example() -> None:
    calls = {f"dengine.engine.Engine.{name}" for name in public(dengine.Engine)}
    assert calls - EXAMPLES.keys() == {"dengine.engine.Engine.spawn"}
    for name, item in documented(embedded_mode):
        assert inspect.getdoc(item), f"{name} has no docstring"


def test_an_engine_has_what_a_client_has() -> None:
    """Names, parameters, defaults: code that is given either need not know which."""
    theirs, ours = public(Client), public(dengine.Engine)
    assert theirs.keys() - ours.keys() == {"close"}
    for name in theirs.keys() - {"close"}:
        one = inspect.signature(theirs[name]).parameters
        other = inspect.signature(ours[name]).parameters
        assert list(one) == list(other), name
        assert [p.default for p in one.values()] == [p.default for p in other.values()], name
