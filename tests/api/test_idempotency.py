"""`Idempotency-Key`: a write that is sent again is carried out once."""

from __future__ import annotations

import json
import secrets

import pytest

from dengine.api.kv import refusal
from dengine.errors import RateLimited
from dengine.kv.commands import Full
from tests.api.raw import Answer, Wire, assert_error


@pytest.fixture
def name() -> str:
    """A key of this test alone."""
    return secrets.token_hex(8)


def _put(client: Wire, key: str, value: bytes = b"v", *head: str, path: str = "idem") -> Answer:
    lines = "".join(f"{line}\r\n" for line in (f"Idempotency-Key: {key}", *head))
    return client.request("PUT", f"/v1/kv/{path}", value, lines)


@pytest.mark.parametrize("form", ["{}", "{}:1", "a:b:{}", "{}:01"])
def test_a_repetition_gets_the_first_answer(client: Wire, name: str, form: str) -> None:
    """Whatever has happened meanwhile: status, body and ETag."""
    key = form.format(name)
    first = _put(client, key)
    client.request("PUT", "/v1/kv/idem", b"other")
    again = _put(client, key)
    assert (first.status, first.body) == (again.status, again.body)
    assert first.headers["etag"] == again.headers["etag"]
    assert client.request("GET", "/v1/kv/idem").body == b"other"


def test_a_refusal_is_repeated_too(client: Wire, name: str) -> None:
    first = assert_error(
        _put(client, name, b"v", 'If-Match: "1"', path="idem/absent"), 412, "precondition_failed"
    )
    again = assert_error(
        _put(client, name, b"v", 'If-Match: "1"', path="idem/absent"), 412, "precondition_failed"
    )
    assert first == again


def test_another_request_under_the_key_is_refused(client: Wire, name: str) -> None:
    """Another value, path, condition or method: a key names one request."""
    _put(client, name)
    for other in (
        _put(client, name, b"w"),
        _put(client, name, path="idem2"),
        _put(client, name, b"v", "If-None-Match: *"),
        _put(client, name, path="idem?ttl=60"),
        client.request("DELETE", "/v1/kv/idem", None, f"Idempotency-Key: {name}\r\n"),
    ):
        assert assert_error(other, 422, "idempotency_mismatch")["outcome"] == "none"


def test_a_repetition_through_a_proxy_is_one(client: Wire, name: str) -> None:
    """Which sends the absolute form, with the host that it asks: the host is no part of it."""
    key = f"Idempotency-Key: {name}\r\n"
    first = _put(client, name)
    for host in ("node1:9081", "node2:9082"):
        again = client.request("PUT", f"http://{host}/v1/kv/idem", b"v", key)
        assert (again.status, again.body) == (first.status, first.body)


def test_numbers_that_are_forgotten_are_stale(client: Wire, name: str) -> None:
    """The newest thousand are known. Of an older one nobody can say whether it ever was."""
    for number in range(2, 1003):
        assert _put(client, f"{name}:{number}", path="idem/many").status == 200
    stale = assert_error(_put(client, f"{name}:1", path="idem/many"), 409, "stale_request")
    assert stale["outcome"] == "unknown"
    assert _put(client, f"{name}:3", path="idem/many").status == 200


def test_every_write_takes_a_key(client: Wire, name: str) -> None:
    head = "Content-Type: application/json\r\nIdempotency-Key: {}\r\n"
    txn = b'{"success":[{"op":"put","key":"idem/t","value":"1"}]}'
    for method, target, body in (
        ("POST", "/v1/txn", txn),
        ("POST", "/v1/leases", b'{"ttl":60}'),
        ("PUT", "/v1/kv/idem/v", b"1"),
        ("DELETE", "/v1/kv/idem/t", None),
        ("DELETE", "/v1/kv?prefix=idem/", None),
    ):
        key = head.format(f"{name}-{method}{len(target)}")
        first, again = (client.request(method, target, body, key) for _ in range(2))
        assert first.status == 200, first
        assert first.body == again.body
    granted = client.request("POST", "/v1/leases", b'{"ttl":60}', head.format(f"{name}-lease"))
    lease = f"/v1/leases/{json.loads(granted.body)['id']}"
    for method, target in (("POST", f"{lease}/keepalive"), ("DELETE", lease)):
        key = f"Idempotency-Key: {name}-{method}\r\n"
        first, again = (client.request(method, target, None, key) for _ in range(2))
        assert first.status == 200, first
        assert first.body == again.body


@pytest.mark.parametrize("key", ["", "x" * 129, "two words", "umläut"])
def test_bad_keys_are_refused(client: Wire, key: str) -> None:
    assert_error(_put(client, key), 400, "invalid_request")


def test_other_calls_take_none(client: Wire) -> None:
    """It would be a promise that nobody keeps."""
    head = "Idempotency-Key: k\r\nContent-Type: application/json\r\n"
    answer = client.request("PUT", "/v1/cluster/settings", b'{"promotion":"immediate"}', head)
    assert_error(answer, 400, "invalid_request")


@pytest.mark.parametrize("what", ["keys", "clients", "bytes"])
def test_no_room_to_remember_is_told_from_other_429s(what: str) -> None:
    """Only another kind of key helps where there is no room for keys."""
    told = refusal(Full(what))
    assert isinstance(told, RateLimited)
    assert told.to_dict()["full"] == what
