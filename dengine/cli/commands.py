"""The client commands: each takes its parsed arguments and a `Remote`, prints, returns exit code.

People get tables and sentences on stdout, programs get JSON from `--json`, and a value goes out as
the bytes that were stored. Failures are `DengineError`s, which `main` turns into one sentence.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dengine.cli.remote import Remote
from dengine.cli.streams import read_input
from dengine.client.attempts import IdempotencyKeys, Key
from dengine.client.encoding import Paging, field_bytes, json_bytes, key_target, target
from dengine.errors import DengineError, InvalidRequest, KeyNotFound

SHOWN_VALUE_CHARACTERS = 60
USAGE = 2


def get(args: Namespace, remote: Remote) -> int:
    """Write the value's bytes to stdout; `--json` adds key, revision and remaining TTL."""
    key = os.fsencode(args.key)
    try:
        reply = remote.call("GET", key_target(key, consistency=args.consistency))
    except KeyNotFound:
        raise KeyNotFound(f"there is no key {printable(key)!r}") from None
    if args.json:
        revision = int(reply.headers.get("ETag", "0").strip('"'))
        named = {**json_bytes("key", key), **json_bytes("value", reply.body)}
        ttl = reply.headers.get("Dengine-TTL")
        print_json({**named, "mod_revision": revision, "ttl": None if ttl is None else int(ttl)})
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(reply.body)
        sys.stdout.buffer.flush()
    return 0


def put(args: Namespace, remote: Remote) -> int:
    """Store VALUE, standard input (VALUE is "-") or a file."""
    if args.file is not None:
        value = args.file.read_bytes()
    elif args.value == "-":
        value = read_input()
    else:
        value = os.fsencode(args.value)
    ttl = None if args.ttl is None else str(args.ttl)
    where = key_target(os.fsencode(args.key), ttl=ttl, lease=args.lease)
    reply = remote.call("PUT", where, value, _conditions(args), key=write_key(args)).json()
    print(f"revision {reply['revision']} ({'created' if reply['created'] else 'replaced'})")
    return 0


def delete(args: Namespace, remote: Remote) -> int:
    """Delete one key, or with `--prefix` or `--start/--end` a range of them."""
    if args.prefix == "" and not args.all:
        return _usage("an empty prefix deletes every key: --all allows that")
    if args.end is not None and args.start is None:
        return _usage("--end goes with --start: it is where that range ends")
    if args.all and args.prefix is None and args.start is None:
        return _usage("--all goes with --prefix or --start")
    if args.key is not None:
        where, headers = key_target(os.fsencode(args.key)), _conditions(args)
    else:
        where = target("/v1/kv", **_selection(args), all="true" if args.all else None)
        headers = _conditions(args)  # the node refuses them here: better than deleting anyway
    reply = remote.call("DELETE", where, headers=headers, key=write_key(args)).json()
    count = reply["deleted"]
    print(f"revision {reply['revision']} ({count} {'key' if count == 1 else 'keys'} deleted)")
    return 0


def _usage(message: str) -> int:
    print(f"dengine: {message}", file=sys.stderr)
    return USAGE


def list_keys(args: Namespace, remote: Remote) -> int:
    """Print the keys of a range in order, page after page."""
    if args.count:
        where = target(
            "/v1/kv", **_selection(args), count_only="true", consistency=args.consistency
        )
        reply = remote.call("GET", where).json()
        if args.json:
            print_json(reply)
        else:
            print(reply["count"])
        return 0
    if args.json:
        _print_json_pages(_pages(args, remote))
        return 0
    heads = ("KEY", "REVISION", "VERSION", "TTL", "VALUE")
    table = Table(heads, (False, True, True, True, False))
    for page in _pages(args, remote):  # as many as there are, and none of them kept
        if args.keys_only:
            sys.stdout.write(_lines(printable(item_bytes(item, "key")) for item in page["items"]))
        else:
            sys.stdout.write(table.part([_listed(item) for item in page["items"]]))
    return 0


def _listed(item: dict[str, Any]) -> tuple[object, ...]:
    """A key as the table of a listing has it."""
    value = shortened(printable(item_bytes(item, "value")))
    ttl_s = "" if item.get("ttl") is None else item["ttl"]
    return printable(item_bytes(item, "key")), item["mod_revision"], item["version"], ttl_s, value


def _print_json_pages(pages: Iterator[dict[str, Any]]) -> None:
    """One object as for a single page, written while they come: what is known of the last page
    only follows the items. Nothing of it is there before the first page is.
    """
    count = 0
    last: dict[str, Any] = {}
    for page in pages:
        parts = [] if last else ['{\n  "items": [']
        for item in page.pop("items"):
            text = json.dumps(item, ensure_ascii=False, indent=2).replace("\n", "\n    ")
            parts.append(f"{',' if count else ''}\n    {text}")
            count += 1
        sys.stdout.write("".join(parts))
        last = page
    parts = ["\n  ]" if count else "]"]
    for name, value in {**last, "count": count}.items():
        parts.append(f",\n  {json.dumps(name)}: {json.dumps(value)}")
    sys.stdout.write("".join((*parts, "\n}\n")))


def _pages(args: Namespace, remote: Remote) -> Iterator[dict[str, Any]]:
    """The pages of a listing, until its end or until `--limit` items came."""
    paging = Paging(args.limit)
    while not paging.over:
        where = target(
            "/v1/kv",
            **_selection(args),
            after=paging.after,
            limit=paging.limit,
            keys_only="true" if args.keys_only else None,
            consistency=args.consistency,
        )
        try:
            page = remote.call("GET", where).json()
        except InvalidRequest as error:
            if not paging.take_less(error):
                raise
            continue
        paging.took(len(page["items"]), page["next"])
        yield page


def status(args: Namespace, remote: Remote) -> int:
    """One line per endpoint; fails only when none of them answers."""
    answers: list[dict[str, Any]] = []
    for endpoint in remote.endpoints:
        try:
            answers.append(
                {"endpoint": endpoint, **remote.only(endpoint).json("GET", "/v1/status")}
            )
        except DengineError as error:
            answers.append({"endpoint": endpoint, "problem": error.message})
    if args.json:
        print_json(answers)
    else:
        columns = ("role", "term", "leader", "commit_index", "last_applied", "revision")
        rows = [
            (
                answer["endpoint"],
                answer.get("node_id"),
                *(_cell(answer.get(name)) for name in columns),
                answer.get("problem", ""),
            )
            for answer in answers
        ]
        heads = ("ENDPOINT", "NODE", "ROLE", "TERM", "LEADER", "COMMIT", "APPLIED", "REVISION", "")
        print_table(heads, rows)
    return 0 if any("problem" not in answer for answer in answers) else 1


def members(args: Namespace, remote: Remote) -> int:
    """The membership as the leader sees it, and what it can survive."""
    cluster = remote.json("GET", "/v1/cluster")
    if args.json:
        print_json(cluster)
        return 0
    columns = ("id", "address", "zone", "role", "status", "match", "lag", "ready", "reason")
    rows = [[_cell(member.get(name)) for name in columns] for member in cluster["members"]]
    print_table([name.upper() for name in columns], rows)
    print()
    names = ("cluster_id", "leader", "term", "revision", "joint", "fault_tolerance", "advice")
    for name in names:
        if cluster.get(name) not in (None, ""):
            print(f"{name.replace('_', ' '):16} {_cell(cluster[name])}")
    return 0


def settings(args: Namespace, remote: Remote) -> int:
    """Show the replicated settings, or change those given as NAME=VALUE."""
    if args.changes:
        body = {name: int(v) if v.isdecimal() else v for name, v in args.changes}
        remote.json("PUT", "/v1/cluster/settings", body)
    current = remote.json("GET", "/v1/cluster")["settings"]
    if args.json:
        print_json(current)
    else:
        print_table(("SETTING", "VALUE"), list(current.items()))
    return 0


def promote(args: Namespace, remote: Remote) -> int:
    """Print who was promoted: a node that votes already is nothing to do."""
    answer = remote.json("POST", "/v1/cluster/promote", {"ids": args.ids})
    promoted, voters = (", ".join(map(str, answer[name])) for name in ("promoted", "voters"))
    done = f"promoted {promoted}" if promoted else "nothing to promote"
    print(f"{done}; the voters are {voters}")
    return 0


def remove(args: Namespace, remote: Remote) -> int:
    remote.json("DELETE", f"/v1/cluster/members/{args.id}")
    print(f"removed node {args.id}: this id is never used again")
    return 0


def move(args: Namespace, remote: Remote) -> int:
    remote.json("PUT", f"/v1/cluster/members/{args.id}", {"address": args.address})
    print(f"node {args.id} is now dialled at {args.address}")
    return 0


def transfer_leader(args: Namespace, remote: Remote) -> int:
    remote.json("POST", "/v1/cluster/leader", {"id": args.id})
    print(f"node {args.id} leads")
    return 0


def _conditions(args: Namespace) -> dict[str, str]:
    headers = {}
    if args.if_match is not None:
        headers["If-Match"] = "*" if args.if_match == "*" else f'"{args.if_match}"'
    if getattr(args, "if_none_match", False):
        headers["If-None-Match"] = "*"
    return headers


def write_key(args: Namespace) -> Key:
    """The Idempotency-Key of a write: the one that was given, else a new one."""
    given: str | None = args.idempotency_key
    return IdempotencyKeys().take() if given is None else Key(given)


def _selection(args: Namespace) -> dict[str, bytes]:
    """The query fields that choose a range of keys."""
    names = ("prefix", "start", "end")
    return {name: os.fsencode(v) for name in names if (v := getattr(args, name)) is not None}


def item_bytes(item: dict[str, Any], name: str) -> bytes:
    """A key or value of a JSON answer; b"" where it is left out."""
    return field_bytes(item, name) or b""


def printable(data: bytes) -> str:
    """What a terminal may safely show of any bytes."""
    text = data.decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN_VALUE_CHARACTERS else text[: SHOWN_VALUE_CHARACTERS - 1] + "…"


def _cell(value: object) -> str:
    """A JSON value in a table; the leader may come as {"id", "address"}."""
    if isinstance(value, dict):
        return str(value.get("id", "-"))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None or value == "" else str(value)


def print_json(value: Any) -> None:
    """What `--json` prints."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def print_json_line(value: Any) -> None:
    """An object of a stream that programs read."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


class Table:
    """A table that is made in parts. Its columns are as wide as their widest cell so far.

    Args:
        right: which columns are set to the right, as numbers are.
    """

    def __init__(self, heads: Sequence[str], right: Sequence[bool]) -> None:
        self._begin = [[*heads]]
        self._widths = [len(head) for head in heads]
        self._right = right

    def part(self, rows: Sequence[Sequence[object]]) -> str:
        """The lines of the next rows, behind the heads if they are the first."""
        cells, self._begin = [*self._begin, *_cells(rows)], []
        for row in cells:
            self._widths = [max(w, len(text)) for w, text in zip(self._widths, row, strict=True)]
        return _lines(map(self._line, cells))

    def _line(self, row: Sequence[str]) -> str:
        parts = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, self._widths, self._right, strict=True)
        ]
        return "  ".join(parts).rstrip()


def print_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as their widest cell, numbers to the right."""
    cells = _cells(rows)
    columns = [[row[n] for row in cells if row[n] != "-"] for n in range(len(heads))]
    right = [bool(column) and all(map(str.isdigit, column)) for column in columns]
    sys.stdout.write(Table(heads, right).part(rows))


def _cells(rows: Sequence[Sequence[object]]) -> list[list[str]]:
    """Those of a table as text."""
    return [[_cell(value) if value != "" else "" for value in row] for row in rows]


def _lines(texts: Iterable[str]) -> str:
    """For one write: printed one by one, each line is a write of its own, also into a pipe."""
    return "".join(f"{text}\n" for text in texts)
