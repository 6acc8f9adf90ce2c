"""What a founder of a static list concludes from the Hello of another one."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from dengine.config import read
from dengine.errors import IdentityError
from dengine.kv.commands import COMMAND_VERSION
from dengine.node.founding import Founding
from dengine.node.wire import PROTOCOL_VERSION, Hello
from dengine.raft.types import MemberId
from dengine.storage.directory import DataDirectory
from tests.cluster import config_text
from tests.node.hosts import admission_of
from tests.raft.harness import A, B, C, Disk, Server, leader, membership


def founding_of(tmp_path: Path, *ids: int) -> Founding:
    """Node 1's, with an empty directory and a list of these founders."""
    file = tmp_path / "n1.toml"
    file.write_text(config_text(1, {i: 9080 + i for i in ids}, 0, 2), encoding="utf-8")
    return Founding(read(file, {}), A)


def hello(who: MemberId, *members: MemberId, expects: int | None = 1) -> Hello:
    """A node of the cluster "c", whose members it knows to be these."""
    return Hello(
        PROTOCOL_VERSION,
        COMMAND_VERSION,
        "c",
        who,
        1,
        "127.0.0.1:9",
        1000,
        0,
        expects=expects,
        founders=members,
    )


def test_two_founders_that_come_late_do_not_take_each_other_for_a_foreign_cluster(
    tmp_path: Path,
) -> None:
    """The first of them has been told of the cluster, and not yet of its members. It must not end
    the second one, which systemd would not start again."""
    founding = founding_of(tmp_path, 1, 2, 3)
    assert founding.offer(hello(B)) is None
    assert founding.adopted_cluster_id is None
    assert founding.membership() is None, "and it founds nothing meanwhile"
    assert founding.offer(hello(C, A, B, C)) is None
    assert founding.adopted_cluster_id == "c"


def test_who_comes_late_makes_the_same_first_entry_as_the_others(tmp_path: Path) -> None:
    """So that the cluster does not depend on the disk of who founded first. Where the members are
    others by now, the first entry is not known, and comes with the log."""
    on_time, late, later = (founding_of(tmp_path, 1, 2, 3) for _ in range(3))
    for founder in (B, C):
        unfounded = msgspec.structs.replace(
            hello(founder), cluster_id="", list_digest=on_time.list_digest
        )
        assert on_time.offer(unfounded) is None
    first = on_time.membership()
    assert first is not None
    of_cluster = msgspec.structs.replace(hello(C, A, B, C), cluster_id=first.cluster_id)
    assert late.offer(of_cluster) is None
    assert late.membership() == first

    replaced = msgspec.structs.replace(of_cluster, founders=(A, B, MemberId(3, 0xDEAD)))
    assert later.offer(replaced) is None
    assert later.membership() is None
    assert later.adopted_cluster_id == first.cluster_id


def test_a_founder_with_the_role_of_a_joiner_is_told_that_there_is_no_cluster(
    tmp_path: Path,
) -> None:
    """To make the lists equal, which is what it would be told else, is not what helps."""
    joiner = msgspec.structs.replace(hello(B), cluster_id="")
    told = founding_of(tmp_path, 1, 2, 3).offer(joiner)
    assert told is not None
    assert "role = 3" in told
    assert "there is no cluster yet" in told


def test_who_knows_the_members_ends_a_founder_that_is_none_of_them(tmp_path: Path) -> None:
    wiped = MemberId(1, 0xDEAD)
    founding = founding_of(tmp_path, 1, 2, 3)
    with pytest.raises(IdentityError, match="set role = 3 to join"):
        founding.offer(hello(B, wiped, B, C))


def test_alone_a_founder_believes_whoever_expects_it(tmp_path: Path) -> None:
    """It would found at once, and nobody else may ever speak to it."""
    founding = founding_of(tmp_path, 1)
    with pytest.raises(IdentityError, match="set role = 3 to join"):
        founding.offer(hello(B))


def test_a_founder_is_not_ended_by_whom_it_has_just_let_in(tmp_path: Path) -> None:
    """With its founding entry durable it leads and lets others in; that its identity on disk names
    the cluster comes a moment later, and somebody may be that fast."""
    raft = leader(A, membership(A)).raft
    (tmp_path / "n1.toml").write_text(config_text(1, {1: 9081}, 0, 2), encoding="utf-8")
    config, ended = read(tmp_path / "n1.toml", {}), list[BaseException]()
    directory = DataDirectory.open(tmp_path / "db", 1)
    admission = admission_of(config, directory, raft, ended.append)
    joined = msgspec.structs.replace(hello(B), cluster_id=raft.membership.cluster_id)
    refused = admission.admit(joined, "10.0.0.2")
    assert refused is not None
    assert refused.reason == "again"
    assert not ended

    directory.set_cluster_id(raft.membership.cluster_id)
    assert admission.admit(joined, "10.0.0.2") is None


def test_who_would_found_beside_a_cluster_is_told_so_by_who_knows_its_members(
    tmp_path: Path,
) -> None:
    """Node 2 was started with another role than 3, and would wait for ever to found with node 1. A
    founder that came late itself cannot know whether node 2 is another one, and ends nobody."""
    raft = leader(A, membership(A)).raft
    (tmp_path / "n1.toml").write_text(config_text(1, {1: 9081}, 0, 2), encoding="utf-8")
    config, ended = read(tmp_path / "n1.toml", {}), list[BaseException]()
    directory = DataDirectory.open(tmp_path / "db", 1)
    directory.set_cluster_id("c")
    founder = msgspec.structs.replace(hello(B), cluster_id="", list_digest="of 1 and 2")

    refused = admission_of(config, directory, raft, ended.append).admit(founder, "10.0.0.2")
    assert refused is not None
    assert refused.reason == "wiped", "which ends node 2 with 76"
    assert "set role = 3 to join" in refused.message

    late = Server(A, Disk()).raft
    refused = admission_of(config, directory, late, ended.append).admit(founder, "10.0.0.2")
    assert refused is not None
    assert refused.reason == "foreign_cluster"
    assert not ended
