"""Copies of snapshots: downloads that do not end, leftovers, and whose copies a run may delete."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


def listing(*snapshots: dict[str, Any], job: str | None = None, **more: Any) -> Say:
    """What GET /v1/snapshots says."""
    return Say(
        {
            "snapshots": list(snapshots),
            "job": job,
            "failures": 3,
            "last_error": "an old one",
            **more,
        }
    )


def waiting(said: dict[str, Any], *answers: Say) -> Answers:
    """A node with 12 entries that answers 202, and then so."""
    return {
        **offering(said, Say(b"")),
        "POST /v1/snapshots": Say({"state": "running"}, 202),
        "GET /v1/snapshots": list(answers),
    }


def test_an_older_snapshot_is_not_taken_for_the_one_that_waits_its_turn() -> None:
    """While another member has the turn there is no job, and an old error is no new one."""
    _, said = snapshot_file()
    old = {**said, "index": 5, "sha256": "0" * 64}
    answers = waiting(
        said, listing(old), listing(old), listing(old), listing(old, job="%"), listing(old, said)
    )
    with Server(answers) as server:
        result = run_module("dengine_snapshot", endpoints=[server.endpoint], state="taken")
    assert result["snapshot"] == said, result
    assert server.changes == ["POST /v1/snapshots"]


def test_a_snapshot_that_fails_says_why() -> None:
    """A node that has none yet, and fails to take one: the error is the new one."""
    _, said = snapshot_file()
    answers = waiting(said, listing(), listing(), listing(failures=4, last_error="no room"))
    with Server(answers) as server:
        result = run_module("dengine_snapshot", endpoints=[server.endpoint], state="taken")
        assert result["msg"] == f"{server.endpoint} took no snapshot: no room"


def test_a_snapshot_that_never_ends_is_not_waited_for_for_ever() -> None:
    _, said = snapshot_file()
    with Server(waiting(said, listing())) as server:
        ask = {"endpoints": [server.endpoint], "state": "taken", "timeout": 1.0}
        result = run_module("dengine_snapshot", **ask)
    assert "the snapshot is not finished after 1 s" in result["msg"]


def test_a_request_for_a_snapshot_that_is_cut_is_looked_after() -> None:
    """Nobody knows whether the node began: it is not asked twice, and its listing tells."""
    _, said = snapshot_file()
    lost = Say({"error": "timeout", "message": "who knows", "outcome": "unknown"}, 504)
    answers = {**waiting(said, listing(), listing(said)), "POST /v1/snapshots": lost}
    with Server(answers) as server:
        result = run_module("dengine_snapshot", endpoints=[server.endpoint], state="taken")
    assert result["snapshot"] == said, result
    assert server.changes == ["POST /v1/snapshots"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No process that is started here writes beyond `size` bytes of a file: a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_ends_a_download_at_once_and_is_not_kept_full(tmp_path: Path) -> None:
    file, said = snapshot_file(30 * 1024 * 1024)
    with Server(offering(said, Say(file))) as server, largest_file(20 * 1024 * 1024):
        ask = {"endpoints": [server.endpoint], "dest": str(tmp_path), "timeout": 20.0}
        result = run_module("dengine_snapshot", **ask)
    assert "File too large" in result["msg"], result
    assert ".part: " in result["msg"]
    assert [line for line in server.lines if said["sha256"] in line] == [
        f"GET /v1/snapshots/{said['sha256']}"
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_download_for_which_there_is_no_room_is_not_begun(tmp_path: Path) -> None:
    _, said = snapshot_file()
    large = {**said, "size_bytes": 10**18}
    with Server(offering(large, Say(b""))) as server:
        result = run_module("dengine_snapshot", endpoints=[server.endpoint], dest=str(tmp_path))
    assert f"{tmp_path} has " in result["msg"]
    assert "1000000000000 MB are to come" in result["msg"]
    assert "MB are missing" in result["msg"]
    assert not any(said["sha256"] in line for line in server.lines)
    assert list(tmp_path.iterdir()) == []


def test_a_download_of_which_nothing_comes_ends_long_before_its_time(tmp_path: Path) -> None:
    """What has come stays, for the next run goes on with it."""
    file, said = snapshot_file()

    def beginning(asked: Asked) -> Say:
        begin = int(asked.headers.get("Range", "bytes=0-")[6:-1])
        return Say(file[begin:1000], 206 if begin else 200)

    with Server(offering(said, beginning)) as server:
        ask = {"endpoints": [server.endpoint], "dest": str(tmp_path), "stall_timeout": 1.0}
        result = run_module("dengine_snapshot", **ask)
    assert "the download has 1000 of 3032 bytes and nothing more has come for 1 s" in result["msg"]
    (part,) = tmp_path.iterdir()
    assert part.read_bytes() == file[:1000]


def test_root_writes_into_no_file_that_somebody_else_put_there(tmp_path: Path) -> None:
    """The directory is the node's user's, and the name can be guessed."""
    file, said = snapshot_file()
    victim = tmp_path / "victim"
    dest = tmp_path / "backups"
    dest.mkdir()
    name = f"backup-{12:012d}-{said['sha256'][:16]}.dsnap.{said['sha256'][:16]}.part"
    for put in (Path.symlink_to, Path.hardlink_to):
        victim.write_text("precious")
        put(dest / name, victim)
        with Server(offering(said, Say(file))) as server:
            result = run_module("dengine_snapshot", endpoints=[server.endpoint], dest=str(dest))
        assert Path(result["file"]).read_bytes() == file
        assert victim.read_text() == "precious"
        Path(result["file"]).unlink()


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
    odd = tmp_path / "backup-a-11-000000000004-aa.dsnap"
    odd.symlink_to(tmp_path / "nowhere")  # whoever owns the directory may do that
    ask = {"endpoints": [], "state": "pruned", "dest": str(tmp_path), "name": "backup-a-11"}
    assert run_module("dengine_snapshot", **ask)["removed"] == [str(stale)]
    assert set(tmp_path.iterdir()) == {busy, other, odd}
