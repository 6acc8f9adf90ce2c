"""Which nodes there are, which of them leads, and which one to ask next.

No I/O: the transport tells what it sees, with the time of its loop in seconds.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from dengine.client.encoding import parse_endpoint

MAX_NODES = 64  # what a confused answer may make us remember
AVOID_S = 0.5  # after the first failure; doubled with each, up to
AVOID_MAX_S = 15.0

Prefer = Literal["leader", "follower", "any"]


class Node:
    """One address and how it has behaved.

    `address` is "host:port". `given`: named by the caller, so it is never forgotten.
    """

    def __init__(self, address: str, *, given: bool) -> None:
        self.address = address
        self.given = given
        self.node_id: int | None = None
        self.failures = 0
        self.avoid_until = 0.0
        self.silent = False  # another node has answered what this one had not
        self._silence: asyncio.Future[None] | None = None

    def failed(self, now: float) -> None:
        """It refused, broke off, or did not answer in time: others are asked first for a while."""
        wait_s = min(AVOID_S * 2**self.failures, AVOID_MAX_S)
        self.failures = min(self.failures + 1, 16)
        self.avoid_until = now + wait_s * random.uniform(0.75, 1.25)

    def answered(self) -> None:
        self.failures, self.avoid_until, self.silent = 0, 0.0, False

    def silence(self) -> asyncio.Future[None]:
        """Done when `silent` is noticed, for those who wait for an answer of this node."""
        loop = asyncio.get_running_loop()
        held = self._silence
        if held is None or held.done() or held.get_loop() is not loop:
            held = self._silence = loop.create_future()
        return held

    def is_silent(self) -> None:
        """It may be hung."""
        self.silent = True
        if self._silence is not None and not self._silence.done():
            self._silence.set_result(None)


class Nodes:
    """The nodes of one cluster, as far as a client knows.

    Args:
        endpoints: "host:port" or "http://host:port", at least one.
    """

    def __init__(self, endpoints: str | Sequence[str]) -> None:
        named = [endpoints] if isinstance(endpoints, str) else list(endpoints)
        if not named:
            raise ValueError("name at least one endpoint, like 192.168.1.10:9081")
        addresses = dict.fromkeys(parse_endpoint(text) for text in named)
        self._nodes = {address: Node(address, given=True) for address in addresses}
        self._leader: Node | None = None
        self._term = 0  # of the newest view: an older one may come from a leader that was
        self._turn = random.randrange(1024)  # clients do not all begin with the same node

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def leader(self) -> Node | None:
        return self._leader

    @property
    def addresses(self) -> list[str]:
        return list(self._nodes)

    def choose(self, prefer: Prefer, now: float, tried: Iterable[Node] = ()) -> Node | None:
        """The node to ask next, or None when all of them have been `tried`.

        One that failed lately comes after all others, and is not left out: it may be the last.
        """
        asked = set(tried)
        left = [node for node in self._nodes.values() if node not in asked]
        if not left:
            return None
        self._turn += 1
        offset = self._turn % len(left)
        liked = {"leader": self._leader, "follower": None, "any": None}[prefer]
        disliked = self._leader if prefer == "follower" else None

        def rank(node: Node) -> tuple[float, bool, bool]:
            return max(0.0, node.avoid_until - now), node is not liked, node is disliked

        return min(left[offset:] + left[:offset], key=rank)

    def follow(self, leader: Mapping[str, Any] | None, told_by: Node) -> None:
        """An answer of `told_by` names the leader as {"id", "address"}: ask that one first."""
        if leader is None:
            return
        address = _reachable(leader.get("address"), told_by)
        if address is None:
            return
        if address not in self._nodes and len(self._nodes) < MAX_NODES:
            self._nodes[address] = Node(address, given=False)
        self._leader = self._nodes.get(address, self._leader)

    def leads_no_more(self, node: Node) -> None:
        """`node` says so, or does not answer."""
        if self._leader is node:
            self._leader = None

    def learn(self, cluster: Mapping[str, Any], told_by: Node) -> None:
        """What `GET /v1/cluster` says: the members join those named by the caller."""
        members = cluster.get("members")
        if not isinstance(members, list):
            return
        leader, term = cluster.get("leader"), cluster.get("term")
        leader_id = leader.get("id") if isinstance(leader, Mapping) else leader
        if isinstance(term, int):
            if term < self._term:
                leader_id = None
            self._term = max(self._term, term)
        found: dict[str, Any] = {}
        for member in members:
            if isinstance(member, Mapping):
                address = _reachable(member.get("address"), told_by)
                if address is not None and len(found) < MAX_NODES:
                    found[address] = member.get("id")
        kept = {a: node for a, node in self._nodes.items() if node.given or a in found}
        for address, node_id in found.items():
            node = kept.setdefault(address, self._nodes.get(address) or Node(address, given=False))
            node.node_id = node_id if isinstance(node_id, int) else None
            if node_id == leader_id and leader_id is not None:
                self._leader = node
        self._nodes = kept
        if self._leader is not None and self._leader.address not in kept:
            self._leader = None


def _reachable(address: object, told_by: Node) -> str | None:
    """Where a client finds a member. A wildcard is where the node is that names it."""
    try:
        parsed = parse_endpoint(str(address))
    except ValueError:
        return None
    url = urlsplit(f"//{parsed}")
    if url.hostname in ("0.0.0.0", "::"):
        host = urlsplit(f"//{told_by.address}").hostname or ""
        return parse_endpoint(f"[{host}]:{url.port}" if ":" in host else f"{host}:{url.port}")
    return parsed
