"""`POST /v1/txn`: several keys at once, or none of them."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from typing import Any

import pytest

from tests.api.raw import Answer, Wire, assert_error, wire
from tests.cluster import ServeProcess

JSON = "Content-Type: application/json\r\n"
Json = dict[str, Any]


def post(client: Wire, body: Json | bytes) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.request("POST", "/v1/txn", data, JSON)


def put(key: str, value: str) -> Json:
    return {"op": "put", "key": key, "value": value}


def compare(key: str, target: str, op: str, operand: Any) -> Json:
    return {"key": key, "target": target, "op": op, "operand": operand}


def test_both_branches(client: Wire) -> None:
    """A transfer between two accounts happens once; the second attempt is told what is there."""
    first = post(client, {"success": [put("acc/a", "5"), put("acc/b", "0")]})
    assert first.status == 200
    before = first.json()["revision"]
    transfer = {
        "compare": [compare("acc/a", "value", "=", "5"), compare("acc/b", "exists", "=", True)],
        "success": [put("acc/a", "3"), put("acc/b", "2"), {"op": "get", "key": "acc/a"}],
        "failure": [{"op": "get", "key": "acc/a"}, {"op": "get", "key": "acc/none"}],
    }
    done = post(client, transfer).json()
    item = {
        "key": "acc/a",
        "value": "3",
        "mod_revision": before + 1,
        "create_revision": before,
        "version": 2,
        "ttl": None,
        "lease": None,
    }
    assert done == {
        "revision": before + 1,
        "succeeded": True,
        "results": [
            {"op": "put", "created": False},
            {"op": "put", "created": False},
            {"op": "get", "item": item},
        ],
    }
    again = post(client, transfer).json()
    assert again == {
        "revision": before + 1,
        "succeeded": False,
        "results": [{"op": "get", "item": item}, {"op": "get", "item": None}],
    }
    for key in ("acc/a", "acc/b"):
        assert client.request("GET", f"/v1/kv/{key}").headers["etag"] == f'"{before + 1}"'


def test_deletes_and_any_bytes(client: Wire) -> None:
    """Keys and values that are no text travel in base64, both ways."""
    key, value = base64.b64encode(b"del\xff").decode(), base64.b64encode(b"\x00\xfe").decode()
    done = post(
        client,
        {
            "success": [
                {"op": "put", "key_base64": key, "value_base64": value},
                put("del/1", "x"),
                put("del/2", "x"),
                {"op": "get", "key_base64": key},
                {"op": "delete_range", "prefix": "del/"},
                {"op": "delete", "key": "del/1"},
            ]
        },
    ).json()["results"]
    assert done[3]["item"]["key_base64"] == key
    assert done[3]["item"]["value_base64"] == value
    assert done[4:] == [
        {"op": "delete_range", "deleted": 2},
        {"op": "delete", "deleted": 0},
    ]
    compared = {"key_base64": key, "target": "value", "op": "=", "operand_base64": value}
    assert post(client, {"compare": [compared]}).json()["succeeded"] is True
    raw = client.request("GET", f"/v1/kv?key_base64={key}")
    assert raw.body == b"\x00\xfe"


def test_an_empty_transaction_changes_nothing(client: Wire) -> None:
    revision = post(client, {"success": [put("empty", "1")]}).json()["revision"]
    for body in ({}, {"success": [{"op": "delete", "key": "not/there"}]}):
        answer = post(client, body).json()
        assert (answer["revision"], answer["succeeded"]) == (revision, True)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not acceptable"),
        (b"{", "not acceptable"),
        (b"[]", "not acceptable"),
        (b'{"success": [{"op": "put", "key": "\\ud800", "value": ""}]}', "not acceptable"),
        ({"sucess": []}, "known here: compare, success, failure"),
        ({"success": [{"op": "increment", "key": "k"}]}, "increment"),
        ({"success": [{"op": "put", "key": "k"}]}, "success[0]: value is missing"),
        ({"failure": [{"op": "get"}]}, "failure[0]: key is missing"),
        ({"success": [{"op": "get", "key": ""}]}, "1 to 511 bytes"),
        ({"success": [{"op": "get", "key": "k", "key_base64": "aw=="}]}, "not both"),
        ({"success": [{"op": "get", "key_base64": "?"}]}, "not valid base64"),
        ({"success": [put("k", "v") | {"ttl": 0}]}, ">= 1"),
        ({"success": [put("k", "v") | {"ttl": 5, "lease": "x"}]}, "ttl or lease"),
        ({"success": [put("k", "v") | {"lease": ""}]}, "lease is empty"),
        ({"success": [{"op": "delete_range"}]}, "would delete every key"),
        ({"success": [{"op": "delete_range", "prefix": ""}]}, "would delete every key"),
        ({"success": [{"op": "delete_range", "prefix": "a", "end": "b"}]}, "either prefix"),
        ({"compare": [compare("k", "lease", "=", 0)]}, "lease"),
        ({"compare": [compare("k", "version", "~", 0)]}, "~"),
        ({"compare": [compare("k", "version", "=", "1")]}, "a whole number"),
        ({"compare": [compare("k", "version", "<", 2**63)]}, "2^63-1"),
        ({"compare": [compare("k", "mod_revision", ">", 2**70)]}, "2^63-1"),
        ({"compare": [compare("k", "mod_revision", ">", -(2**63) - 1)]}, "2^63-1"),
        ({"compare": [compare("k", "version", "=", True)]}, "a whole number"),
        ({"compare": [compare("k", "value", "=", 1)]}, "compared with a string"),
        ({"compare": [compare("k", "exists", "=", 1)]}, "true or false"),
        ({"compare": [compare("k", "exists", "<", True)]}, "= or !="),
        ({"compare": [compare("", "exists", "=", True)]}, "1 to 511 bytes"),
    ],
    ids=repr,
)
def test_bad_input_is_refused_in_words(client: Wire, body: Json | bytes, words: str) -> None:
    """And changes nothing: the revision is what it was."""
    before = post(client, {}).json()["revision"]
    error = assert_error(post(client, body), 400, "invalid_request")
    assert words in error["message"]
    assert error["outcome"] == "none"
    assert post(client, {}).json()["revision"] == before


@pytest.mark.parametrize("header", ['If-Match: "7"', "If-None-Match: *"])
def test_a_condition_of_one_key_is_refused(client: Wire, header: str) -> None:
    """Left unheeded, the change would happen although it does not hold."""
    body = json.dumps({"success": [{"op": "put", "key": "k", "value": "v"}]}).encode()
    headers = f"Content-Type: application/json\r\n{header}\r\n"
    error = assert_error(client.request("POST", "/v1/txn", body, headers), 400, "invalid_request")
    assert "compare" in error["message"]


@pytest.mark.parametrize("relation", ["=", "!=", "<", ">="])
def test_no_comparison_holds_of_the_value_of_a_key_that_is_not_there(
    client: Wire, relation: str
) -> None:
    asked = {"compare": [compare("never/there", "value", relation, "v")]}
    assert post(client, asked).json()["succeeded"] is False


def test_it_takes_json_only(client: Wire) -> None:
    answer = client.request("POST", "/v1/txn", b"{}", "Content-Type: text/plain\r\n")
    assert_error(answer, 415, "unsupported_media")
    assert_error(client.request("GET", "/v1/txn"), 405, "method_not_allowed")


def test_too_large_bodies_and_ranges(small_node: ServeProcess) -> None:
    """The node's limits: of the body, of keys and values, of operations, of deleted keys for all
    ranges."""
    with wire(small_node) as client:
        large = b'{"success":[' + b" " * (2 * 1024 * 1024) + b"]}"
        assert_error(post(client, large), 413, "too_large")
    for operation in (put("k", "v" * (1024 * 1024 + 1)), {"op": "get", "key": "k" * 512}):
        with wire(small_node) as client:
            refused = assert_error(post(client, {"success": [operation]}), 413, "too_large")
            assert refused["message"].startswith("success[0]: the ")
    for many in (
        {"success": [{"op": "get", "key": "k"}] * 129},
        {"compare": [compare("k", "version", "=", 0)] * 129},
    ):
        with wire(small_node) as client:
            refused = assert_error(post(client, many), 413, "too_large")
            assert "has 129 items; at most 128 are allowed" in refused["message"]
    with wire(small_node) as client:
        assert post(client, {"success": [put(f"r/{n}", "") for n in range(6)]}).status == 200
        parts = [{"op": "delete_range", "start": f"r/{n}", "end": f"r/{n + 3}"} for n in (0, 3)]
        refused = assert_error(post(client, {"success": parts}), 413, "too_large")
        assert "more than 5 keys" in refused["message"]
        assert client.request("GET", "/v1/kv?prefix=r/&count_only=1").json()["count"] == 6
        assert post(client, {"success": parts[:1]}).json()["results"][0]["deleted"] == 3


def dengine_txn(node: ServeProcess, text: bytes, *options: str) -> subprocess.CompletedProcess[str]:
    endpoint = f"127.0.0.1:{node.port}"
    return subprocess.run(
        [sys.executable, "-m", "dengine", "txn", "--endpoint", endpoint, *options],
        input=text.decode("utf-8", "surrogateescape"),
        encoding="utf-8",
        errors="surrogateescape",
        capture_output=True,
        timeout=30,
        check=False,
    )


def test_the_command_line_shows_what_became_of_it(node: ServeProcess, client: Wire) -> None:
    """Lines in, a table out; JSON in, JSON out; a mistake changes nothing and exits 1."""
    client.request("DELETE", "/v1/kv?prefix=cli/")
    lines = b"if cli/a absent\nput cli/a 1\nput cli/b 2\nelse\nget cli/a\n"
    first = dengine_txn(node, lines)
    assert first.returncode == 0, first
    assert first.stdout.startswith("succeeded, revision ")
    assert [line.split() for line in first.stdout.splitlines()[1:]] == [
        ["OPERATION", "KEY", "RESULT"],
        ["put", "cli/a", "created"],
        ["put", "cli/b", "created"],
    ]
    second = dengine_txn(node, lines)
    assert second.stdout.splitlines()[-1].split() == ["get", "cli/a", "1"]
    assert second.stdout.startswith("else, revision ")
    body = json.dumps({"success": [{"op": "delete_range", "prefix": "cli/"}]}).encode()
    third = dengine_txn(node, body, "--json")
    assert json.loads(third.stdout)["results"] == [{"op": "delete_range", "deleted": 2}]
    for wrong in (b"put cli/a", b"{"):
        refused = dengine_txn(node, wrong)
        assert refused.returncode == 1
        assert refused.stderr.startswith("dengine: ")
        assert refused.stderr.count("\n") == 1
    assert client.request("GET", "/v1/kv?prefix=cli/&count_only=1").json()["count"] == 0


def test_the_command_line_sends_no_more_than_it_reads(node: ServeProcess, client: Wire) -> None:
    """What a node takes as it stands is taken from `dengine txn`, too."""
    text = "\u6c34" * 300_000
    puts = [put(f"cli/zh/{number}", text) for number in (0, 1)]
    body = json.dumps({"success": puts}, ensure_ascii=False, separators=(",", ":")).encode()
    assert post(client, body).status == 200
    done = dengine_txn(node, body)
    assert (done.returncode, done.stderr) == (0, "")
    assert client.request("GET", "/v1/kv/cli/zh/1").body.decode() == text
    raw = b"\xff".join(json.dumps({"success": [put("cli/x", "|")]}).encode().split(b"|"))
    for broken in (raw, rb'{"success": [{"op": "get", "key": "\ud800"}]}'):
        refused = dengine_txn(node, broken)
        assert refused.returncode == 1
        assert refused.stderr.startswith("dengine: the JSON body is not acceptable: ")
    client.request("DELETE", "/v1/kv?prefix=cli/")


def test_the_command_line_reads_base64_as_the_node_does(node: ServeProcess, client: Wire) -> None:
    """Of either alphabet, with or without padding: what was done is told."""
    keys = {"-_8": "\\xfb\\xff", "+/8=": "\\xfb\\xff", "Y2xp": "cli", "_w==": "\\xff"}
    puts = [{"op": "put", "key_base64": key, "value_base64": "_w"} for key in keys]
    done = dengine_txn(node, json.dumps({"success": puts}).encode())
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[1] for line in done.stdout.splitlines()[2:]] == list(keys.values())
    assert client.request("GET", "/v1/kv/%FB%FF").body == b"\xff"
    wrong = json.dumps({"success": [{"op": "get", "key_base64": "Y"}]}).encode()
    refused = dengine_txn(node, wrong)
    assert refused.returncode == 1
    assert refused.stderr.startswith("dengine: success[0]: key_base64 is not valid base64")
    for key in ("cli", "%FB%FF", "%FF"):
        assert client.request("DELETE", f"/v1/kv/{key}").status == 200
