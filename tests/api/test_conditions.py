"""If-Match and If-None-Match on `/v1/kv/KEY`: compare-and-swap, create-only, and 304."""

from __future__ import annotations

import pytest

from tests.api.raw import Answer, Wire, assert_error


@pytest.fixture
def revision(client: Wire) -> int:
    """The revision of a fresh value under /v1/kv/cond."""
    revision: int = client.request("PUT", "/v1/kv/cond", b"one").json()["revision"]
    return revision


def _put(client: Wire, *head: str) -> Answer:
    return client.request("PUT", "/v1/kv/cond", b"two", "".join(f"{line}\r\n" for line in head))


def test_a_write_with_the_current_revision_succeeds_once(client: Wire, revision: int) -> None:
    """Compare-and-swap: the second writer with the same revision is told the current one."""
    assert _put(client, f'If-Match: "{revision}"').status == 200
    lost = assert_error(_put(client, f'If-Match: "{revision}"'), 412, "precondition_failed")
    assert lost["current_revision"] == revision + 1
    assert lost["outcome"] == "none"


@pytest.mark.parametrize(
    "header", ["*", '"{r}"', '"987654", "{r}"', '"x" , "{r}",W/"987654"', ' "{r}" ']
)
def test_if_match_holds(client: Wire, revision: int, header: str) -> None:
    assert _put(client, "If-Match: " + header.format(r=revision)).status == 200


@pytest.mark.parametrize(
    "header",
    ['"987654"', 'W/"{r}"', '"x"', '"987654", W/"{r}"', '""', '"0{r}"', '"+{r}"', '"0"'],
)
def test_if_match_does_not_hold(client: Wire, revision: int, header: str) -> None:
    """Only strong tags count, as RFC 9110 13.1.1 wants, and these letter by letter; other texts are
    no revision."""
    answer = _put(client, "If-Match: " + header.format(r=revision))
    assert assert_error(answer, 412, "precondition_failed")["current_revision"] == revision
    assert client.request("GET", "/v1/kv/cond").body == b"one"


def test_several_if_match_lines_are_one_list(client: Wire, revision: int) -> None:
    assert _put(client, 'If-Match: "987654"', f'If-Match: "{revision}"').status == 200


@pytest.mark.parametrize(
    "header", ["If-Match: 5", 'If-Match: "5', "If-Match: ", 'If-None-Match: "5"', "If-Match: **"]
)
def test_a_malformed_condition_is_refused(client: Wire, revision: int, header: str) -> None:
    assert_error(_put(client, header), 400, "invalid_request")
    assert client.request("GET", "/v1/kv/cond").body == b"one"


def test_create_only(client: Wire, revision: int) -> None:
    """If-None-Match: * writes only where nothing is."""
    taken = assert_error(_put(client, "If-None-Match: *"), 412, "precondition_failed")
    assert taken["current_revision"] == revision
    client.request("DELETE", "/v1/kv/cond")
    assert _put(client, "If-None-Match: *").json()["created"] is True


def test_a_missing_key_has_no_revision(client: Wire) -> None:
    answer = client.request("PUT", "/v1/kv/cond-none", b"x", "If-Match: *\r\n")
    assert assert_error(answer, 412, "precondition_failed")["current_revision"] is None


def test_delete_takes_the_same_conditions(client: Wire, revision: int) -> None:
    stale = client.request("DELETE", "/v1/kv/cond", head='If-Match: "987654"\r\n')
    assert assert_error(stale, 412, "precondition_failed")["current_revision"] == revision
    right = client.request("DELETE", "/v1/kv/cond", head=f'If-Match: "{revision}"\r\n')
    assert right.json()["deleted"] == 1


@pytest.mark.parametrize("header", ["*", '"{r}"', 'W/"{r}"', '"987654", "{r}"'])
def test_a_reader_that_has_it_gets_304(client: Wire, revision: int, header: str) -> None:
    head = f"If-None-Match: {header.format(r=revision)}\r\n"
    for method in ("GET", "HEAD"):
        answer = client.request(method, "/v1/kv/cond", head=head)
        assert (answer.status, answer.body) == (304, b"")
        assert answer.headers["etag"] == f'"{revision}"'
    assert client.request("GET", "/v1/kv/cond").body == b"one"  # the connection is still in step


def test_a_reader_that_has_another_revision_gets_the_value(client: Wire, revision: int) -> None:
    assert client.request("GET", "/v1/kv/cond", head='If-None-Match: "987654"\r\n').body == b"one"
    assert client.request("GET", "/v1/kv/cond", head=f'If-Match: "{revision}"\r\n').body == b"one"
    stale = client.request("GET", "/v1/kv/cond", head='If-Match: "987654"\r\n')
    assert_error(stale, 412, "precondition_failed")


def test_conditions_do_not_apply_to_ranges(client: Wire, revision: int) -> None:
    answer = client.request("DELETE", "/v1/kv?prefix=cond", head='If-Match: "987654"\r\n')
    assert_error(answer, 400, "invalid_request")
    assert client.request("GET", "/v1/kv/cond").status == 200
