"""Elections: locks of which the value of the first key says who leads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dengine.client.locks import Lock, checked_name, waiting
from dengine.client.types import Change
from dengine.errors import Compacted

if TYPE_CHECKING:
    from dengine.client.client import Client

ELECTIONS = b"_election/"


@dataclass(frozen=True, slots=True)
class Leader:
    """Who leads: what it campaigned with, and its fencing token."""

    value: bytes
    token: int


class Election:
    """Made by `Client.election`. Any number of candidates campaign; one leads.

    Example:
        election = client.election("scheduler")
        async with election.campaign(b"host-a") as leadership:
            leader = await election.leader()
            assert leader.value == b"host-a" and leader.token == leadership.token
        assert await election.leader() is None
    """

    def __init__(self, client: Client, name: str | bytes) -> None:
        self._client = client
        self._prefix = ELECTIONS + checked_name(name) + b"/"

    def campaign(self, value: bytes, *, ttl_s: int = 10, timeout_s: float | None = None) -> Lock:
        """Stand for election: `async with` waits until we lead, and leaving it resigns.

        A candidate that loses its place in an outage queues again. A leader that is cut off for
        `ttl_s` seconds is told so by `lost`, and by LockLost on leaving; to lead again it
        campaigns again.

        Args:
            value: what others learn of the leader, for example its address.
            ttl_s: whole seconds after which a dead leader is replaced.
            timeout_s: how long to wait for the leadership; None: as long as it takes.

        Example:
            async with client.election("scheduler").campaign(b"host-a") as leadership:
                assert not leadership.lost.is_set()
        """
        return Lock(self._client, self._prefix, value, ttl_s, timeout_s)

    async def leader(self) -> Leader | None:
        """Who leads now, None while nobody does. Errors are those of `Client.get`.

        Example:
            assert await client.election("scheduler").leader() is None
        """
        return _first((await self._candidates())[0])

    async def observe(self) -> AsyncIterator[Leader | None]:
        """The leader now, and then each that follows; None while nobody leads.

        Every leader is seen, in order, also over failures of nodes; only when the history that the
        cluster keeps is shorter than an interruption are some left out. Errors: those of a watch.

        Example:
            async for leader in client.election("scheduler").observe():
                assert leader is None
                break
        """
        leader: Leader | None = None
        known = False
        while True:
            candidates, revision = await self._candidates()
            if not known or _first(candidates) != leader:
                leader, known = _first(candidates), True
                yield leader
            try:
                watch = self._client.watch(prefix=self._prefix, from_revision=revision + 1)
                async with watch:
                    async for change in watch:
                        _follow(candidates, change, self._prefix)
                        if _first(candidates) != leader:
                            leader = _first(candidates)
                            yield leader
            except Compacted:
                continue

    async def _candidates(self) -> tuple[dict[bytes, Leader], int]:
        """All of them by key, and the revision from which changes have to be followed."""
        found: dict[bytes, Leader] = {}
        revision = 0
        listing = self._client.list(prefix=self._prefix, consistency="linearizable")
        async for page in listing.pages():
            revision = revision or page.revision
            for item in waiting(page.items, self._prefix):
                found[item.key] = Leader(item.value, item.create_revision)
        return found, revision


def _first(candidates: dict[bytes, Leader]) -> Leader | None:
    return min(candidates.values(), key=lambda leader: leader.token, default=None)


def _follow(candidates: dict[bytes, Leader], change: Change, prefix: bytes) -> None:
    for event in change.events:
        if b"/" in event.key[len(prefix) :]:
            continue
        if event.value is None:
            candidates.pop(event.key, None)
        else:
            known = candidates.get(event.key)
            token = change.revision if known is None else known.token
            candidates[event.key] = Leader(event.value, token)
