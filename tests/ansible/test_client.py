"""The client that all modules share: when it asks somebody else, and what an endpoint is."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from ansible_collections.dengine.core.plugins.module_utils import client

from tests.ansible.answers import BUSY, LOST, healthy, member, view
from tests.ansible.server import Answers, Say, Server, run_module, snapshot_file

TOKEN = "a-token-that-nobody-may-see-0123456789"


def test_a_write_is_repeated_only_when_it_certainly_did_nothing() -> None:
    """503 with outcome none is asked again; an unknown outcome is reported, never repeated."""
    answers: Answers = {
        "GET /v1/kv/a": Say({"error": "key_not_found"}, 404),
        "PUT /v1/kv/a": [BUSY, Say({"revision": 4})],
    }
    with Server(answers) as server:
        result = run_module("dengine_kv", endpoints=[server.endpoint], key="a", value="x")
        assert result["revision"] == 4
        assert server.changes == ["PUT /v1/kv/a"] * 2
    with Server({**answers, "PUT /v1/kv/a": LOST}) as server:
        result = run_module("dengine_kv", endpoints=[server.endpoint], key="a", value="x")
        assert result["failed"]
        assert result["outcome"] == "unknown"
        assert server.changes == ["PUT /v1/kv/a"]


def test_the_next_endpoint_is_asked_when_the_first_is_gone() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{free.getsockname()[1]}"
        with Server({"GET /v1/cluster": view(member(1))}) as server:
            result = run_module(
                "dengine_settings",
                endpoints=[dead, server.endpoint],
                settings={"promotion": "immediate"},
            )
            assert not result["changed"]


@contextmanager
def silent() -> Iterator[str]:
    """An endpoint that does not even refuse, as a host that is off: its queue is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_write_goes_to_the_next_endpoint_when_the_first_cannot_be_connected_with() -> None:
    """A host that is off, or has no name any more, has done nothing for certain."""
    answers: Answers = {
        "GET /v1/kv/a": Say({"error": "key_not_found"}, 404),
        "PUT /v1/kv/a": Say({"revision": 4}),
    }
    with silent() as off, Server(answers) as server:
        for dead in (off, "no-such-host.invalid:9081", f"{'x' * 70}.invalid:9081"):
            result = run_module("dengine_kv", endpoints=[dead, server.endpoint], key="a", value="x")
            assert result.get("revision") == 4, result
        alone = run_module("dengine_settings", endpoints=[off], settings={"a": 1}, patience=0)
    assert (alone["outcome"], alone["msg"]) == ("none", f"{off}: timed out")


@pytest.mark.parametrize(
    "endpoint",
    [
        "2001:db8::10:9081",
        "[::1",
        "[::1]",
        "10.0.0.1",
        "a:b",
        "a:0",
        "a:65536",
        "",
        ":9081",
        "a/b:1",
    ],
)
def test_what_is_no_endpoint_is_called_so(endpoint: str) -> None:
    with pytest.raises(client.ApiError, match="is not an endpoint: write it like"):
        client.split_endpoint(endpoint)


def test_modules_refuse_what_is_no_endpoint_in_a_sentence(tmp_path: Path) -> None:
    bad = "2001:db8::10:9081"
    for name, ask in {
        "dengine_settings": {"settings": {}},
        "dengine_kv": {"key": "a", "value": "b"},
        "dengine_leader": {"node_id": 1},
        "dengine_member": {"ids": [1]},
        "dengine_cluster_info": {},
        "dengine_snapshot": {"dest": str(tmp_path)},
    }.items():
        assert "in brackets like" in run_module(name, endpoints=[bad], **ask)["msg"], name
    ask = {"listen_address": bad, "targets": [bad]}
    assert "in brackets like" in run_module("dengine_probe", action="listen", **ask)["msg"]
    way = run_module("dengine_probe", action="connect", **ask)["ways"][bad]
    assert "in brackets like" in way["error"]
    (row,) = run_module("dengine_probe", action="checks", checks=["port"], **ask)["rows"]
    assert "in brackets like" in row["measured"]
    (problem,) = run_module("dengine_verify", endpoints=[bad], voters=[1])["problems"]
    assert "in brackets like" in problem


def test_an_ipv6_address_in_brackets_is_an_endpoint(tmp_path: Path) -> None:
    """For all modules, and for the stand-in."""
    file, said = snapshot_file()
    answers: Answers = {
        **healthy(member(1)),
        "GET /v1/kv/a": Say(b"old", headers={"ETag": '"7"'}),
        "PUT /v1/kv/a": Say({"revision": 8}),
        "GET /v1/snapshots": Say({"snapshots": [said]}),
        "GET /v1/status": Say({"last_applied": 12}),
        f"GET /v1/snapshots/{said['sha256']}": Say(file),
    }
    with Server(answers, "::1") as server:
        ask = {"endpoints": [server.endpoint]}
        assert server.endpoint.startswith("[::1]:")
        assert run_module("dengine_kv", key="a", value="new", **ask)["revision"] == 8
        assert run_module("dengine_cluster_info", **ask)["nodes"][server.endpoint]["ready"]
        assert run_module("dengine_snapshot", dest=str(tmp_path), **ask)["changed"]
        assert run_module("dengine_member", ids=[1], **ask)["done"]
        assert run_module("dengine_leader", node_id=1, **ask)["leader"] == 1
        ways = run_module("dengine_probe", action="connect", targets=[server.endpoint])["ways"]
        assert ways[server.endpoint]["error"] == ""
    for listen in (server.endpoint, server.endpoint.replace("::1", "::")):
        ask = {"listen_address": listen, "config": str(tmp_path / "c")}
        try:
            assert run_module("dengine_probe", action="listen", seconds=30, **ask)["listening"]
            (row,) = run_module("dengine_probe", action="checks", checks=["port"], **ask)["rows"]
            assert row["status"] == "ok"
        finally:
            assert run_module("dengine_probe", action="hush", **ask)["ended"]


def test_the_token_is_sent_and_never_shown() -> None:
    """Also when the node is so unkind as to repeat it."""
    echo = Say({"error": "unauthorized", "message": f"bad {TOKEN}", "outcome": "none"}, 401)
    with Server({"GET /v1/cluster": echo}) as server:
        result = run_module(
            "dengine_leader", endpoints=[server.endpoint], token=TOKEN, node_id=1, patience=0
        )
    assert server.asked[0].headers["Authorization"] == f"Bearer {TOKEN}"
    assert result["failed"]
    assert TOKEN not in result["raw"]
