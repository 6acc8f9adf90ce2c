"""The release: a wheelhouse that installs without any network, and only if nobody touched it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dengine import __version__
from tests.cluster import ROOT

HERE = (f"{sys.version_info[0]}.{sys.version_info[1]}", platform.machine())
ELSEWHERE = ("3.13", "aarch64" if HERE[1] == "x86_64" else "x86_64")
NO_NETWORK = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(HERE[0] > "3.13", reason=f"no wheels are pinned for Python {HERE[0]}"),
]


def run(*command: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run with an environment that says nothing of indexes; stdout and stderr in one."""
    return subprocess.run(
        list(map(str, command)),
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
        check=False,
    )


def build(out: Path, target: tuple[str, str] = HERE, root: Path = ROOT) -> list[str]:
    script = root / "scripts" / "build-wheelhouse"
    return [sys.executable, str(script), str(out), "--python", target[0], "--arch", target[1]]


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheelhouse for this machine, built once. Tests that change it work on a copy."""
    out = tmp_path_factory.mktemp("release") / "wheelhouse"
    done = subprocess.run(build(out), capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done
    return out


@pytest.fixture
def copy(wheelhouse: Path, tmp_path: Path) -> Path:
    return shutil.copytree(wheelhouse, tmp_path / "copied")


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty one, as python3-venv makes it without any network."""
    path = tmp_path_factory.mktemp("host") / "venv"
    made = run(*NO_NETWORK, sys.executable, "-m", "venv", path)
    assert made.returncode == 0, made.stdout
    return path


def install(wheels: Path, venv: Path) -> subprocess.CompletedProcess[str]:
    """What is done on a host, with no route to anywhere."""
    return run(
        *(*NO_NETWORK, venv / "bin" / "pip", "install", "--disable-pip-version-check"),
        *("--no-index", "--find-links", wheels, "--require-hashes"),
        *("--requirement", wheels / "requirements.txt"),
    )


def test_it_lists_exactly_what_it_holds(wheelhouse: Path) -> None:
    """One line per wheel, each with one hash; our own wheel is one of them."""
    first, *lines = (wheelhouse / "requirements.txt").read_text().splitlines()
    assert first.startswith(f"# python {HERE[0]}, {HERE[1]}, made from ")
    assert all(
        re.fullmatch(r"[\w.-]+(\[node\])?==\S+ --hash=sha256:\w{64}", line) for line in lines
    )
    assert len(lines) == len(list(wheelhouse.glob("*.whl")))
    assert f"dengine[node]=={__version__} " in "\n".join(lines)


@pytest.mark.parametrize("name", ["dengine", "uvloop"])
def test_a_tampered_wheel_is_refused(copy: Path, venv: Path, name: str) -> None:
    """One changed byte, and nothing at all is installed."""
    (wheel,) = copy.glob(f"{name}-*.whl")
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 1
    wheel.write_bytes(data)
    done = install(copy, venv)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stdout
    listed = run(venv / "bin" / "pip", "list", "--format=freeze", "--disable-pip-version-check")
    assert "aiohttp" not in listed.stdout


def test_a_missing_wheel_is_not_fetched_elsewhere(copy: Path, venv: Path) -> None:
    """What was lost on the way is named; no index is asked for it."""
    next(copy.glob("yarl-*.whl")).unlink()
    done = install(copy, venv)
    assert done.returncode != 0
    assert "No matching distribution found for yarl" in done.stdout


def test_an_install_without_any_network(wheelhouse: Path, venv: Path) -> None:
    """A host with python3 and python3-venv needs nothing else, and what arrives works."""
    done = install(wheelhouse, venv)
    assert done.returncode == 0, done.stdout
    said = run(venv / "bin" / "dengine", "--version")
    assert said.stdout.split()[-1] == __version__
    imported = run(
        *(venv / "bin" / "python", "-I", "-c"),
        "import aiohttp, dengine.cli.serve, lmdb, msgspec, orjson, psutil, uvloop, xxhash, zlib_ng",
    )
    assert imported.returncode == 0, imported.stdout


def test_a_tampered_lock_is_refused(tmp_path: Path) -> None:
    """A wheel that the lock does not vouch for is never put into a wheelhouse."""
    root = tmp_path / "checkout"
    for name in ("dengine", "requirements", "scripts"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    lock = root / "requirements" / "lock.txt"
    package, hashes = re.search(r"aiosignal==\S+ \\\n( +--hash=\S+)", lock.read_text()).group(0, 1)
    forged = package.replace(hashes, "    --hash=sha256:" + "0" * 64)
    lock.write_text(lock.read_text().replace(package, forged))
    done = subprocess.run(
        build(tmp_path / "out", root=root), capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert not (tmp_path / "out").exists()


def test_nothing_is_done_twice(copy: Path) -> None:
    """The same again is a look at the hashes: no network, nothing written. Damage is noticed."""
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    again = run(*NO_NETWORK, *build(copy))
    assert again.returncode == 0, again.stdout
    assert "up to date" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before

    next(copy.glob("idna-*.whl")).write_bytes(b"damaged")
    offline = run(*NO_NETWORK, *build(copy), PIP_RETRIES="0", PIP_TIMEOUT="1")
    assert offline.returncode != 0, "it wants to build again, and cannot"


def test_a_wheelhouse_for_other_hosts(tmp_path: Path) -> None:
    """The control node need not have the hosts' Python or architecture."""
    done = subprocess.run(
        build(tmp_path / "out", ELSEWHERE), capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done
    names = [wheel.name for wheel in (tmp_path / "out").glob("*.whl")]
    assert any(f"cp313-manylinux_2_17_{ELSEWHERE[1]}" in name for name in names), names
    assert not any(HERE[1] in name for name in names)


def test_every_pin_has_a_wheel_for_every_host() -> None:
    """A package is the same for all (one hash) or built for each Python and architecture."""
    lock = (ROOT / "requirements" / "lock.txt").read_text()
    pins = re.findall(r"^([\w.-]+)==\S+((?: \\\n +--hash=sha256:\w{64})+)$", lock, re.MULTILINE)
    counts = {name: hashes.count("--hash") for name, hashes in pins}
    assert {
        "aiohttp",
        "lmdb",
        "msgspec",
        "orjson",
        "psutil",
        "uvloop",
        "xxhash",
        "zlib-ng",
    } <= counts.keys()
    assert counts["psutil"] == 2, "one abi3 wheel per architecture"
    assert set(counts.values()) <= {1, 2, 6}


def test_another_directory_is_not_overwritten(tmp_path: Path) -> None:
    """A slip of the finger must not cost somebody a directory."""
    (tmp_path / "thesis.txt").write_text("mine")
    done = run(*build(tmp_path))
    assert done.returncode != 0
    assert "holds something else" in done.stdout
    assert (tmp_path / "thesis.txt").read_text() == "mine"
