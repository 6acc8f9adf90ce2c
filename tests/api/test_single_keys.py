"""`/v1/kv/KEY`: what a key may be, what a value may be, and conditions."""

from __future__ import annotations

import base64
import secrets
import socket

import pytest

from tests.api.raw import Wire, assert_error
from tests.cluster import ServeProcess

MIB = 1024 * 1024
ANY_BYTE = "".join(f"%{byte:02x}" for byte in range(256))


def test_a_value_is_written_read_and_deleted(client: Wire) -> None:
    """PUT says whether it created the key; ETag and revision are the same number everywhere."""
    written = client.request("PUT", "/v1/kv/color", b"blue")
    revision = written.json()["revision"]
    assert written.status == 200
    assert written.json() == {"revision": revision, "created": True}
    assert written.headers["etag"] == f'"{revision}"'

    again = client.request("PUT", "/v1/kv/color", b"red")
    assert again.json() == {"revision": revision + 1, "created": False}

    read = client.request("GET", "/v1/kv/color")
    assert (read.status, read.body) == (200, b"red")
    assert read.headers["etag"] == f'"{revision + 1}"'
    assert int(read.headers["dengine-revision"]) >= revision + 1
    assert read.headers["content-type"] == "application/octet-stream"
    assert read.headers["x-content-type-options"] == "nosniff"

    gone = client.request("DELETE", "/v1/kv/color")
    assert (gone.status, gone.json()) == (200, {"revision": revision + 2, "deleted": 1})
    assert_error(client.request("GET", "/v1/kv/color"), 404, "key_not_found")
    nothing = client.request("DELETE", "/v1/kv/color")
    assert nothing.json() == {"revision": revision + 2, "deleted": 0}


def test_head_answers_like_get_without_the_body(client: Wire) -> None:
    client.request("PUT", "/v1/kv/head", b"12345")
    read, head = client.request("GET", "/v1/kv/head"), client.request("HEAD", "/v1/kv/head")
    assert head.body == b""
    for name in ("content-length", "content-type", "etag", "dengine-revision"):
        assert head.headers[name] == read.headers[name]
    missing = client.request("HEAD", "/v1/kv/no-such-key")
    assert (missing.status, missing.body) == (404, b"")


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ("a%2Fb", b"a/b"),
        ("a+b", b"a+b"),
        ("a%2Bb", b"a+b"),
        ("a%20b", b"a b"),
        ("/", b"/"),
        ("//two//", b"//two//"),
        ("trailing/", b"trailing/"),
        ("..", b".."),
        ("../x/./y", b"../x/./y"),
        ("%00", b"\x00"),
        ("%00nul%00", b"\x00nul\x00"),
        ("%ff%fe", b"\xff\xfe"),
        ("caf%c3%a9", "café".encode()),
        ("%2525", b"%25"),
        ("k%3Fq%23f", b"k?q#f"),
        (":@!$&'()*,;=~", b":@!$&'()*,;=~"),
        ("%61", b"a"),
        ("k" * 511, b"k" * 511),
        ("%ff" * 511, b"\xff" * 511),
    ],
)
def test_every_key_survives_unchanged(client: Wire, raw: str, key: bytes) -> None:
    """What follows /v1/kv/ is decoded exactly once and never normalised or redirected; the same
    key is found by key_base64 in either alphabet."""
    value = secrets.token_bytes(8)
    assert client.request("PUT", f"/v1/kv/{raw}", value).status == 200
    assert client.request("GET", f"/v1/kv/{raw}").body == value
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        found = client.request("GET", f"/v1/kv?key_base64={encode(key).decode()}")
        assert found.body == value
    listed = client.request("GET", f"/v1/kv?start={_escape(key)}&limit=1").json()["items"][0]
    name = listed["key"].encode() if "key" in listed else base64.b64decode(listed["key_base64"])
    assert name == key


def _escape(key: bytes) -> str:
    return "".join(f"%{byte:02X}" for byte in key)


def test_a_raw_byte_beyond_ascii_must_be_escaped(client: Wire) -> None:
    client.send(b"PUT /v1/kv/caf\xc3\xa9 HTTP/1.1\r\nHost: t\r\nContent-Length: 1\r\n\r\nx")
    assert_error(client.answer(), 400, "invalid_request")


def test_key_base64_reaches_any_key_with_every_method(client: Wire) -> None:
    target = "/v1/kv?key_base64=" + base64.b64encode(b"../\xff").decode()
    assert client.request("PUT", target, b"v").status == 200
    assert client.request("GET", target).body == b"v"
    assert client.request("HEAD", target).status == 200
    assert client.request("DELETE", target).json()["deleted"] == 1


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/v1/kv/", 400),
        ("/v1/kv?key_base64=", 400),
        ("/v1/kv?key_base64=%25%25", 400),
        ("/v1/kv?key_base64=a", 400),
        ("/v1/kv?key_base64=YQ==&key_base64=YQ==", 400),
        ("/v1/kv/" + "k" * 512, 413),
        ("/v1/kv/" + "%ff" * 512, 413),
        ("/v1/kv/%", 400),
        ("/v1/kv/a%2", 400),
        ("/v1/kv/a%zz", 400),
        ("/v1/kv/a%%", 400),
        ("/v1/kv/a#b", 400),
        ("/v1/kv/a?colour=blue", 400),
        ("/v1/kv/a?=", 400),
        ("/v1/kv/a?ttl=5s", 400),
        ("/v1/kv/a?lease=", 400),
        ("/v1/kv/a?consistency=strong", 400),
        ("/v1/kv/a?%zz", 400),
    ],
)
def test_a_bad_key_or_query_is_refused(client: Wire, method: str, target: str, status: int) -> None:
    body = b"v" if method == "PUT" else None
    answer = client.request(method, target, body)
    if method == "HEAD":
        assert (answer.status, answer.body) == (status, b"")
        return
    name = {400: "invalid_request", 413: "too_large"}[status]
    error = assert_error(answer, status, name)
    assert error["outcome"] == "none"


def test_an_unknown_query_parameter_is_named(client: Wire) -> None:
    error = assert_error(client.request("GET", "/v1/kv/a?colour=1"), 400, "invalid_request")
    assert "colour" in error["message"]
    assert "consistency" in error["message"]


@pytest.mark.parametrize("level", ["linearizable", "lease", "eventual"])
def test_every_consistency_level_reads(client: Wire, level: str) -> None:
    client.request("PUT", "/v1/kv/level", b"v")
    assert client.request("GET", f"/v1/kv/level?consistency={level}").body == b"v"


def test_values_of_any_size_up_to_1_mib(client: Wire) -> None:
    """0 bytes and 1 MiB are stored; one byte more is refused and changes nothing."""
    for size in (0, 1, 256, 65_537, MIB):
        value = secrets.token_bytes(size)
        assert client.request("PUT", "/v1/kv/size", value).status == 200
        assert client.request("GET", "/v1/kv/size").body == value
    error = assert_error(client.request("PUT", "/v1/kv/size", bytes(MIB + 1)), 413, "too_large")
    assert error["outcome"] == "none"


def test_a_refused_value_leaves_the_old_one(client: Wire, node: ServeProcess) -> None:
    client.request("PUT", "/v1/kv/keep", b"old")
    before = client.request("GET", "/v1/kv/keep").headers["etag"]
    client.send(b"PUT /v1/kv/keep HTTP/1.1\r\nHost: t\r\nContent-Length: 99999999\r\n\r\n")
    assert_error(client.answer(), 413, "too_large")
    assert client.closed()
    read = node.request("GET", "/v1/kv/keep")
    assert (read.body, read.headers["etag"]) == (b"old", before)


def test_bodies_announced_with_expect_continue(client: Wire, node: ServeProcess) -> None:
    """The node asks for a body it will take, and refuses one it will not before it is sent."""
    head = (
        b"PUT /v1/kv/expect HTTP/1.1\r\nHost: t\r\n"
        b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    )
    client.send(head % MIB)
    assert client.answer().status == 100
    client.send(bytes(MIB))
    assert client.answer().status == 200
    client.send(head % (MIB + 1))
    assert_error(client.answer(), 413, "too_large")
    assert client.closed()


def test_a_client_of_http_1_0_is_not_told_to_continue(client: Wire, node: ServeProcess) -> None:
    """It knows no answer but the last one, and would take a 100 for that."""
    head = (
        b"PUT /v1/kv/old HTTP/1.0\r\nHost: t\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    )
    client.send(head)
    assert node.request("GET", "/livez").ok, "behind the head, which it has taken in by then"
    client.send(b"value")
    assert client.answer().status == 200


def test_who_has_said_all_is_answered(client: Wire, node: ServeProcess) -> None:
    """A client may close its half of the connection behind its requests, as `nc -N` does: each gets
    its answer, also one that has to wait for the disk, and then the connection ends."""
    head = b"PUT /v1/kv/said HTTP/1.1\r\nHost: t\r\nContent-Length: 3\r\n\r\n"
    client.send(head + b"all" + head + b"now" + head + b"no")  # the last body is not complete
    client.sock.shutdown(socket.SHUT_WR)
    assert client.answer().json()["created"]
    assert not client.answer().json()["created"]
    assert client.closed()
    assert node.request("GET", "/v1/kv/said").body == b"now"


def test_a_value_must_come_as_it_is_and_with_its_length(client: Wire, node: ServeProcess) -> None:
    """No Content-Encoding, no chunks, no missing length: nothing is stored by accident."""
    encoded = client.request("PUT", "/v1/kv/enc", b"x", "Content-Encoding: gzip\r\n")
    assert_error(encoded, 415, "unsupported_media")
    assert_error(client.request("PUT", "/v1/kv/enc"), 411, "length_required")
    client.send(
        b"PUT /v1/kv/enc HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"
    )
    assert_error(client.answer(), 411, "length_required")
    assert client.closed()
    assert node.request("GET", "/v1/kv/enc").status == 404
