"""Lists that grow by transactions: what a client asks, what it is told, what that says of each key.

A list is the value of a key: its elements with a space between them. Who appends compares the
revision for which it knows the elements, puts all of them and one more, and has the answer show
what is there then, whichever branch it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tests.linearizability.checker import FOREVER, Operation

Version = tuple[int, tuple[str, ...]]  # mod_revision and elements
NO_LIST: Version = (0, ())


@dataclass(frozen=True, slots=True)
class ListTxn:
    """A transaction on lists. Times are time.monotonic().

    Attributes:
        asked: the keys that it reads in either branch.
        appended: the new element by key; empty for one that only reads.
        base: by key, what it was appended to, and so what was compared.
        returned: FOREVER while its outcome is unknown.
        succeeded: did it happen? None: unknown. False also when it was refused with the outcome
            "none".
        found: by key, what its answer shows; empty without one.
    """

    client: int
    called: float
    asked: Sequence[str]
    appended: Mapping[str, str] = field(default_factory=dict)
    base: Mapping[str, Version] = field(default_factory=dict)
    returned: float = FOREVER
    succeeded: bool | None = None
    found: Mapping[str, Version] = field(default_factory=dict)

    def put(self, key: str) -> tuple[str, ...]:
        """What it makes of a list."""
        return (*self.base[key][1], self.appended[key])

    def request(self) -> bytes:
        """The body that asks for it."""
        gets = [{"op": "get", "key": key} for key in self.asked]
        puts = [{"op": "put", "key": key, "value": text(self.put(key))} for key in self.appended]
        compare = [_unchanged(key, self.base[key][0]) for key in self.appended]
        body = {"compare": compare, "success": puts + gets, "failure": gets}
        return json.dumps(body).encode()

    def answered(self, returned: float, answer: Mapping[str, Any]) -> ListTxn:
        items = [result["item"] for result in answer["results"] if result["op"] == "get"]
        found = {
            key: (item["mod_revision"], elements(item["value"])) if item else NO_LIST
            for key, item in zip(self.asked, items, strict=True)
        }
        return replace(self, returned=returned, succeeded=answer["succeeded"], found=found)

    def refused(self, returned: float) -> ListTxn:
        """With the outcome "none"."""
        return replace(self, returned=returned, succeeded=False)

    def operations(self) -> Iterator[tuple[str, Operation]]:
        """What it was to each key by itself: a swap if it happened or may have, else a read."""
        for key in self.asked:
            revision, held = self.found.get(key, NO_LIST)
            if key in self.appended and self.succeeded is not False:
                name, argument = "cas", (self.base[key][0] or None, text(self.put(key)))
                result: object = revision if self.found else None
            elif self.found:
                name, argument, result = "read", None, (revision, text(held) if revision else None)
            else:
                continue
            yield key, Operation(self.client, self.called, self.returned, name, argument, result)


def _unchanged(key: str, revision: int) -> dict[str, object]:
    if revision:
        return {"key": key, "target": "mod_revision", "op": "=", "operand": revision}
    return {"key": key, "target": "exists", "op": "=", "operand": False}


def text(held: Sequence[str]) -> str:
    return " ".join(held)


def elements(value: str | None) -> tuple[str, ...]:
    return tuple((value or "").split())
