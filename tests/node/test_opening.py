"""What a start looks at before a node can be made of its directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from dengine.config import Config, read
from dengine.errors import DataCorruption, FatalError, IdentityError
from dengine.node.opening import open_directory, raft_config
from dengine.raft.types import MemberId
from tests.cluster import config_text

ME = MemberId(1, 1)


def config_of(tmp_path: Path, election: str = "", kept_in: str = "db") -> Config:
    file = tmp_path / "n1.toml"
    file.write_text(config_text(1, {1: 9081}, 0, 2) + election, encoding="utf-8")
    config = read(file, {"DENGINE__CLUSTER__DB_ROOT_DIR": str(tmp_path / kept_in)})
    return config


@pytest.mark.parametrize("kind", [DataCorruption, IdentityError])
def test_nobody_starts_before_a_person_has_decided(tmp_path: Path, kind: type[FatalError]) -> None:
    """Members that hold different states stopped, or one was told that its directory is an old
    copy; a reboot must not let them answer again. The code is the one that it ended with."""
    config = config_of(tmp_path)
    directory = open_directory(config)
    directory.halt(kind("compare them, and restore the right one"))
    directory.close()
    with pytest.raises(kind, match=r"restore the right one; then remove .*HALTED"):
        open_directory(config)
    (directory.path / "HALTED").unlink()
    open_directory(config).close()


def test_a_shorter_timeout_counts_when_the_longer_one_has_been_kept(tmp_path: Path) -> None:
    """A leader that heard this voter before its start counts on what it said then."""
    long, short = (
        config_of(
            tmp_path,
            f"[raft.election]\ntimeout_ms_min = {ms}\ntimeout_ms_max = {2 * ms}\n",
        )
        for ms in (10_000, 1000)
    )
    for config, promised_ms in ((long, 10_000), (short, 10_000), (short, 10_000)):
        directory = open_directory(config)
        assert raft_config(config, directory, ME).start_stickiness_ms == promised_ms
        directory.close()
    directory = open_directory(short)
    directory.set_stickiness(1000)  # as the node does when that time has passed
    assert raft_config(short, directory, ME).start_stickiness_ms == 1000
    assert raft_config(long, directory, ME).start_stickiness_ms == 10_000
    directory.close()


def test_the_only_voter_waits_at_each_start(tmp_path: Path) -> None:
    """Its disk may be an older copy, and somebody who knows better has to be heard first: also
    where it ran a moment ago, and was killed before it could be told."""
    config = config_of(tmp_path)
    for _ in range(2):
        directory = open_directory(config)
        wait_ms = raft_config(config, directory, ME).sole_voter_wait_ms
        assert wait_ms == config.cluster.founding_wait_ms
        directory.state_path().mkdir(exist_ok=True)
        directory.mark_running()
        directory.close()
