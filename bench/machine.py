"""What the benchmark needs from the machine it runs on, and what it writes down about it."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from importlib import metadata
from pathlib import Path

import psutil
from processes import BenchError
from systems import REPOSITORY

PACKAGES = {"wrk": "wrk", "etcd": "etcd-server", "etcdctl": "etcd-client"}
MEMORY_FILESYSTEMS = frozenset({"tmpfs", "ramfs"})
SYNC_SAMPLES = 200


def install_missing(commands: list[str]) -> None:
    """Install the Debian packages of `commands` that are not on PATH; `BenchError` if we cannot.

    Debian starts a service with etcd-server: it is left alone, the benchmark has its own ports.
    """
    packages = sorted(PACKAGES[c] for c in commands if shutil.which(c) is None)
    if not packages:
        return
    apt_get = shutil.which("apt-get")
    hint = f"install {' and '.join(packages)} (Debian: apt-get install {' '.join(packages)})"
    if apt_get is None or os.geteuid() != 0:
        raise BenchError(f"{', '.join(packages)} missing: {hint}, or leave etcd out with --only")
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for step in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
        done = subprocess.run(
            [apt_get, "-q", *step], env=environ, capture_output=True, text=True, timeout=600
        )
        if done.returncode != 0:
            raise BenchError(f"apt-get {' '.join(step)} failed:\n{done.stderr}\n{hint}")


def make_data_directory(parent: Path) -> Path:
    """A fresh directory below `parent`; `BenchError` when that is in memory and not on a disk."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix="dengine-bench-", dir=parent))
    except OSError as error:
        raise BenchError(f"{parent}: {error.strerror}; name another with --data-dir") from error
    filesystem = _filesystem(directory)
    if filesystem in MEMORY_FILESYSTEMS:
        directory.rmdir()
        raise BenchError(
            f"{parent} is on {filesystem}: durable writes would cost nothing there; "
            "name a directory on a disk with --data-dir"
        )
    return directory


def _filesystem(path: Path) -> str:
    mounts = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    resolved = path.resolve()
    for candidate in (resolved, *resolved.parents):
        if candidate in mounts:
            return str(mounts[candidate])
    return "unknown"


def describe(directory: Path) -> dict[str, str]:
    """Facts that the numbers depend on, by name, for people."""
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "dengine": _output(["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]),
        "machine": f"{os.cpu_count()} cores, {_cpu_model()}, Linux {platform.release()}",
        "load before": load,
        "data": f"{_filesystem(directory)}; append 4 KiB + fdatasync: median "
        f"{_sync_ms(directory):.2f} ms",
        "versions": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {_version(name)}" for name in ("aiohttp", "uvloop", "lmdb"))
        + f", {_output(['etcd', '--version']) or 'no etcd'}, {_output(['wrk', '-v'])}",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _output(argv: list[str]) -> str:
    """First line that a command prints, "" when it does not run; wrk -v exits 1 by design."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = (done.stdout or done.stderr).splitlines()
    return lines[0].split(" Copyright")[0] if lines else ""


def _sync_ms(directory: Path) -> float:
    """Median milliseconds of appending 4 KiB and fdatasync, the floor of every durable write."""
    path = directory / "sync-probe"
    samples = []
    with path.open("wb", buffering=0) as file:
        for _ in range(SYNC_SAMPLES):
            started = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            samples.append((time.perf_counter() - started) * 1000)
    path.unlink()
    return statistics.median(samples)
