"""The HTTP server of a node: one port for clients and peers, one function per request.

`HttpServer._handle` is the whole life of a request: find the call, run it, turn any error into
the JSON of `DengineError.to_dict`, note the time. It runs in the task that aiohttp makes for it and
arms no timer of its own.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import traceback
from time import perf_counter
from typing import TYPE_CHECKING, cast

import orjson

from dengine.api import cluster, health, kv, leases, openapi, snapshots, txn, watch
from dengine.api.guard import Guard
from dengine.api.params import IDEMPOTENCY_KEY, BodyReader
from dengine.api.parsing import MAX_HEADER_BYTES
from dengine.api.protocol import (
    Connection,
    Request,
    Response,
    Server,
    error_response,
)
from dengine.api.routes import Body, Call, Route, RouteTable
from dengine.config import parse_address
from dengine.errors import (
    DengineError,
    FatalError,
    HeadersTooLarge,
    InvalidRequest,
    TryAgain,
    Unauthorized,
)

if TYPE_CHECKING:
    from dengine.config import Config
    from dengine.node.node import Node

log = logging.getLogger("dengine.api")

BACKLOG = 1024
WRITES = ("PUT", "POST", "DELETE")
CUT_OFF_S = 0.05  # for requests under way when nothing will answer them any more


class HttpServer:
    """Serves one node's HTTP on `config.cluster.listen_address`.

    Make it, `start()` and `stop()` it on the event loop that runs the node.
    """

    def __init__(self, node: Node, config: Config) -> None:
        self._node = node
        self._config = config
        self._guard = Guard(node.secrets)
        self._slow_s = config.log.slow_request_ms / 1000
        self._web: Server | None = None
        self._listener: asyncio.Server | None = None

    async def start(self) -> None:
        """Bind the port and serve.

        Raises:
            TryAgain: the port is taken or the address is not one of this machine.
        """
        loop = asyncio.get_running_loop()
        self._closing: asyncio.Future[None] = loop.create_future()
        self._table = RouteTable(self._routes())
        address = self._config.cluster.listen_address
        host, port = parse_address(address)
        self._web = Server(self._handle, self._name_leader_to_anyone, self._table.allowed)
        try:
            self._listener = await loop.create_server(
                self._web, host, port, backlog=BACKLOG, reuse_address=True
            )
        except (OSError, socket.gaierror) as error:
            raise TryAgain(
                f"cannot listen on {address}: {error.strerror or error}; "
                "stop what uses that port, or change cluster.listen_address"
            ) from None

    async def stop(self, grace_s: float) -> None:
        """Stop accepting, and let requests under way end; after `grace_s` they are cut off.

        Peer streams stay: they belong to the node, which needs them to hand leadership over.
        """
        if self._listener is None or self._web is None:
            return
        self._listener.close()
        self._listener = None  # a second stop has nothing left to do
        self._closing.set_result(None)
        clients = [cast(Connection, c) for c in self._web.connections]
        busy = [c for c in clients if c.busy and not c.upgraded]
        for connection in clients:
            if not connection.busy:
                connection.force_close()
        limit_s = max(grace_s, CUT_OFF_S)
        await asyncio.gather(*(connection.finish(limit_s) for connection in busy))

    def _routes(self) -> list[Route]:
        bodies = BodyReader(self._config.limits.pending_bytes)
        routes = [
            *kv.routes(kv.KvCalls(self._node, self._config, bodies)),
            *txn.routes(txn.TxnCalls(self._node, self._config, bodies)),
            *leases.routes(leases.LeaseCalls(self._node, bodies)),
            *watch.routes(watch.WatchCalls(self._node, self._config, self._closing)),
            *cluster.routes(cluster.ClusterCalls(self._node, self._config, bodies, self._closing)),
            *snapshots.routes(snapshots.SnapshotCalls(self._node, self._config, bodies)),
            *health.routes(health.HealthCalls(self._node)),
        ]
        description = Body("OpenAPI 3.1", {"openapi": "3.1.0"})
        itself = Route(
            "GET", "/v1/openapi.json", self._openapi, "This document", {200: description}
        )
        routes.append(itself)
        self._document = orjson.dumps(openapi.document(routes))
        return routes

    async def _openapi(self, request: Request) -> Response:
        return Response(200, self._document, b"Content-Type: application/json\r\n")

    async def _handle(self, request: Request) -> Response:
        """One request from parsed header to complete response; never raises but ConnectionError."""
        started = perf_counter()
        call: Call | None = None
        try:
            self._guard.check(request, self._table)
            if request.message.method == "OPTIONS":
                return self._options(request)
            call = self._table.resolve(request)
            if call.access == "join":
                self._guard.check_join(request)
            self._check_headers(request, call)
            response = await call.handler(request)
        except Unauthorized as error:  # who is a stranger is not told who leads either
            challenges = self._guard.challenges(self._table.access(request))
            response = error_response(error, headers=challenges)
        except FatalError as error:  # damaged data, for one: answer, and end the process
            response = self._refusal(error)
            self._node.fail(error)
        except DengineError as error:
            response = self._refusal(error)
        except ConnectionError:
            raise
        except Exception as error:
            response = _bug(error)
        if request.proof is not None and isinstance(response, Response):
            self._guard.sign(request.proof, response)
        if call is not None and not call.streams:
            self._observe(call, request, response, perf_counter() - started)
        return response

    def _check_headers(self, request: Request, call: Call) -> None:
        message = request.message
        if request.protocol.oversized:
            raise HeadersTooLarge(f"the header is larger than {MAX_HEADER_BYTES} bytes")
        if not call.once and IDEMPOTENCY_KEY in message.headers and message.method in WRITES:
            raise InvalidRequest(
                "this call takes no Idempotency-Key: it is for writes of keys, transactions and "
                "leases"
            )

    def _options(self, request: Request) -> Response:
        try:
            allow = self._table.allowed(request.message.path)
        except DengineError as error:
            return self._refusal(error)
        return Response(204, b"", b"Allow: %b\r\n" % allow.encode())

    def _name_leader_to_anyone(self, error: DengineError) -> None:
        """In an answer to bytes that are no request, so that nobody knows who sent them."""
        if not self._guard.asks_for_token:
            self._name_leader(error)

    def _name_leader(self, error: DengineError) -> None:
        if error.leader is None and self._node.leader is not None:
            node_id, address = self._node.leader
            error.leader = {"id": node_id, "address": address}

    def _refusal(self, error: DengineError) -> Response:
        self._name_leader(error)
        # A connection with an oversized header stays refused, so it ends.
        return error_response(error, close=isinstance(error, HeadersTooLarge))

    def _observe(self, call: Call, request: Request, response: Response, seconds: float) -> None:
        self._node.metrics_observe_request(call.name, seconds)
        if seconds >= self._slow_s:
            target = ascii(request.message.path[:200])[1:-1]
            log.warning(
                "slow request: %s %s took %.0f ms and ended as %d",
                request.message.method,
                target,
                seconds * 1000,
                response.status,
            )


def _bug(error: Exception) -> Response:
    """A mistake of ours: one line that says where, and a 500 whose outcome is unknown."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    log.error(
        "unexpected %s in %s, line %s: %s", type(error).__name__, place.name, place.lineno, error
    )
    return error_response(DengineError("unexpected error in this node", outcome="unknown"))
