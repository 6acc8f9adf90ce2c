"""`dengine txn`: a transaction from standard input, as JSON or in lines that people can write."""

from __future__ import annotations

import json
import os
import shlex
from argparse import Namespace
from typing import Any

from dengine.cli.commands import item_bytes, print_json, print_table, printable, write_key
from dengine.cli.remote import Remote
from dengine.cli.streams import read_input
from dengine.client.encoding import sent_bytes
from dengine.errors import InvalidRequest

RELATIONS = ("=", "!=", "<", "<=", ">", ">=")
TARGETS = ("value", "version", "mod_revision")
EXAMPLES = """\
  dengine txn <<'END'
  if accounts/a value = 5
  if accounts/b exists
  put accounts/a 3
  put accounts/b 2
  else
  get accounts/a
  END
  dengine txn --json < transaction.json

Lines: if KEY exists|absent, if KEY value|version|mod_revision =|!=|<|<=|>|>= OPERAND; then put KEY
VALUE, put KEY VALUE ttl SECONDS, put KEY VALUE lease ID, get KEY, delete KEY, delete-prefix PREFIX,
delete-range START END; those after a line "else" are for the case that not all comparisons hold.
Quotes as in a shell, but within a line; # begins a comment. Of a key that does not exist no
comparison of the value holds. All happens as one change, or nothing; either branch ends with 0.
Input that begins with { is the JSON of POST /v1/txn.
What is read has at most 64 KiB, and 4 MiB where all that is done is get.
"""


def txn(args: Namespace, remote: Remote) -> int:
    """Send the transaction on standard input and print what became of it."""
    text = read_input().decode("utf-8", "surrogateescape")
    if text.lstrip().startswith("{"):
        try:
            asked = json.loads(text)
        except ValueError as error:
            raise InvalidRequest(f"standard input is no JSON: {error}") from None
    else:
        asked = parse(text)
    if args.idempotency_key is None and only_reads(asked):
        reply = remote.json("POST", "/v1/txn", asked, kind="read")
    else:
        reply = remote.json("POST", "/v1/txn", asked, key=write_key(args))
    if args.json:
        print_json(reply)
        return 0
    print(f"{'succeeded' if reply['succeeded'] else 'else'}, revision {reply['revision']}")
    if reply["results"]:
        done = asked.get("success" if reply["succeeded"] else "failure", [])
        rows = [_row(o, r) for o, r in zip(done, reply["results"], strict=True)]
        print_table(("OPERATION", "KEY", "RESULT"), rows)
    return 0


def only_reads(asked: Any) -> bool:
    """Does it change nothing? Then it is sent again without a key, under which what it reads would
    have to be remembered. What is no transaction is left to the node, which says what is wrong.
    """
    if not isinstance(asked, dict):
        return False
    branches = [asked.get("success", []), asked.get("failure", [])]
    return all(
        isinstance(branch, list)
        and all(isinstance(o, dict) and o.get("op") == "get" for o in branch)
        for branch in branches
    )


def parse(text: str) -> dict[str, Any]:
    """The JSON of `POST /v1/txn` from lines. Raises InvalidRequest, which names the line."""
    asked: dict[str, list[dict[str, Any]]] = {"compare": [], "success": [], "failure": []}
    branch = "success"
    for number, line in enumerate(text.split("\n"), 1):
        try:
            words = shlex.split(_without_comment(line))
            if words == ["else"] and branch == "success":
                branch = "failure"
            elif words and words[0] == "if":
                if branch == "failure" or asked["success"]:
                    raise ValueError("comparisons come before the operations")
                asked["compare"].append(_comparison(words))
            elif words:
                asked[branch].append(_operation(words))
        except ValueError as error:
            raise InvalidRequest(f"line {number}, {line.strip()!r}: {error}") from None
    return asked


def _without_comment(line: str) -> str:
    """As in a shell, # begins a comment at the start of a word only, and not within quotes."""
    quote, escaped, starts = "", False, True
    for place, character in enumerate(line):
        if starts and character == "#":
            return line[:place]
        starts = character.isspace() and not quote and not escaped
        if escaped:
            escaped = False
        elif character == "\\" and quote != "'":
            escaped = True
        elif quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
    return line


def _comparison(words: list[str]) -> dict[str, Any]:
    match words:
        case ["if", key, "exists" | "absent" as state]:
            shown = {"target": "exists", "op": "=", "operand": state == "exists"}
            return {**_bytes("key", key), **shown}
        case ["if", key, target, relation, operand] if target in TARGETS and relation in RELATIONS:
            compared = {**_bytes("key", key), "target": target, "op": relation}
            if target == "value":
                return {**compared, **_bytes("operand", operand)}
            return {**compared, "operand": int(operand)}
    raise ValueError("not a comparison: if KEY exists, if KEY absent, if KEY value = OPERAND")


def _operation(words: list[str]) -> dict[str, Any]:
    match words:
        case ["put", key, value]:
            return {"op": "put", **_bytes("key", key), **_bytes("value", value)}
        case ["put", key, value, "ttl", seconds]:
            return _operation(["put", key, value]) | {"ttl": int(seconds)}
        case ["put", key, value, "lease", lease]:
            return _operation(["put", key, value]) | {"lease": lease}
        case ["get" | "delete" as op, key]:
            return {"op": op, **_bytes("key", key)}
        case ["delete-prefix", prefix]:
            return {"op": "delete_range", **_bytes("prefix", prefix)}
        case ["delete-range", start, end]:
            return {"op": "delete_range", **_bytes("start", start), **_bytes("end", end)}
    raise ValueError(
        "not an operation: put KEY VALUE, put KEY VALUE ttl SECONDS, put KEY VALUE lease ID, "
        "get KEY, delete KEY, delete-prefix PREFIX, delete-range START END, else"
    )


def _bytes(name: str, text: str) -> dict[str, str]:
    return sent_bytes(name, os.fsencode(text))


def _row(operation: dict[str, Any], result: dict[str, Any]) -> tuple[str, str, str]:
    names = ("prefix", "start") if operation["op"] == "delete_range" else ("key",)
    shown = printable(next(filter(None, (item_bytes(operation, name) for name in names)), b""))
    match result:
        case {"created": created}:
            return "put", shown, "created" if created else "replaced"
        case {"deleted": count}:
            return operation["op"].replace("_", "-"), shown, f"{count} deleted"
    item = result["item"]
    return "get", shown, "not there" if item is None else printable(item_bytes(item, "value"))
