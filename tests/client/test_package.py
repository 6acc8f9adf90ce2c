"""The client library as a package: what it loads, and that what its documentation shows works."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dengine.client
from dengine.client import attempts, client, elections, leases, locks, sync, types, watching
from tests.client.fake_server import cluster_thread, fake_cluster
from tests.client.virtual import run

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).resolve().parent.parent.parent
MODULES = (client, elections, leases, locks, types, watching)
NAMES: dict[str, Any] = {name: getattr(dengine.client, name) for name in dir(dengine.client)}


def test_it_loads_nothing_of_a_node() -> None:
    """`pip install dengine` without [node] is the client: it must not need more."""
    code = (
        "import sys, dengine.client, dengine.client.sync\n"
        "for name in dir(dengine.client): getattr(dengine.client, name)\n"
        "print(*(n for n in sys.modules if n.split('.')[0] in "
        "('lmdb', 'msgspec', 'uvloop', 'xxhash', 'psutil', 'prometheus_client', 'zlib_ng')))\n"
        "print(*(n for n in sys.modules if n.startswith('dengine.')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    foreign, own = done.stdout.splitlines()
    assert foreign == ""
    strangers = [n for n in own.split() if not n.startswith(("dengine.client", "dengine.errors"))]
    assert strangers == []


def test_it_imports_what_it_says() -> None:
    """aiohttp (with its yarl), orjson and the standard library."""
    allowed = {*sys.stdlib_module_names, "aiohttp", "yarl", "orjson", "dengine"}
    for path in sorted((ROOT / "dengine" / "client").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_nothing_is_loaded_before_it_is_used() -> None:
    """The command line needs a few functions of it, and starts faster without aiohttp. So does who
    only makes operations and catches errors."""
    code = (
        "import sys, dengine.client.encoding\n"
        "from dengine.client import ClientClosed, LeaseLost, LockLost, Put\n"
        "print('aiohttp' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT
    )
    assert done.stdout == "False\n", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'Clinet'"):
        dengine.client.Clinet  # noqa: B018


# --- the documentation


def documented(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Every public class and function that a module defines, and the methods of the classes."""
    for name, item in vars(module).items():
        if name.startswith("_") or getattr(item, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(item):
            yield f"{module.__name__}.{name}", item
            for method, value in vars(item).items():
                if not method.startswith("_") and inspect.isfunction(value):
                    yield f"{module.__name__}.{name}.{method}", value
        elif inspect.isfunction(item):
            yield f"{module.__name__}.{name}", item


def example(item: Any) -> str | None:
    """The code under "Example:" in a docstring."""
    lines = (inspect.getdoc(item) or "").splitlines()
    if "Example:" not in lines:
        return None
    rest = lines[lines.index("Example:") + 1 :]
    kept = []
    for line in rest:
        if line and not line.startswith(" "):
            break
        kept.append(line)
    return textwrap.dedent("\n".join(kept)).strip()


ASYNC = {
    name: code
    for module in MODULES
    for name, item in documented(module)
    if (code := example(item)) is not None
}
SYNC = {name: code for name, item in documented(sync) if (code := example(item)) is not None}


def test_every_operation_has_an_example() -> None:
    """What a client can do is shown, once for each of the two."""
    for cls, examples in ((client.Client, ASYNC), (sync.Client, SYNC)):
        names = [name for name, value in vars(cls).items() if inspect.isfunction(value)]
        public = [name for name in names if not name.startswith("_")]
        missing = [n for n in public if f"{cls.__module__}.Client.{n}" not in examples]
        assert [name for name in missing if name != "spawn"] == []


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(name, p.default) for name, p in inspect.signature(function).parameters.items()]


def test_both_clients_have_the_same_names() -> None:
    """Who knows one knows the other: names, parameters and defaults agree."""
    pairs = ((client.Client, sync.Client), (elections.Election, sync.Election))
    for one, other in pairs:
        names = {n for n, v in vars(one).items() if not n.startswith("_")} - {"spawn"}
        assert names == {n for n, v in vars(other).items() if not n.startswith("_")}
        for name in names:
            if inspect.isfunction(vars(one)[name]):
                assert parameters(vars(one)[name]) == parameters(vars(other)[name]), name


def test_what_both_clients_hand_out_has_the_same_names() -> None:
    """Attributes as well as methods. Only the end of a watch is called as each world calls it."""
    one, other = client.Client("127.0.0.1:1"), sync.Client("127.0.0.1:1")
    calls: list[Callable[[Any], Any]] = [
        lambda c: c.lease(5),
        lambda c: c.lock("job"),
        lambda c: c.election("e"),
        lambda c: c.election("e").campaign(b""),
        lambda c: c.list(),
        lambda c: c.watch("k"),
    ]
    with other:
        for call in calls:
            ours, theirs = call(one), call(other)
            names, others = (
                {n for n in dir(item) if not n.startswith("_")} for item in (ours, theirs)
            )
            assert {"close" if n == "aclose" else n for n in names} == others, type(ours)
            for name in names & others:
                method, same = getattr(type(ours), name, None), getattr(type(theirs), name, None)
                if inspect.isfunction(method):
                    assert inspect.isfunction(same), name
                    assert parameters(method) == parameters(same), name


@pytest.mark.parametrize("name", sorted(ASYNC))
def test_examples(name: str) -> None:
    """Each of them runs, against a cluster that is empty before it."""
    code = f"async def example():\n{textwrap.indent(ASYNC[name], '    ')}"

    async def scenario() -> None:
        async with (
            fake_cluster(3) as cluster,
            dengine.client.Client(cluster.endpoints) as given,
        ):
            space = {**NAMES, "client": given, "endpoints": cluster.endpoints}
            exec(compile(code, name, "exec"), space)
            await space["example"]()

    run(scenario())


@pytest.mark.parametrize("name", sorted(SYNC))
def test_synchronous_examples(name: str) -> None:
    code = f"def example():\n{textwrap.indent(SYNC[name], '    ')}"
    with cluster_thread(1) as thread:
        endpoints = thread.cluster.endpoints
        with sync.Client(endpoints, timeout_s=60.0) as given:
            space = {**NAMES, "Client": sync.Client, "client": given, "endpoints": endpoints}
            exec(compile(code, name, "exec"), space)
            space["example"]()


def test_modules_are_documented() -> None:
    for module in (*MODULES, sync, attempts):
        for name, item in documented(module):
            assert inspect.getdoc(item), f"{name} has no docstring"
