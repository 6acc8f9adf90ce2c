"""What a client of keys that come and go notes is what it was told: of a node that is right nothing
is found, and of one that is wrong much.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.nemesis.client import Caller
from tests.nemesis.range_verdicts import ranges_whole
from tests.nemesis.ranges import RANGE_END, RangeClient
from tests.nemesis.test_workers import Handler, answered, node, run
from tests.nemesis.workload import Records

Items = dict[str, tuple[int, str]]  # revision and value by key


class Store:
    """What a node does that is right; every fifth answer is lost, and some say that nothing
    happened."""

    def __init__(self, shown: Callable[[Items, Items], Items]) -> None:
        self._shown = shown  # of a list: what it shows of what is there, and was before
        self._rng = random.Random(7)
        self._revision = self._made = 0
        self._items: Items = {}
        self._before: Items = {}

    def answer(self, line: str, headers: dict[str, str]) -> Iterator[bytes]:
        dice = self._rng.random()
        method, target, _ = line.split()
        self._made += method == "PUT"
        if dice < 0.1:
            yield answered(503, '{"outcome":"none"}')
            return
        reply = self._reply(method, target, headers)
        if dice < 0.8:
            yield reply

    def _reply(self, method: str, target: str, headers: dict[str, str]) -> bytes:
        parts = urlsplit(target)
        query, key = parse_qs(parts.query), parts.path.removeprefix("/v1/kv").removeprefix("/")
        start, end = key, key + "\0"
        if not key:
            start, end = query.get("start", ["d/"])[0], query.get("end", [RANGE_END])[0]
        there = {k: seen for k, seen in sorted(self._items.items()) if start <= k < end}
        found = there.get(key, (0, ""))
        if method == "GET" and key:
            return self._value(*found)
        if method == "GET":
            before = {k: seen for k, seen in sorted(self._before.items()) if start <= k < end}
            return self._page(self._shown(there, before), int(query["limit"][0]))
        expected = "0" if "If-None-Match" in headers else headers.get("If-Match", str(found[0]))
        if expected.strip('"') != str(found[0]):
            return answered(412, json.dumps({"current_revision": found[0] or None}))
        if there or method == "PUT":
            self._revision += 1
            self._before = dict(self._items)
        for other in there:
            del self._items[other]
        if method == "PUT":
            self._items[key] = (self._revision, f"300.{self._made}")
        return answered(200, json.dumps({"revision": self._revision, "deleted": len(there)}))

    def _value(self, revision: int, value: str) -> bytes:
        if not revision:
            return answered(404, "{}")
        head = f'HTTP/1.1 200 X\r\nETag: "{revision}"\r\nDengine-Revision: {self._revision}\r\n'
        return f"{head}Connection: close\r\nContent-Length: {len(value)}\r\n\r\n{value}".encode()

    def _page(self, items: Items, limit: int) -> bytes:
        rows = [
            {"key": key, "mod_revision": revision, "value": value}
            for key, (revision, value) in items.items()
        ]
        token = "more" if len(rows) > limit else None
        return answered(
            200, json.dumps({"revision": self._revision, "items": rows[:limit], "next": token})
        )


def asked(monkeypatch: pytest.MonkeyPatch, answer: Handler) -> Records:
    """What one client has noted after some hundred requests."""
    records = Records()

    async def ask() -> None:
        caller = Caller(random.Random(5), records, lambda node_id: False)
        client = RangeClient(caller, 300, records.ranged, records.refused)
        async with node(monkeypatch, answer):
            for _ in range(400):
                await client.once(1)
                await asyncio.sleep(0)
            client.close()

    run(ask)
    return records


def test_a_node_that_is_right_is_not_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though answers are lost; and there is much that it might have been wrong about."""
    records = asked(monkeypatch, Store(lambda there, before: there).answer)
    assert ranges_whole(records) == []
    assert records.surprises == []
    deletions = [change for change in records.ranged.changes if change.deleted]
    assert any(change.expected for change in deletions)
    assert any(change.deleted > 1 for change in deletions)
    assert any(change.expected and change.value for change in records.ranged.changes)
    assert any(not change.revision for change in records.ranged.changes)
    assert records.besides["linearizable lists"] > 20
    assert records.refused


def lacks_one(there: Items, before: Items) -> Items:
    return dict([*there.items()][1:])


def is_old(there: Items, before: Items) -> Items:
    return before


def is_torn(there: Items, before: Items) -> Items:
    """Of what was changed last something shows, and something does not."""
    return {**there, **{key: seen for key, seen in before.items() if key not in there}}


@pytest.mark.parametrize("shown", [lacks_one, is_old, is_torn])
def test_a_node_whose_lists_are_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch, shown: Callable[[Items, Items], Items]
) -> None:
    assert ranges_whole(asked(monkeypatch, Store(shown).answer))
