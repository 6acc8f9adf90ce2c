"""How a directory without a cluster comes to belong to one.

The rules are in ARCHITECTURE.md, "Identity and membership". In short:

Alone: wait a moment for somebody to say that this id is a member already, then found.
From a static list: found once every other founder has shown an empty directory and the same list.
As a joiner (own role = learner): never found; the cluster lets it in.
"""

from __future__ import annotations

import hashlib

import msgspec

from dengine.config import Config, InitialRole
from dengine.errors import IdentityError
from dengine.kv.commands import COMMAND_VERSION
from dengine.node.wire import Hello
from dengine.raft.membership import Member, Membership, Settings, found
from dengine.raft.types import MemberId


class Founding:
    """The founders of `initial_cluster` and what they have shown so far."""

    def __init__(self, config: Config, me: MemberId) -> None:
        cluster = config.cluster
        self._me = me
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
        self._incarnations = {me.id: me.incarnation}
        self.adopted_cluster_id: str | None = None

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
        if hello.member.id not in self._addresses or self.is_joiner:
            return None
        if not hello.list_digest:
            return (
                f"node {hello.member.id} waits to be let in (role = 3), but this node's "
                "initial_cluster names it as a founder, and there is no cluster yet: start it with "
                "the same list and role as the other founders"
            )
        if hello.list_digest != self.list_digest:
            return (
                f"node {hello.member.id} was started with another initial_cluster list or other "
                "founding settings: make them equal on all founders"
            )
        self._incarnations[hello.member.id] = hello.member.incarnation
        return None

    def _meet_cluster(self, hello: Hello) -> None:
        """A member of an existing cluster is there."""
        if self._me in hello.founders:  # we are one of them, only later
            self.adopted_cluster_id = hello.cluster_id
            self._incarnations = {m.id: m.incarnation for m in hello.founders}
            return
        if not hello.founders and hello.member.id in self.others:
            # A founder that came late like us: it has been told of the cluster, and knows its
            # members only when their log has come. Who knows them will speak to us as well.
            return
        concerns_us = hello.expects == self._me.id or hello.member.id in self._addresses
        if not self.is_joiner and concerns_us:
            raise IdentityError(
                f"node {hello.member.id} belongs to cluster {hello.cluster_id} already, and this "
                f"directory of node {self._me.id} is empty, so it must not found another one: "
                "set role = 3 to join"
            )

    def membership(self) -> Membership | None:
        """The first membership once every founder is known; its hash names the cluster.

        None as well where a cluster was met whose membership is no longer the one it began with.
        """
        if self.is_joiner or set(self._incarnations) != set(self._addresses):
            return None
        members = [
            Member(
                id=MemberId(i, self._incarnations[i]),
                address=address,
                zone=self._zone if self.is_alone else "",  # others announce theirs later
                command_version=COMMAND_VERSION,
            )
            for i, address in sorted(self._addresses.items())
        ]
        anonymous = found("", members, self._settings)
        cluster_id = hashlib.sha256(anonymous.encode()).hexdigest()[:32]
        if self.adopted_cluster_id not in (None, cluster_id):
            return None
        return msgspec.structs.replace(anonymous, cluster_id=cluster_id)
