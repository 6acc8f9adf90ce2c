"""The state of a cluster as clients know it, in a dictionary: what the fake nodes of
fake_server.py share. Nothing here knows the client.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote_to_bytes

from dengine.errors import (
    Compacted,
    DengineError,
    IdempotencyMismatch,
    InvalidRequest,
    KeyNotFound,
    NotFound,
    PreconditionFailed,
    RateLimited,
    StaleRequest,
    TooLarge,
)

RESULTS_OF_A_CLIENT = 1000
CLIENTS = 10_000
SINGLE_KEYS = 100_000


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """One request as it came in."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, bytes]:
        pairs = (pair.partition("=") for pair in self.target.partition("?")[2].split("&") if pair)
        return {name: unquote_to_bytes(value) for name, _, value in pairs}


@dataclass(frozen=True)
class Record:
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    expires: float | None = None
    lease: str | None = None


@dataclass
class Granted:
    ttl_s: int
    ends: float


@dataclass(frozen=True)
class Happened:
    type: str
    key: bytes
    value: bytes | None
    prev: bytes | None


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    body = json.dumps(value).encode()
    return Answer(status, body, {"Content-Type": "application/json", **headers})


def named(name: str, data: bytes) -> dict[str, str]:
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode()}


def given(fields: Mapping[str, Any], name: str) -> bytes | None:
    if f"{name}_base64" in fields:
        return base64.b64decode(fields[f"{name}_base64"])
    return None if name not in fields else str(fields[name]).encode()


class State:
    """Keys, leases, history and results. `clock` gives seconds; nothing expires but in `tick`."""

    def __init__(self, clock: Callable[[], float], page: int = 1000) -> None:
        self.clock = clock
        self.page = page
        self.revision = 0
        self.keys: dict[bytes, Record] = {}
        self.leases: dict[str, Granted] = {}
        self.keys_at_once: int | None = None  # more than these of a revoked lease wait for `end`
        self.ending: dict[str, list[bytes]] = {}
        self.history: dict[int, list[Happened]] = {}
        self.compact_revision = 1  # the first that is kept
        self.executed = 0  # writes that were carried out, replays not counted
        self.on_change: list[Callable[[], None]] = []
        self._single: dict[str, tuple[bytes, Answer]] = {}
        self._clients: dict[str, dict[int, tuple[bytes, Answer]]] = {}
        self._lease_number = 0

    @property
    def clients(self) -> int:
        return len(self._clients)

    # --- time -------------------------------------------------------------------------------------

    def next_due(self) -> float | None:
        due = [r.expires for r in self.keys.values() if r.expires is not None]
        return min([*due, *(lease.ends for lease in self.leases.values())], default=None)

    def tick(self) -> None:
        """Expire what is due, all keys of it at one revision."""
        now = self.clock()
        ended = {name for name, lease in self.leases.items() if lease.ends <= now}
        gone = [
            key
            for key, r in self.keys.items()
            if (r.expires is not None and r.expires <= now) or r.lease in ended
        ]
        for name in ended:
            del self.leases[name]
        if gone:
            events = [Happened("expire", k, None, self.keys.pop(k).value) for k in sorted(gone)]
            self._commit(events)

    def _commit(self, events: list[Happened]) -> None:
        self.revision += 1
        self.history[self.revision] = events
        for call in list(self.on_change):
            call()

    def compact(self, revision: int) -> None:
        """Forget what happened before `revision`."""
        self.compact_revision = revision
        self.history = {r: e for r, e in self.history.items() if r >= revision}

    def changes(self, first: int, chosen: Callable[[bytes], bool]) -> Iterator[tuple[int, Any]]:
        """Raises Compacted."""
        if first < self.compact_revision:
            raise Compacted(
                f"revision {first} is no longer kept", compact_revision=self.compact_revision - 1
            )
        for revision in range(first, self.revision + 1):
            events = [e for e in self.history.get(revision, []) if chosen(e.key)]
            if events:
                yield revision, events

    # --- requests ---------------------------------------------------------------------------------

    def execute(self, asked: Asked) -> Answer:
        """The answer to anything but a watch. Raises DengineError."""
        self.tick()
        if asked.method in ("GET", "HEAD"):
            return self._read(asked)
        key = asked.headers.get("Idempotency-Key")
        return self._write(asked) if key is None else self._once(key, asked)

    def _once(self, key: str, asked: Asked) -> Answer:
        relevant = [asked.headers.get(name, "") for name in ("If-Match", "If-None-Match")]
        parts = [asked.method, asked.target, *relevant, hashlib.sha256(asked.body).hexdigest()]
        fingerprint = hashlib.sha256("\n".join(parts).encode()).digest()
        numbered = re.fullmatch(r"([^:]+):([1-9][0-9]*)", key)
        if numbered is None:
            results, number = self._single, key
            if key not in results and len(results) >= SINGLE_KEYS:
                raise RateLimited("too many idempotency keys", full="keys")
        else:
            client, number = numbered[1], int(numbered[2])
            if client not in self._clients and len(self._clients) >= CLIENTS:
                raise RateLimited("too many clients", full="clients")
            results = self._clients.setdefault(client, {})
            if number not in results and results and number <= max(results) - RESULTS_OF_A_CLIENT:
                raise StaleRequest("the result of this number is no longer kept")
        if number in results:
            before, answer = results[number]
            if before != fingerprint:
                raise IdempotencyMismatch("this key was used for another request")
            return answer
        try:
            answer = self._write(asked)
        except (PreconditionFailed, NotFound) as error:
            answer = as_json(error.to_dict(), error.status)
        results[number] = fingerprint, answer
        while numbered is not None and len(results) > RESULTS_OF_A_CLIENT:
            del results[min(results)]
        return answer

    def _write(self, asked: Asked) -> Answer:
        if asked.path.startswith("/v1/leases"):
            return self._lease_call(asked)
        if asked.path == "/v1/txn":
            return self._txn(json.loads(asked.body))
        if asked.path != "/v1/kv" and not asked.path.startswith("/v1/kv/"):
            raise NotFound("nothing is served under this path")
        if asked.method == "DELETE" and asked.path == "/v1/kv" and "key_base64" not in asked.query:
            return self._delete_range(asked)
        key = self._key(asked)
        self._check(asked, key)
        self.executed += 1
        if asked.method == "DELETE":
            deleted = self._change({key: None} if key in self.keys else {})
            return as_json({"revision": self.revision, "deleted": deleted})
        created = key not in self.keys
        self._change({key: self._record(asked.body, asked.query)})
        answer = {"revision": self.revision, "created": created}
        return as_json(answer, ETag=f'"{self.revision}"')

    def _key(self, asked: Asked) -> bytes:
        if "key_base64" in asked.query:
            return base64.b64decode(asked.query["key_base64"])
        key = unquote_to_bytes(asked.path.removeprefix("/v1/kv/"))
        if not key:
            raise InvalidRequest("the key is empty")
        if len(key) > 511:
            raise TooLarge("the key is too long")
        return key

    def _record(self, value: bytes, options: Mapping[str, Any]) -> Record:
        """A record whose revisions `_change` fills in."""
        ttl, lease = options.get("ttl"), options.get("lease")
        lease = lease.decode() if isinstance(lease, bytes) else lease
        if lease is not None and lease not in self.leases:
            raise NotFound(f"there is no lease {lease}")
        return Record(value, 0, 0, 0, None if ttl is None else self.clock() + int(ttl), lease)

    def _check(self, asked: Asked, key: bytes) -> None:
        held = self.keys.get(key)
        current = None if held is None else held.mod_revision
        wanted = asked.headers.get("If-Match")
        if wanted is not None:
            listed = [int(text) for text in re.findall(r'"([0-9]+)"', wanted)]
            if held is None or (wanted != "*" and current not in listed):
                raise PreconditionFailed("the condition does not hold", current_revision=current)
        if asked.headers.get("If-None-Match") == "*" and held is not None:
            raise PreconditionFailed("the key exists", current_revision=current)

    def _change(self, changes: Mapping[bytes, Record | None]) -> int:
        """Carry out `changes` at one revision; how many keys were deleted."""
        events, deleted = [], 0
        for key, record in changes.items():
            before = self.keys.get(key)
            prev = None if before is None else before.value
            if record is None:
                if before is not None:
                    del self.keys[key]
                    deleted += 1
                    events.append(Happened("delete", key, None, prev))
                continue
            revision = self.revision + 1
            created = revision if before is None else before.create_revision
            version = 1 if before is None else before.version + 1
            self.keys[key] = replace(
                record, create_revision=created, mod_revision=revision, version=version
            )
            events.append(Happened("put", key, record.value, prev))
        if events:
            self._commit(events)
        return deleted

    def _selected(self, fields: Mapping[str, bytes | None]) -> list[bytes]:
        prefix, start, end = (fields.get(name) for name in ("prefix", "start", "end"))
        return sorted(
            key
            for key in self.keys
            if key.startswith(prefix or b"") and key >= (start or b"") and (not end or key < end)
        )

    def _delete_range(self, asked: Asked) -> Answer:
        chosen = any(asked.query.get(name) for name in ("prefix", "start", "end"))
        if not chosen and asked.query.get("all") != b"true":
            raise InvalidRequest("this would delete every key")
        self.executed += 1
        deleted = self._change(dict.fromkeys(self._selected(asked.query)))
        return as_json({"revision": self.revision, "deleted": deleted})

    # --- transactions -----------------------------------------------------------------------------

    def _txn(self, asked: dict[str, Any]) -> Answer:
        succeeded = all(self._holds(compare) for compare in asked["compare"])
        self.executed += 1
        kept, revision, calls = dict(self.keys), self.revision, self.on_change
        self.on_change = []  # nobody sees a transaction half done
        results, last = [], {}
        try:
            for operation in asked["success" if succeeded else "failure"]:
                results.append(self._operate(operation, revision + 1, last))
        except DengineError:
            self.keys = kept
            raise
        finally:
            self.on_change = calls
        if last:
            events = [
                Happened(
                    "delete" if record is None else "put",
                    key,
                    None if record is None else record.value,
                    kept[key].value if key in kept else None,
                )
                for key, record in last.items()
                if record is not None or key in kept
            ]
            if events:
                self._commit(events)
        answer = {"revision": self.revision, "succeeded": succeeded, "results": results}
        return as_json(answer)

    def _operate(self, operation: dict[str, Any], revision: int, last: dict[bytes, Any]) -> Any:
        kind = operation["op"]
        if kind == "delete_range":
            chosen = {name: given(operation, name) for name in ("prefix", "start", "end")}
            gone = self._selected(chosen)
            for key in gone:
                del self.keys[key]
                last[key] = None
            return {"op": kind, "deleted": len(gone)}
        key = given(operation, "key")
        assert key
        held = self.keys.get(key)
        if kind == "get":
            return {"op": "get", "item": None if held is None else self._row(key, held, False)}
        if kind == "delete":
            if held is not None:
                del self.keys[key]
                last[key] = None
            return {"op": "delete", "deleted": int(held is not None)}
        record = self._record(given(operation, "value") or b"", operation)
        self.keys[key] = last[key] = replace(
            record,
            create_revision=revision if held is None else held.create_revision,
            mod_revision=revision,
            version=1 if held is None else held.version + 1,
        )
        return {"op": "put", "created": held is None}

    def _holds(self, compare: dict[str, Any]) -> bool:
        key = given(compare, "key")
        assert key
        held = self.keys.get(key)
        target = compare["target"]
        seen: Any
        if target == "exists":
            seen = held is not None
        elif target == "value":
            seen = None if held is None else held.value
        else:
            seen = 0 if held is None else getattr(held, target)
        wanted = given(compare, "operand") if target == "value" else compare["operand"]
        if seen is None:
            return bool(compare["op"] == "!=")
        return {
            "=": seen == wanted, "!=": seen != wanted, "<": seen < wanted, "<=": seen <= wanted,
            ">": seen > wanted, ">=": seen >= wanted,
        }[compare["op"]]  # fmt: skip

    # --- leases -----------------------------------------------------------------------------------

    def _lease_call(self, asked: Asked) -> Answer:
        name, _, what = asked.path.removeprefix("/v1/leases").strip("/").partition("/")
        self.executed += 1
        if not name:
            ttl_s = int(json.loads(asked.body)["ttl"])
            self._lease_number += 1
            name = f"{self._lease_number:016x}"
            self.leases[name] = Granted(ttl_s, self.clock() + ttl_s)
            return as_json({"id": name, "ttl": ttl_s})
        lease = self._lease(name)
        if asked.method == "DELETE":
            del self.leases[name]
            gone = sorted(key for key, record in self.keys.items() if record.lease == name)
            now, later = gone[: self.keys_at_once], gone[len(gone[: self.keys_at_once]) :]
            deleted = self._change(dict.fromkeys(now))
            if later:
                self.ending[name] = later
            answer = {"revision": self.revision, "deleted": deleted, "going": bool(later)}
            return as_json(answer)
        assert what == "keepalive", asked.target
        lease.ends = self.clock() + lease.ttl_s
        return as_json({"id": name, "ttl": lease.ttl_s})

    def end(self) -> None:
        """Delete what is left of leases that were revoked."""
        for gone in self.ending.values():
            self._change(dict.fromkeys(gone))
        self.ending.clear()

    def _lease(self, name: str) -> Granted:
        if name in self.ending:
            raise NotFound(f"lease {name} has ended", going=True)
        if name not in self.leases:
            raise NotFound(f"there is no lease {name}")
        return self.leases[name]

    # --- reading ----------------------------------------------------------------------------------

    def _read(self, asked: Asked) -> Answer:
        query = asked.query
        if asked.path.startswith("/v1/leases/"):
            name = asked.path.removeprefix("/v1/leases/")
            lease = self._lease(name)
            keys = sorted(key for key, record in self.keys.items() if record.lease == name)
            return as_json(
                {
                    "id": name,
                    "ttl": lease.ttl_s,
                    "remaining": lease.ends - self.clock(),
                    "keys": [named("key", key) for key in keys],
                }
            )
        if asked.path == "/v1/kv" and "key_base64" not in query:
            return self._list(query)
        if not asked.path.startswith("/v1/kv"):
            raise NotFound("nothing is served under this path")
        record = self.keys.get(self._key(asked))
        if record is None:
            raise KeyNotFound("there is no such key")
        headers = {"ETag": f'"{record.mod_revision}"', "Dengine-Revision": str(self.revision)}
        if record.expires is not None:
            headers["Dengine-TTL"] = str(max(1, round(record.expires - self.clock())))
        return Answer(200, record.value, {"Content-Type": "application/octet-stream", **headers})

    def _list(self, query: Mapping[str, bytes]) -> Answer:
        limit = int(query.get("limit", str(self.page).encode()))
        if limit > self.page:
            raise InvalidRequest(f"limit is at most {self.page}", maximum=self.page)
        chosen = self._selected(query)
        if query.get("count_only") == b"true":
            return as_json(
                {"revision": self.revision, "items": [], "count": len(chosen), "next": None}
            )
        if "after" in query:
            chosen = [key for key in chosen if key >= base64.b64decode(query["after"])]
        page, rest = chosen[:limit], chosen[limit:]
        keys_only = query.get("keys_only") == b"true"
        rows = [self._row(key, self.keys[key], keys_only) for key in page]
        token = base64.b64encode(rest[0]).decode() if rest else None
        return as_json(
            {"revision": self.revision, "items": rows, "count": len(rows), "next": token}
        )

    def _row(self, key: bytes, record: Record, keys_only: bool) -> dict[str, Any]:
        ttl = None if record.expires is None else max(1, round(record.expires - self.clock()))
        return {
            **named("key", key),
            **({} if keys_only else named("value", record.value)),
            "mod_revision": record.mod_revision,
            "create_revision": record.create_revision,
            "version": record.version,
            "ttl": ttl,
            "lease": record.lease,
        }
