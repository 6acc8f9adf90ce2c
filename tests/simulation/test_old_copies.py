"""Directories that are put back from a backup of another time of the cluster: what the others know
of it is what shows that they are old.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from dengine.config import Membership as MembershipConfig
from dengine.errors import DengineError, IdentityError, TryAgain
from dengine.kv.commands import Put
from dengine.node.node import Node
from dengine.node.wire import decode
from dengine.raft.messages import AppendRequest
from dengine.raft.types import MemberId
from tests.simulation import invariants
from tests.simulation.disk import Inode
from tests.simulation.loop import SECOND
from tests.simulation.machine import Machine
from tests.simulation.plan import FAULTS, Plan
from tests.simulation.test_calls import call
from tests.simulation.test_found import belongs, cut, mend, until
from tests.simulation.world import World

Ends = list[tuple[int, BaseException | None]]  # machine id and why


def growing() -> World:
    """One node that founds, two that join; nothing else happens."""
    plan = Plan(0, tuple(FAULTS))
    plan.shape, plan.founders, plan.joiners = "1->3", 1, 2
    return World(plan)


def three_voters(world: World) -> bool:
    return len(world.membership.voters) == 3 and not world.membership.joint


def acknowledged(world: World, machine: Machine, key: bytes) -> None:
    """A write at this node."""
    assert machine.process is not None
    command = Put(key, b"of " + key, None)
    answers = call(machine.process, lambda node, by: node.write(command, by), 1)
    until(world, lambda: bool(answers))
    assert not isinstance(answers[0], DengineError), answers[0]


def put_back(world: World, machine: Machine, root: Inode) -> None:
    """While it is off, its disk becomes what it was."""
    world.checker.damaging(machine)
    machine.crash(power=True)
    machine.put_back(root, whole=True)
    world.checker.forgets(machine)
    world.faults.mark(machine, "disk rolled back", lambda: False)
    world.faults.ever_rolled_back.add(machine.id)


def grown(world: World, *, learners: int = 0) -> Machine:
    """Three voters; the disk of node 1, which is off, is from when it voted alone."""
    one, two, three = world.machines.values()
    world.start(one)
    until(world, lambda: bool(world.membership.voters) and world.leader() is not None)
    acknowledged(world, one, b"a")
    before = copy.deepcopy(one.disk.root)
    world.start(two)
    world.start(three)
    if learners:
        until(world, lambda: len(world.membership.learners) == learners, SECOND // 1000)
        before = copy.deepcopy(one.disk.root)
    until(world, lambda: three_voters(world))
    acknowledged(world, one, b"b")
    put_back(world, one, before)
    one.founding_wait_ms = 500
    return one


def asked(world: World, machine: Machine, what: Callable[[Node, float], Awaitable[Any]]) -> None:
    """Something else than a write, which this node carries out."""
    assert machine.process is not None
    answers = call(machine.process, what, 3)
    until(world, lambda: bool(answers))
    assert not isinstance(answers[0], DengineError), answers[0]


def leads(machine: Machine) -> bool:
    return machine.process is not None and machine.process.leads


def noted_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> Ends:
    """From now on who ends is noted here, and started again as systemd does."""
    ends: Ends = []

    def ended(machine: Machine, process: object, error: BaseException | None) -> None:
        if machine.process is process:
            ends.append((machine.id, error))
            world.process_gone(machine.process)
            machine.crash()
            if isinstance(error, TryAgain):
                world.restart_later(machine)

    monkeypatch.setattr(world, "process_ended", ended)
    return ends


def leading_alone(
    world: World, monkeypatch: pytest.MonkeyPatch, *, learners: int = 0
) -> tuple[Machine, Ends]:
    """An old copy that nobody reaches: it leads by itself, which is not promised not to happen."""
    one = grown(world, learners=learners)
    ends = noted_ends(world, monkeypatch)
    cut(world, (1, 2), (1, 3))
    monkeypatch.setattr(invariants, "violated", lambda *what: None)
    world.start(one)
    until(world, lambda: leads(one))
    return one, ends


@pytest.mark.parametrize(
    "when",
    [
        lambda world: len(world.membership.voters) == 1,
        lambda world: len(world.membership.learners) == 2,
    ],
    ids=["alone", "with learners"],
)
def test_an_old_copy_of_the_only_voter_leads_nobody(
    when: Callable[[World], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a disk from before the cluster grew node 1 led at once, all by itself: it acknowledged
    writes that nobody else had, and ended the leader of the others, who led in the same term."""
    world = growing()
    with world.alive():
        one, two, three = machines = list(world.machines.values())
        world.start(one)
        until(world, lambda: bool(world.membership.voters) and world.leader() is not None)
        acknowledged(world, one, b"a")
        copies: list[Inode] = []
        if when(world):
            copies.append(copy.deepcopy(one.disk.root))
        world.start(two)
        world.start(three)
        if not copies:
            until(world, lambda: when(world), SECOND // 1000)
            copies.append(copy.deepcopy(one.disk.root))
        until(world, lambda: three_voters(world))
        acknowledged(world, one, b"b")

        put_back(world, one, copies[0])
        one.founding_wait_ms = 500
        ends = noted_ends(world, monkeypatch)
        until(world, lambda: world.leader() is not None)
        cut(world, (1, 2), (1, 3))  # until they try again, which takes them a moment
        world.start(one)
        world.scheduler.run_until(world.scheduler.now + SECOND // 4)
        assert not leads(one), "it may acknowledge what nobody else has"
        mend(world, (1, 2), (1, 3))
        until(world, lambda: bool(ends) or leads(one), SECOND // 1000)
        assert [(machine_id, type(error)) for machine_id, error in ends] == [(1, IdentityError)]
        assert "empty it, and set role = 3" in str(ends[0][1])
        acknowledged(world, two, b"c")
        assert all(m.process is not None for m in machines if m is not one)

        cut(world, (1, 2), (1, 3))
        world.start(one)  # by somebody who has not read that, and nobody tells it anew
        world.scheduler.run_until(world.scheduler.now + SECOND)
        assert [type(error) for _, error in ends] == [IdentityError, IdentityError]


def test_an_old_copy_that_is_killed_while_it_waits_waits_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That it had just run was taken for a sign that it was no copy: it led at its second start."""
    world = growing()
    with world.alive():
        one = grown(world)
        ends = noted_ends(world, monkeypatch)
        until(world, lambda: world.leader() is not None)
        world.start(one)
        world.scheduler.run_until(world.scheduler.now + SECOND // 200)
        one.crash()
        world.start(one)
        until(world, lambda: bool(ends) or leads(one), SECOND // 1000)
        assert [(machine_id, type(error)) for machine_id, error in ends] == [(1, IdentityError)]


def test_an_old_copy_that_has_led_alone_does_not_become_a_follower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its log was the longer one by then, so it was let in: it stayed for good, and answered reads
    from entries that nobody else had."""
    world = growing()
    with world.alive():
        one, ends = leading_alone(world, monkeypatch)
        for number in range(20):
            acknowledged(world, one, b"%d" % number)
        mend(world, (1, 2), (1, 3))
        until(world, lambda: bool(ends), SECOND // 1000)
        assert {machine_id for machine_id, _ in ends} == {1}
        world.start(one)
        world.scheduler.run_until(world.scheduler.now + SECOND)
        assert ends[-1][0] == 1
        assert isinstance(ends[-1][1], IdentityError)


def test_what_an_old_copy_changes_alone_makes_it_no_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings, addresses and learners are changed by the only voter by itself. Counted as changes
    of the membership they made up for the others' votes: its log won, and states were mixed."""
    world = growing()
    with world.alive():
        one, ends = leading_alone(world, monkeypatch, learners=2)
        for revisions in (1000, 1001, 1002):
            asked(
                world,
                one,
                lambda n, by, r=revisions: n.change_settings({"history_revisions": r}, by),
            )
        for number in range(20):
            acknowledged(world, one, b"%d" % number)
        one.crash()
        world.start(one)  # in a higher term than theirs
        until(world, lambda: leads(one))
        mend(world, (1, 2), (1, 3))
        until(world, lambda: bool(ends), SECOND // 1000)
        world.scheduler.run_until(world.scheduler.now + SECOND)
        assert {(machine_id, type(error)) for machine_id, error in ends} == {(1, IdentityError)}


def test_nobody_is_removed_by_an_old_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the copy they are learners that seem dead, so an operator removed them there: voters that
    had only just reached it marked themselves, and never started again."""
    world = growing()
    with world.alive():
        one, ends = leading_alone(world, monkeypatch, learners=2)
        for dead in (2, 3):
            asked(world, one, lambda node, by, dead=dead: node.remove_member(dead, by))
        mend(world, (1, 2), (1, 3))
        until(world, lambda: bool(ends), SECOND // 1000)
        world.scheduler.run_until(world.scheduler.now + SECOND)
        assert {machine_id for machine_id, _ in ends} == {1}


def test_the_only_voter_is_not_stopped_by_who_was_led_by_an_old_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The learner's log was the longer one: the only sound copy of all was told to be emptied."""
    plan = Plan(0, tuple(FAULTS))
    plan.shape, plan.founders, plan.joiners = "1->3", 1, 3
    plan.membership = MembershipConfig(promotion="odd", catchup_entries=50, stable_ms=50)
    world = World(plan)
    ends = noted_ends(world, monkeypatch)
    with world.alive():
        one, two, three, four = world.machines.values()
        world.start(one)
        until(world, lambda: bool(world.membership.voters) and world.leader() is not None)
        world.start(four)
        until(world, lambda: belongs(four))
        asked(world, one, lambda node, by: node.update_member(4, {"status": "read_only"}, by))
        world.scheduler.run_until(world.scheduler.now + SECOND // 4)
        four.crash()
        before = copy.deepcopy(one.disk.root)
        world.start(two)
        world.start(three)
        until(world, lambda: three_voters(world))
        assert one.process is not None
        process = one.process
        answers = call(process, lambda node, by: node.transfer_leader(2, by), 3)
        until(world, lambda: bool(answers) and leads(two))
        for machine in (one, three):
            removes(world, two, machine.id)
        until(world, lambda: len(world.membership.voters) == 1 and leads(two))
        acknowledged(world, two, b"here alone")
        for machine in (one, three):
            machine.crash()

        cut(world, (1, 2), (2, 4))
        monkeypatch.setattr(invariants, "violated", lambda *what: None)  # what is not promised
        put_back(world, one, before)
        world.start(one)
        world.start(four)
        until(world, lambda: leads(one))
        for number in range(60):
            acknowledged(world, one, b"%d" % number)
        assert four.process is not None
        led = four.process
        until(world, lambda: led.node is not None and led.node.raft.log.last_index > 60)
        one.crash()
        ends.clear()
        mend(world, (1, 2), (2, 4))
        world.scheduler.run_until(world.scheduler.now + 2 * SECOND)
        assert [end for end in ends if end[0] == 2] == []
        assert leads(two)


def removes(world: World, leader: Machine, victim: int) -> None:
    """As an operator does, who tries again."""
    assert leader.process is not None
    while world.membership.find(victim):
        call(leader.process, lambda node, by: node.remove_member(victim, by), 1)
        world.scheduler.run_until(world.scheduler.now + SECOND // 10)


def test_the_only_voter_that_promotes_others_meanwhile_is_no_old_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its Hello was on its way for so long that the receiver knew of later entries: a sound voter
    set itself aside."""
    plan = Plan(0, tuple(FAULTS))
    plan.shape, plan.founders, plan.joiners = "1->3", 1, 3
    plan.membership = MembershipConfig(promotion="odd", catchup_entries=50, stable_ms=50)
    world = World(plan)
    refused: list[tuple[object, ...]] = []
    note = world.note

    def noting(*what: object) -> None:
        if "refuses" in what:
            refused.append(what)
        note(*what)

    monkeypatch.setattr(world, "note", noting)
    ends = noted_ends(world, monkeypatch)
    with world.alive():
        one, two, three, four = world.machines.values()
        world.start(one)
        until(world, lambda: bool(world.membership.voters) and world.leader() is not None)
        world.start(four)
        until(world, lambda: belongs(four))
        four.crash()
        for machine in (two, three):
            world.start(machine)
        until(world, lambda: len(world.membership.learners) == 3, SECOND // 1000)
        world.network.slow[1, 4] = SECOND
        world.start(four)
        until(world, lambda: three_voters(world), SECOND // 1000)
        assert one.process is not None
        process = one.process
        answers = call(process, lambda node, by: node.transfer_leader(3, by), 2)
        until(world, lambda: bool(answers), SECOND // 1000)
        until(world, lambda: bool(refused), SECOND // 1000)
        world.scheduler.run_until(world.scheduler.now + 2 * SECOND)
        assert one.process is process
        assert ends == []


def test_a_voter_with_a_disk_from_before_it_joined_is_another_member(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was let in as the voter that it had been, without a log, and with its vote a leader was
    found that lacked what it had acknowledged."""
    world = growing()
    with world.alive():
        one, two, three = world.machines.values()
        world.start(three)  # waits to be let in, and nobody is there
        world.scheduler.run_until(SECOND // 5)
        assert three.process is not None
        voter = three.process.member
        before = copy.deepcopy(three.disk.root)
        world.start(one)
        world.start(two)
        until(world, lambda: three_voters(world))
        cut(world, (1, 2), (2, 3))
        acknowledged(world, one, b"k")  # by nodes 1 and 3

        put_back(world, three, before)
        one.crash()  # after that it does not know any more what node 3 has acknowledged
        mend(world, (1, 2))
        ends = noted_ends(world, monkeypatch)
        hold_back_appends(world, one.id, monkeypatch)
        world.start(one)
        until(world, lambda: one.process is not None and one.process.leads)
        world.start(three)
        until(world, lambda: bool(ends))
        assert [(machine_id, type(error)) for machine_id, error in ends] == [(3, TryAgain)]
        until(world, lambda: belongs(three))
        assert three.process is not None
        assert three.process.member != voter


def hold_back_appends(world: World, leader: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gets entries from it."""
    carry = world.network.raft_frame

    def lossy(sender: MemberId, to: MemberId, data: bytes, count: int) -> None:
        frame = decode(data)
        entries = any(isinstance(m, AppendRequest) for m in getattr(frame, "messages", ()))
        if sender.id != leader or not entries:
            carry(sender, to, data, count)

    monkeypatch.setattr(world.network, "raft_frame", lossy)
