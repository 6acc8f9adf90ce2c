"""HTTP to a dengine cluster, for the modules: standard library only, honest about writes.

A request goes to the first endpoint that answers. It is sent again, to the next one, only when it
reads, when nobody could be connected with, or when the answer says that it did nothing
("outcome": "none").
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import time
import urllib.parse

PAUSE_S = 0.2  # between two rounds over all endpoints
# A node answers a call that it cannot end in time, and says more than our own timeout would.
REPLY_MARGIN_S = 2.0
CONNECT_S = 2.0  # a host that is off says nothing, and the next endpoint is to have its turn
REFUSED = "connection_refused"  # the host is there, and nobody listens
_ENDPOINT = re.compile(r"(?:\[([^\[\]/@\s]+)\]|([^\[\]:/@?#\s]+)):([0-9]{1,5})")

API_SPEC = {
    "endpoints": {"type": "list", "elements": "str", "required": True},
    "token": {"type": "str", "no_log": True, "default": ""},
    "request_timeout": {"type": "float", "default": 5.0},
    "patience": {"type": "float", "default": 10.0},
}


class ApiError(Exception):
    """The cluster refused, or nobody answered (`status` 0)."""

    def __init__(self, message, status=0, name="unreachable", outcome="none", retryable=True):
        super().__init__(message)
        self.message = message
        self.status = status
        self.name = name
        self.outcome = outcome
        self.retryable = retryable


class Unconnected(OSError):
    """There was no connection, so nothing was sent."""


class Reply:
    """One answer; `endpoint` is who gave it."""

    def __init__(self, endpoint, status, headers, body):
        self.endpoint = endpoint
        self.status = status
        self.headers = headers
        self.body = body

    def json(self):
        return json.loads(self.body.decode("utf-8"))


def key_path(key):
    """The request target of a single key; every byte of it survives the way."""
    return "/v1/kv/" + urllib.parse.quote(key, safe="")


def split_endpoint(endpoint):
    """("host", port) of "host:port"; an IPv6 host stands in brackets. Raises ApiError."""
    found = _ENDPOINT.fullmatch(endpoint)
    if not found or not 1 <= int(found[3]) <= 65535:
        raise ApiError(
            f"{endpoint!r} is not an endpoint: write it like 192.168.1.10:9081, an IPv6 address in "
            "brackets like [2001:db8::10]:9081"
        )
    return found[1] or found[2], int(found[3])


class Client:
    """The cluster as one addressable thing.

    Args:
        endpoints: "host:port", tried in this order.
        patience: seconds in all for one call, every endpoint and repetition included.
    """

    def __init__(self, endpoints, token="", request_timeout=5.0, patience=10.0, keep=False):
        self.endpoints = list(endpoints)
        self.request_timeout = request_timeout
        self.patience = patience
        self._token = token
        self._keep = keep
        self._kept = {}  # open connections by endpoint

    @classmethod
    def of(cls, params):
        """From the parameters that every module shares."""
        return cls(
            params["endpoints"], params["token"], params["request_timeout"], params["patience"]
        )

    def only(self, endpoint, patience=0.0, keep=False):
        """The same for a single endpoint; with `keep` it reads over one connection."""
        return Client([endpoint], self._token, self.request_timeout, patience, keep)

    def open(self, endpoint, method, path, body=None, headers=None):
        """(connection, response) of one exchange; the caller closes the connection.

        Raises Unconnected when nothing was sent, any other OSError when something may have been.
        """
        connection = self._connect(endpoint)
        try:
            return connection, self._exchange(connection, method, path, body, headers)
        except BaseException:
            connection.close()
            raise

    def _connect(self, endpoint):
        host, port = split_endpoint(endpoint)
        connect_s = max(0.1, min(self.request_timeout, CONNECT_S))
        connection = http.client.HTTPConnection(host, port, timeout=connect_s)
        try:
            connection.connect()
        except (OSError, UnicodeError) as failure:  # UnicodeError: no name that DNS could have
            connection.close()
            raise Unconnected(_reason(failure)) from failure
        connection.sock.settimeout(self.request_timeout + REPLY_MARGIN_S)
        return connection

    def _exchange(self, connection, method, path, body, headers):
        sent = {"Dengine-Timeout-Ms": str(int(min(max(self.request_timeout, 0.1), 60) * 1000))}
        if self._token:
            sent["Authorization"] = "Bearer " + self._token
        sent.update(headers or {})
        connection.request(method, path, body, sent)
        return connection.getresponse()

    def get(self, path):
        """The JSON body of a GET."""
        return self.call("GET", path).json()

    def call(self, method, path, body=None, headers=None, accept=()):
        """One request to whoever answers; raises ApiError for everything but 2xx and `accept`.

        A dict as `body` is sent as JSON.
        """
        headers = dict(headers or {})
        if isinstance(body, dict):
            body = json.dumps(body).encode("utf-8")
            headers["Content-Type"] = "application/json"
        deadline = time.monotonic() + self.patience
        while True:
            error = None
            for endpoint in self.endpoints:
                try:
                    reply = self._once(endpoint, method, path, body, headers)
                except (OSError, http.client.HTTPException) as failure:
                    error = _unreachable(endpoint, method, failure)
                else:
                    if reply.status < 300 or reply.status in accept:
                        return reply
                    error = refusal(reply)
                if not (error.retryable and (method == "GET" or error.outcome == "none")):
                    raise error
            if error is None:
                raise ApiError("no endpoint is given")
            if time.monotonic() + PAUSE_S >= deadline:
                raise error
            time.sleep(PAUSE_S)

    def change(self, method, path, body, is_done):
        """One write to the cluster; where its outcome is unknown, the cluster is looked at.

        Returns the answer, or None where there was none.

        Args:
            is_done: says of GET /v1/cluster whether it has what was asked for.
        """
        try:
            return self.call(method, path, body)
        except ApiError as error:
            if error.outcome != "unknown":
                raise
            deadline = time.monotonic() + self.patience
            while not is_done(self.get("/v1/cluster")):
                if time.monotonic() >= deadline:
                    raise
                time.sleep(PAUSE_S)
            return None

    def _once(self, endpoint, method, path, body, headers):
        kept = self._kept.pop(endpoint, None)
        if kept is not None and method == "GET":
            # The other side may have closed it: then a new one is as good.
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self._read(endpoint, kept, self._exchange(kept, method, path, body, headers))
        if kept is not None:
            kept.close()
        connection, response = self.open(endpoint, method, path, body, headers)
        return self._read(endpoint, connection, response)

    def _read(self, endpoint, connection, response):
        done = False
        try:
            reply = Reply(endpoint, response.status, response.headers, response.read())
            done = self._keep and not response.will_close
        finally:
            if not done:
                connection.close()
        if done:
            self._kept[endpoint] = connection
        return reply

    def close(self):
        """End the connections that were kept."""
        for connection in self._kept.values():
            connection.close()
        self._kept.clear()


def _reason(failure):
    return getattr(failure, "strerror", None) or str(failure) or type(failure).__name__


def _unreachable(endpoint, method, failure):
    nothing = isinstance(failure, Unconnected) or method == "GET"
    return ApiError(
        f"{endpoint}: {_reason(failure)}",
        name=REFUSED if isinstance(failure.__cause__, ConnectionRefusedError) else "unreachable",
        outcome="none" if nothing else "unknown",
    )


def refusal(reply):
    """The ApiError that an answer is."""
    try:
        said = reply.json()
    except ValueError:
        said = {}
    if not isinstance(said, dict):
        said = {}
    return ApiError(
        "{}: {} ({})".format(reply.endpoint, said.get("message", "no reason given"), reply.status),
        status=reply.status,
        name=said.get("error", "http_error"),
        outcome=said.get("outcome", "unknown"),
        retryable=bool(said.get("retryable", reply.status == 503)),
    )
