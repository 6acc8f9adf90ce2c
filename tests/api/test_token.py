"""The token: every route of the route table without, with a wrong, and with the right one."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from dengine.api import cluster, health, kv, leases, snapshots, watch
from dengine.api.guard import Guard, _Challenges
from dengine.api.params import BodyReader
from dengine.api.routes import Route, RouteTable
from dengine.config import read
from dengine.errors import Unauthorized
from dengine.security import PeerSecret, Secrets
from tests.api.conftest import start_node
from tests.api.raw import Answer, Wire, wire
from tests.cluster import Cluster, ServeProcess

TOKEN = secrets.token_hex(32)
PEER_SECRET = secrets.token_hex(32)
RIGHT = f"Authorization: Bearer {TOKEN}\r\n"
OPEN = {"/livez", "/readyz", "/leader", "/replica", "/v1/peer"}
WRONG = [
    "",
    "Authorization: \r\n",
    "Authorization: Bearer\r\n",
    "Authorization: Bearer \r\n",
    f"Authorization: Bearer {TOKEN[:-1]}\r\n",
    f"Authorization: Bearer {TOKEN}0\r\n",
    f"Authorization: Bearer {TOKEN.swapcase()}\r\n",
    f"Authorization: Bearer {PEER_SECRET}\r\n",
    "Authorization: Bearer t\xf6ken\r\n",
    f"Authorization: Basic {TOKEN}\r\n",
    f"Authorization: {TOKEN}\r\n",
    f"Authorization: Dengine-Peer {TOKEN}\r\n",
    f"X-Authorization: Bearer {TOKEN}\r\n",
    f"Authorization: Bearer wrong\r\nAuthorization: Bearer {TOKEN}\r\n",
]


def route_table() -> list[Route]:
    """The routes of a node, as its server makes them."""

    async def make() -> list[Route]:
        config = read(None, {"DENGINE__CLUSTER__" + name: value for name, value in LEAST.items()})
        node, bodies = cast(Any, None), BodyReader(1)
        closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        return [
            *kv.routes(kv.KvCalls(node, config, bodies)),
            *cluster.routes(cluster.ClusterCalls(node, config, bodies, closing)),
            *leases.routes(leases.LeaseCalls(node, bodies)),
            *watch.routes(watch.WatchCalls(node, config, closing)),
            *snapshots.routes(snapshots.SnapshotCalls(node, config, bodies)),
            *health.routes(health.HealthCalls(node)),
        ]

    return asyncio.run(make())


LEAST = {
    "NODE_ID": "1",
    "LISTEN_ADDRESS": "127.0.0.1:9081",
    "INITIAL_CLUSTER": '[{ id = 1, address = "127.0.0.1:9081", role = 2, status = 2 }]',
    "DB_ROOT_DIR": "./db",
}
TABLE = route_table()
CALLS = [
    *((route.method, route.path) for route in TABLE),
    *(("HEAD", route.path) for route in TABLE if route.has_head),
    ("GET", "/v1/openapi.json"),
    ("OPTIONS", "/v1/kv/a"),
    ("OPTIONS", "*"),
    ("OPTIONS", "/livez"),
    ("POST", "/livez"),
    ("GET", "/nowhere"),
    ("DELETE", "/"),
]


def secret_files(directory: Path) -> str:
    """Both secrets in files below `directory`, and the configuration that names them."""
    for name, text in (("token", TOKEN), ("peer", PEER_SECRET)):
        (directory / name).write_text(text + "\n", encoding="ascii")
        (directory / name).chmod(0o600)
    return f'[security]\ntoken_file = "{directory}/token"\npeer_secret_file = "{directory}/peer"\n'


@pytest.fixture(scope="module", params=["token", "both"])
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A node that asks for a token, alone and beside a peer secret."""
    directory = tmp_path_factory.mktemp("guarded")
    lines = secret_files(directory).splitlines(keepends=True)
    with Cluster(directory) as nodes:
        nodes.token = TOKEN
        yield start_node(nodes, "".join(lines if request.param == "both" else lines[:2]))
        print(nodes.describe())


@pytest.fixture
def node(guarded: ServeProcess) -> Iterator[ServeProcess]:
    yield guarded
    assert guarded.running, guarded.tail()
    assert "Traceback" not in guarded.output(), guarded.tail()
    assert TOKEN not in guarded.output()
    assert PEER_SECRET not in guarded.output()


def is_open(method: str, path: str) -> bool:
    return path in OPEN and method in ("GET", "HEAD")


def assert_unauthorized(answer: Answer, method: str) -> None:
    """A 401 that names the scheme and nothing of the cluster."""
    assert answer.status == 401, answer
    challenges = answer.headers["www-authenticate"]
    assert challenges == "Bearer" or challenges.startswith("Dengine-Peer nonce="), answer
    if method == "HEAD":
        return
    body = answer.json()
    assert (body["error"], body["code"], body["outcome"]) == ("unauthorized", 401, "none")
    assert set(body) == {"error", "code", "message", "retryable", "outcome"}, "who leads is said"


def test_what_is_open_is_what_the_contract_says() -> None:
    """Forgetting to guard a new route fails here, and so does guarding what supervisors ask."""
    assert {route.path for route in TABLE if route.access == "open"} == OPEN
    assert [r.path for r in TABLE if r.access == "join"] == ["/v1/cluster/members"]
    assert [r.path for r in TABLE if r.access == "fetch"] == ["/v1/snapshots/{name}"]


@pytest.mark.parametrize(("method", "path"), CALLS, ids=str)
def test_every_call_needs_the_token(node: ServeProcess, method: str, path: str) -> None:
    """Without or with a wrong token no call gets further than its header; with it each does."""
    target = path.partition("{")[0] + ("x" if "{" in path else "")
    body = b"{}" if method in ("PUT", "POST", "DELETE") else None
    if not is_open(method, path):
        for head in WRONG:
            with wire(node) as connection:
                assert_unauthorized(connection.request(method, target, body, head), method)
        if path == "/v1/cluster/watch":
            return  # an event stream: tested below
    head = "" if is_open(method, path) else RIGHT
    with wire(node) as connection:
        answer = connection.request(method, target, body, head)
    joins_without_proof = path == "/v1/cluster/members" and "peer_secret_file" in (
        node.config.read_text(encoding="utf-8")
    )
    assert (answer.status == 401) is joins_without_proof, answer


def test_the_event_stream_needs_the_token_too(node: ServeProcess) -> None:
    with wire(node) as connection:
        connection.send(f"GET /v1/cluster/watch HTTP/1.1\r\nHost: t\r\n{RIGHT}\r\n".encode())
        assert connection.sock.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "target", ["http://h/v1/status", "/v1/status?x=%zz", "/v1/kv/a?ttl=1", "//"]
)
def test_no_way_of_writing_the_target_gets_around_it(node: ServeProcess, target: str) -> None:
    """The check comes before the target is parsed."""
    with wire(node) as connection:
        assert_unauthorized(connection.request("GET", target), "GET")
        assert connection.request("GET", "http://h/livez").status == 200


def test_the_scheme_may_be_written_in_any_case(node: ServeProcess) -> None:
    """RFC 9110: a scheme is case-insensitive."""
    with wire(node) as connection:
        for scheme in ("bearer", "BEARER", "Bearer "):
            head = f"Authorization: {scheme} {TOKEN}\r\n"
            assert connection.request("GET", "/v1/status", None, head).status == 200


def test_no_body_is_read_before_the_token(node: ServeProcess) -> None:
    """A stranger's megabyte is refused while it is still on its way, and nothing is stored."""
    with wire(node) as connection:
        head = "PUT /v1/kv/stranger HTTP/1.1\r\nHost: t\r\nContent-Length: 1000000\r\n"
        connection.send(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert_unauthorized(connection.answer(), "PUT")
        assert connection.closed()
    assert node.get("stranger").status == 404


def test_a_connection_goes_on_after_a_refusal(node: ServeProcess) -> None:
    """One request with a wrong token does not spoil the next with the right one."""
    with wire(node) as connection:
        assert_unauthorized(connection.request("GET", "/v1/status"), "GET")
        assert connection.request("PUT", "/v1/kv/a", b"1", RIGHT).status == 200
        assert_unauthorized(connection.request("GET", "/v1/kv/a"), "GET")
        assert connection.request("GET", "/v1/kv/a", None, RIGHT).body == b"1"


def test_a_stranger_is_not_told_who_leads(node: ServeProcess) -> None:
    """Not even by the answer to bytes that are no request."""
    with wire(node) as connection:
        connection.send(b"nonsense\r\n\r\n")
        answer = connection.answer()
        assert answer.status == 400
        assert "leader" not in answer.json()


def test_the_document_says_what_needs_the_token(node: ServeProcess) -> None:
    """OpenAPI: the scheme, and 401 on each call but the open ones."""
    document = node.request("GET", "/v1/openapi.json").json()
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            guarded = not is_open(method.upper(), path)
            assert ("401" in operation["responses"]) is guarded, (method, path)
            assert bool(operation["security"]) is guarded, (method, path)


# --- nodes among themselves


class FakeRequest:
    """Of a request what a guard looks at."""

    def __init__(self, method: str, path: str, header: str) -> None:
        self.message = self
        self.method, self.path = method, path
        self.headers = {"Authorization": header}
        self.proof = None


def proved(guard: Guard, access: Any, method: str, path: str, body: bytes = b"") -> str:
    """The header of a node's answer to the challenge of a 401."""
    lines = guard.challenges(access).decode().split("\r\n")
    values = [line.partition(": ")[2] for line in lines if line]
    answer = PeerSecret(PEER_SECRET.encode()).answer(values, method, path, body)
    assert answer is not None
    return answer.header


@pytest.mark.parametrize(
    ("method", "path"), [(r.method, r.path) for r in TABLE if r.access != "open"], ids=str
)
def test_the_proof_of_a_node_opens_only_what_nodes_need(method: str, path: str) -> None:
    """Fetching a snapshot and joining; a node's proof is no token, whatever else is asked."""
    table = RouteTable(TABLE)
    target = path.partition("{")[0] + ("x" if "{" in path else "")
    guard = Guard(Secrets(PeerSecret(PEER_SECRET.encode()), TOKEN))
    header = proved(guard, "fetch", method, target)
    if path == "/v1/snapshots/{name}":
        guard.check(cast(Any, FakeRequest(method, target, header)), table)
        with pytest.raises(Unauthorized):  # good once
            guard.check(cast(Any, FakeRequest(method, target, header)), table)
    elif path == "/v1/cluster/members":
        request = cast(Any, FakeRequest(method, target, header))
        guard.check(request, table)
        guard.check_join(request)
        assert request.proof is not None
        with pytest.raises(Unauthorized):
            guard.check_join(cast(Any, FakeRequest(method, target, header)))
        with pytest.raises(Unauthorized):
            guard.check_join(cast(Any, FakeRequest(method, target, f"Bearer {TOKEN}")))
    else:
        with pytest.raises(Unauthorized):
            guard.check(cast(Any, FakeRequest(method, target, header)), table)


def test_a_challenge_is_good_once_for_a_while_and_from_this_process_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A recorded proof is worth nothing later, elsewhere, or again."""
    here, elsewhere = _Challenges(), _Challenges()
    nonce = here.issue()
    assert not elsewhere.take(nonce)
    assert here.take(nonce)
    assert not here.take(nonce)
    assert not here.take(nonce.upper().lower()[:-2] + "00")
    assert not here.take("")
    assert not here.take("zz")
    late, now = here.issue(), time.monotonic()
    monkeypatch.setattr("dengine.api.guard.time.monotonic", lambda: now + 11)
    assert not here.take(late)


def test_a_join_without_proof_is_refused(node: ServeProcess, client: Wire) -> None:
    """Where there is a peer secret a token alone makes nobody a member, nor does a wrong secret."""
    if "peer_secret_file" not in node.config.read_text(encoding="utf-8"):
        return  # a token is all that such a node asks for
    body = b'{"id":2,"incarnation":"1","address":"127.0.0.1:1"}'
    head = f"{RIGHT}Content-Type: application/json\r\n"
    answer = client.request("POST", "/v1/cluster/members", body, head)
    assert_unauthorized(answer, "POST")
    for secret in (b"another secret, as long", PEER_SECRET.encode()):
        challenge = client.request("POST", "/v1/cluster/members", b"{}").headers["www-authenticate"]
        made = PeerSecret(secret).answer([challenge], "POST", "/v1/cluster/members", b"other body")
        assert made is not None
        head = f"Authorization: {made.header}\r\nContent-Type: application/json\r\n"
        assert_unauthorized(client.request("POST", "/v1/cluster/members", body, head), "POST")
    members = node.cluster()["members"]
    assert [member["id"] for member in members] == [1]


def test_only_a_peer_secret_leaves_clients_alone(tmp_path: Path) -> None:
    """Without token_file all calls are open but joining."""
    lines = secret_files(tmp_path).splitlines(keepends=True)
    with Cluster(tmp_path) as nodes:
        node = start_node(nodes, lines[0] + lines[2])
        assert node.put("a", "1").ok
        assert node.request("GET", "/v1/cluster").ok
        assert node.request("POST", "/v1/cluster/members", b"{}").status == 401
