"""How a directory without a cluster comes to belong to one.

The rules are in ARCHITECTURE.md, "Identity and membership". In short:

Alone: wait a moment for somebody to say that this id is a member already, then found.
From a static list: once every founder has shown an empty directory and the same list, each binds
its directory to the membership that follows from it, durably and for good: its pledge. Who has
heard the same pledge from all of them founds; whoever comes later is told, and does the same.
As a joiner (own role = learner): never found; the cluster lets it in.

Without the pledges two clusters could come of one list: some founders found, the disk of one of
them is replaced, and the others, who remember those that are cut off now, found with the new one.
Each would have a majority of its own members. With them any two memberships that can be founded
have no directory in common.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from dengine.config import Config, InitialRole
from dengine.errors import IdentityError
from dengine.kv.commands import COMMAND_VERSION
from dengine.node.wire import Hello, Pledge
from dengine.raft.membership import Member, Membership, Settings, found
from dengine.raft.types import MemberId


class Founding:
    """The founders of `initial_cluster` and what they have shown so far.

    Args:
        boot: makes the id of a cluster that this node founds alone: nobody has to agree on it, and
            two copies of one directory must not found the same.
        pledge: what this directory is bound to already.

    Attributes:
        pledge: what it is bound to; None: nothing yet.
    """

    def __init__(
        self, config: Config, me: MemberId, boot: int, pledge: Membership | None = None
    ) -> None:
        cluster = config.cluster
        self._me = me
        self._boot = boot
        self._zone = cluster.zone
        self.is_joiner = config.own_entry.role is InitialRole.LEARNER
        self._addresses = {
            m.id: m.address for m in cluster.initial_cluster if m.role is not InitialRole.LEARNER
        }
        if cluster.advertise_address is not None and len(self._addresses) == 1:
            self._addresses[me.id] = cluster.advertise_address
        self._settings = Settings(
            promotion="odd" if config.membership.promotion == "odd" else "immediate",
            history_revisions=config.kv.history_revisions,
            history_bytes=config.kv.history_bytes,
            idempotency_window_s=config.kv.idempotency_window_s,
        )
        if pledge is not None and pledge.is_sole_voter(me) and not self.is_alone:
            pledge = None  # nobody else counts on it
        self.pledge = pledge
        self._incarnations = {me.id: me.incarnation}
        self._pledges: dict[MemberId, Pledge] = {}  # of the others, one for each id
        self._is_founded = False  # what this directory is bound to, by another founder

    @property
    def is_alone(self) -> bool:
        return not self.is_joiner and set(self._addresses) == {self._me.id}

    @property
    def others(self) -> list[int]:
        return [i for i in sorted(self._addresses) if i != self._me.id]

    @property
    def list_digest(self) -> str:
        """Names what all founders must agree on: ids, addresses and founding settings."""
        if self.is_joiner:
            return ""
        named = msgspec.msgpack.encode((sorted(self._addresses.items()), self._settings))
        return hashlib.sha256(named).hexdigest()

    def offer(self, hello: Hello) -> str | None:
        """Take note of another node's Hello.

        Returns:
            Why it is of no use, or None.

        Raises:
            IdentityError: a cluster exists already in which this directory has no place.
        """
        if hello.cluster_id:
            self._meet_cluster(hello)
            return None
        who = hello.member
        if who.id not in self._addresses or self.is_joiner:
            return None
        if not hello.list_digest:
            return (
                f"node {who.id} waits to be let in (role = 3), but this node's initial_cluster "
                "names it as a founder, and there is no cluster yet: start it with the same list "
                "and role as the other founders"
            )
        if hello.list_digest != self.list_digest:
            return (
                f"node {who.id} was started with another initial_cluster list or other "
                "founding settings: make them equal on all founders"
            )
        if self.pledge is not None and self.pledge.get(who) is None:
            return (
                f"node {who.id} has another data directory than the one that this node has agreed "
                "to found a cluster with: if some node serves already, start it with role = 3; if "
                "none does, empty the directories of all founders and start them again"
            )
        self._incarnations[who.id] = who.incarnation
        for older in [m for m in self._pledges if m.id == who.id and m != who]:
            del self._pledges[older]
        return None

    def _meet_cluster(self, hello: Hello) -> None:
        """A member of an existing cluster is there."""
        if self.is_joiner:
            return
        if self.pledge is not None and self.pledge.cluster_id == hello.cluster_id:
            self._is_founded = True  # we are one of its founders, only later
            return
        if self._me in hello.founders:
            raise IdentityError(
                f"node {hello.member.id} belongs to cluster {hello.cluster_id}, which node "
                f"{self._me.id} has founded with it, and this directory knows nothing of that: it "
                "is an old copy; empty it, and set role = 3 to join"
            )
        if not hello.founders and hello.member.id in self.others:
            # It has been told of the cluster, and knows its members only when their log has come.
            # Who knows them will speak to us as well.
            return
        concerns_us = hello.expects == self._me.id or hello.member.id in self._addresses
        if concerns_us:
            raise IdentityError(
                f"node {hello.member.id} belongs to cluster {hello.cluster_id} already, and this "
                f"directory of node {self._me.id} is empty, so it must not found another one: "
                "set role = 3 to join"
            )

    def pledged(self, who: MemberId, pledge: Pledge) -> None:
        """Another founder is bound to this, for good."""
        if self._incarnations.get(who.id) == who.incarnation or (
            self.pledge is not None and self.pledge.get(who) is not None
        ):
            self._pledges[who] = pledge

    def to_pledge(self, all_there: bool) -> Membership | None:
        """What to bind this directory to now. None: nothing, for it is bound already, or not all
        founders are known, or one of those that are is bound to something else.

        Args:
            all_there: every founder is connected. Nobody begins without one that may come back
                with another disk.
        """
        if self.pledge is not None or self.is_joiner:
            return None
        if not self._pledges:
            return self._membership(self._incarnations) if all_there else None
        pledges = set(self._pledges.values())
        named = {m.id: m.incarnation for pledge in pledges for m in pledge.founders}
        membership = self._membership(named | self._incarnations)
        same = membership is not None and pledges == {pledge_of(membership)}
        return membership if same else None

    def misfit(self) -> str:
        """Which founder is bound to what cannot come of our file, and what to do; or nothing."""
        ours = self.pledge or self._membership(self._incarnations)
        for who, pledge in sorted(self._pledges.items()):
            if ours is not None and pledge != pledge_of(ours):
                return (
                    f"node {who.id} is bound to a cluster of these founders with other addresses, "
                    "settings or data directories: put back what was changed in the files, or, if "
                    "none of them serves, empty the directories of all of them and start again"
                )
        return ""

    def agreed(self) -> Membership | None:
        """The first membership, once every founder is bound to it; its hash names the cluster.

        Raises:
            IdentityError: the list of founders is another one by now.
        """
        if self.pledge is None:
            return None
        if {m.id.id for m in self.pledge.members} != set(self._addresses):
            agreed = ", ".join(str(m.id.id) for m in self.pledge.members)
            raise IdentityError(
                "cluster.initial_cluster was changed after this directory had been bound to a "
                f"cluster that nodes {agreed} found together: put the list back, or, if none of "
                "them serves, empty the directories of all of them and start again"
            )
        others = [m.id for m in self.pledge.members if m.id != self._me]
        ours = pledge_of(self.pledge)
        if self._is_founded or all(self._pledges.get(other) == ours for other in others):
            return self.pledge
        return None

    def _membership(self, incarnations: Mapping[int, int]) -> Membership | None:
        """Of these founders; None where it is not exactly those of the list."""
        if self.is_joiner or set(incarnations) != set(self._addresses):
            return None
        members = [
            Member(
                id=MemberId(i, incarnations[i]),
                address=address,
                zone=self._zone if self.is_alone else "",  # others announce theirs later
                command_version=COMMAND_VERSION,
            )
            for i, address in sorted(self._addresses.items())
        ]
        anonymous = found(f"{self._boot:x}" if self.is_alone else "", members, self._settings)
        cluster_id = hashlib.sha256(anonymous.encode()).hexdigest()[:32]
        return msgspec.structs.replace(anonymous, cluster_id=cluster_id)


def pledge_of(membership: Membership) -> Pledge:
    """What a founder that is bound to `membership` says of it."""
    return Pledge(membership.cluster_id, tuple(m.id for m in membership.members))
