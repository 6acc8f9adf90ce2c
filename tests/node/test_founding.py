"""What a founder of a static list concludes from the Hello of another one."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from dengine.config import read
from dengine.errors import IdentityError, InvariantBroken
from dengine.kv.commands import COMMAND_VERSION
from dengine.node.founding import Founding, pledge_of
from dengine.node.wire import PROTOCOL_VERSION, Hello
from dengine.raft.membership import Membership, decode_membership
from dengine.raft.types import MemberId
from dengine.storage.directory import DataDirectory
from tests.cluster import config_text
from tests.node.hosts import admission_of
from tests.raft.harness import A, B, C, Disk, Server, leader, membership


def founding_of(tmp_path: Path, *ids: int) -> Founding:
    """Node 1's, with an empty directory and a list of these founders."""
    file = tmp_path / "n1.toml"
    file.write_text(config_text(1, {i: 9080 + i for i in ids}, 0, 2), encoding="utf-8")
    return Founding(read(file, {}), A, boot=1)


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


def unfounded(who: MemberId, founding: Founding) -> Hello:
    """Of a founder with the same list as that one."""
    return msgspec.structs.replace(hello(who), cluster_id="", list_digest=founding.list_digest)


def bound(tmp_path: Path) -> tuple[Founding, Membership]:
    """Node 1 of three, bound to a cluster with B and C."""
    founding = founding_of(tmp_path, 1, 2, 3)
    for founder in (B, C):
        assert founding.to_pledge(all_there=True) is None
        assert founding.offer(unfounded(founder, founding)) is None
    assert founding.to_pledge(all_there=False) is None, "one may come back with another disk"
    founding.pledge = founding.to_pledge(all_there=True)
    assert founding.pledge is not None
    assert founding.pledge.voters == (A, B, C)
    return founding, founding.pledge


def test_nobody_founds_before_all_founders_are_bound_to_the_same(tmp_path: Path) -> None:
    founding, membership = bound(tmp_path)
    assert founding.to_pledge(all_there=True) is None, "it is bound for good"
    assert founding.agreed() is None
    founding.pledged(B, pledge_of(membership))
    assert founding.agreed() is None
    other = msgspec.structs.replace(pledge_of(membership), cluster_id="another")
    founding.pledged(C, other)
    assert founding.agreed() is None
    founding.pledged(C, pledge_of(membership))
    assert founding.agreed() == membership


def test_who_has_not_met_a_founder_is_bound_to_what_another_one_says(tmp_path: Path) -> None:
    """The third may be reached by that one alone."""
    _, membership = bound(tmp_path)
    founding = founding_of(tmp_path, 1, 2, 3)
    assert founding.offer(unfounded(B, founding)) is None
    assert founding.to_pledge(all_there=True) is None
    founding.pledged(B, pledge_of(membership))
    assert founding.to_pledge(all_there=False) == membership


def test_nobody_is_bound_to_what_contradicts_what_is_known(tmp_path: Path) -> None:
    """B is bound to one with a disk of node 3, or of this node, that is not there any more. To
    found another cluster then would split the founders.
    """
    founding, membership = bound(tmp_path)
    pledge = pledge_of(membership)
    for known in ((B, MemberId(3, 0xDEAD)), (B, C)):
        founding = founding_of(tmp_path, 1, 2, 3)
        for founder in known:
            assert founding.offer(unfounded(founder, founding)) is None
        old_self = (MemberId(1, 0xDEAD), B, C)
        of_b = pledge if C not in known else msgspec.structs.replace(pledge, founders=old_self)
        founding.pledged(B, of_b)
        assert founding.to_pledge(all_there=True) is None
    foreign = founding_of(tmp_path, 1, 2, 3, 4)
    assert foreign.offer(unfounded(B, foreign)) is None
    foreign.pledged(B, pledge)
    assert foreign.to_pledge(all_there=True) is None, "another list"


def test_another_disk_of_a_founder_is_no_part_of_what_was_agreed(tmp_path: Path) -> None:
    founding, membership = bound(tmp_path)
    wiped = MemberId(3, 0xDEAD)
    useless = founding.offer(unfounded(wiped, founding))
    assert useless is not None
    assert "another data directory" in useless
    for who in (B, wiped):
        founding.pledged(who, pledge_of(membership))
    assert founding.agreed() is None


def test_a_pledge_is_for_good_and_survives_a_restart(tmp_path: Path) -> None:
    _, membership = bound(tmp_path)
    directory = DataDirectory.open(tmp_path / "db", 1)
    directory.set_pledge(membership.encode())
    with pytest.raises(InvariantBroken):
        directory.set_pledge(membership.encode())
    directory.close()
    directory = DataDirectory.open(tmp_path / "db", 1)
    assert decode_membership(directory.identity.pledge) == membership
    directory.set_cluster_id(membership.cluster_id)
    assert directory.identity.pledge == b""
    directory.close()


def test_a_list_that_was_changed_after_the_agreement_is_refused(tmp_path: Path) -> None:
    """To wait without a word for somebody who is not on the list any more helps nobody."""
    _, membership = bound(tmp_path)
    file = tmp_path / "n1.toml"
    file.write_text(config_text(1, {1: 9081, 2: 9082}, 0, 2), encoding="utf-8")
    with pytest.raises(IdentityError, match="nodes 1, 2, 3 found together: put the list back"):
        Founding(read(file, {}), A, 1, membership).agreed()


def test_who_was_about_to_found_alone_may_found_with_others(tmp_path: Path) -> None:
    """Its file was changed after a crash in the midst of it: nobody counts on that cluster."""
    alone = founding_of(tmp_path, 1).to_pledge(all_there=True)
    assert alone is not None
    (tmp_path / "n1.toml").write_text(
        config_text(1, {i: 9080 + i for i in (1, 2, 3)}, 0, 2), encoding="utf-8"
    )
    founding = Founding(read(tmp_path / "n1.toml", {}), A, 1, alone)
    assert founding.pledge is None
    assert founding.agreed() is None
    _, membership = bound(tmp_path)
    directory = DataDirectory.open(tmp_path / "db", 1)
    directory.set_pledge(alone.encode())
    directory.set_pledge(membership.encode())
    directory.close()


def test_who_comes_late_makes_the_same_first_entry_as_the_others(tmp_path: Path) -> None:
    """So that the cluster does not depend on the disk of who founded first. It does not matter
    whether the one that tells of the cluster knows its members."""
    for members in ((A, B, C), ()):
        founding, membership = bound(tmp_path)
        told = msgspec.structs.replace(hello(C, *members), cluster_id=membership.cluster_id)
        assert founding.offer(told) is None
        assert founding.agreed() == membership


def test_an_old_copy_of_a_founder_is_told_so(tmp_path: Path) -> None:
    """Nobody founds with a directory that is not bound; this one knows nothing of it."""
    founding = founding_of(tmp_path, 1, 2, 3)
    with pytest.raises(IdentityError, match="old copy"):
        founding.offer(hello(C, A, B, C))


def test_who_has_been_told_of_a_cluster_and_nothing_else_ends_no_founder(tmp_path: Path) -> None:
    """It has not got the log yet and cannot know whether we are a member."""
    founding = founding_of(tmp_path, 1, 2, 3)
    assert founding.offer(hello(B)) is None
    assert founding.agreed() is None


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


def test_two_copies_of_one_directory_found_two_clusters(tmp_path: Path) -> None:
    """An image in which a node has never founded, started twice: they must refuse each other."""
    (tmp_path / "n1.toml").write_text(config_text(1, {1: 9081}, 0, 2), encoding="utf-8")
    config = read(tmp_path / "n1.toml", {})
    first, second = (Founding(config, A, boot).to_pledge(all_there=True) for boot in (1, 2))
    assert first is not None
    assert second is not None
    assert first.voters == second.voters
    assert first.cluster_id != second.cluster_id
    assert Founding(config, A, 3, first).agreed() == first, "as after a crash in the midst of it"


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


def test_a_founder_says_who_is_bound_to_what_cannot_come_of_its_own_file(tmp_path: Path) -> None:
    """One was bound, all were stopped, and a setting was changed in all files: they waited for each
    other for ever, and said only that they did."""
    founding, membership = bound(tmp_path)
    founding.pledged(B, pledge_of(membership))
    assert founding.misfit() == ""
    later = founding_of(tmp_path, 1, 2, 3)
    for founder in (B, C):
        later.offer(unfounded(founder, later))
    assert later.misfit() == ""
    other = msgspec.structs.replace(pledge_of(membership), cluster_id="of other settings")
    later.pledged(C, other)
    assert later.to_pledge(all_there=True) is None
    assert "node 3 is bound" in later.misfit()
    assert "put back what was changed" in later.misfit()
