"""A client over plain HTTP that sends each write until it is certain what became of it."""

from __future__ import annotations

import contextlib
import http.client
import random
import select
import time
from collections.abc import Mapping, Sequence

from tests.cluster import UNREACHABLE, Reply, ServeProcess, exchange

TRANSIENT = (429, 503, 504)
GIVE_UP_S = 120.0
ATTEMPT_S = 5.0
COMMITTED_S = 0.5  # a reply that is to be lost is waited for that long


class Retrying:
    """Every write goes under one Idempotency-Key from node to node until one of them answers.

    Args:
        nodes: asked in any order; some may be down.
        name: unique to this client.
        numbered: keys are `name:N`; else opaque ones.
        drop: how often the first reply of a write is thrown away unread, 0 to 1.
    """

    def __init__(
        self,
        nodes: Sequence[ServeProcess],
        name: str,
        rng: random.Random,
        *,
        numbered: bool = True,
        drop: float = 0.0,
    ) -> None:
        self._nodes = nodes
        self._name = name
        self._rng = rng
        self._numbered = numbered
        self._drop = drop
        self._count = 0
        self._links: dict[int, http.client.HTTPConnection] = {}
        self.repeated = 0  # attempts beside the first of each request

    def write(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """The answer of the state machine: 2xx, 404, 409, 410 or 412."""
        self._count += 1
        key = f"{self._name}:{self._count}" if self._numbered else f"{self._name}-{self._count}"
        sent = {"Idempotency-Key": key, **(headers or {})}
        if self._rng.random() < self._drop:
            self.repeated += 1
            self._lose_reply(self._rng.choice(self._nodes), method, path, body, sent)
        return self._until_answered(method, path, body, sent)

    def read(self, path: str) -> Reply:
        return self._until_answered("GET", path, None, {})

    def close(self) -> None:
        for link in self._links.values():
            link.close()

    def _until_answered(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> Reply:
        end = time.monotonic() + GIVE_UP_S
        node = self._rng.choice(self._nodes)
        while True:
            problem: object
            try:
                reply = exchange(self._link(node), method, path, body, headers)
                if reply.status not in TRANSIENT:
                    return reply
                problem = (reply.status, reply.body)
            except UNREACHABLE as error:
                problem = error
                self._links.pop(node.node_id).close()
            assert time.monotonic() < end, f"{method} {path} is not answered: {problem!r}"
            self.repeated += 1
            node = self._rng.choice([n for n in self._nodes if n is not node] or [node])
            time.sleep(0.02)  # a node that is down refuses thousands a second

    def _link(self, node: ServeProcess) -> http.client.HTTPConnection:
        link = self._links.get(node.node_id)
        if link is None:
            link = self._links[node.node_id] = node.connect(ATTEMPT_S)
        return link

    def _lose_reply(
        self,
        node: ServeProcess,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
    ) -> None:
        """Send it on a connection that ends before anything is read: at once, or when the reply
        has come, so that the write has happened for certain."""
        with (
            contextlib.suppress(*UNREACHABLE),
            contextlib.closing(node.connect(ATTEMPT_S)) as link,
        ):
            link.request(method, path, body=body, headers=dict(headers))
            if self._rng.random() < 0.7:
                select.select([link.sock], [], [], COMMITTED_S)
