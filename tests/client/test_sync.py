"""The client for callers that wait: threads, forks, Ctrl-C, and iterators that are dropped."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dengine.client import ClientClosed, Compare, LeaseLost, LockLost, Put
from dengine.client.blocking import LoopThread
from dengine.client.elections import Leader
from dengine.client.sync import Client, Lease, Lock
from dengine.errors import PreconditionFailed, RequestTimeout
from tests.client.fake_server import ClusterThread, cluster_thread

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).resolve().parent.parent.parent
WAIT_S = 60.0  # the machine may be busy; nothing here takes as long


@pytest.fixture
def served() -> Iterator[ClusterThread]:
    with cluster_thread(3) as thread:
        yield thread


@pytest.fixture
def client(served: ClusterThread) -> Iterator[Client]:
    with Client(served.cluster.endpoints, timeout_s=WAIT_S) as client:
        yield client


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"waited {WAIT_S} s for {what}"
        time.sleep(0.02)


def test_all_of_it(client: Client, served: ClusterThread) -> None:
    """Every operation, as the asynchronous client has it."""
    first = client.put("a/1", b"1", if_none_match=True)
    with pytest.raises(PreconditionFailed):
        client.put("a/1", b"2", if_none_match=True)
    client.put("a/1", b"2", if_match=first.revision)
    found = client.get("a/1", consistency="eventual")
    assert found is not None
    assert (found.value, client.get("none")) == (b"2", None)
    assert client.txn([Compare("a/1", "value", "=", b"2")], [Put("a/2", b"")]).succeeded
    assert [item.key for item in client.list("a/")] == [b"a/1", b"a/2"]
    assert [len(page.items) for page in client.list("a/").pages()] == [2]
    assert len(client.list("a/", limit=1).all()) == client.count("a/", end=None) - 1 == 1
    with client.watch(prefix="a/", from_revision=1) as watch:
        assert [next(watch).revision for _ in range(3)] == [1, 2, 3]
        assert client.delete(prefix="a/").deleted == 2
        assert [event.type for event in next(watch).events] == ["delete", "delete"]
    with client.lease(30) as lease:
        client.put("s", b"", lease=lease)
        assert client.lease_info(lease.id).keys == (b"s",)
        assert 0 < lease.remaining_s <= 30
        lease.check()
    assert client.get("s") is None
    with client.lock("job", ttl_s=30) as lock:
        assert client.txn([lock.guard], [Put("done", b"")]).succeeded
        assert not lock.lost.is_set()
        assert not lock.lost.wait(0.01)
    with client.election("e").campaign(b"me", ttl_s=30) as leadership:
        assert client.election("e").leader() == Leader(b"me", leadership.token)
        assert next(client.election("e").observe()) == Leader(b"me", leadership.token)
        leadership.proclaim(b"still me")
        assert client.election("e").leader() == Leader(b"still me", leadership.token)
    assert set(client.endpoints) == set(served.cluster.endpoints)


def test_threads_share_a_client(client: Client, served: ClusterThread) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for count in range(10):
                client.put(f"t/{number}", b"%d" % count)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert errors == []
    assert served.do(lambda cluster: cluster.state.revision) == 80


def test_a_lock_between_threads(client: Client) -> None:
    inside: list[int] = []
    clashes: list[list[int]] = []

    def work(number: int) -> None:
        with client.lock("job", ttl_s=60):
            inside.append(number)
            if len(inside) != 1:
                clashes.append(list(inside))
            time.sleep(0.01)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert clashes == []


def test_a_lost_lock_is_told(client: Client, served: ClusterThread) -> None:
    def hang(cluster: object) -> None:
        for node in served.cluster.nodes:
            node.hang()

    def hold() -> None:
        with client.lock("job", ttl_s=2) as lock:
            served.do(hang)
            assert lock.lost.wait(WAIT_S)
            with pytest.raises(LockLost):
                lock.check()

    with pytest.raises(LockLost):
        hold()


def test_a_closed_client_stays_closed(served: ClusterThread) -> None:
    """No thread is left, what waits is woken, and closing again is nothing."""
    client = Client(served.cluster.endpoints, timeout_s=WAIT_S)
    client.put("k", b"")
    watch = client.watch("k")
    outcome: list[BaseException | None] = []

    def follow() -> None:
        try:
            next(watch)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    until(lambda: served.do(lambda c: sum(n.streams for n in c.nodes)) == 1, "the stream")
    client.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert isinstance(outcome[0], ClientClosed | StopIteration), outcome
    assert client.closed
    client.close()
    for call in (lambda: client.put("k", b""), lambda: client.list().all(), lambda: next(watch)):
        with pytest.raises((ClientClosed, StopIteration)):
            call()
    assert [t.name for t in threading.enumerate() if t.name == "dengine-client"] == []


def test_a_call_while_it_closes_is_refused(
    served: ClusterThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another thread, and after the last look at what is under way: nobody would answer it."""
    client, ended, refused = Client(served.cluster.endpoints, timeout_s=WAIT_S), [], []
    client.put("k", b"")
    end = LoopThread._end

    async def end_and_call(self: LoopThread) -> None:
        await end(self)
        ended.append(True)
        late = threading.Thread(target=call)
        late.start()
        await asyncio.to_thread(late.join, WAIT_S)

    def call() -> None:
        try:
            client.get("k")
        except ClientClosed as error:
            refused.append(error)

    monkeypatch.setattr(LoopThread, "_end", end_and_call)
    client.close()
    assert ended
    assert refused


def test_a_wrong_endpoint_is_told_at_once() -> None:
    with pytest.raises(ValueError, match="is not an endpoint"):
        Client("ftp://x")


def test_dropped_iterators_end_their_streams(client: Client, served: ClusterThread) -> None:
    """Nobody has to close what nobody holds any more."""

    def streams() -> int:
        return int(served.do(lambda cluster: sum(node.streams for node in cluster.nodes)))

    client.put("k", b"")
    watch = client.watch("k", from_revision=1)
    next(watch)
    observing = client.election("e").observe()
    next(observing)
    for item in client.list():
        assert item.key == b"k"
        break
    assert streams() >= 1
    del watch, observing
    gc.collect()
    until(lambda: streams() == 0, "the streams to end")


def test_what_a_client_hands_out_keeps_it_open(served: ClusterThread) -> None:
    """Who holds only the iterator still gets what it iterates over."""
    with Client(served.cluster.endpoints, timeout_s=WAIT_S) as client:
        for number in range(3):
            client.put(f"k/{number}", b"")
    seen = []
    for item in Client(served.cluster.endpoints, timeout_s=WAIT_S).list("k/"):
        gc.collect()
        seen.append(item.key)
    watch = Client(served.cluster.endpoints, timeout_s=WAIT_S).watch(prefix="k/", from_revision=1)
    for _ in range(3):
        gc.collect()
        seen.append(next(watch).events[0].key)
    assert seen == [b"k/0", b"k/1", b"k/2"] * 2


def test_a_dropped_client_ends_its_thread(served: ClusterThread) -> None:
    client = Client(served.cluster.endpoints, timeout_s=WAIT_S)
    client.put("k", b"")
    assert any(t.name == "dengine-client" for t in threading.enumerate())
    del client
    gc.collect()
    until(
        lambda: all(t.name != "dengine-client" for t in threading.enumerate()), "the thread to end"
    )


FORKS = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of Python 3.12


@FORKS
def test_a_fork_has_a_client_of_its_own(client: Client, served: ClusterThread) -> None:
    """As under a pre-forking server: made before, used in every worker, and still by the parent."""
    client.put("parent", b"1")
    workers = []
    for number in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                for count in range(6):
                    client.put(f"worker/{number}", b"%d" % count)
                client.close()
                os._exit(0)
            except BaseException:
                os._exit(1)
        workers.append(pid)
    client.put("parent", b"2")
    assert [os.waitpid(pid, 0)[1] for pid in workers] == [0, 0]
    client.put("parent", b"3")
    assert client.count("worker/") == 2
    writes = served.do(lambda c: [a for node in c.nodes for a in node.writes()])
    assert len({asked.headers["Idempotency-Key"] for asked in writes}) == 15
    assert served.do(lambda cluster: cluster.state.executed) == 15


@FORKS
def test_what_was_made_before_a_fork_says_so(client: Client) -> None:
    """A watch belongs to the process that made it: an error, and not a wait for ever."""
    client.put("k", b"")
    watch = client.watch("k")
    pid = os.fork()
    if pid == 0:
        try:
            next(watch)
        except RuntimeError:
            os._exit(0)
        except BaseException:
            os._exit(2)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


SCRIPT = """
import sys
from dengine.client.sync import Client

client = Client(sys.argv[1], timeout_s=300)
client.put("k", b"")
print("watching", flush=True)
try:
    for change in client.watch("k"):
        pass
except KeyboardInterrupt:
    print("interrupted", flush=True)
client.put("k", b"after")
print("usable", flush=True)
"""


def test_ctrl_c_ends_the_call_and_not_the_client(served: ClusterThread) -> None:
    """And the end of the interpreter ends the rest, without a word on stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, served.cluster.endpoints[0]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        until(
            lambda: served.do(lambda c: sum(n.streams for n in c.nodes)) == 1, "the script's stream"
        )
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
        process.wait()
    assert out.split() == ["watching", "interrupted", "usable"]
    assert (process.returncode, err) == (0, "")


# --- Ctrl-C in the first and last steps of `with`


class CtrlC:
    """Raises KeyboardInterrupt in this thread's next wait for the client, or instead of its next
    request to it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._thread = threading.current_thread()
        self._when: Callable[[], bool] | None = None
        self._first = False
        waiting, asking = concurrent.futures.Future.result, asyncio.run_coroutine_threadsafe

        def result(future: Any, timeout: float | None = None) -> Any:
            if self._is_due():
                self._raise()
            return waiting(future, timeout)

        def ask(work: Any, loop: Any) -> Any:
            if self._first and self._is_due():
                work.close()
                self._raise()
            return asking(work, loop)

        monkeypatch.setattr(concurrent.futures.Future, "result", result)
        monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", ask)

    def instead(self) -> None:
        self._when, self._first = (lambda: True), True

    def as_soon_as(self, when: Callable[[], bool]) -> None:
        self._when, self._first = when, False

    def _is_due(self) -> bool:
        return self._when is not None and threading.current_thread() is self._thread

    def _raise(self) -> None:
        when, self._when = self._when, None
        assert when is not None
        until(when, "the moment of Ctrl-C")
        raise KeyboardInterrupt


TAKES: list[Callable[[Client], Lease | Lock]] = [
    lambda client: client.lease(600),
    lambda client: client.lock("job", ttl_s=600),
    lambda client: client.election("e").campaign(b"me", ttl_s=600),
]


@pytest.mark.parametrize("take", TAKES)
@pytest.mark.parametrize("when", ["before", "at once", "meanwhile"])
def test_ctrl_c_while_leaving_lets_go(
    client: Client,
    served: ClusterThread,
    take: Callable[[Client], Lease | Lock],
    when: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long before the lease ends."""
    nodes, state = served.cluster.nodes, served.cluster.state
    ctrl_c, held = CtrlC(monkeypatch), take(client)
    with pytest.raises(KeyboardInterrupt), held:  # noqa: PT012
        if when == "before":
            ctrl_c.instead()
        elif when == "at once":
            ctrl_c.as_soon_as(lambda: True)
        else:
            for node in nodes:
                served.do(lambda _, node=node: setattr(node, "late_s", 0.2))
            ctrl_c.as_soon_as(held.lost.is_set)
    until(lambda: not state.leases, "the end of the lease")
    assert held.lost.wait(WAIT_S)


@pytest.mark.parametrize("take", TAKES)
def test_ctrl_c_while_entering_leaves_nothing_held(
    client: Client,
    served: ClusterThread,
    take: Callable[[Client], Lease | Lock],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where it comes when it is held already, and `with` does not know yet."""
    state = served.cluster.state
    ctrl_c, held = CtrlC(monkeypatch), take(client)
    ctrl_c.as_soon_as(lambda: served.do(lambda _: len(state.leases)) == 1 and is_held(held))
    with pytest.raises(KeyboardInterrupt):
        held.__enter__()
    until(lambda: not state.leases, "the end of the lease")


def is_held(held: Lease | Lock) -> bool:
    return held._held.remaining_s > 0 and (isinstance(held, Lease) or held.token > 0)


@pytest.mark.parametrize("take", TAKES)
def test_what_nobody_holds_any_more_is_let_go(
    client: Client, served: ClusterThread, take: Callable[[Client], Lease | Lock]
) -> None:
    """As when Ctrl-C comes between the last step of the block and the first of leaving it."""
    held = take(client).__enter__()
    with pytest.raises(RuntimeError, match="once"):
        held.__enter__()
    gc.collect()
    held.check()
    assert len(served.cluster.state.leases) == 1
    del held
    gc.collect()
    until(lambda: not served.cluster.state.leases, "the end of the lease")


def test_a_lease_without_a_block(client: Client, served: ClusterThread) -> None:
    lease = client.lease(60)
    lease.grant()
    client.put("s", b"", lease=lease)
    assert client.lease_info(lease.id).keys == (b"s",)
    lease.revoke()
    assert client.get("s") is None
    assert lease.lost.is_set()


def test_the_loop_does_not_wait_for_itself(client: Client) -> None:
    """A deadlock is told as one."""
    loop = client._holder.loop()

    async def inside() -> None:
        client.get("k")

    with pytest.raises(RuntimeError, match="would wait for itself"):
        loop.run(inside())


def test_a_deadline_is_one(client: Client, served: ClusterThread) -> None:
    def hang(cluster: object) -> None:
        for node in served.cluster.nodes:
            node.hang()

    served.do(hang)
    with pytest.raises(RequestTimeout):
        client.put("k", b"", timeout_s=1.0)


def test_what_a_closed_client_held_is_lost(served: ClusterThread) -> None:
    """Leaving says that, as with the asynchronous client, and never hides what the block raises."""

    def end(what: str, error: Exception | None) -> None:
        client = Client(served.cluster.endpoints, timeout_s=WAIT_S)
        held: Lock | Lease = client.lock("job") if what == "lock" else client.lease(60)
        with held:
            client.close()
            assert held.remaining_s == 0.0
            assert held.lost.is_set()
            assert held.lost.wait(WAIT_S)
            with pytest.raises(LeaseLost, match="the client was closed"):
                held.check()
            if isinstance(held, Lock):
                with pytest.raises(LockLost):
                    held.proclaim(b"")
            if error is not None:
                raise error

    for what, lost in (("lock", LockLost), ("lease", LeaseLost)):
        with pytest.raises(lost, match="the client was closed"):
            end(what, None)
        with pytest.raises(ValueError, match="of the block"):
            end(what, ValueError("of the block"))


def test_what_was_let_go_before_the_client_was_closed_is_not_lost(served: ClusterThread) -> None:
    client = Client(served.cluster.endpoints, timeout_s=WAIT_S)
    with client.lock("job") as lock:
        lock.release()
        client.close()
    lock.release()


def test_messages_name_the_word_that_enters_it(client: Client) -> None:
    """`with`: nobody who waits can use `async with`."""
    with pytest.raises(RuntimeError, match="enter it with `with`"):
        _ = client.lease(60).id
    with pytest.raises(RuntimeError, match="enter it with `with`"):
        _ = client.lock("job").guard
    with pytest.raises(RuntimeError, match="enter it with `with`"):
        client.election("boss").campaign(b"me").proclaim(b"")
