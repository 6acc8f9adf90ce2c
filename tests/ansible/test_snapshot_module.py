"""Copies of snapshots: downloads that do not end, leftovers, and whose copies a run may delete."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tests.ansible.server import Answers, Asked, Say, Server, run_module, snapshot_file

HOUR_S = 3600


def offering(said: dict[str, Any], answer: Any) -> Answers:
    """A node whose newest snapshot is `said`, and gives it out as `answer` has it."""
    return {
        "GET /v1/snapshots": Say({"snapshots": [said]}),
        "GET /v1/status": Say({"last_applied": said["index"]}),
        f"GET /v1/snapshots/{said['sha256']}": answer,
    }


def test_a_download_that_gets_nothing_more_ends_and_says_so(tmp_path: Path) -> None:
    """A node that answers again and again with an empty body is not asked for ever."""
    _, said = snapshot_file()
    with Server(offering(said, Say(b"", 206))) as server:
        ask = {"endpoints": [server.endpoint], "dest": str(tmp_path), "timeout": 1.0}
        result = run_module("dengine_snapshot", **ask)
    assert "the download has 0 of 3032 bytes after 1 s" in result["msg"]
    assert len(server.asked) < 20, "without a pause it would have been asked hundreds of times"


def test_a_download_in_short_pieces_comes_to_its_end(tmp_path: Path) -> None:
    file, said = snapshot_file()

    def piece(asked: Asked) -> Say:
        begin = int(asked.headers.get("Range", "bytes=0-")[6:-1])
        return Say(file[begin : begin + 1000], 206 if begin else 200)

    with Server(offering(said, piece)) as server:
        result = run_module("dengine_snapshot", endpoints=[server.endpoint], dest=str(tmp_path))
    assert Path(result["file"]).read_bytes() == file


def test_a_snapshot_that_takes_longer_than_a_request_is_waited_for(tmp_path: Path) -> None:
    """The node says so when the time that it was given is over, and not before."""
    file, said = snapshot_file()

    def not_yet(asked: Asked) -> Say:
        time.sleep(int(asked.headers["Dengine-Timeout-Ms"]) / 1000)
        return Say({"state": "running"}, 202)

    answers: Answers = {
        **offering(said, Say(file)),
        "POST /v1/snapshots": not_yet,
        "GET /v1/snapshots": [
            Say({"snapshots": [], "job": {"percent": 50}, "last_error": ""}),
            Say({"snapshots": [said], "job": None, "last_error": ""}),
        ],
    }
    with Server(answers) as server:
        ask = {"endpoints": [server.endpoint], "dest": str(tmp_path), "fresh": True}
        result = run_module("dengine_snapshot", request_timeout=0.3, **ask)
    assert Path(result["file"]).read_bytes() == file
    assert server.changes == ["POST /v1/snapshots"]


def test_copies_of_another_cluster_are_left_alone(tmp_path: Path) -> None:
    """Two clusters share a directory, and the name of one begins with that of the other."""
    for name in ("backup-a-11", "backup-a-11-b-22", "backup"):
        for number in range(3):
            (tmp_path / f"{name}-{number:012d}-{number:016x}.dsnap").write_bytes(b"")
    ask = {"endpoints": [], "state": "pruned", "dest": str(tmp_path), "keep": 1}
    removed = run_module("dengine_snapshot", name="backup-a-11", **ask)["removed"]
    assert [Path(file).name for file in removed] == [
        f"backup-a-11-{number:012d}-{number:016x}.dsnap" for number in (0, 1)
    ]
    assert len(list(tmp_path.iterdir())) == 7


def test_what_an_interrupted_download_left_goes_after_an_hour(tmp_path: Path) -> None:
    """One that another run is at right now stays, and so does one of another name."""
    stale, busy, other = (
        tmp_path / f"{name}-{index:012d}-aa.dsnap.aa.part"
        for name, index in (("backup-a-11", 1), ("backup-a-11", 2), ("backup-b-22", 3))
    )
    for file in (stale, busy, other):
        file.write_bytes(b"")
        age = 0 if file == busy else 2 * HOUR_S
        os.utime(file, (time.time() - age,) * 2)
    ask = {"endpoints": [], "state": "pruned", "dest": str(tmp_path), "name": "backup-a-11"}
    assert run_module("dengine_snapshot", **ask)["removed"] == [str(stale)]
    assert set(tmp_path.iterdir()) == {busy, other}
