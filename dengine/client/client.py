"""`Client`: the operations on a cluster, for asyncio.

What a caller may rely on, in every call:

- It goes to the leader where that is known, and leaves a node that is dead, hung or cut off.
- It ends within `timeout_s` seconds, with an answer or with a `DengineError` whose `outcome` is
  "none" (it did not and will not happen) or "unknown" (it may have happened, or may still).
- A write happens once, however often it has to be sent: each carries an `Idempotency-Key`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, Literal

import orjson

from dengine.client.calls import JSON, Calls
from dengine.client.elections import Election
from dengine.client.encoding import (
    Match,
    as_from_revision,
    as_key,
    as_seconds,
    as_value,
    conditions,
    key_target,
    lease_target,
    selection,
    target,
)
from dengine.client.leases import Lease, until_keys_are_gone
from dengine.client.locks import Lock, named_lock
from dengine.client.nodes import Nodes, Prefer
from dengine.client.transport import Transport
from dengine.client.types import (
    Compare,
    DeleteResult,
    LeaseInfo,
    Listing,
    Operation,
    Page,
    PutResult,
    TxnResult,
    Value,
    lease_id,
    only_reads,
    txn_parts,
)
from dengine.client.watching import Watch
from dengine.errors import KeyNotFound

TIMEOUT_S = 10.0

Consistency = Literal["linearizable", "lease", "eventual"]


class Client:
    """A cluster, reached through any of its nodes.

    Args:
        endpoints: "host:port", or several; the other members are found through them.
        token: where the cluster asks for one (`security.token_file`).
        timeout_s: for each call, its retries included, in seconds; calls can set their own.

    Raises:
        ValueError: an endpoint is not one.

    Close it when you are done, or use it as `async with Client(...) as client`. It belongs to the
    event loop in which it is first used.

    Example:
        async with Client(endpoints, timeout_s=5.0) as other:
            assert (await other.put("greeting", b"hello")).revision > 0
    """

    def __init__(
        self,
        endpoints: str | Sequence[str],
        *,
        token: str | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._transport = Transport(Nodes(endpoints), token)
        self._calls = Calls(self._transport, timeout_s)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all connections, and what is still under way. Every later call raises ClientClosed.

        Example:
            other = Client(endpoints)
            await other.close()
        """
        await self._transport.close()

    @property
    def closed(self) -> bool:
        return self._transport.closed

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The nodes that are known by now, as "host:port": those named and those learned."""
        return tuple(self._transport.nodes.addresses)

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
                saves a round trip and trusts clocks to run at the same speed; "eventual" asks any
                node for what it has. None: what the nodes are configured for.

        Raises:
            InvalidRequest, TooLarge: no key can look like that.
            RequestTimeout, ClusterUnavailable: no answer within `timeout_s` seconds.
            Unauthorized: the cluster asks for another token.
            ClientClosed: this client is closed.

        Example:
            await client.put("config/color", b"blue")
            found = await client.get("config/color")
            assert found.value == b"blue" and found.mod_revision == found.revision
            assert await client.get("config/size") is None
        """
        name = as_key(key)
        try:
            reply = await self._calls.read(
                key_target(name, consistency=consistency),
                timeout_s,
                "any" if consistency == "eventual" else "leader",
            )
        except KeyNotFound:
            return None
        return reply.understood(lambda: Value.parse(name, reply.body, reply.headers))

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
            idempotency_key: of your own, 1 to 128 visible ASCII characters, and not NAME:NUMBER,
                which numbers the requests of one client: the same call with the same key within
                `idempotency_window_s`, by any client, happens once.

        Raises:
            PreconditionFailed: the condition does not hold; `details["current_revision"]`.
            NotFound: there is no such lease.
            TooLarge, InvalidRequest, RateLimited, DiskFull: refused. Nothing was stored, unless
                `outcome` is "unknown": one node says no, and another that was asked before, and may
                have other limits, has not answered.
            RequestTimeout, ClusterUnavailable, StaleRequest: see `outcome`.

        Example:
            first = await client.put("config/color", b"blue", if_none_match=True)
            await client.put("config/color", b"red", if_match=first.revision)
            await client.put("session/7", b"anna", ttl_s=60)
        """
        if ttl_s is not None and lease is not None:
            raise ValueError("a value ends with ttl_s or with a lease: give one of them")
        where = key_target(
            as_key(key),
            ttl=None if ttl_s is None else str(as_seconds(ttl_s, "ttl_s")),
            lease=None if lease is None else lease_id(lease),
        )
        headers = conditions(if_match, if_none_match)
        data = as_value(value)
        reply = await self._calls.write("PUT", where, data, headers, idempotency_key, timeout_s)
        return reply.parse(PutResult.parse)

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
            if_match: of a single key, as for `put`.
            idempotency_key: as for `put`.

        Raises:
            PreconditionFailed: as for `put`.
            TooLarge: more keys than one call may delete (limits.range_delete); none was.
            InvalidRequest: it would delete every key.
            DengineError: as for `put`.

        Example:
            await client.put("session/7", b"anna")
            assert (await client.delete("session/7")).deleted == 1
            assert (await client.delete(prefix="session/")).deleted == 0
        """
        headers = conditions(if_match, False)
        if key is not None:
            if prefix is not None or start is not None or end is not None:
                raise ValueError("delete takes a key, or a prefix, or start and end")
            where = key_target(as_key(key))
        else:
            chosen = selection(prefix, start, end)
            if not chosen and not all:
                raise ValueError("delete takes a key, or a prefix, or start and end")
            where = target("/v1/kv", **chosen, all="true" if all else None)
        reply = await self._calls.write("DELETE", where, None, headers, idempotency_key, timeout_s)
        return reply.parse(DeleteResult.parse)

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

        It fetches page after page while it is iterated; each page is consistent in itself, the
        whole is not (see `Listing`).

        Args:
            limit: at most so many keys.
            keys_only: leave the values out, which are b"" then.
            timeout_s: for each page.

        Raises, while it is iterated: as `get`.

        Example:
            await client.put("config/color", b"blue")
            async for item in client.list("config/"):
                assert item.key == b"config/color" and item.version == 1
            assert len(await client.list(start="a", end="d", limit=10).all()) == 1
        """
        chosen = selection(prefix, start, end)
        if limit is not None and limit < 1:
            raise ValueError(f"limit is at least 1, not {limit}")

        async def fetch(most: int | None, after: str | None) -> Page:
            where = target(
                "/v1/kv",
                **chosen,
                limit=most,
                after=after,
                keys_only="true" if keys_only else None,
                consistency=consistency,
            )
            prefer: Prefer = "any" if consistency == "eventual" else "leader"
            return (await self._calls.read(where, timeout_s, prefer)).parse(Page.parse)

        return Listing(fetch, limit)

    async def count(
        self,
        prefix: str | bytes | None = None,
        *,
        start: str | bytes | None = None,
        end: str | bytes | None = None,
        consistency: Consistency | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """How many keys there are with `prefix`, or from `start` up to before `end`, or in all.

        Raises: as `get`.

        Example:
            assert await client.count("config/") == 0
        """
        chosen = selection(prefix, start, end)
        where = target("/v1/kv", **chosen, count_only="true", consistency=consistency)
        prefer: Prefer = "any" if consistency == "eventual" else "leader"
        reply = await self._calls.read(where, timeout_s, prefer)
        return reply.parse(lambda fields: int(fields["count"]))

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
        of each (limits.txn_ops). What it reads has at most 64 KiB, for it is remembered with the
        idempotency key; 4 MiB where no operation is other than `Get`.

        Raises:
            DengineError: as for `put`; comparisons that do not hold are no error.

        Example:
            done = await client.txn(
                [Compare("accounts/a", "exists", "=", False)],
                success=[Put("accounts/a", b"5"), Get("accounts/a")],
                failure=[Get("accounts/a")],
            )
            assert done.succeeded and done.results[1].item.value == b"5"
        """
        parts = txn_parts(compare, success, failure)
        body = orjson.dumps({name: [p.to_json() for p in part] for name, part in parts.items()})
        if idempotency_key is None and only_reads((*parts["success"], *parts["failure"])):
            reply = await self._calls.read("/v1/txn", timeout_s, body=body)
        else:
            reply = await self._calls.write(
                "POST", "/v1/txn", body, JSON, idempotency_key, timeout_s
            )
        return reply.parse(TxnResult.parse)

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

        Raises, while it is iterated: see `Watch`.

        Example:
            put = await client.put("config/color", b"blue")
            async for change in client.watch("config/color", from_revision=put.revision):
                assert (change.revision, change.events[0].value) == (put.revision, b"blue")
                break
        """
        if (key is None) == (prefix is None):
            raise ValueError("watch takes a key or a prefix")
        from_revision = as_from_revision(from_revision)
        chosen = {"key": as_key(key)} if key is not None else {"prefix": as_key(prefix or b"")}

        return Watch(self._transport, chosen, from_revision, prev, self._calls.timeout_s)

    # --- leases, locks ----------------------------------------------------------------------------

    def lease(self, ttl_s: int) -> Lease:
        """A lease of `ttl_s` whole seconds, granted and kept alive inside `async with`.

        Example:
            async with client.lease(10) as lease:
                await client.put("service/web/1", b"10.0.0.7:80", lease=lease)
        """
        return Lease(self, ttl_s)

    def lock(self, name: str | bytes, *, ttl_s: int = 10, timeout_s: float | None = None) -> Lock:
        """The lock of that name, held inside `async with`; who waits is served in order.

        Args:
            ttl_s: whole seconds after which the lock of a dead holder is free.
            timeout_s: how long to wait for it; None: as long as it takes.

        Raises, on entering and leaving: see `Lock`.

        Example:
            async with client.lock("nightly-report") as lock:
                assert lock.token > 0
        """
        return named_lock(self, name, ttl_s, timeout_s)

    def election(self, name: str | bytes) -> Election:
        """The election of that name: `campaign`, `leader`, `observe`.

        Example:
            assert await client.election("scheduler").leader() is None
        """
        return Election(self, name)

    async def grant_lease(self, ttl_s: int, *, timeout_s: float | None = None) -> LeaseInfo:
        """A lease that nobody keeps alive: for those who do that themselves. Raises as `put`.

        Example:
            granted = await client.grant_lease(60)
            await client.put("session/7", b"anna", lease=granted.id)
        """
        body = orjson.dumps({"ttl": as_seconds(ttl_s, "the TTL of a lease")})
        reply = await self._calls.write("POST", "/v1/leases", body, JSON, None, timeout_s)
        return reply.parse(LeaseInfo.parse)

    async def keepalive_lease(self, id: str, *, timeout_s: float | None = None) -> LeaseInfo:
        """The lease's time begins anew.

        Raises:
            NotFound: it has ended.
            DengineError: as for `put`.

        Example:
            granted = await client.grant_lease(60)
            assert (await client.keepalive_lease(granted.id)).ttl_s == 60
        """
        where = f"{lease_target(id)}/keepalive"
        return (await self._calls.renew(where, timeout_s)).parse(LeaseInfo.parse)

    async def revoke_lease(self, id: str, *, timeout_s: float | None = None) -> None:
        """End a lease now, and return when its keys are deleted.

        Raises:
            RequestTimeout: also where it has ended, and holds so many keys that some are left; they
                go by themselves.
            DengineError: as `keepalive_lease`.

        Example:
            await client.revoke_lease((await client.grant_lease(60)).id)
        """
        deadline = self._calls.deadline(timeout_s)
        reply = await self._calls.write("DELETE", lease_target(id), None, {}, None, timeout_s)
        if reply.parse(lambda fields: bool(fields.get("going"))):
            await until_keys_are_gone(self, id, deadline)

    async def lease_info(self, id: str, *, timeout_s: float | None = None) -> LeaseInfo:
        """What the cluster knows of a lease.

        Raises:
            NotFound: it has ended.
            DengineError: as for `get`.

        Example:
            granted = await client.grant_lease(60)
            await client.put("session/7", b"anna", lease=granted.id)
            assert (await client.lease_info(granted.id)).keys == (b"session/7",)
        """
        return (await self._calls.read(lease_target(id), timeout_s)).parse(LeaseInfo.parse)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """A task that ends with this client at the latest: for the helpers that it makes."""
        return self._transport.spawn(work, name)
