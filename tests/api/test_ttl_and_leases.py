"""`?ttl=`, `?lease=` and `/v1/leases`."""

from __future__ import annotations

import pytest

from tests.api.raw import Wire, assert_error, wire
from tests.cluster import ServeProcess, wait_for


def _grant(client: Wire, ttl_s: int = 60) -> str:
    granted = client.json("POST", "/v1/leases", {"ttl": ttl_s})
    assert granted.status == 200, granted
    assert granted.json()["ttl"] == ttl_s
    lease: str = granted.json()["id"]
    return lease


def test_a_key_with_a_ttl_expires(client: Wire, node: ServeProcess) -> None:
    """And says meanwhile how long it has; at first no less than what was asked for."""
    assert client.request("PUT", "/v1/kv/ttl/short?ttl=1", b"v").status == 200
    assert client.request("PUT", "/v1/kv/ttl/long?ttl=600", b"v").status == 200
    found = client.request("GET", "/v1/kv/ttl/long")
    assert 590 <= int(found.headers["dengine-ttl"]) <= 600
    (item,) = client.request("GET", "/v1/kv?prefix=ttl/long").json()["items"]
    assert 590 <= item["ttl"] <= 600
    assert item["lease"] is None

    def gone() -> bool:
        with wire(node) as other:
            return other.request("GET", "/v1/kv/ttl/short").status == 404

    wait_for(gone, "the key to expire")
    assert client.request("GET", "/v1/kv/ttl/long").status == 200


def test_a_plain_put_clears_a_ttl(client: Wire) -> None:
    client.request("PUT", "/v1/kv/ttl/k?ttl=600", b"v")
    client.request("PUT", "/v1/kv/ttl/k", b"w")
    found = client.request("GET", "/v1/kv/ttl/k")
    assert "dengine-ttl" not in found.headers
    (item,) = client.request("GET", "/v1/kv?prefix=ttl/k").json()["items"]
    assert item["ttl"] is None


@pytest.mark.parametrize(
    "query",
    ["ttl=0", "ttl=-1", "ttl=1.5", "ttl=315360001", "ttl=", "ttl=x", "lease=", "ttl=5&lease=x"],
)
def test_a_bad_ttl_is_refused(client: Wire, query: str) -> None:
    assert_error(client.request("PUT", f"/v1/kv/k?{query}", b"v"), 400, "invalid_request")
    assert_error(client.request("GET", "/v1/kv/k?ttl=5"), 400, "invalid_request")


def test_a_lease_holds_its_keys_until_it_is_revoked(client: Wire) -> None:
    lease = _grant(client)
    for name in ("b", "a"):
        put = client.request("PUT", f"/v1/kv/leased/{name}?lease={lease}", b"v")
        assert put.status == 200
    shown = client.request("GET", f"/v1/leases/{lease}").json()
    assert shown["keys"] == ["leased/a", "leased/b"]
    assert (shown["id"], shown["ttl"]) == (lease, 60)
    assert 50 <= shown["remaining"] <= 60
    items = client.request("GET", "/v1/kv?prefix=leased/").json()["items"]
    assert {item["lease"] for item in items} == {lease}
    assert int(client.request("GET", "/v1/kv/leased/a").headers["dengine-ttl"]) > 50

    kept = client.request("POST", f"/v1/leases/{lease}/keepalive", b"")
    assert kept.json() == {"id": lease, "ttl": 60}
    revoked = client.request("DELETE", f"/v1/leases/{lease}").json()
    assert (revoked["deleted"], revoked["going"]) == (2, False)
    assert client.request("GET", "/v1/kv?prefix=leased/").json()["items"] == []
    for method, target in (
        ("GET", f"/v1/leases/{lease}"),
        ("DELETE", f"/v1/leases/{lease}"),
        ("POST", f"/v1/leases/{lease}/keepalive"),
    ):
        assert_error(client.request(method, target), 404, "not_found")


def test_a_lease_that_nobody_keeps_ends(client: Wire, node: ServeProcess) -> None:
    lease = _grant(client, 1)
    client.request("PUT", f"/v1/kv/mortal?lease={lease}", b"v")

    def gone() -> bool:
        with wire(node) as other:
            return other.request("GET", "/v1/kv/mortal").status == 404

    wait_for(gone, "the lease to end")
    refused = client.request("PUT", f"/v1/kv/mortal?lease={lease}", b"v")
    assert_error(refused, 404, "not_found")


def test_transactions_take_ttl_and_lease(client: Wire) -> None:
    lease = _grant(client)
    success = [
        {"op": "put", "key": "t/a", "value": "1", "ttl": 100},
        {"op": "put", "key": "t/b", "value": "1", "lease": lease},
        {"op": "get", "key": "t/b"},
    ]
    done = client.json("POST", "/v1/txn", {"success": success}).json()
    assert done["results"][2]["item"]["lease"] == lease
    items = client.request("GET", "/v1/kv?prefix=t/").json()["items"]
    assert [item["lease"] for item in items] == [None, lease]
    assert items[0]["ttl"] > 90
    both = {"op": "put", "key": "t/c", "value": "1", "ttl": 5, "lease": lease}
    assert_error(client.json("POST", "/v1/txn", {"success": [both]}), 400, "invalid_request")
    missing = {"op": "put", "key": "t/c", "value": "1", "lease": "none"}
    assert_error(client.json("POST", "/v1/txn", {"success": [missing]}), 404, "not_found")


@pytest.mark.parametrize("body", [{}, {"ttl": 0}, {"ttl": "5"}, {"ttl": 5, "id": "mine"}, []])
def test_bad_grants_are_refused(client: Wire, body: object) -> None:
    assert_error(client.json("POST", "/v1/leases", body), 400, "invalid_request")


def test_other_paths_below_leases_do_not_exist(client: Wire) -> None:
    assert_error(client.request("POST", "/v1/leases/x/other", b""), 405, "method_not_allowed")
    assert_error(client.request("GET", "/v1/leases/x/keepalive"), 405, "method_not_allowed")
    assert_error(client.request("PUT", "/v1/leases/x", b""), 405, "method_not_allowed")
    assert_error(client.request("GET", "/v1/leases/x/other"), 404, "not_found")
