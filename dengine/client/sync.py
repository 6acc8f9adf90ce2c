"""The client without asyncio: the same names, the same arguments, the same errors.

    from dengine.client.sync import Client

    with Client("10.0.0.1:9081") as client:
        client.put("config/color", b"blue")

An event loop in a thread of its own does the work. Several threads may share a client. A forked
process gets a loop, connections and idempotency keys of its own with its first call. Ctrl-C ends
the call that is under way, and leaves the client usable; leaving a lease or a lock goes on behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import TracebackType

from dengine.client import client as asynchronous
from dengine.client.blocking import Election, Holder, Lease, Listing, Lock, Lost, Watch
from dengine.client.client import TIMEOUT_S, Consistency
from dengine.client.encoding import Match
from dengine.client.leases import Lease as AsyncLease
from dengine.client.types import (
    Compare,
    DeleteResult,
    LeaseInfo,
    Operation,
    PutResult,
    TxnResult,
    Value,
)

__all__ = ["Client", "Election", "Lease", "Listing", "Lock", "Lost", "Watch"]


class Client:
    """A cluster, reached through any of its nodes. See `dengine.client.Client` for all that its
    methods take, return and raise: they have the same names here.

    Example:
        with Client(endpoints) as client:
            client.put("config/color", b"blue")
            assert client.get("config/color").value == b"blue"
            for item in client.list("config/"):
                assert item.key == b"config/color"
            with client.lock("reports") as lock:
                assert lock.token > 0
    """

    def __init__(
        self,
        endpoints: str | Sequence[str],
        *,
        token: str | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        named = endpoints if isinstance(endpoints, str) else tuple(endpoints)

        def make() -> asynchronous.Client:
            return asynchronous.Client(named, token=token, timeout_s=timeout_s)

        make()  # a wrong endpoint is told here, and not in the first call
        self._holder = Holder(make)
        self._finalizer = weakref.finalize(self, self._holder.close)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all connections and the thread. Every later call raises ClientClosed.

        Example:
            other = Client(endpoints)
            other.close()
        """
        self._finalizer()

    @property
    def closed(self) -> bool:
        return self._holder.closed

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The nodes that are known by now, as "host:port"."""
        return self._holder.loop().client.endpoints

    def get(
        self,
        key: str | bytes,
        *,
        consistency: Consistency | None = None,
        timeout_s: float | None = None,
    ) -> Value | None:
        """Read a key; None when there is no such key.

        Example:
            assert client.get("config/size") is None
        """
        loop = self._holder.loop()
        return loop.run(loop.client.get(key, consistency=consistency, timeout_s=timeout_s))

    def put(
        self,
        key: str | bytes,
        value: bytes,
        *,
        ttl_s: int | None = None,
        lease: Lease | AsyncLease | str | None = None,
        if_match: Match | None = None,
        if_none_match: bool = False,
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
    ) -> PutResult:
        """Store a value.

        Example:
            first = client.put("config/color", b"blue", if_none_match=True)
            client.put("config/color", b"red", if_match=first.revision)
        """
        loop = self._holder.loop()
        work = loop.client.put(
            key,
            value,
            ttl_s=ttl_s,
            lease=lease.id if isinstance(lease, Lease) else lease,
            if_match=if_match,
            if_none_match=if_none_match,
            idempotency_key=idempotency_key,
            timeout_s=timeout_s,
        )
        return loop.run(work)

    def delete(
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
        """Delete one key, or a range of them.

        Example:
            assert client.delete("config/color").deleted == 0
        """
        loop = self._holder.loop()
        work = loop.client.delete(
            key,
            prefix=prefix,
            start=start,
            end=end,
            all=all,
            if_match=if_match,
            idempotency_key=idempotency_key,
            timeout_s=timeout_s,
        )
        return loop.run(work)

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
        """The keys of a range, in their order, page after page.

        Example:
            assert client.list("config/").all() == []
        """
        loop = self._holder.loop()
        listing = loop.client.list(
            prefix,
            start=start,
            end=end,
            limit=limit,
            keys_only=keys_only,
            consistency=consistency,
            timeout_s=timeout_s,
        )
        return Listing(loop, listing, self)

    def count(
        self,
        prefix: str | bytes | None = None,
        *,
        start: str | bytes | None = None,
        end: str | bytes | None = None,
        consistency: Consistency | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """How many keys there are.

        Example:
            assert client.count("config/") == 0
        """
        loop = self._holder.loop()
        work = loop.client.count(
            prefix, start=start, end=end, consistency=consistency, timeout_s=timeout_s
        )
        return loop.run(work)

    def txn(
        self,
        compare: Sequence[Compare] = (),
        success: Sequence[Operation] = (),
        failure: Sequence[Operation] = (),
        *,
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
    ) -> TxnResult:
        """Compare, then do all of one branch as one change.

        Example:
            absent = Compare("accounts/a", "exists", "=", False)
            assert client.txn([absent], [Put("accounts/a", b"5")]).succeeded
        """
        loop = self._holder.loop()
        work = loop.client.txn(
            compare, success, failure, idempotency_key=idempotency_key, timeout_s=timeout_s
        )
        return loop.run(work)

    def watch(
        self,
        key: str | bytes | None = None,
        *,
        prefix: str | bytes | None = None,
        from_revision: int | None = None,
        prev: bool = False,
    ) -> Watch:
        """Follow every change of a key, or of all keys with `prefix`.

        Example:
            with client.watch(prefix="config/") as watch:
                client.put("config/color", b"blue")
                assert next(watch).events[0].value == b"blue"
        """
        loop = self._holder.loop()
        watch = loop.client.watch(key, prefix=prefix, from_revision=from_revision, prev=prev)
        return Watch(loop, watch, self)

    def lease(self, ttl_s: int) -> Lease:
        """A lease, granted and kept alive inside `with`.

        Example:
            with client.lease(10) as lease:
                client.put("service/web/1", b"10.0.0.7:80", lease=lease)
        """
        loop = self._holder.loop()
        return Lease(loop, loop.client.lease(ttl_s), self)

    def lock(self, name: str | bytes, *, ttl_s: int = 10, timeout_s: float | None = None) -> Lock:
        """The lock of that name, held inside `with`.

        Example:
            with client.lock("nightly-report") as lock:
                assert lock.token > 0
        """
        loop = self._holder.loop()
        return Lock(loop, loop.client.lock(name, ttl_s=ttl_s, timeout_s=timeout_s), self)

    def election(self, name: str | bytes) -> Election:
        """The election of that name.

        Example:
            assert client.election("scheduler").leader() is None
        """
        loop = self._holder.loop()
        return Election(loop, loop.client.election(name), self)

    def grant_lease(self, ttl_s: int, *, timeout_s: float | None = None) -> LeaseInfo:
        """A lease that nobody keeps alive.

        Example:
            client.put("session/7", b"anna", lease=client.grant_lease(60).id)
        """
        loop = self._holder.loop()
        return loop.run(loop.client.grant_lease(ttl_s, timeout_s=timeout_s))

    def keepalive_lease(self, id: str, *, timeout_s: float | None = None) -> LeaseInfo:
        """The lease's time begins anew.

        Example:
            assert client.keepalive_lease(client.grant_lease(60).id).ttl_s == 60
        """
        loop = self._holder.loop()
        return loop.run(loop.client.keepalive_lease(id, timeout_s=timeout_s))

    def revoke_lease(self, id: str, *, timeout_s: float | None = None) -> None:
        """End a lease now, and return when its keys are deleted.

        Example:
            client.revoke_lease(client.grant_lease(60).id)
        """
        loop = self._holder.loop()
        loop.run(loop.client.revoke_lease(id, timeout_s=timeout_s))

    def lease_info(self, id: str, *, timeout_s: float | None = None) -> LeaseInfo:
        """What the cluster knows of a lease.

        Example:
            assert client.lease_info(client.grant_lease(60).id).keys == ()
        """
        loop = self._holder.loop()
        return loop.run(loop.client.lease_info(id, timeout_s=timeout_s))
