"""`/v1/kv`: pages of keys, counts, and deleting a range."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.raw import Wire, assert_error
from tests.cluster import ServeProcess

NAMES = [f"list/{number:02d}" for number in range(25)]


@pytest.fixture
def listed(client: Wire) -> Wire:
    """A connection to a node that holds list/00 to list/24 and a neighbour on either side."""
    for name in [*NAMES, "lisa", "list0"]:
        client.request("PUT", f"/v1/kv/{name}", name.encode())
    return client


def _page(client: Wire, query: str) -> dict[str, Any]:
    answer = client.request("GET", f"/v1/kv?{query}")
    assert answer.status == 200, answer
    page: dict[str, Any] = answer.json()
    assert set(page) == {"revision", "items", "count", "next"}
    return page


def _keys(page: dict[str, Any]) -> list[str]:
    return [item["key"] for item in page["items"]]


def test_a_prefix_lists_its_keys_in_order(listed: Wire) -> None:
    page = _page(listed, "prefix=list/")
    assert (_keys(page), page["count"], page["next"]) == (NAMES, 25, None)
    item = page["items"][3]
    assert item["value"] == "list/03"
    assert item["mod_revision"] >= item["create_revision"] > 0
    assert item["version"] > 0
    assert (item["ttl"], item["lease"]) == (None, None)


@pytest.mark.parametrize("limit", [1, 7, 24, 25, 26, 1000])
def test_pages_follow_each_other_without_gap_or_repeat(listed: Wire, limit: int) -> None:
    found, query = [], f"prefix=list/&limit={limit}"
    page = _page(listed, query)
    while True:
        assert page["count"] == len(page["items"]) <= limit
        found += _keys(page)
        if page["next"] is None:
            break
        page = _page(listed, f"{query}&after={page['next']}")
    assert found == NAMES


def test_a_range_includes_its_start_and_not_its_end(listed: Wire) -> None:
    assert _keys(_page(listed, "start=list/03&end=list/06")) == NAMES[3:6]
    assert _keys(_page(listed, "start=list/23&end=list0")) == NAMES[23:]
    assert _keys(_page(listed, "start=list/23&limit=3")) == ["list/23", "list/24", "list0"]
    assert _page(listed, "start=z&end=a")["items"] == []


def test_keys_only_and_count_only(listed: Wire) -> None:
    page = _page(listed, "prefix=list/&keys_only=true")
    assert _keys(page) == NAMES
    assert not any("value" in item or "value_base64" in item for item in page["items"])
    counted = _page(listed, "prefix=list/&count_only=true&limit=3")
    assert (counted["count"], counted["items"], counted["next"]) == (25, [], None)


def test_bytes_that_are_no_utf8_come_as_base64(listed: Wire) -> None:
    listed.request("PUT", "/v1/kv/b64/%ff", b"\xfe")
    item = _page(listed, "prefix=b64/%ff")["items"][0]
    assert (item["key_base64"], item["value_base64"]) == ("YjY0L/8=", "/g==")
    assert "key" not in item
    assert "value" not in item
    listed.request("DELETE", "/v1/kv/b64/%ff")


def test_a_page_of_large_values_is_cut_short(client: Wire) -> None:
    """A page ends early rather than filling the node's memory; paging still finds everything."""
    for number in range(12):
        client.request("PUT", f"/v1/kv/large/{number:02d}", bytes(1024 * 1024))
    keys, after = [], ""
    while True:
        page = _page(client, f"prefix=large/{after}")
        assert sum(len(item["value"]) for item in page["items"]) <= 21 * 1024 * 1024
        keys += _keys(page)
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
    assert keys == [f"large/{number:02d}" for number in range(12)]
    assert client.request("DELETE", "/v1/kv?prefix=large/").json()["deleted"] == 12


def test_head_of_a_list(listed: Wire) -> None:
    answer = listed.request("HEAD", "/v1/kv?prefix=list/")
    assert (answer.status, answer.body) == (200, b"")
    assert int(answer.headers["content-length"]) > 100


@pytest.mark.parametrize(
    "query",
    [
        "prefix=a&start=b",
        "prefix=a&end=b",
        "limit=0",
        "limit=1001",
        "limit=-1",
        "limit=ten",
        "limit=",
        "limit=1e2",
        "after=%2a",
        "prefix=list/&after=YQ",
        "after=",
        "keys_only=maybe",
        "count_only=2",
        "prefix=a&prefix=a",
        "prefix=%f",
        "prefix=a&order=desc",
        "key_base64=YQ==&prefix=a",
        "consistency=maybe",
    ],
)
def test_a_bad_selection_is_refused(client: Wire, query: str) -> None:
    assert_error(client.request("GET", f"/v1/kv?{query}"), 400, "invalid_request")


@pytest.mark.parametrize("name", ["prefix", "start", "end"])
def test_a_bound_longer_than_a_key_is_refused(client: Wire, name: str) -> None:
    answer = client.request("GET", f"/v1/kv?{name}={'k' * 512}")
    assert_error(answer, 413, "too_large")


def test_deleting_a_prefix_or_a_range(listed: Wire) -> None:
    before = _page(listed, "prefix=list/")["revision"]
    part = listed.request("DELETE", "/v1/kv?start=list/20&end=list/22")
    assert part.json() == {"revision": before + 1, "deleted": 2}
    assert listed.request("DELETE", "/v1/kv?prefix=list/").json()["deleted"] == 23
    assert listed.request("DELETE", "/v1/kv?prefix=list/").json()["deleted"] == 0
    assert listed.request("GET", "/v1/kv/list0").status == 200


@pytest.mark.parametrize("query", ["", "?prefix=", "?start=", "?start=&end=", "?all=false"])
def test_deleting_everything_must_be_meant(listed: Wire, query: str) -> None:
    assert_error(listed.request("DELETE", f"/v1/kv{query}"), 400, "invalid_request")
    assert listed.request("GET", "/v1/kv/list/00").status == 200
    for bad in ("?colour=1", "?prefix=a&limit=1", "?prefix=a&start=b"):
        assert_error(listed.request("DELETE", f"/v1/kv{bad}"), 400, "invalid_request")


def test_a_malformed_all_deletes_nothing(listed: Wire) -> None:
    """Also where the selection is small enough to do without it."""
    assert_error(listed.request("DELETE", "/v1/kv?prefix=list/&all=maybe"), 400, "invalid_request")
    assert listed.request("GET", "/v1/kv/list/00").status == 200


def test_all_true_deletes_everything(listed: Wire) -> None:
    assert listed.request("DELETE", "/v1/kv?prefix=&all=true").json()["deleted"] >= 27
    assert _page(listed, "prefix=")["items"] == []


def test_more_keys_than_one_delete_may_take(small_node: ServeProcess) -> None:
    """Over limits.range_delete nothing is deleted, and the message says what to do."""
    for number in range(6):
        assert small_node.put(f"many/{number}", "x").ok
    answer = small_node.request("DELETE", "/v1/kv?prefix=many/")
    assert (answer.status, answer.json()["error"]) == (413, "too_large")
    assert len(small_node.items("many/")) == 6
    part = small_node.request("DELETE", "/v1/kv?start=many/0&end=many/5")
    assert part.json()["deleted"] == 5
