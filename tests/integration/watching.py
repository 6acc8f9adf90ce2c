"""Streams of `GET /v1/watch` recorded from real nodes; writers that know what they have done."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from tests.cluster import UNREACHABLE, ServeProcess, wait_for
from tests.integration.retrying import Retrying

SILENCE_S = 40.0  # a stream says something every 15 s
# Bytes that the kernel takes for a reader who reads nothing. Less than two segments of loopback
# would keep him slow for ever after.
SMALL_BUFFER = 128 * 1024


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a stream, and on which connection of its recorder, to which node, it came."""

    connection: int
    node_id: int
    event: str
    id: int | None
    data: dict[str, Any]

    @property
    def revision(self) -> int:
        revision: int = self.data["revision"]
        return revision


def changed_key(event: dict[str, Any]) -> str:
    key: str = event.get("key") or "base64:" + event["key_base64"]
    return key


@dataclass
class Recorder:
    """Follows a watch as a browser does: whenever it ends it goes on at another node, with the id
    of the last message as Last-Event-ID. Stops behind `until`, or when the history is gone.

    Args:
        query: `key=` or `prefix=` and more; without from_revision.
    """

    nodes: Sequence[ServeProcess]
    query: str
    seed: int
    first: int = 1
    messages: list[Message] = field(default_factory=list)
    connections: int = 0
    last_id: int | None = None
    until: int | None = None
    compact_revision: int | None = None  # of a 410 that ended it
    resting: threading.Event = field(default_factory=threading.Event)  # it reads nothing while set
    small: bool = False  # with little room in the kernel for what is not read
    trouble: list[str] = field(default_factory=list)  # what no stream may contain
    _thread: threading.Thread | None = None

    def start(self) -> Recorder:
        self._thread = threading.Thread(target=self._run, name=self.query, daemon=True)
        self._thread.start()
        return self

    @property
    def changes(self) -> list[Message]:
        return [message for message in self.messages if message.event == "change"]

    @property
    def position(self) -> int:
        """Everything that was selected up to here has come."""
        return self.first - 1 if self.last_id is None else self.last_id

    def stop_behind(self, revision: int) -> None:
        self.until = revision

    def join(self, deadline_s: float = 90.0) -> Recorder:
        assert self._thread is not None
        self._thread.join(deadline_s)
        what = f"{self.query} is at {self.position} of {self.until}"
        assert not self._thread.is_alive(), what
        assert self.trouble == [], what
        return self

    @property
    def _done(self) -> bool:
        over = self.until is not None and self.position >= self.until
        return over or self.compact_revision is not None or bool(self.trouble)

    def _run(self) -> None:
        rng = random.Random(f"{self.seed} {self.query}")
        while not self._done:
            node = rng.choice(self.nodes)
            with contextlib.suppress(*UNREACHABLE):
                self._follow(node)
            threading.Event().wait(0.02)  # nodes that are down refuse thousands a second

    def _follow(self, node: ServeProcess) -> None:
        headers = {} if self.last_id is None else {"Last-Event-ID": str(self.last_id)}
        with contextlib.closing(node.connect(SILENCE_S)) as link:
            link.connect()
            if self.small:
                link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
            path = f"/v1/watch?{self.query}&from_revision={self.first}"
            link.request("GET", path, headers=headers)
            response = link.getresponse()
            if response.status == 410:
                self.compact_revision = json.loads(response.read())["compact_revision"]
            elif response.status == 200:
                self.connections += 1
                self._read(node, response)
            elif response.status not in (429, 503, 504):
                self.trouble.append(f"{response.status} {response.read()!r}")

    def _read(self, node: ServeProcess, response: http.client.HTTPResponse) -> None:
        for fields in self._fields(response):
            if set(fields) - {"event", "id", "data"}:
                self.trouble.append(f"unknown fields {fields}")
            number = int(fields["id"]) if "id" in fields else None
            data = json.loads(fields["data"])
            self.messages.append(
                Message(self.connections, node.node_id, fields["event"], number, data)
            )
            if number is not None:
                self.last_id = number
            if self._done or fields["event"] == "cancelled":
                return

    def _fields(self, response: http.client.HTTPResponse) -> Iterator[dict[str, str]]:
        """Whole messages only: what a broken connection leaves half is none."""
        fields: dict[str, str] = {}
        while True:
            while self.resting.is_set():
                threading.Event().wait(0.02)
            line = response.readline()
            if not line.endswith(b"\n"):
                return
            text = line.decode().rstrip("\n")
            if text and not text.startswith(":"):
                name, _, value = text.partition(": ")
                fields[name] = value
            elif not text and fields:
                yield fields
                fields = {}


@dataclass(frozen=True, slots=True)
class Done:
    """An acknowledged write: what it must look like in every stream.

    `puts` are the values by key; `deleted` the number of keys that went, of which `deletes` name
    those that are known.
    """

    revision: int
    puts: dict[str, str]
    deletes: frozenset[str]
    deleted: int


@dataclass
class Writers:
    """Threads that put, delete, delete ranges and run transactions, on few keys, so that what was
    there before matters. Some keys expire, some go with a lease. Whatever they do is certain.
    """

    nodes: Sequence[ServeProcess]
    seed: int
    count: int = 3
    done: list[Done] = field(default_factory=list)
    written_bytes: int = 0  # values
    failures: list[BaseException] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> Writers:
        for number in range(self.count):
            thread = threading.Thread(target=self._run, args=(number,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(150)
        assert self.failures == []

    def more(self, count: int) -> None:
        """Wait until that many further writes are done."""
        goal = len(self.done) + count

        def there() -> bool:
            assert self.failures == []
            return len(self.done) >= goal

        wait_for(there, f"{count} more writes", 120)

    def _run(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        client = Retrying(self.nodes, f"w{number}.{self.seed}", rng, drop=0.02)
        try:
            while not self._stopping.is_set():
                self._write(client, rng)
        except BaseException as error:
            self.failures.append(error)
        finally:
            client.close()

    def _write(self, client: Retrying, rng: random.Random) -> None:
        chosen = rng.random()
        if chosen < 0.5:
            self._put(client, key_of(rng), value_of(rng), "")
        elif chosen < 0.6:
            self._put(client, key_of(rng), value_of(rng), "?ttl=1")
        elif chosen < 0.65:
            lease = client.write("POST", "/v1/leases", b'{"ttl":1}', JSON).json()["id"]
            for _ in range(2):
                self._put(client, key_of(rng), value_of(rng), f"?lease={lease}")
        elif chosen < 0.8:
            key = key_of(rng)
            reply = client.write("DELETE", "/v1/kv/" + quote(key, safe=""))
            assert reply.status == 200, reply
            if reply.json()["deleted"]:
                self.done.append(Done(reply.json()["revision"], {}, frozenset([key]), 1))
        elif chosen < 0.85:
            reply = client.write("DELETE", f"/v1/kv?prefix={rng.choice(PREFIXES)}")
            assert reply.status == 200, reply
            if deleted := reply.json()["deleted"]:
                self.done.append(Done(reply.json()["revision"], {}, frozenset(), deleted))
        else:
            self._txn(client, rng)

    def _put(self, client: Retrying, key: str, value: str, query: str) -> None:
        path = f"/v1/kv/{quote(key, safe='')}{query}"
        reply = client.write("PUT", path, value.encode())
        if reply.status == 404 and "lease" in query:
            return  # it has ended meanwhile
        assert reply.status == 200, reply
        self.written_bytes += len(value)
        self.done.append(Done(reply.json()["revision"], {key: value}, frozenset(), 0))

    def _txn(self, client: Retrying, rng: random.Random) -> None:
        keys = {key_of(rng) for _ in range(8)}
        puts = {key: value_of(rng) for key in sorted(keys) if rng.random() < 0.6}
        deletes = sorted(keys - set(puts))
        operations: list[dict[str, str]] = [
            *({"op": "put", "key": key, "value": value} for key, value in puts.items()),
            *({"op": "delete", "key": key} for key in deletes),
        ]
        body = json.dumps({"success": operations}).encode()
        reply = client.write("POST", "/v1/txn", body, JSON)
        assert reply.status == 200, reply
        results = reply.json()["results"][len(puts) :]
        gone = frozenset(k for k, r in zip(deletes, results, strict=True) if r["deleted"])
        if puts or gone:
            self.done.append(Done(reply.json()["revision"], puts, gone, len(gone)))


JSON = {"Content-Type": "application/json"}
PREFIXES = ("a/1", "a/2", "b/")
LARGE = 32 * 1024


def key_of(rng: random.Random) -> str:
    """One of some sixty; "a" and "a/" begin others without being above them."""
    return rng.choice(
        ("a", "a/", f"a/{rng.randrange(30)}", f"b/{rng.randrange(20)}", f"ä/{rng.randrange(10)}")
    )


def value_of(rng: random.Random) -> str:
    """All differ; some are large, so that readers fall behind."""
    value = f"{rng.getrandbits(64):016x}"
    return value * (LARGE // 16) if rng.random() < 0.1 else value
