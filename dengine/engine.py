"""Embedded mode: a node inside an app's own process and event loop.

    async with dengine.Engine("./data") as engine:
        await engine.put("config/color", b"blue")

It is the node that `dengine serve` runs, on the same kind of directory, and its calls have the
names and results of `dengine.client.Client`. What a caller may rely on, in every call:

- It works on any member, whoever leads.
- It ends within `timeout_s` seconds, with an answer or with a `DengineError` whose `outcome` is
  "none" (it did not and will not happen) or "unknown" (it may have happened, or may still).
- A write happens once, however often it has to be tried: each carries an idempotency key.
- When the node ends by itself, the app goes on: every call raises `EngineClosed` with the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

from dengine.client.client import Client, Consistency
from dengine.client.elections import Election
from dengine.client.encoding import Match, as_lease_id
from dengine.client.leases import Lease, until_keys_are_gone
from dengine.client.locks import Lock, named_lock
from dengine.client.types import (
    Compare,
    DeleteResult,
    LeaseInfo,
    Listing,
    Operation,
    PutResult,
    TxnResult,
    Value,
)
from dengine.config import Config
from dengine.embedded import commands
from dengine.embedded.calls import EngineClosed
from dengine.embedded.node import EmbeddedNode, setup_of, start, stop
from dengine.embedded.notifications import Leadership, Member, Membership, Subscription
from dengine.embedded.reads import Watch
from dengine.errors import FatalError
from dengine.kv import commands as kv

__all__ = ["Engine", "EngineClosed", "Leadership", "Member", "Membership", "Subscription", "Watch"]

TIMEOUT_S: Final = 10.0
READY_S: Final = 30.0


class Engine:
    """A node that lives as long as the `async with` block; made and used in one event loop.

    Args:
        data_dir: where it keeps everything; `<data_dir>/<node_id>` is its own.
        node_id: used once for all time in a cluster.
        listen_address: "host:port" for the other members and for HTTP clients, port 0 for any that
            is free. Without it there is no port, and the node is a cluster of one.
        initial_cluster: ids and addresses of those that found a cluster together, or of a cluster
            to `join`. It counts once: later the directory knows who belongs.
        join: join the members in `initial_cluster` instead of founding.
        settings: further keys of the configuration file by their dotted names.
        config: a configuration, or its file, instead of all these.
        timeout_s: for each call, its repetitions included, in seconds; calls can set their own.

    Raises:
        ConfigError: a mistake in these, in a sentence that names the key.
        ValueError: neither `data_dir` nor `config`, or `config` and others of these.

    Who reaches the port may read, write and join, unless `security.token_file` and
    `security.peer_secret_file` say otherwise. The node logs to `logging`, under "dengine".

    Example:
        async with dengine.Engine("./other", listen_address="127.0.0.1:0") as other:
            await other.put("greeting", b"hello")
            print(f"curl http://{other.address}/v1/kv/greeting")
    """

    def __init__(
        self,
        data_dir: Path | str | None = None,
        *,
        node_id: int = 1,
        listen_address: str | None = None,
        initial_cluster: Mapping[int, str] | None = None,
        join: bool = False,
        settings: Mapping[str, int | str] | None = None,
        config: Config | Path | str | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._setup = setup_of(
            data_dir, node_id, listen_address, initial_cluster, join, settings, config
        )
        self._timeout_s = timeout_s
        self._entered = False
        self._embedded: EmbeddedNode | None = None

    # --- start and end ----------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Lock the directory, bind the port and go on from there; see `wait_ready`.

        Raises:
            FatalError: it cannot start, and nothing is left behind. TryAgain, one of them, says who
                has the directory, or that the port is taken.
        """
        if self._entered:
            raise RuntimeError("an engine is entered once: make another one")
        self._entered = True
        self._embedded = await start(self._setup, self._timeout_s)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let calls end, hand leadership over, sync, and let go of directory and port: to the end,
        each part within a time limit, also when the block is cancelled.

        Raises:
            EngineClosed: the node had ended by itself, and nothing else is raised already.
        """
        await stop(self._alive, quietly=error is not None)

    async def wait_ready(self, timeout_s: float = READY_S) -> Leadership:
        """Return once reads and writes can be answered: who leads then.

        Raises:
            RequestTimeout: not within `timeout_s` seconds; the message says for what it waits.
            EngineClosed: the node has ended.

        Example:
            now = await engine.wait_ready(timeout_s=30)
            assert now.leader == 1 and now.is_leader
        """
        return await self._alive.ready(timeout_s)

    async def wait_closed(self) -> FatalError | None:
        """Return when the engine has ended: with what ended the node, or None when it was left.

        Another engine on the same directory may go on, unless the error says otherwise.

        Example:
            async with dengine.Engine("./other") as other:
                closed = asyncio.create_task(other.wait_closed())
            assert await closed is None
        """
        return await self._alive.wait_ended()

    @property
    def closed(self) -> bool:
        """Does it answer no more?"""
        return self._embedded is not None and self._embedded.calls.closed

    @property
    def address(self) -> str | None:
        """Where it serves HTTP and its peers; None: nowhere."""
        return self._alive.address

    # --- keys -------------------------------------------------------------------------------------

    async def get(
        self,
        key: str | bytes,
        *,
        consistency: Consistency | None = None,
        timeout_s: float | None = None,
    ) -> Value | None:
        """Read a key; None when there is no such key.

        Args:
            consistency: "linearizable" sees every write that was acknowledged before; "lease"
                saves a round trip and trusts clocks to run at the same speed; "eventual" is what
                this node has. None: `read.default` of the configuration.

        Raises:
            InvalidRequest, TooLarge: no key can look like that.
            RequestTimeout, ClusterUnavailable, EngineClosed: no answer within `timeout_s` seconds.

        Example:
            await engine.put("config/color", b"blue")
            found = await engine.get("config/color")
            assert found.value == b"blue" and found.mod_revision == found.revision
            assert await engine.get("config/size") is None
        """
        return await self._alive.reads.get(key, consistency, timeout_s)

    async def put(
        self,
        key: str | bytes,
        value: bytes,
        *,
        ttl_s: int | None = None,
        lease: Lease | str | None = None,
        if_match: Match | None = None,
        if_none_match: bool = False,
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
    ) -> PutResult:
        """Store a value. An earlier TTL or lease of the key is forgotten.

        Args:
            ttl_s: whole seconds until it expires.
            lease: the lease it ends with, instead.
            if_match: only if the key is at this revision, or one of these; "*": only if it exists.
            if_none_match: only if there is no such key.
            idempotency_key: of your own, 1 to 128 visible ASCII characters, not NAME:NUMBER: the
                same call of any engine with it, within `idempotency_window_s`, happens once.

        Raises:
            PreconditionFailed: the condition does not hold; `details["current_revision"]`.
            NotFound: there is no such lease.
            TooLarge, InvalidRequest: nothing was stored.
            RateLimited, DiskFull, RequestTimeout, ClusterUnavailable, LeaderChanged, EngineClosed:
                see `outcome`.

        Example:
            first = await engine.put("config/color", b"blue", if_none_match=True)
            await engine.put("config/color", b"red", if_match=first.revision)
            await engine.put("session/7", b"anna", ttl_s=60)
        """
        calls, condition = self._alive.calls, commands.condition(if_match, if_none_match)
        command = commands.put(key, value, condition, ttl_s, lease)
        done = await calls.write(command, kv.PutResult, idempotency_key, timeout_s)
        return PutResult(done.revision, done.created)

    async def delete(
        self,
        key: str | bytes | None = None,
        *,
        prefix: str | bytes | None = None,
        start: str | bytes | None = None,
        end: str | bytes | None = None,
        all: bool = False,
        if_match: Match | None = None,
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
    ) -> DeleteResult:
        """Delete one key, or every key with `prefix`, or from `start` up to before `end`.

        Args:
            all: allow what would delete every key.
            if_match, idempotency_key: as for `put`; the first is for a single key.

        Raises:
            TooLarge: more keys than one call may delete (limits.range_delete); none was.
            InvalidRequest: it would delete every key; and as `put`.

        Example:
            await engine.put("session/7", b"anna")
            assert (await engine.delete("session/7")).deleted == 1
            assert (await engine.delete(prefix="session/")).deleted == 0
        """
        command = commands.delete(key, (prefix, start, end), all, if_match, self._alive.limits)
        done = await self._alive.calls.write(command, kv.DeleteResult, idempotency_key, timeout_s)
        return DeleteResult(done.revision, done.deleted)

    def list(
        self,
        prefix: str | bytes | None = None,
        *,
        start: str | bytes | None = None,
        end: str | bytes | None = None,
        limit: int | None = None,
        keys_only: bool = False,
        consistency: Consistency | None = None,
        timeout_s: float | None = None,
    ) -> Listing:
        """The keys with `prefix`, or from `start` up to before `end`, or all, in their order.

        It reads page after page while it is iterated; each page is consistent in itself, the whole
        is not (see `Listing`). Raises as `get`, while it is iterated.

        Args:
            limit: at most so many keys.
            keys_only: leave the values out, which are b"" then.
            timeout_s: for each page.

        Example:
            await engine.put("config/color", b"blue")
            async for item in engine.list("config/"):
                assert item.key == b"config/color" and item.version == 1
            assert len(await engine.list(start="a", end="d", limit=10).all()) == 1
        """
        span = commands.span(prefix, start, end, self._alive.limits)
        return self._alive.reads.list(span, limit, keys_only, consistency, timeout_s)

    async def count(
        self,
        prefix: str | bytes | None = None,
        *,
        start: str | bytes | None = None,
        end: str | bytes | None = None,
        consistency: Consistency | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """How many keys there are in such a range, as for `list`. Raises as `get`.

        Example:
            assert await engine.count("config/") == 0
        """
        span = commands.span(prefix, start, end, self._alive.limits)
        return await self._alive.reads.count(span, consistency, timeout_s)

    async def txn(
        self,
        compare: Sequence[Compare] = (),
        success: Sequence[Operation] = (),
        failure: Sequence[Operation] = (),
        *,
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
    ) -> TxnResult:
        """Compare, then do all of `success` if every comparison holds, else all of `failure`.

        It is one change with one revision, or none. Later operations see earlier ones. At most 128
        of each (limits.txn_ops), and 64 KiB of values that it reads; 4 MiB where it only reads.
        Raises as `put`; comparisons that do not hold are no error.

        Example:
            done = await engine.txn(
                [Compare("accounts/a", "exists", "=", False)],
                success=[Put("accounts/a", b"5"), Get("accounts/a")],
                failure=[Get("accounts/a")],
            )
            assert done.succeeded and done.results[1].item.value == b"5"
        """
        command = commands.txn(compare, success, failure, self._alive.limits)
        done = await self._alive.calls.write(command, kv.TxnResult, idempotency_key, timeout_s)
        return commands.txn_result(command, done, self._alive.node.lifetimes)

    def watch(
        self,
        key: str | bytes | None = None,
        *,
        prefix: str | bytes | None = None,
        from_revision: int | None = None,
        prev: bool = False,
    ) -> Watch:
        """Follow every change of a key, or of all keys with `prefix`.

        It begins when it is entered with `async with`, or with the first step of `async for`.

        Args:
            from_revision: the first revision of interest, past ones too; None: what comes from now.
            prev: bring along what the value was before.

        Raises, when it begins or while it is iterated:
            Compacted: that is no longer kept, nor is anything up to `details["compact_revision"]`:
                read the keys anew, and watch from the revision behind that of the reading.
            WatchOverflow, EngineClosed: limits.watchers are open already; all is over.

        Example:
            put = await engine.put("config/color", b"blue")
            async with engine.watch("config/color", from_revision=put.revision) as watch:
                change = await anext(watch)
            assert (change.revision, change.events[0].value) == (put.revision, b"blue")
        """
        selected = commands.watched(key, prefix, self._alive.limits)
        return Watch(self._alive.node, self._alive.calls, selected, from_revision, prev)

    # --- leases, locks ----------------------------------------------------------------------------

    def lease(self, ttl_s: int) -> Lease:
        """A lease of `ttl_s` whole seconds, granted and kept alive inside `async with`.

        Example:
            async with engine.lease(10) as lease:
                await engine.put("service/web/1", b"10.0.0.7:80", lease=lease)
        """
        return Lease(self._as_client, ttl_s)

    def lock(self, name: str | bytes, *, ttl_s: int = 10, timeout_s: float | None = None) -> Lock:
        """The lock of that name, held inside `async with`; who waits is served in order.

        `ttl_s` as for `lease`; `timeout_s`: how long to wait, None as long as it takes. See `Lock`.

        Example:
            async with engine.lock("nightly-report") as lock:
                assert lock.token > 0
        """
        return named_lock(self._as_client, name, ttl_s, timeout_s)

    def election(self, name: str | bytes) -> Election:
        """The election of that name, among apps: it is not about which node leads the cluster.

        Example:
            assert await engine.election("scheduler").leader() is None
        """
        return Election(self._as_client, name)

    async def grant_lease(self, ttl_s: int, *, timeout_s: float | None = None) -> LeaseInfo:
        """A lease that nobody keeps alive: for those who do that themselves. Raises as `put`.

        Example:
            granted = await engine.grant_lease(60)
            await engine.put("session/7", b"anna", lease=granted.id)
        """
        calls, ttl_s = self._alive.calls, commands.checked_seconds(ttl_s, "the TTL of a lease")
        done = await calls.write(kv.LeaseGrant(ttl_s), kv.LeaseResult, None, timeout_s)
        return LeaseInfo(done.lease, done.ttl_s, None, ())

    async def keepalive_lease(self, id: str, *, timeout_s: float | None = None) -> LeaseInfo:
        """The lease's time begins anew. Raises NotFound: it has ended; and as `put`.

        Example:
            granted = await engine.grant_lease(60)
            assert (await engine.keepalive_lease(granted.id)).ttl_s == 60
        """
        command = kv.LeaseKeepAlive(as_lease_id(id))
        done = await self._alive.calls.write(command, kv.LeaseResult, None, timeout_s)
        return LeaseInfo(done.lease, done.ttl_s, None, ())

    async def revoke_lease(self, id: str, *, timeout_s: float | None = None) -> None:
        """End a lease now, and return when its keys are deleted. Raises as `keepalive_lease`;
        RequestTimeout also where it has ended and some of very many keys still go by themselves.

        Example:
            await engine.revoke_lease((await engine.grant_lease(60)).id)
        """
        calls, command = self._alive.calls, kv.LeaseRevoke(as_lease_id(id))
        deadline = calls.deadline(timeout_s)
        if (await calls.write(command, kv.LeaseRevoked, None, timeout_s)).going:
            await until_keys_are_gone(self._as_client, id, deadline)

    async def lease_info(self, id: str, *, timeout_s: float | None = None) -> LeaseInfo:
        """What the cluster knows of a lease; of its keys at most 1000.

        Raises NotFound: it has ended; and as `get`.

        Example:
            granted = await engine.grant_lease(60)
            await engine.put("session/7", b"anna", lease=granted.id)
            assert (await engine.lease_info(granted.id)).keys == (b"session/7",)
        """
        return await self._alive.reads.lease(as_lease_id(id), timeout_s)

    # --- the cluster ------------------------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        """Does this node lead, as far as it knows? A node that has ended does not."""
        return self._alive.notifications.leadership_now().is_leader

    @property
    def leader(self) -> Member | None:
        """Who leads, as far as this node knows; None: nobody is known to."""
        leader = self._alive.notifications.leadership_now().leader
        return next((member for member in self.members if member.id == leader), None)

    @property
    def members(self) -> tuple[Member, ...]:
        """The committed members, as far as this node knows; () until it belongs to a cluster."""
        return self._alive.notifications.membership_now().members

    def leadership(self) -> Subscription[Leadership]:
        """Who leads: now, and again whenever that changes.

        Example:
            async for now in engine.leadership():
                if now.is_leader:
                    break
        """
        return self._alive.notifications.leadership()

    def membership(self) -> Subscription[Membership]:
        """The committed members: now, and again after every change.

        Example:
            async for now in engine.membership():
                assert [member.id for member in now.members] == [1]
                break
        """
        return self._alive.notifications.membership()

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """A task that ends with this engine at the latest: for the helpers that it makes."""
        try:
            return self._alive.calls.spawn(work, name)
        except RuntimeError:  # it is not asked for where it may be
            work.close()
            raise

    @property
    def _alive(self) -> EmbeddedNode:
        if self._embedded is None:
            raise RuntimeError("this engine does not run yet: enter it with `async with`")
        self._embedded.calls.require_loop()
        return self._embedded

    @property
    def _as_client(self) -> Client:
        """Leases, locks and elections are the client's; an engine has all that they ask of one."""
        return cast(Client, self)
