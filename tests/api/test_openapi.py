"""Generated requests, well-formed and not, to every documented call of a running node."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from dengine.api import replies
from dengine.config import parse_address
from tests.api.conftest import start_node
from tests.api.raw import Wire
from tests.cluster import Cluster, ServeProcess

SEED = int(os.environ.get("DENGINE_OPENAPI_SEED", random.SystemRandom().randrange(2**32)))
FULL = bool(os.environ.get("DENGINE_CRASH_SWEEP"))  # make crash-sweep
TIMES = 10 if FULL else 1
EXAMPLES = {GenerationMode.POSITIVE: 15 * TIMES, GenerationMode.NEGATIVE: 8 * TIMES}  # of each call
BUDGET_S = 1800.0 if FULL else 30.0  # a busy machine gets to other calls in the next run
NOBODY = "127.0.0.1:1"  # a member that is dialled in vain, and on this machine
PATIENCE_MS = 300  # of calls that wait for such a member
UNAVAILABLE = (503, 504, 507)
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]


pytestmark = pytest.mark.timeout(2400 if FULL else 120)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[ServeProcess]:
    """A node of its own: strangers join it, and its settings change."""
    with Cluster(tmp_path) as cluster:
        yield start_node(cluster, "[raft.membership]\nstable_ms = 60000\n")
        print(cluster.describe())


def test_no_request_gets_an_answer_that_is_not_documented(target: ServeProcess) -> None:
    """No 500, and no status, media type or shape but those of the served document. A failure is
    found again with DENGINE_OPENAPI_SEED."""
    print(f"DENGINE_OPENAPI_SEED={SEED}")
    document = target.call("GET", "/v1/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.base_url = f"http://{target.host}:{target.port}"
    seen: set[int] = set()
    tried = 0
    with requests.Session() as session:
        operations = [found.ok() for found in schema.get_all_operations()]
        random.Random(SEED).shuffle(operations)
        end = time.monotonic() + BUDGET_S
        for operation in operations:
            if time.monotonic() > end:
                break
            tried += 1
            for mode, count in EXAMPLES.items():

                @seed(SEED)
                @settings(
                    max_examples=count,
                    deadline=None,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                @given(case=operation.as_strategy(generation_mode=mode))
                def try_it(case: Case) -> None:
                    seen.add(_exchange(case, session))

                # Of some calls nothing can be wrong: any text is a name.
                wrong = mode is GenerationMode.NEGATIVE
                with contextlib.suppress(*((Unsatisfiable,) if wrong else ())):
                    try_it()
    print(f"{tried} of {len(operations)} calls")
    assert tried == len(operations) or not FULL
    assert {200, 400, 404} <= seen
    assert target.running, target.tail()
    assert target.ready()
    assert "Traceback" not in target.output(), target.tail()


def _operations(document: Any) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from path.values()


def test_parameters_say_what_they_may_be(client: Wire) -> None:
    document = client.request("GET", "/v1/openapi.json").json()
    found = {
        parameter["name"]: parameter["schema"]
        for operation in _operations(document)
        for parameter in operation["parameters"]
    }
    assert found["consistency"]["enum"] == ["linearizable", "lease", "eventual"]
    ranges = {
        name: (schema.get("minimum"), schema.get("maximum"))
        for name, schema in found.items()
        if schema["type"] == "integer"
    }
    assert ranges == {
        "Dengine-Timeout-Ms": (100, 60_000),
        "from_revision": (1, 2**63 - 2),
        "id": (1, 2**32 - 1),
        "lag": (0, 2**63 - 1),
        "limit": (1, 1000),
        "ttl": (1, 315_360_000),
    }
    for value in (0, 1001):
        assert client.request("GET", f"/v1/kv?limit={value}").status == 400
    for value in (0, 315_360_001):
        assert client.request("PUT", f"/v1/kv/k?ttl={value}", b"").status == 400


def test_every_error_has_an_example_and_says_what_it_carries(client: Wire) -> None:
    document = client.request("GET", "/v1/openapi.json").json()
    known = set(document["components"]["schemas"]["Error"]["properties"])
    carried = {"405": "allow", "410": "compact_revision", "412": "current_revision"}
    for operation in _operations(document):
        replies = operation["responses"]
        assert {"429", "500"} <= set(replies)
        for status, reply in replies.items():
            if int(status) < 400:
                continue
            content = reply["content"]["application/json"]
            assert set(content["example"]) <= known
            assert content["example"]["message"]
            details = carried.get(status)
            if details:
                assert content["schema"]["allOf"][1]["required"] == [details]
                assert details in content["example"]
    client.request("PUT", "/v1/kv/k", b"")
    failed = client.request("PUT", "/v1/kv/k", b"", "If-None-Match: *\r\n")
    assert set(failed.json()) <= known


def test_the_results_of_a_transaction_are_described(client: Wire) -> None:
    """Of every operation, and nothing else comes: the described structs decode a real answer."""
    operations = [
        {"op": "put", "key": "described/a", "value": "v"},
        {"op": "get", "key": "described/a"},
        {"op": "get", "key": "described/none"},
        {"op": "put", "key_base64": "/w==", "value_base64": "/w==", "ttl": 60},
        {"op": "get", "key_base64": "/w=="},
        {"op": "delete", "key_base64": "/w=="},
        {"op": "delete_range", "prefix": "described/"},
    ]
    reply = client.json("POST", "/v1/txn", {"success": operations})
    assert reply.status == 200
    done = msgspec.json.decode(reply.body, type=replies.TxnReply)
    assert len(done.results) == len(operations)
    document = client.request("GET", "/v1/openapi.json").json()
    schema = document["paths"]["/v1/txn"]["post"]["responses"]["200"]["content"]
    assert schema["application/json"]["schema"] == {"$ref": "#/components/schemas/TxnReply"}


def _json_schemas(document: Any) -> Iterator[dict[str, Any]]:
    """Of everything that is answered."""
    yield from document["components"]["schemas"].values()
    for operation in _operations(document):
        for reply in operation["responses"].values():
            if "application/json" in reply.get("content", {}):
                yield reply["content"]["application/json"]["schema"]


def _parts(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    for part in (*schema.get("properties", {}).values(), *schema.get("anyOf", ())):
        yield from _parts(part)
    if "items" in schema:
        yield from _parts(schema["items"])


def test_every_field_of_an_answer_has_a_type(client: Wire) -> None:
    document = client.request("GET", "/v1/openapi.json").json()
    for schema in _json_schemas(document):
        assert {} not in list(_parts(schema)), schema


def test_answers_are_what_the_document_says(node: ServeProcess, client: Wire) -> None:
    """With keys and values that are no UTF-8 and such that are, and fields that are null or not."""
    document = client.request("GET", "/v1/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.base_url = f"http://{node.host}:{node.port}"

    def answer(method: str, path: str, **asked: Any) -> Any:
        case = schema[path][method].Case(**asked)
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        assert response.status_code == 200, response.content
        return response.json()

    lease = answer("POST", "/v1/leases", body={"ttl": 60}, media_type="application/json")["id"]
    for key, query in (
        ("%FF%00", f"?lease={lease}"),
        ("text", f"?lease={lease}"),
        ("ttl", "?ttl=600"),
    ):
        assert client.request("PUT", f"/v1/kv/real/{key}{query}", b"\xff\x00").status == 200
    assert client.request("PUT", "/v1/kv/real/stays", b"text").status == 200
    for query in ({}, {"limit": 2}, {"keys_only": "true"}, {"count_only": "true"}):
        page = answer("GET", "/v1/kv", query={"prefix": "real/", **query})
        assert page["count"] == (2 if "limit" in query else 4)
    seen = answer("GET", "/v1/leases/{id}", path_parameters={"id": lease})
    assert seen["keys"] == ["real/text", {"key_base64": "cmVhbC//AA=="}]
    keys: list[dict[str, str]] = [{"key": "real/text"}, {"key_base64": "cmVhbC//AA=="}]
    txn = {
        "success": [
            *({"op": "get", **key} for key in (*keys, {"key": "real/none"})),
            *({"op": "delete", **key} for key in keys),
            {"op": "delete_range", "prefix": "real/"},
        ]
    }
    answer("POST", "/v1/txn", body=txn, media_type="application/json")
    answer("DELETE", "/v1/leases/{id}", path_parameters={"id": lease})
    answer("POST", "/v1/snapshots", headers={"Dengine-Timeout-Ms": "60000"})
    for path in ("/v1/cluster", "/v1/status", "/v1/snapshots", "/livez", "/readyz", "/leader"):
        answer("GET", path)
    assert answer("GET", "/readyz", query={"verbose": "true"})["checks"]["leader"] is True


def _exchange(case: Case, session: requests.Session) -> int:
    """Send `case`, hold the answer against the document, and return its status."""
    if isinstance(case.body, dict) and _is_address(case.body.get("address")):
        case.body["address"] = NOBODY
    case.headers.setdefault("Dengine-Timeout-Ms", str(PATIENCE_MS))
    sent: dict[str, Any] = case.as_transport_kwargs()
    with session.request(**sent, stream=True, timeout=30, allow_redirects=False) as response:
        status, kind = response.status_code, response.headers.get("Content-Type", "")
        assert status < 500 or status in UNAVAILABLE, (case.as_curl_command(), response.content)
        if kind.startswith("text/event-stream"):  # it goes on, and has no end to wait for
            assert str(status) in case.operation.definition.raw["responses"]
        else:
            case.validate_response(response, checks=CHECKS)
    return status


def _is_address(text: object) -> bool:
    try:
        parse_address(str(text))
    except ValueError:
        return False
    return isinstance(text, str)
