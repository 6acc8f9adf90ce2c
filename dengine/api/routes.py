"""The route table: one entry per call, from which routing, query checking and OpenAPI all come.

A route that is missing here does not exist, and one that is here is documented: the OpenAPI
document is generated from the same entries (openapi.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from dengine.api.params import IDEMPOTENCY_KEY, origin_form, parse_query
from dengine.api.parsing import ALL_METHODS
from dengine.api.protocol import Request, Response
from dengine.errors import InvalidRequest, MethodNotAllowed, NotFound

# Who may call: holders of the token; everybody; these or a node that proves to be one; or, where
# nodes have a secret, such a node alone (see guard.py).
Access = Literal["token", "open", "fetch", "join"]
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A query parameter, header or part of the path; `example` also tells its type.

    A number is from `minimum` to `maximum`, a text one of `values`, where these are given.
    """

    name: str
    text: str
    example: str | int | bool
    required: bool = False
    place: str = "query"
    minimum: int | None = None
    maximum: int | None = None
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Body:
    """What a call takes or answers. `example` is a JSON value, or text for other media types.
    `shape` is the struct that a JSON body is decoded as, or that a reply is one of; without one
    it has what the example has.
    """

    text: str
    example: Any = None
    media_type: str = "application/json"
    headers: tuple[str, ...] = ()
    otherwise: Body | None = None  # what the same status carries in another case
    shape: type | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """One call. A `{name}` in `path` stands for the whole raw rest of the path, or for what is
    between the two ends that `path` has.

    `errors` are the statuses it answers beside those that every call can (see openapi.py).
    """

    method: str
    path: str
    handler: Handler
    summary: str
    replies: dict[int, Body]
    parameters: tuple[Parameter, ...] = ()
    body: Body | None = None
    errors: tuple[int, ...] = ()
    streams: bool = False  # a stream, a WebSocket or a large file: no request histogram
    access: Access = "token"

    @property
    def has_head(self) -> bool:
        """HEAD goes with every GET that ends by itself."""
        found = self.replies.get(200)
        ends = found is not None and found.media_type != "text/event-stream"
        return self.method == "GET" and ends

    @property
    def has_timeout(self) -> bool:
        """Does Dengine-Timeout-Ms bound it? Then it may end as 504, or as 202 for what goes on."""
        return 504 in self.errors or 202 in self.replies

    @property
    def once(self) -> bool:
        """Does it take an Idempotency-Key?"""
        return any(p.name == IDEMPOTENCY_KEY for p in self.parameters)

    @property
    def query(self) -> frozenset[str]:
        return frozenset(p.name for p in self.parameters if p.place == "query")


@dataclass(frozen=True, slots=True)
class Call:
    """A route made ready for dispatch."""

    handler: Handler
    name: str  # label of the request histogram
    query: frozenset[str]
    streams: bool
    access: Access
    once: bool  # takes an Idempotency-Key


Calls = dict[str, Call]


class RouteTable:
    """Finds the call for a method and a raw target, without decoding anything but the query."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)
        self._exact: dict[str, Calls] = {}
        self._between: dict[tuple[str, str], Calls] = {}
        self._prefixes: dict[str, Calls] = {}
        for route in self.routes:
            calls = self._place(route.path)
            name = f"{route.method} {route.path}"
            call = Call(route.handler, name, route.query, route.streams, route.access, route.once)
            calls[route.method] = call
            if route.has_head:
                calls["HEAD"] = call
        self._keys = self._prefixes["/v1/kv/"]

    def _place(self, path: str) -> Calls:
        prefix, has_tail, rest = path.partition("{")
        suffix = rest.partition("}")[2]
        if suffix:
            return self._between.setdefault((prefix, suffix), {})
        return (self._prefixes if has_tail else self._exact).setdefault(prefix, {})

    def resolve(self, request: Request) -> Call:
        """The call for `request`, whose `path`, `tail` and `params` are filled in.

        Raises:
            NotFound: nothing is served under this path.
            MethodNotAllowed: something is, but not with this method; `allow` names those.
            InvalidRequest: the target or its query is malformed.
        """
        target, _, query = request.message.path.partition("?")
        if target.startswith("/v1/kv/"):  # the hot path
            calls, request.tail = self._keys, target[7:]
        else:
            calls, request.tail = self._find(target, request.message.method)
        call = calls.get(request.message.method)
        if call is None:
            raise MethodNotAllowed(
                f"{request.message.method} is not possible here; use one of {allow(calls)}",
                allow=allow(calls),
            )
        if "#" in request.message.path:
            raise InvalidRequest("a request target has no fragment: write a literal # as %23")
        request.params = parse_query(query, call.query) if query else {}
        return call

    def allowed(self, target: str) -> str:
        """The Allow header for a request target; raises NotFound when nothing is served there."""
        path = target.partition("?")[0]
        return ALL_METHODS if path == "*" else allow(self._find(path, "OPTIONS")[0])

    def access(self, request: Request) -> Access:
        """Who may do what `request` asks for; what does not exist is for nobody without a token."""
        message = request.message
        try:
            calls, _ = self._find(message.path.partition("?")[0], message.method)
        except NotFound:
            return "token"
        call = calls.get(message.method)
        return "token" if call is None else call.access

    def _find(self, target: str, method: str) -> tuple[Calls, str]:
        if method != "CONNECT":
            target = origin_form(target)
        calls = self._exact.get(target)
        if calls is not None:
            return calls, ""
        for (prefix, suffix), calls in self._between.items():
            if target.startswith(prefix) and target.endswith(suffix, len(prefix)):
                return calls, target[len(prefix) : -len(suffix)]
        for prefix, calls in self._prefixes.items():
            if target.startswith(prefix):
                return calls, target[len(prefix) :]
        raise NotFound("nothing is served under this path; GET /v1/openapi.json lists what is")


def allow(calls: Calls) -> str:
    return ", ".join([*calls, "OPTIONS"])
