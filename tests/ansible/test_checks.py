"""Each check of the preflight against a host that has exactly this fault, and one that has not."""

from __future__ import annotations

import collections
import json
import os
import platform
import resource
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.dengine.core.plugins.module_utils import checks, host, network

SYSTEMD = {"backend": "systemd"}
Usage = collections.namedtuple("Usage", "total used free")


def judged(check: str, answer: tuple[int, str] = (0, ""), **params: Any) -> str:
    """The status of the row of one check, "" where it gives none; commands answer `answer`."""
    params = {
        "backend": "process",
        "config": "/of-no-node.toml",
        "data_dir": "/var/lib/dengine/1",
        "data_bytes": 0,
        "listen_address": "127.0.0.1:9081",
        "limits": {},
        **params,
        "checks": [check],
    }
    found = checks.run(params, lambda _: (*answer, ""))
    return "".join(row["status"] for row in found)


@pytest.fixture(autouse=True)
def _no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs on this machine."""
    monkeypatch.setattr(host, "find_process", lambda _: None)
    monkeypatch.setattr(network, "stand_in_pid", lambda _: None)


def test_a_python_of_another_version_or_without_venv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 11, 2, "final", 0))
    assert judged("python") == "ok"
    assert judged("python", (1, ""), **SYSTEMD) == "FAILED"
    assert judged("python", (1, "")) == "ok", "no virtual environment is made"
    for version in ((3, 10), (3, 14)):
        monkeypatch.setattr(sys, "version_info", version)
        assert judged("python") == "FAILED"


def test_a_machine_for_which_there_are_no_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, status in (("aarch64", "ok"), ("armv7l", "FAILED")):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert judged("architecture") == status


def test_a_systemd_that_is_too_old_or_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "isdir", lambda _: True)
    assert judged("systemd") == ""
    assert judged("systemd", (0, "systemd 252 (252.30-1)"), **SYSTEMD) == "ok"
    for answer in ((0, "systemd 250 (250.4)"), (0, ""), (1, "systemd 252")):
        assert judged("systemd", answer, **SYSTEMD) == "FAILED"
    monkeypatch.setattr(os.path, "isdir", lambda _: False)
    assert judged("systemd", (0, "systemd 252 (252.30-1)"), **SYSTEMD) == "FAILED"


def test_who_is_not_root_may_not_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for uid, status in ((0, "ok"), (1000, "FAILED")):
        monkeypatch.setattr(os, "getuid", lambda uid=uid: uid)
        assert judged("privileges", **SYSTEMD) == status
        assert judged("privileges") == ""


def test_too_little_memory() -> None:
    assert judged("memory", limits={"memory_mb": 0}) == "ok"
    assert judged("memory", limits={"memory_mb": 10**9}) == "FAILED"


def test_too_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for hard, status in ((4096, "ok"), (4095, "FAILED"), (resource.RLIM_INFINITY, "ok")):
        monkeypatch.setattr(resource, "getrlimit", lambda _, hard=hard: (hard, hard))
        assert judged("open_files") == status
        assert judged("open_files", **SYSTEMD) == "", "the unit sets its own"


def test_too_small_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 3 * 10**9))
    assert judged("disk_space") == "ok"
    assert judged("disk_space", data_bytes=10**9) == "ok"
    assert judged("disk_space", data_bytes=10**9 + 10**6) == "FAILED"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 2 * 10**9))
    assert judged("disk_space") == "FAILED"


@pytest.mark.parametrize(
    ("kind", "status"),
    [("ext4", "ok"), ("xfs", "ok"), ("tmpfs", "FAILED"), ("overlay", "FAILED"), ("nfs4", "FAILED")],
)
def test_a_disk_that_is_none(kind: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "mount_of", lambda _: ("/data", kind))
    assert judged("filesystem") == status


def test_a_slow_disk_or_none_to_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, status in ((10**9, "ok"), (0, "FAILED")):
        assert judged("fsync", data_dir=str(tmp_path), limits={"fsync_p99_ms": limit}) == status
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert judged("fsync", data_dir=str(tmp_path), limits={"fsync_p99_ms": 10**9}) == "FAILED"


@pytest.mark.parametrize(
    ("state", "status", "expected"), [(0, 0, "ok"), (5, 0x40, "FAILED"), (-1, 0, "FAILED")]
)
def test_a_clock_that_nothing_keeps_right(
    state: int, status: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Libc:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def adjtimex(self, buffer: Any) -> int:
            offset = 8 + 4 * checks.ctypes.sizeof(checks.ctypes.c_long)
            buffer[offset : offset + 4] = status.to_bytes(4, sys.byteorder)
            return state

    monkeypatch.setattr(checks.ctypes, "CDLL", Libc)
    assert judged("time_sync") == expected


def test_a_port_that_somebody_else_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, it is free; and an address of another host is none to listen on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        assert judged("port", listen_address=endpoint) == "FAILED"
        monkeypatch.setattr(network, "stand_in_pid", lambda _: 7)
        assert judged("port", listen_address=endpoint) == "ok"
        monkeypatch.setattr(network, "stand_in_pid", lambda _: None)
        monkeypatch.setattr(host, "find_process", lambda _: {"pid": 7})
        assert judged("port", listen_address=endpoint) == "ok"
        monkeypatch.setattr(host, "find_process", lambda _: None)
    assert judged("port", listen_address=endpoint) == "ok"
    params = {"config": "", "listen_address": "192.0.2.1:9081"}
    ok, said, *_, hint = checks.port(params, {}, None)
    assert (ok, hint) == (False, "correct dengine_address")
    assert "is not of this host" in said


def test_what_cannot_be_checked_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> Any:
        raise OSError("Input/output error")

    monkeypatch.setattr(host, "mount_of", broken)
    assert judged("filesystem") == "FAILED"
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(checks, "_which", lambda _: "/usr/sbin/nft")
    assert judged("firewall", (1, "")) == "", "whether there is one cannot be known"
    assert judged("firewall", (0, json.dumps({"nftables": []}))) == "ok"
