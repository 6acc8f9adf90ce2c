"""Each guard of guards.py, taken out alone: the test that is named beside it must then fail.

A guard that nobody would miss is none. Everything happens in a copy. The pure tests are quick;
those that need whole playbooks run in the long target.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ansible.guards import IN_PLAYBOOKS, PURE, Guard

ROOT = Path(__file__).resolve().parents[2]
CORE = Path("ansible/collections/ansible_collections/dengine/core")
COPIED = ("ansible", "examples", "inventories", "tests/ansible", "tests/cluster.py")
LINKED = ("dengine", "scripts", "systemd", "tests/conftest.py", "pyproject.toml")
BROKEN = {"ImportError", "ModuleNotFoundError", "NameError", "SyntaxError", "UsageError"}
LONG_S = 1200
BARE = ("--noconftest", "-p", "pytest_timeout")  # no other plugin: they take longer than the tests
ALONE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


class Copy:
    """A copy of the tree, and a process that runs tests in it."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._times = itertools.count(1_000_000_000, 10)
        ignored = shutil.ignore_patterns("__pycache__", ".dengine")
        for name in COPIED:
            source, target = ROOT / name, place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=ignored)
            else:
                shutil.copy(source, target)
        for name in LINKED:
            (place / name).symlink_to(ROOT / name)
        (place / "ansible.cfg").symlink_to("ansible/ansible.cfg")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(ROOT / "tests/ansible/without.py")],
            cwd=place,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def run(self, tests: list[str], more: tuple[str, ...], **environment: str) -> dict[str, Any]:
        """What became of these tests: `code`, `raised`, `output`."""
        arguments = [
            *("-q", "-x", "-p", "no:cacheprovider", *more),
            *("--basetemp", str(self._place / "tmp"), *(f"tests/ansible/{t}" for t in tests)),
        ]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        ask = {"arguments": arguments, "environment": environment}
        self._process.stdin.write(json.dumps(ask) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that runs the tests has ended"
        return dict(json.loads(answer))

    @contextlib.contextmanager
    def without(self, guard: Guard) -> Iterator[None]:
        file = self._place / CORE / guard.file
        text = file.read_text(encoding="utf-8")
        assert text.count(guard.text) == 1, f"{guard.text!r} is not once in {guard.file}"
        self._write(file, text.replace(guard.text, guard.instead))
        try:
            yield
        finally:
            self._write(file, text)

    def _write(self, file: Path, text: str) -> None:
        """Never with a time that it had before, or what was compiled of it would still count."""
        file.write_text(text, encoding="utf-8")
        now = next(self._times)
        os.utime(file, (now, now))

    def misses(self, guard: Guard, *more: str, **environment: str) -> None:
        """The named test fails without the guard, and not because that is no program any more."""
        with self.without(guard):
            said = self.run([guard.test], more, **environment)
        assert said["code"] == 1, f"nobody misses {guard.text!r}:\n{said['output']}"
        assert not BROKEN & {*said["raised"]}, f"{guard.instead!r} is no program: {said['output']}"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    copied = Copy(tmp_path_factory.mktemp("copy"))
    yield copied
    copied.close()


def by_file(guards: list[Guard]) -> dict[str, list[str]]:
    """The named tests, each once, by file."""
    tests = sorted({guard.test for guard in guards})
    return {f: list(found) for f, found in itertools.groupby(tests, lambda t: t.split("::")[0])}


def named(guard: Guard) -> str:
    return f"{Path(guard.file).stem}: {' '.join(guard.text.split())} -> {guard.instead.strip()}"


@pytest.mark.parametrize("tests", by_file(PURE).values(), ids=by_file(PURE))
def test_a_sound_copy_passes(tests: list[str], sound: Copy) -> None:
    """Else the tests below would prove nothing."""
    said = sound.run(tests, BARE, **ALONE)
    assert said["code"] == 0, said["output"]


@pytest.mark.parametrize("guard", PURE, ids=named)
def test_a_guard_that_is_gone_is_missed(guard: Guard, sound: Copy) -> None:
    sound.misses(guard, *BARE, **ALONE)


@pytest.mark.playbooks
@pytest.mark.timeout(LONG_S)
@pytest.mark.parametrize("tests", by_file(IN_PLAYBOOKS).values(), ids=by_file(IN_PLAYBOOKS))
def test_a_sound_copy_passes_its_playbooks(tests: list[str], sound: Copy) -> None:
    said = sound.run(tests, (), DENGINE_LAB_TESTS="1")
    assert said["code"] == 0, said["output"]


@pytest.mark.playbooks
@pytest.mark.timeout(LONG_S)
@pytest.mark.parametrize("guard", IN_PLAYBOOKS, ids=named)
def test_a_guard_of_a_playbook_that_is_gone_is_missed(guard: Guard, sound: Copy) -> None:
    sound.misses(guard, DENGINE_LAB_TESTS="1")
