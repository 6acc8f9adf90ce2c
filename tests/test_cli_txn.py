"""`dengine txn`: what the lines of standard input mean."""

from __future__ import annotations

from typing import Any

import pytest

from dengine.cli.txn import only_reads, parse
from dengine.errors import InvalidRequest


def test_lines_become_the_json_of_the_call() -> None:
    """Comparisons, then what is done, then what is done otherwise."""
    text = """
    # a transfer
    if accounts/a value = 5
    if accounts/b exists          # both are there
    if accounts/c absent
    if accounts/a version >= 2
    put accounts/a 3
    put 'with space' "two words"
    put sessions/a 1 ttl 60
    put sessions/b 1 lease 2f1-0-6c789e114b3c
    delete accounts/old
    delete-prefix session/
    delete-range a b
    else
    get accounts/a
    """
    assert parse(text) == {
        "compare": [
            {"key": "accounts/a", "target": "value", "op": "=", "operand": "5"},
            {"key": "accounts/b", "target": "exists", "op": "=", "operand": True},
            {"key": "accounts/c", "target": "exists", "op": "=", "operand": False},
            {"key": "accounts/a", "target": "version", "op": ">=", "operand": 2},
        ],
        "success": [
            {"op": "put", "key": "accounts/a", "value": "3"},
            {"op": "put", "key": "with space", "value": "two words"},
            {"op": "put", "key": "sessions/a", "value": "1", "ttl": 60},
            {"op": "put", "key": "sessions/b", "value": "1", "lease": "2f1-0-6c789e114b3c"},
            {"op": "delete", "key": "accounts/old"},
            {"op": "delete_range", "prefix": "session/"},
            {"op": "delete_range", "start": "a", "end": "b"},
        ],
        "failure": [{"op": "get", "key": "accounts/a"}],
    }


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("delete user#1", "user#1"),
        ("delete user#1 # the first", "user#1"),
        ("delete '#1'", "#1"),
        ('delete "a #1"#2', "a #1#2"),
        ("delete a\\ #1", "a #1"),
        ("delete \\#1", "#1"),
        ("delete 'it'#\"s\" \t# ours", "it#s"),
    ],
)
def test_a_comment_begins_where_a_word_could(line: str, key: str) -> None:
    """As in a shell: nothing of a key is taken for one."""
    assert parse(line)["success"] == [{"op": "delete", "key": key}]


@pytest.mark.parametrize("character", ["\u2028", "\x0c", "\x85", "\r"])
def test_only_a_newline_ends_a_line(character: str) -> None:
    text = f"put k 'a{character}b'\ndelete l"
    assert parse(text)["success"][0]["value"] == f"a{character}b"


def test_bytes_that_are_no_text_travel_in_base64() -> None:
    raw = b"put k\xff v\xfe".decode("utf-8", "surrogateescape")
    assert parse(raw)["success"] == [{"op": "put", "key_base64": "a/8=", "value_base64": "dv4="}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("put k", "line 1, 'put k': not an operation"),
        ("put k v w", "not an operation"),
        ("put k v ttl soon", "line 1, 'put k v ttl soon'"),
        ("\nincrement k", "line 2, 'increment k'"),
        ("if k value ~ 5", "not a comparison"),
        ("if k version = five", "line 1"),
        ("if k", "not a comparison"),
        ("put k v\nif k exists", "comparisons come before"),
        ("else\nelse", "not an operation"),
        ("put k 'v", "line 1"),
    ],
)
def test_a_line_that_means_nothing_is_named(text: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(text)
    assert words in refused.value.message


@pytest.mark.parametrize(
    ("asked", "reads"),
    [
        (parse("if k exists\nget a\nelse\nget b"), True),
        (parse("get a\nput b v"), False),
        (parse("get a\nelse\ndelete b"), False),
        ({"success": [{"op": "get", "key": "a"}]}, True),
        ({"compare": [{"key": "a", "target": "exists", "op": "=", "operand": True}]}, True),
        ({"success": 1}, False),
        ({"success": [1]}, False),
        ([], False),
    ],
)
def test_what_only_reads_goes_without_a_key(asked: Any, reads: bool) -> None:
    """Under a key it could not read more than what is remembered."""
    assert only_reads(asked) is reads
