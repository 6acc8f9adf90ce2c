"""What load balancers, supervisors and monitors ask, and the document of it all."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.api.raw import Wire, assert_error
from tests.cluster import ServeProcess


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/readyz?verbose", "/leader"])
def test_a_healthy_leader_says_so(client: Wire, path: str) -> None:
    for method in ("GET", "HEAD"):
        assert client.request(method, path).status == 200


def test_verbose_readiness_names_its_checks(client: Wire) -> None:
    checks = client.request("GET", "/readyz?verbose").json()["checks"]
    assert checks
    assert all(checks.values())
    assert "checks" not in client.request("GET", "/readyz").json()


@pytest.mark.parametrize("path", ["/replica", "/replica?lag=0"])
def test_a_leader_is_no_replica(client: Wire, path: str) -> None:
    refused = client.request("GET", path)
    assert assert_error(refused, 503, "cluster_unavailable")["message"]
    assert refused.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    "target", ["/replica?lag=-1", "/replica?lag=x", "/readyz?verbose=7", "/livez?a=1", "/leader?x"]
)
def test_bad_health_queries_are_refused(client: Wire, target: str) -> None:
    assert_error(client.request("GET", target), 400, "invalid_request")


def test_status_is_the_nodes_own_view(client: Wire) -> None:
    status = client.request("GET", "/v1/status").json()
    known = {"node_id", "incarnation", "role", "term", "leader", "commit_index", "last_applied"}
    assert known | {"last_index", "revision", "version"} <= set(status)
    assert (status["node_id"], status["role"]) == (1, "leader")


def test_metrics_are_prometheus_text(client: Wire) -> None:
    client.request("PUT", "/v1/kv/metric", b"x")
    answer = client.request("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in answer.body.decode().splitlines() if line and line[0] != "#"]
    assert lines
    for line in lines:
        assert re.fullmatch(r"[a-zA-Z_:][\w:]*(\{.*\})? [-+0-9.eEnaNIf]+", line), line
    assert any("PUT /v1/kv/{key}" in line for line in lines), "requests are counted by route"


def _document(client: Wire) -> dict[str, Any]:
    answer = client.request("GET", "/v1/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    document: dict[str, Any] = answer.json()
    return document


def test_the_document_and_the_routes_are_the_same(client: Wire) -> None:
    """For each documented path, OPTIONS allows exactly the documented methods, and every other
    method is a 405 with that Allow."""
    document = _document(client)
    assert document["openapi"] == "3.1.0"
    assert set(document["components"]["securitySchemes"]) == {"token", "peer"}
    assert {"/v1/kv/{key}", "/v1/kv", "/v1/cluster", "/v1/peer"} <= set(document["paths"])
    for path, operations in document["paths"].items():
        target = path.replace("{key}", "k").replace("{id}", "1")
        documented = {method.upper() for method in operations} | {"OPTIONS"}
        options = client.request("OPTIONS", target)
        assert (options.status, options.body) == (204, b"")
        assert set(options.headers["allow"].split(", ")) == documented
        for method in {"GET", "PUT", "POST", "DELETE", "PATCH", "TRACE"} - documented:
            refused = client.request(method, target)
            assert_error(refused, 405, "method_not_allowed")
            assert set(refused.headers["allow"].split(", ")) == documented


def test_the_document_is_complete_and_has_examples(client: Wire) -> None:
    """Operation ids are unique, every path parameter is declared, every body has an example."""
    ids: list[str] = []
    for path, operations in _document(client)["paths"].items():
        for operation in operations.values():
            ids.append(operation["operationId"])
            declared = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
            assert declared == set(re.findall(r"{(\w+)}", path))
            if "200" in operation["responses"]:
                assert "content" in operation["responses"]["200"]
            bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
            for body in bodies:
                for content in body.get("content", {}).values():
                    assert "example" in content or "$ref" in content["schema"]
    assert len(ids) == len(set(ids))
    assert all(name.isidentifier() and name.isascii() for name in ids), ids


def test_errors_name_the_headers_that_say_what_to_do(client: Wire) -> None:
    named = {"401": "WWW-Authenticate", "405": "Allow", "429": "Retry-After", "503": "Retry-After"}
    for operations in _document(client)["paths"].values():
        for operation in operations.values():
            for status, reply in operation["responses"].items():
                if int(status) >= 400:
                    assert list(reply.get("headers", ())) == [
                        named[s] for s in named if s == status
                    ]


def test_one_call_may_answer_in_two_forms(client: Wire) -> None:
    """`GET /v1/kv` lists as JSON, and with key_base64 gives the raw value with its headers."""
    for method in ("get", "head"):
        answer = _document(client)["paths"]["/v1/kv"][method]["responses"]["200"]
        assert set(answer["content"]) == {"application/json", "application/octet-stream"}
        assert set(answer["headers"]) == {"ETag", "Dengine-Revision", "Dengine-TTL"}


def test_the_documented_parameters_are_accepted(client: Wire) -> None:
    """Every query parameter in the document works with its own example."""
    for path, operations in _document(client)["paths"].items():
        if "watch" in path or "peer" in path:
            continue
        for parameter in operations.get("get", {}).get("parameters", ()):
            if parameter["in"] == "query":
                example = str(parameter["example"]).lower()
                if parameter["name"] == "after":
                    continue  # belongs to the listing that gave it
                target = path.replace("{key}", "k") + f"?{parameter['name']}={example}"
                answer = client.request("GET", target)
                assert answer.status in (200, 404, 503), (target, answer)


def test_a_timeout_is_documented_exactly_where_it_is_read(client: Wire) -> None:
    """A time that is none is refused by each call that has `Dengine-Timeout-Ms` in the document;
    the others do not look at it."""
    for path, operations in _document(client)["paths"].items():
        target = path.replace("{key}", "k").replace("{id}", "1").replace("{name}", "latest")
        for method, operation in operations.items():
            named = "Dengine-Timeout-Ms" in {p["name"] for p in operation["parameters"]}
            if path in ("/v1/cluster/watch", "/v1/peer"):
                assert not named, path
                continue
            required = [p for p in operation["parameters"] if p["required"]]
            fields = [f"{p['name']}={p['example']}" for p in required if p["in"] == "query"]
            if (method, path) == ("delete", "/v1/kv"):
                fields = ["prefix=nothing-here"]
            body, head = b"" if method == "post" else None, "Dengine-Timeout-Ms: soon\r\n"
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                text = content["example"]
                body = (text if isinstance(text, str) else json.dumps(text)).encode()
                head += f"Content-Type: {kind}\r\n"
            answer = client.request(method.upper(), "?".join([target, *fields]), body, head)
            refused = answer.status == 400
            assert refused == named, (method, path, answer)


def test_unknown_paths_are_404(client: Wire, node: ServeProcess) -> None:
    for path in (
        "/",
        "/v1",
        "/v1/kvs",
        "/v2/kv/a",
        "/livez/",
        "/V1/kv/a",
        "/v1/cluster/",
        "/%6civez",
    ):
        for method in ("GET", "PUT", "OPTIONS"):
            assert_error(client.request(method, path, b""), 404, "not_found")


def test_options_for_the_whole_server(client: Wire) -> None:
    answer = client.request("OPTIONS", "*")
    assert answer.status == 204
    assert "PUT" in answer.headers["allow"]


def test_an_absolute_target_is_understood(client: Wire) -> None:
    """Proxies send the absolute form (RFC 9112 3.2.2)."""
    assert client.request("PUT", "http://any.host/v1/kv/abs/%2F", b"x").status == 200
    assert client.request("GET", "/v1/kv/abs/%2F").body == b"x"
