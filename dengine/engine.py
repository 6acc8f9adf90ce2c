"""Embedded mode: a node inside an app's own process and event loop.

    async with dengine.Engine("./data") as engine:
        await engine.put("config/color", b"blue")

It is the same node as `dengine serve` runs, on the same kind of directory and with the same HTTP
port: others join it, and it joins others. Keys are bytes or text. Everything here belongs to the
event loop on which the engine was entered. What waits takes `timeout_s`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from dengine.api.kv import refusal
from dengine.api.server import HttpServer
from dengine.config import ENVIRONMENT_PREFIX, Config, load
from dengine.errors import FatalError, InvalidRequest, RequestTimeout
from dengine.kv.commands import (
    Condition,
    Delete,
    DeleteRange,
    DeleteResult,
    Effect,
    ExpiringPut,
    LeaseGrant,
    LeaseKeepAlive,
    LeaseResult,
    LeaseRevoke,
    LeaseRevoked,
    Put,
    PutResult,
    Result,
    Txn,
    TxnResult,
    prefix_end,
)
from dengine.kv.store import Record
from dengine.node.lifetimes import LeaseView
from dengine.node.node import Node
from dengine.node.watch_hub import Selection, Watch
from dengine.node.writes import parse_once
from dengine.storage.state_store import Page

TIMEOUT_S: Final = 5.0
READY_S: Final = 30.0
STOP_GRACE_S: Final = 5.0
POLL_S: Final = 0.02

Key = bytes | str


class Engine:
    """A node that lives as long as the `async with` block.

    Args:
        data_dir: where it keeps everything; `<data_dir>/<node_id>` is its own.
        node_id: used once for all time in a cluster.
        listen_address: for peers and HTTP clients.
        join: id and address of members of a cluster that this node is to join. Empty: it founds a
            cluster of its own, or goes on with the one that its directory belongs to.
        settings: further keys of the configuration by their dotted names, values as TOML has them:
            {"raft.election.timeout_ms_min": "500"}.
        config: a whole configuration instead of all these.

    Raises:
        ConfigError: any mistake in these.
    """

    def __init__(
        self,
        data_dir: Path | str = "./data",
        *,
        node_id: int = 1,
        listen_address: str = "127.0.0.1:9081",
        join: Mapping[int, str] | None = None,
        settings: Mapping[str, str] | None = None,
        config: Config | None = None,
    ) -> None:
        self._config = config or _config(
            Path(data_dir), node_id, listen_address, join or {}, settings or {}
        )

    # --- life ---------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Lock the directory, bind the port and go on from there; see `wait_ready`.

        Raises:
            FatalError: it cannot start.
        """
        self._node = node = Node(self._config)
        await node.open()
        self._server = HttpServer(node, self._config)
        try:
            await self._server.start()
        except BaseException:
            await node.stop()
            raise
        self._running = asyncio.create_task(node.run(), name="dengine node")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish requests, hand leadership over, sync, and let go of the directory.

        Raises:
            FatalError: the node had ended before, and why.
        """
        await self._server.stop(0.0 if self._running.done() else STOP_GRACE_S)
        if not self._running.done():
            await self._node.stop()
        await self._running

    async def wait_ready(self, timeout_s: float = READY_S) -> None:
        """Return once reads and writes can be answered.

        Raises:
            RequestTimeout: not in time; the message says for what it waits.
            FatalError: the node has ended.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not (readiness := self._node.readiness()).ready:
            if self._running.done():
                await self._running
            if loop.time() >= deadline:
                raise RequestTimeout(
                    f"not ready after {timeout_s:g} s: {'; '.join(readiness.reasons)}",
                    outcome="none",
                )
            await asyncio.sleep(POLL_S)

    async def wait_closed(self) -> None:
        """Return when the node ends by itself, which it does only by raising.

        Raises:
            FatalError: why; a new `Engine` on the same directory may go on.
        """
        await asyncio.shield(self._running)

    # --- writes -------------------------------------------------------------------------------

    async def put(
        self,
        key: Key,
        value: bytes,
        *,
        ttl_s: int | None = None,
        lease: str | None = None,
        if_revision: int | None = None,
        if_absent: bool = False,
        once: str | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> PutResult:
        """Store a value. An earlier TTL or lease of the key is forgotten.

        Args:
            ttl_s, lease: one of the two ends it: whole seconds, or a lease of that id.
            if_revision: only if this is the key's mod_revision.
            if_absent: only if there is no such key.
            once: an idempotency key: with it the same call may be repeated.

        Raises:
            PreconditionFailed: the condition does not hold.
            NotFound: there is no such lease.
            DengineError: `outcome` says whether it may still happen.
        """
        condition = _condition(if_revision, if_absent)
        command: Put | ExpiringPut = Put(_key(key), value, condition)
        if ttl_s is not None or lease is not None:
            command = ExpiringPut(_key(key), value, condition, ttl_s or 0, lease or "")
        result = await self._write(command, once, timeout_s)
        if not isinstance(result, PutResult):
            raise refusal(result)
        return result

    async def delete(
        self,
        key: Key,
        *,
        if_revision: int | None = None,
        once: str | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> DeleteResult:
        """Delete a key; `deleted` tells whether there was one. Raises as `put`."""
        command = Delete(_key(key), _condition(if_revision, False))
        return _deleted(await self._write(command, once, timeout_s))

    async def delete_prefix(
        self, prefix: Key, *, once: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> DeleteResult:
        """Delete every key that begins with `prefix`, which is not empty. Raises as `put`, and
        TooLarge: more than `limits.range_delete` keys match, and none was deleted.
        """
        first = _key(prefix)
        if not first:
            raise InvalidRequest("an empty prefix would delete every key")
        limit = self._config.limits.range_delete
        command = DeleteRange(first, prefix_end(first), limit)
        return _deleted(await self._write(command, once, timeout_s))

    async def txn(
        self, txn: Txn, *, once: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> TxnResult:
        """Compare, then carry out one branch, all of it as one change. Raises as `put`."""
        result = await self._write(txn, once, timeout_s)
        if not isinstance(result, TxnResult):
            raise refusal(result)
        return result

    async def grant_lease(
        self, ttl_s: int, *, once: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> str:
        """The id of a new lease. Raises as `put`."""
        return _granted(await self._write(LeaseGrant(ttl_s), once, timeout_s)).lease

    async def keep_lease(self, lease: str, *, timeout_s: float = TIMEOUT_S) -> None:
        """Its time begins anew. Raises NotFound: it has ended; else as `put`."""
        _granted(await self._write(LeaseKeepAlive(lease), None, timeout_s))

    async def revoke_lease(self, lease: str, *, timeout_s: float = TIMEOUT_S) -> LeaseRevoked:
        """End it now, and delete its keys. Raises as `keep_lease`."""
        result = await self._write(LeaseRevoke(lease), None, timeout_s)
        if not isinstance(result, LeaseRevoked):
            raise refusal(result)
        return result

    # --- reads --------------------------------------------------------------------------------

    async def get(
        self, key: Key, *, consistency: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> Record | None:
        """What the key holds; None: it does not exist.

        Args:
            consistency: "linearizable", "lease" or "eventual"; None: `read.default`.
        """
        await self._barrier(consistency, timeout_s)
        return self._node.state.get(_key(key))

    async def list(
        self,
        prefix: Key = b"",
        *,
        after: bytes | None = None,
        limit: int = 1000,
        keys_only: bool = False,
        consistency: str | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Page:
        """A page of keys that begin with `prefix`; its `next`, given as `after`, continues it."""
        first = _key(prefix)
        end = prefix_end(first) if first else None
        await self._barrier(consistency, timeout_s)
        return self._node.state.page(first if after is None else after, end, limit, keys_only)

    async def lease(self, lease: str, *, timeout_s: float = TIMEOUT_S) -> LeaseView:
        """What the cluster knows of a lease. Raises NotFound: it has ended."""
        await self._barrier(None, timeout_s)
        return self._node.lifetimes.lease(lease)

    def remaining_s(self, record: Record) -> int | None:
        """Seconds that a record still has; None: it stays."""
        return self._node.lifetimes.remaining_s(record)

    async def watch(
        self,
        *,
        key: Key | None = None,
        prefix: Key | None = None,
        from_revision: int | None = None,
        prev: bool = False,
        timeout_s: float = TIMEOUT_S,
    ) -> Watch:
        """Follow a key, or all that begin with `prefix`: iterate over it, and `aclose` it.

        Messages are `Changes`, `Progress` and, at the end, `Cancelled` of dengine.node.watch_hub.

        Args:
            from_revision: the first that is wanted; None: what comes from now on.

        Raises:
            Compacted: the history does not go back so far.
            WatchOverflow: there are `limits.watchers` already.
        """
        if (key is None) == (prefix is None):
            raise InvalidRequest("watch either a key or a prefix")
        selection = Selection(_key(key if prefix is None else prefix), prefix is not None)
        deadline = self._deadline(timeout_s)
        return await self._node.watch(selection, from_revision, prev=prev, deadline=deadline)

    # --- the cluster --------------------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        return self._node.is_leader

    @property
    def status(self) -> dict[str, Any]:
        """As GET /v1/status."""
        return self._node.local_status()

    def leadership(self) -> AsyncIterator[dict[str, Any]]:
        """`leader` (a node id or None) and `is_leader` now, then whenever that changes."""
        return self._node.leadership_events()

    def membership(self) -> AsyncIterator[dict[str, Any]]:
        """The cluster as GET /v1/cluster has it now, then after every committed change."""
        return self._node.membership_events()

    # --- small things -------------------------------------------------------------------------

    async def _write(self, command: Effect, once: str | None, timeout_s: float) -> Result:
        key = None if once is None else parse_once(once)
        return await self._node.write(command, self._deadline(timeout_s), key)

    async def _barrier(self, consistency: str | None, timeout_s: float) -> None:
        wanted = consistency or self._config.read.default
        if wanted not in ("linearizable", "lease", "eventual"):
            raise InvalidRequest("consistency is linearizable, lease or eventual")
        await self._node.read_barrier(wanted, self._deadline(timeout_s))

    def _deadline(self, timeout_s: float) -> float:
        if self._running.done() and isinstance(error := self._running.exception(), FatalError):
            raise error
        return asyncio.get_running_loop().time() + timeout_s


def _config(
    data_dir: Path,
    node_id: int,
    listen_address: str,
    join: Mapping[int, str],
    settings: Mapping[str, str],
) -> Config:
    """The configuration that these stand for, read as if from the environment."""
    role, status = (3, 0) if join else (2, 2)
    members: Sequence[str] = [
        *(f'{{ id = {i}, address = "{at}", role = 0, status = 2 }}' for i, at in join.items()),
        f'{{ id = {node_id}, address = "{listen_address}", role = {role}, status = {status} }}',
    ]
    keys = {
        "cluster.node_id": str(node_id),
        "cluster.listen_address": listen_address,
        "cluster.initial_cluster": f"[{', '.join(members)}]",
        "cluster.db_root_dir": str(data_dir),
        **settings,
    }
    environ = {
        ENVIRONMENT_PREFIX + key.upper().replace(".", "__"): value for key, value in keys.items()
    }
    return load(None, environ)


def _key(key: Key) -> bytes:
    return key.encode() if isinstance(key, str) else key


def _condition(if_revision: int | None, if_absent: bool) -> Condition | None:
    if if_revision is None and not if_absent:
        return None
    return Condition(None if if_revision is None else (if_revision,), if_absent)


def _deleted(result: Result) -> DeleteResult:
    if not isinstance(result, DeleteResult):
        raise refusal(result)
    return result


def _granted(result: Result) -> LeaseResult:
    if not isinstance(result, LeaseResult):
        raise refusal(result)
    return result
