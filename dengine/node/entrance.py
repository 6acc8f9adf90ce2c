"""How a node comes to belong to a cluster, once for all time of its directory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from dengine.config import Config
from dengine.kv.commands import COMMAND_VERSION
from dengine.node.addresses import AddressBook
from dengine.node.cycle import Cycle
from dengine.node.founding import Founding
from dengine.node.joining import join
from dengine.raft.membership import Membership, Status
from dengine.security import Secrets
from dengine.storage.directory import DataDirectory

log = logging.getLogger("dengine.entrance")

REPORT_EVERY_S = 10.0
POLL_S = 0.02


class Entrance:
    """Founds or joins, and does nothing where that is done already.

    Args:
        peer_errors: says for node ids why each cannot be reached.
        tell_pledge: called when this directory is bound to a first membership.
        belongs: called when the cluster is known, so that its members can be dialled.
    """

    def __init__(
        self,
        config: Config,
        directory: DataDirectory,
        cycle: Cycle,
        founding: Founding,
        book: AddressBook,
        secrets: Secrets,
        *,
        peer_errors: Callable[[list[int]], str],
        tell_pledge: Callable[[], None],
        belongs: Callable[[], None],
    ) -> None:
        self._config = config
        self._directory = directory
        self._cycle = cycle
        self._founding = founding
        self._book = book
        self._secrets = secrets
        self._peer_errors = peer_errors
        self._tell_pledge = tell_pledge
        self._belongs = belongs

    async def enter(self) -> None:
        """Return once the committed membership names this node.

        Raises:
            IdentityError: this directory has no place in the cluster that is there.
        """
        if not self._directory.identity.cluster_id and not self._founding.is_joiner:
            await self._found()
        if not self._is_member():
            await self._join()

    def _is_member(self) -> bool:
        raft = self._cycle.raft
        return raft.committed_membership.get(raft.me) is not None

    async def _found(self) -> None:
        """Alone after listening for a while; from a static list once everybody is bound to it."""
        founding, loop = self._founding, asyncio.get_running_loop()
        if founding.is_alone:
            # Not a guess but the contract: so long a living cluster may take to speak up.
            await asyncio.sleep(self._config.cluster.founding_wait_ms / 1000)
        report_at = loop.time() + REPORT_EVERY_S
        while (membership := founding.agreed()) is None:
            pledge = founding.to_pledge(all_there=not self._peer_errors(founding.others))
            if pledge is not None:
                self._directory.set_pledge(pledge.encode())
                founding.pledge = pledge
                self._tell_pledge()
            if loop.time() >= report_at:
                report_at += REPORT_EVERY_S
                why = founding.misfit() or self._peer_errors(founding.others)
                log.warning("waiting for all founders; %s", why)
            await asyncio.sleep(POLL_S)
        await self._bootstrap(membership)

    async def _bootstrap(self, membership: Membership) -> None:
        """Append the founding entry; a crash before the identity is noted is healed at start.

        The other order would not be: an identity that names a cluster, beside an empty log, waits
        for others to fill it, and a node that founded alone has none.
        """
        await self._cycle.act(lambda raft: raft.bootstrap(membership))
        log = self._cycle.raft.log
        while True:  # a disk that fails ends the process
            if log.stable_index:
                break
            await asyncio.sleep(POLL_S)
        self._belong_to(membership.cluster_id)

    async def _join(self) -> None:
        """A joiner asks to be let in; a founder that comes late is a member and only waits."""
        raft, cluster = self._cycle.raft, self._config.cluster
        status = self._config.own_entry.status
        request = {
            "id": raft.me.id,
            "incarnation": f"{raft.me.incarnation:016x}",
            "address": self._book.own,
            "zone": cluster.zone,
            "status": "read_only" if status is Status.READ_ONLY else "promotable",
            "command_version": COMMAND_VERSION,
            "cluster_id": self._directory.identity.cluster_id,
        }

        def joined(answer: dict[str, Any]) -> bool:
            if answer:
                self._belong_to(answer["cluster_id"])
                request["cluster_id"] = answer["cluster_id"]
                self._book.told({m["id"]: m["address"] for m in answer.get("members", ())})
            return self._is_member()

        def addresses() -> list[str]:
            known = dict(self._book.bootstrap(raft.me.id))
            for member in raft.membership.members:  # a file may name nobody else (n1.toml)
                if member.id.id != raft.me.id:
                    known[member.id.id] = self._book.dial(member.id.id, member.address)
            return [address for some in known.values() for address in some]

        await join(request, addresses, joined, self._secrets)

    def _belong_to(self, cluster_id: str) -> None:
        self._directory.set_cluster_id(cluster_id)
        if not self._directory.identity.address:
            self._directory.set_address(self._book.own)
        self._belongs()
