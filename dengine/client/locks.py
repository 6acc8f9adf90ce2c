"""Locks: a queue of keys, each bound to the lease of whoever waits.

Who wants the lock creates `_lock/NAME/LEASE`. The key that was created first holds the lock, and
its creation revision is the fencing token: it grows from holder to holder. Everybody else watches
the one key before his own, so a release wakes one waiter and not all. A holder that dies, or is cut
off, loses its key with its lease. The holder watches his own key, which somebody may delete, or
write: a plain put takes it from its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import TYPE_CHECKING

from dengine.client.encoding import as_key
from dengine.client.leases import REVOKE_S, Lease
from dengine.client.types import ClientClosed, Compare, Item, LeaseLost, LockLost
from dengine.errors import Compacted, DengineError, NotFound, PreconditionFailed, RequestTimeout

if TYPE_CHECKING:
    from dengine.client.client import Client

PAUSE_S = 0.2  # before a place in the queue that was lost is taken anew
PLACE_LOST = (LeaseLost, NotFound, PreconditionFailed)
NAME_BYTES = 400  # of a lock; with what is around it, it has to fit into a key
LOCKS = b"_lock/"

UNTOLD = "no node has said yet who holds it"
TAKEN = "another holds it"
LATE = "its lease was not renewed in time"
GONE = "its key is gone: it was deleted, or its lease has ended"
WRITTEN = "its key was written, and has no lease any more: `proclaim` is what changes its value"


def checked_name(name: str | bytes) -> bytes:
    """The bytes of the name of a lock or an election. Raises TypeError, ValueError."""
    data = as_key(name)
    if not 0 < len(data) <= NAME_BYTES:
        raise ValueError(f"a name has 1 to {NAME_BYTES} bytes, not {len(data)}")
    return data


class Lock:
    """A named lock, or with `Client.election` the leadership; held inside `async with`.

    `token` is the fencing token: it grows from one holder to the next. A resource that remembers
    the highest token it has seen, and refuses lower ones, is safe from a holder that was stopped
    and does not know yet that its time is over. For data in this cluster, `guard` in a transaction
    does the same. `lost` is an event: set at once when the lock may belong to somebody else.
    Leaving raises LockLost then, unless another exception is on its way. `why` says, for a person,
    why it is not held: what is waited for, or how it was lost. `key` holds the place. It is not to
    be written: a put takes it from its lease, and the lock is lost (see `proclaim`).

    A leave that is cancelled goes on by itself; the lock is free after `ttl_s` at the latest.

    It is entered once, by one task: whoever else wants the lock makes a `Lock` of his own.

    Example:
        async with client.lock("reports", timeout_s=30) as lock:
            done = await client.txn([lock.guard], [Put("reports/last", b"today")])
            assert done.succeeded and lock.token > 0
    """

    _entered_by = "async with"  # for messages

    def __init__(
        self, client: Client, prefix: bytes, value: bytes, ttl_s: int, timeout_s: float | None
    ) -> None:
        self._client = client
        self._prefix = prefix
        self._value = value
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._lease: Lease | None = None
        self._entered = self._released = False
        self.lost = asyncio.Event()
        self.why = UNTOLD
        self.key = b""
        self.token = 0
        self._revision = 0  # of our key, as we know it
        self._teller: asyncio.Task[str] | None = None

    @property
    def guard(self) -> Compare:
        """For `Client.txn`: the transaction succeeds only while this lock is held, and until the
        next `proclaim`.
        """
        self._require_entered()
        return Compare(self.key, "mod_revision", "=", self._revision)

    def _require_entered(self) -> None:
        if not self.token:
            raise RuntimeError(f"this lock is not held yet: enter it with `{self._entered_by}`")

    @property
    def remaining_s(self) -> float:
        """Seconds that the lock is held for certain, were the cluster out of reach from now on."""
        if self._lease is None or not self.token or self.lost.is_set():
            return 0.0
        return self._lease.remaining_s

    def check(self) -> None:
        """Say whether it is still held.

        Raises:
            LockLost: it may belong to somebody else.
        """
        if self.remaining_s <= 0:
            self._lose(LATE)
            raise LockLost(f"the lock {self._name!r} is lost: {self.why}")

    async def __aenter__(self) -> Lock:
        """Wait for the lock.

        Raises:
            RequestTimeout: not within `timeout_s`; nothing is held, outcome none.
            DengineError: nodes refuse, as for `Client.put`; failures that may pass are waited out.
            RuntimeError: it was entered before; whoever did that goes on holding it.
        """
        if self._entered:  # outside of what follows: the lease to let go of is not ours
            raise RuntimeError("a lock is entered once: make another one")
        self._entered = True
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._acquire()
        except TimeoutError:
            await self._let_go()
            what = "was not free" if self.why == TAKEN else "could not be had"
            why = "" if self.why == TAKEN else f": {self.why}"
            raise RequestTimeout(
                f"the lock {self._name!r} {what} within {self._timeout_s:g} s{why}", outcome="none"
            ) from None
        except BaseException:
            await self._let_go()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._released:
            return
        self._released = True
        was_lost = self.lost.is_set() or self.remaining_s <= 0
        if was_lost:
            self._lose(LATE)
        await self._let_go()
        if was_lost and error is None:
            raise self._lost_before()

    def _leave_closed(self) -> None:
        """What leaving raises when the client is closed: LockLost, unless the lock was released
        before. Needs no event loop.
        """
        if self.token and not self._released:
            self._released = True
            self._lose(LATE)
            raise self._lost_before()

    def _lost_before(self) -> LockLost:
        return LockLost(f"the lock {self._name!r} was lost before it was released: {self.why}")

    async def release(self) -> None:
        """Let go before the end of the block, which is then quiet. Raises as that end would.
        What is not held is left as it is.
        """
        if self.token:
            await self.__aexit__(None, None, None)

    async def resign(self) -> None:
        """`release`, as leaders call it."""
        await self.release()

    async def proclaim(self, value: bytes) -> None:
        """Change what others learn of the leader, who goes on leading with the same token. Take
        `guard` anew after it.

        Raises:
            LockLost: it may belong to somebody else; the value was not stored.
            DengineError: as for `Client.put`; the leadership is as it was.
            RuntimeError: it is not held yet.

        Example:
            election = client.election("scheduler")
            async with election.campaign(b"host-a, starting") as leadership:
                await leadership.proclaim(b"host-a, ready")
                assert (await election.leader()).value == b"host-a, ready"
        """
        self._require_entered()
        self.check()
        try:
            done = await self._client.put(self.key, value, lease=self._lease, if_match="*")
        except PLACE_LOST as error:
            self._lose(GONE)
            raise LockLost(f"the lock {self._name!r} is lost: {self.why}") from error
        self._revision = max(self._revision, done.revision)

    @property
    def _name(self) -> str:
        return self._prefix.split(b"/", 1)[1].rstrip(b"/").decode("utf-8", "replace")

    async def _let_go(self) -> None:
        """Give our place up. Silent in an outage: the lease ends by itself."""
        self._lose("it was released")
        teller, self._teller = self._teller, None
        if teller is not None:
            teller.cancel()
        await self._leave_queue()
        if teller is not None:
            await asyncio.wait({teller})

    async def _leave_queue(self) -> None:
        """End the lease, and with it our place; that goes on when this is cancelled."""
        lease, self._lease = self._lease, None
        if lease is not None:
            with contextlib.suppress(DengineError):  # closed, and nobody renews the lease
                leaving = self._client.spawn(self._leave(lease, self.key), "dengine-client-leave")
                await asyncio.wait({leaving})

    async def _leave(self, lease: Lease, key: bytes) -> None:
        with contextlib.suppress(DengineError, TimeoutError):
            async with asyncio.timeout(REVOKE_S):
                await lease.revoke()
                if key:
                    await self._clear(key)

    async def _clear(self, key: bytes) -> None:
        """Delete our key where no lease does, for somebody has written it: it would stand in the
        queue for ever. It bears the name of our lease, so it is nobody else's.
        """
        if await self._client.get(key, consistency="linearizable") is not None:
            await self._client.delete(key)

    def _lose(self, why: str) -> None:
        """It is not held from now on. The first reason counts, also the one why it never was."""
        self.why = self.why or why
        self.lost.set()

    # --- the queue --------------------------------------------------------------------------------

    async def _acquire(self) -> None:
        """Queue until our key is the first. A place that is lost in an outage is taken anew."""
        while not await self._queue():
            await self._leave_queue()
            await asyncio.sleep(PAUSE_S)
        assert self._lease is not None
        self._teller = self._client.spawn(self._until_lost(self._lease), "dengine-client-lock")
        self._teller.add_done_callback(self._told)

    async def _until_lost(self, lease: Lease) -> str:
        """Return when our key does not hold the lock any more, and say why.

        Raises:
            LeaseLost: the lease has ended before.
            DengineError: no node will ever tell.
        """
        gone = asyncio.create_task(self._until_not_ours(lease))
        ended = asyncio.create_task(lease.lost.wait())
        try:
            await asyncio.wait({gone, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not gone.done():
                lease.check()
            return await gone
        finally:
            for task in (gone, ended):
                task.cancel()
            await asyncio.gather(gone, ended, return_exceptions=True)

    def _told(self, teller: asyncio.Task[str]) -> None:
        """Lost is also what nobody watches over any more: the client was closed, or is refused."""
        if teller.cancelled():
            self._lose("the client was closed")
        else:
            self._lose(str(teller.exception() or teller.result()))

    async def _until_not_ours(self, lease: Lease) -> str:
        """As `_until_lost`. Our own announcements leave the key with its lease.

        Raises:
            DengineError: no node will ever tell.
        """
        known: int | None = self.token  # the revision up to which it is ours; None: look
        while True:
            try:
                if known is None:
                    item, known = await self._look()
                    if item is None or item.create_revision != self.token:
                        return GONE
                    if item.lease != lease.id:
                        break
                    self._revision = max(self._revision, item.mod_revision)
                if not await self._put_again(known):
                    return GONE
                known = None
            except Compacted:
                known = None  # the key says itself whether it is still ours
            except DengineError as error:
                if not error.retryable:
                    raise
                await asyncio.sleep(PAUSE_S)  # meanwhile the lease says what is certain
        self._lose(WRITTEN)
        with contextlib.suppress(DengineError):  # the next one need not wait until we leave
            await self._clear(self.key)
        return WRITTEN

    async def _look(self) -> tuple[Item | None, int]:
        """Our key as it is, and at which revision."""
        listing = self._client.list(
            start=self.key,
            end=self.key + b"\x00",
            limit=1,
            keys_only=True,
            consistency="linearizable",
        )
        page = await anext(listing.pages())
        return (page.items[0] if page.items else None), page.revision

    async def _put_again(self, revision: int) -> bool:
        """Wait for the first change of our key after `revision`; False: it was deleted, or expired.

        Raises:
            Compacted: what has happened since is not known any more.
        """
        async with self._client.watch(self.key, from_revision=revision + 1) as watch:
            async for change in watch:
                return all(event.type == "put" for event in change.events)
        return False

    async def _queue(self) -> bool:
        """Take a place and wait until it is the first; False when it is lost before."""
        lease = self._lease = Lease(self._client, self._ttl_s)
        try:
            await lease.grant()
            self.key = self._prefix + lease.id.encode()
            placed = await self._client.put(self.key, self._value, lease=lease, if_none_match=True)
            if not await self._our_turn(lease, placed.revision):
                lease.check()  # says why
                return False
        except DengineError as error:
            if not (error.retryable or isinstance(error, PLACE_LOST)):
                raise
            self.why = error.message
            return False
        self.token = self._revision = placed.revision
        self.why = ""
        return True

    async def _our_turn(self, lease: Lease, ours: int) -> bool:
        """Wait until nobody is before us; False when the lease is lost before."""
        turn = self._client.spawn(self._wait_turn(ours), "dengine-client-turn")
        lost = self._client.spawn(lease.lost.wait(), "dengine-client-turn-lost")
        try:
            await asyncio.wait({turn, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not turn.done():
                return False
            if turn.cancelled():
                raise ClientClosed("this client was closed while it waited for a lock")
            turn.result()
            return lease.remaining_s > 0
        finally:
            for task in (turn, lost):
                task.cancel()
            await asyncio.gather(turn, lost, return_exceptions=True)

    async def _wait_turn(self, ours: int) -> None:
        while True:
            try:
                before = await self._before(ours)
                if before is None:
                    return
                self.why = TAKEN
                await self._gone(before[0].key, before[1])
            except Compacted:
                continue  # so long ago that the queue has to be looked at anew
            except DengineError as error:
                if not error.retryable:
                    raise
                self.why = error.message
                await asyncio.sleep(PAUSE_S)  # our place is kept as long as the lease is

    async def _before(self, ours: int) -> tuple[Item, int] | None:
        """The waiter just before us, and the revision at which it was; None when we are first.

        Pages are read one after the other, and may differ in revision. Whoever is before us is
        there all the time until he goes for good, so he is in the page that would hold him.

        Raises:
            LeaseLost: our own key is gone.
        """
        found: Item | None = None
        present, oldest = False, 0
        listing = self._client.list(prefix=self._prefix, keys_only=True, consistency="linearizable")
        async for page in listing.pages():
            oldest = oldest or page.revision
            for item in waiting(page.items, self._prefix):
                present = present or item.create_revision == ours
                if item.create_revision >= ours:
                    continue
                if found is None or item.create_revision > found.create_revision:
                    found = item
        if not present:
            raise LeaseLost("our place in the queue is gone")
        return None if found is None else (found, oldest)

    async def _gone(self, key: bytes, revision: int) -> None:
        """Wait until `key`, which was there at `revision`, is deleted or expires.

        Raises:
            Compacted: what has happened since is not known any more.
        """
        async with self._client.watch(key, from_revision=revision + 1) as watch:
            async for change in watch:
                if any(event.type != "put" for event in change.events):
                    return


def named_lock(client: Client, name: str | bytes, ttl_s: int, timeout_s: float | None) -> Lock:
    """What `Client.lock` returns. Raises TypeError, ValueError: no lock has that name."""
    return Lock(client, LOCKS + checked_name(name) + b"/", b"", ttl_s, timeout_s)


def waiting(items: tuple[Item, ...], prefix: bytes) -> list[Item]:
    """Those that wait in the queue of `prefix`, and not in one whose name begins with it."""
    return [item for item in items if b"/" not in item.key[len(prefix) :]]
