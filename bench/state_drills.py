"""What a large state costs: snapshots and joins under load, restarts, memory, bytes per key."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drills import (
    GROWTH_MARGIN_S,
    Growth,
    dengine_voters,
    running,
    start_guide_node,
    write_raw,
)
from load import wrk_while
from processes import BenchError, free_ports, http_request, wait_until
from systems import START_S, Load, Node, dengine_arguments, is_dengine_leader, stop

MIB = 2**20
VALUE_BYTES = 65_536  # of the large state: loading it measures the disk, not HTTP
LOADERS = 8
CONNECTIONS = 64
PROBE_EVERY_S = 0.005
# As long as a snapshot of 1 GiB takes. The kernel writes the dirty pages of the three states back
# every 30 s or so, which the log's syncs feel: shorter rounds meet that or not, a snapshot does.
QUIET_S = 30
JOIN_MAX_S = 240.0
TAKE_MAX_S = 120.0
WRITERS = 8
PURGE_BEYOND = 6000  # entries: retained_log_entries and some more

KEY_VALUE_BYTES = 256
ENTRY_COMMANDS = 64  # commands per entry, as 64 connections give
RESTART_MAX_S = 120.0
_SIZES = re.compile(r"^(RssAnon|VmRSS):\s+(\d+) kB$", re.MULTILINE)


@dataclass
class Seen:
    """PUT as wrk saw it, and the stalls of the leader's loop as GET /livez saw them."""

    seconds: float
    ops_per_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    failed: int
    stall_p50_ms: float
    stall_p99_ms: float
    stall_max_ms: float


@dataclass
class Transfer:
    """One joiner's way: from the first byte asked for to the installed state."""

    node: str
    received_s: float  # until every byte is here; it is verified and unpacked afterwards
    installed_s: float


@dataclass
class LargeState:
    """One node with a large state and a purged log becomes three, then takes a snapshot."""

    state_bytes: int
    file_bytes: int = 0
    load_s: float = 0.0
    growth: Growth | None = None
    copy_s: float = 0.0  # cp + fsync of the same file on the same disk
    transfers: list[Transfer] = field(default_factory=list)
    take_s: float = 0.0
    before: Seen | None = None
    during: Seen | None = None
    after: Seen | None = None

    @property
    def quiet_p99_ms(self) -> float | None:
        """Of the rounds right before and right after the snapshot, the mean."""
        quiet = [each.p99_ms for each in (self.before, self.after) if each is not None]
        return statistics.mean(quiet) if quiet else None


@dataclass
class ManyKeys:
    """One node with many small keys: what it weighs, and how long it takes to come back."""

    keys: int
    value_bytes: int
    build_s: float = 0.0
    state_bytes_per_key: float = 0.0
    log_bytes_per_key: float = 0.0
    snapshot_bytes_per_key: float = 0.0
    idle_mib: tuple[float, float] = (0.0, 0.0)  # resident, and of that its own (not mapped files)
    full_mib: tuple[float, float] = (0.0, 0.0)
    clean_s: float = 0.0
    killed_s: float = 0.0
    rebuilt_s: float = 0.0
    log_entries: int = 0  # that were left to verify, and behind the snapshot, at the rebuild
    entries_after: int = 0


# --- a large state ------------------------------------------------------------------------------


def large_state(directory: Path, result: LargeState, say: Callable[[str], None]) -> None:
    """Load node 1, purge its log, join 2 and 3 under writers, take a snapshot under wrk."""
    directory.mkdir()
    ports = free_ports(3)
    nodes = [start_guide_node(1, ports, directory)]
    try:
        first = nodes[0]
        wait_until(lambda: is_dengine_leader(first), "node 1 to lead", START_S, [first.process])
        values = -(-result.state_bytes // VALUE_BYTES)
        result.load_s = _fill(first.address, range(values // 2))
        take_snapshot(first)  # the log goes up to the second-newest one
        result.load_s += _fill(first.address, range(values // 2, values))
        say(f"{result.state_bytes // MIB} MiB written to node 1 in {result.load_s:.1f} s")
        result.file_bytes = _purge_log(first)
        say("log purged")
        result.growth = _grow(nodes, ports, directory, result)
        installed = ", ".join(f"{each.installed_s:.1f} s" for each in result.transfers)
        say(
            f"grown to 3 in {result.growth.three_voters_after_s:.1f} s, snapshots installed after "
            f"{installed}; longest write {result.growth.longest_ms:.0f} ms"
        )
        _calm(nodes)
        result.copy_s = _copy(directory, first)
        _take_under_load(nodes, result, say)
    finally:
        stop(nodes)
        shutil.rmtree(directory / "grown", ignore_errors=True)


def _fill(address: str, numbers: range) -> float:
    """PUT a value of 64 KiB for each number, over a few connections; how many seconds it took."""
    failures: list[str] = []
    started = time.monotonic()

    def load(share: range) -> None:
        value = bytearray(os.urandom(VALUE_BYTES))
        connection = _connect(address)
        with contextlib.closing(connection):
            for number in share:
                value[:8] = number.to_bytes(8, "big")
                connection.request("PUT", f"/v1/kv/large-{number:08d}", bytes(value))
                response = connection.getresponse()
                body = response.read()
                if response.status != 200:
                    failures.append(f"{response.status} {body!r}")
                    return

    shares = [numbers[n::LOADERS] for n in range(LOADERS)]
    threads = [threading.Thread(target=load, args=(each,), daemon=True) for each in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_MAX_S)
    if failures or any(thread.is_alive() for thread in threads):
        raise BenchError(f"loading {address}: {failures[:3] or 'still running'}")
    return time.monotonic() - started


def _connect(address: str) -> http.client.HTTPConnection:
    host, port = address.rsplit(":", 1)
    return http.client.HTTPConnection(host, int(port), timeout=60)


def _view(node: Node) -> dict[str, Any]:
    answer = http_request(node.address, "GET", "/v1/snapshots", timeout_s=5)
    view: dict[str, Any] = json.loads(answer[1]) if answer and answer[0] == 200 else {}
    return view


def _idle(node: Node) -> bool:
    return _view(node).get("job", "?") is None


def take_snapshot(node: Node) -> dict[str, Any]:
    """Have `node` take a snapshot, wait for it, and return what the list says of it."""
    wait_until(lambda: _idle(node), f"{node.name} to have no snapshot job", TAKE_MAX_S)
    view = _view(node)
    taken, failures = view["taken"], view["failures"]
    answer = http_request(node.address, "POST", "/v1/snapshots", b"", timeout_s=TAKE_MAX_S)
    if answer is None or answer[0] not in (200, 202):
        raise BenchError(f"{node.name} takes no snapshot: {answer}")
    wait_until(
        lambda: _idle(node) and _view(node)["taken"] > taken,
        f"a snapshot of {node.name}",
        TAKE_MAX_S,
        [node.process],
        every_s=0.2,
    )
    view = _view(node)
    if view["failures"] > failures:
        raise BenchError(f"{node.name}: a snapshot had to be taken again: {view['last_error']}")
    newest: dict[str, Any] = view["snapshots"][-1]
    return newest


def _purge_log(node: Node) -> int:
    """The second snapshot, of enough entries that some may go; bytes of its file."""
    more = PURGE_BEYOND - _status(node)["last_applied"]
    if more > 0:
        wrk_while(node.address, dengine_arguments(Load.PUT), 1, _applied(node, more))
    size = int(take_snapshot(node)["size_bytes"])
    wait_until(lambda: _view(node)["purged_index"] > 0, "a purged log", TAKE_MAX_S)
    return size


def _applied(node: Node, more: int) -> Callable[[], bool]:
    """Are `more` entries, from this call on, still to be applied?"""
    goal = _status(node)["last_applied"] + more
    return lambda: _status(node)["last_applied"] < goal


def _grow(nodes: list[Node], ports: Sequence[int], directory: Path, result: LargeState) -> Growth:
    first, growth, stopping = nodes[0], Growth(), threading.Event()
    writers = [
        threading.Thread(target=write_raw, args=(first.address, f"w{i}", growth, stopping))
        for i in range(WRITERS)
    ]
    followers: list[threading.Thread] = []
    with running(writers, stopping):
        time.sleep(GROWTH_MARGIN_S)
        started = time.monotonic()
        for number in (2, 3):
            node = start_guide_node(number, ports, directory)
            nodes.append(node)
            follower = threading.Thread(
                target=_follow, args=(first, node, number, result.transfers), daemon=True
            )
            follower.start()
            followers.append(follower)
        wait_until(
            lambda: dengine_voters(first) == 3,
            "three voters",
            JOIN_MAX_S,
            [node.process for node in nodes],
        )
        growth.three_voters_after_s = time.monotonic() - started
        time.sleep(GROWTH_MARGIN_S)
    for follower in followers:
        follower.join(1)
    return growth


def _follow(sender: Node, joiner: Node, number: int, transfers: list[Transfer]) -> None:
    """Watch what both print: when a transfer begins, everything was sent, it is installed."""
    marks = (
        (joiner, "receiving snapshot"),
        (sender, f"to node {number}: 100 %"),
        (joiner, " installed"),
    )
    seen: list[float] = []
    deadline = time.monotonic() + JOIN_MAX_S
    while len(seen) < len(marks) and time.monotonic() < deadline:
        node, mark = marks[len(seen)]
        if mark in node.log_path.read_text("utf-8", errors="replace"):
            seen.append(time.monotonic())
        time.sleep(0.05)
    if len(seen) == len(marks):
        begun, received, installed = seen
        transfers.append(Transfer(joiner.name, received - begun, installed - begun))


def _copy(directory: Path, node: Node) -> float:
    """Seconds of `cp` and fsync of the newest snapshot, on the disk that holds it."""
    newest = _view(node)["snapshots"][-1]["file"]
    source = directory / "grown" / "1" / "snapshots" / newest
    target = directory / "copy"
    started = time.monotonic()
    try:
        subprocess.run(["cp", str(source), str(target)], check=True, timeout=JOIN_MAX_S)
        with target.open("rb") as stream:
            os.fsync(stream.fileno())
        return time.monotonic() - started
    finally:
        target.unlink(missing_ok=True)


def _calm(nodes: Sequence[Node]) -> None:
    """Wait until no node has anything to do with snapshots."""
    wait_until(lambda: all(_idle(node) for node in nodes), "idle snapshot writers", TAKE_MAX_S)
    os.sync()
    time.sleep(1)


def _take_under_load(nodes: Sequence[Node], result: LargeState, say: Callable[[str], None]) -> None:
    leader = next(node for node in nodes if is_dengine_leader(node))
    result.before = _observe(leader, _for_seconds(QUIET_S))
    say(f"before the snapshot: p99 {result.before.p99_ms:.1f} ms")
    _calm(nodes)
    taken: list[float] = []
    problems: list[str] = []

    def take() -> None:
        time.sleep(1)  # wrk has begun
        started = time.monotonic()
        try:
            take_snapshot(leader)
        except BenchError as error:
            problems.append(str(error))
        else:
            taken.append(time.monotonic() - started)

    taker = threading.Thread(target=take)
    taker.start()
    result.during = _observe(leader, taker.is_alive)
    taker.join()
    if not taken:
        raise BenchError(f"no snapshot was taken under load: {problems}")
    result.take_s = taken[0]
    say(f"during the snapshot, {taken[0]:.1f} s: p99 {result.during.p99_ms:.1f} ms")
    _calm(nodes)
    result.after = _observe(leader, _for_seconds(QUIET_S))


def _for_seconds(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() < end


def _observe(leader: Node, going_on: Callable[[], bool]) -> Seen:
    """PUT at full rate while `going_on`, and beside it GET /livez every 5 ms."""
    with _probing(leader.address) as delays_ms:
        seen = wrk_while(leader.address, dengine_arguments(Load.PUT), CONNECTIONS, going_on)
    delays_ms.sort()
    seconds = seen["duration_us"] / 1e6
    return Seen(
        seconds=seconds,
        ops_per_s=seen["requests"] / seconds,
        p50_ms=seen["p50_us"] / 1000,
        p99_ms=seen["p99_us"] / 1000,
        max_ms=seen["max_us"] / 1000,
        failed=seen["status_errors"] + seen["socket_errors"] + seen["timeouts"],
        stall_p50_ms=delays_ms[len(delays_ms) // 2],
        stall_p99_ms=delays_ms[len(delays_ms) * 99 // 100],
        stall_max_ms=delays_ms[-1],
    )


@contextlib.contextmanager
def _probing(address: str) -> Iterator[list[float]]:
    """Milliseconds that each GET /livez took, one after the other on a connection of its own."""
    delays_ms: list[float] = []
    stopping = threading.Event()

    def probe() -> None:
        with contextlib.closing(_connect(address)) as connection:
            while not stopping.wait(PROBE_EVERY_S):
                started = time.perf_counter()
                try:
                    connection.request("GET", "/livez")
                    connection.getresponse().read()
                except (OSError, http.client.HTTPException):
                    return  # the node ends: whoever observes it says so
                delays_ms.append((time.perf_counter() - started) * 1000)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    try:
        yield delays_ms
    finally:
        stopping.set()
        thread.join(10)
    if not delays_ms:
        raise BenchError(f"{address}: GET /livez was never answered")


# --- many keys ----------------------------------------------------------------------------------


def many_keys(directory: Path, result: ManyKeys, say: Callable[[str], None]) -> None:
    """Found a node, give it `result.keys` keys, and see what it weighs and how it comes back."""
    directory.mkdir()
    ports = free_ports(3)
    node = start_guide_node(1, ports, directory)
    home = directory / "grown" / "1"
    try:
        wait_ready(node)
        time.sleep(2)
        result.idle_mib = resident_mib(node)
        node.process.stop()
        started = time.monotonic()
        build_keys(directory, result.keys, "key-{:09d}")
        result.build_s = time.monotonic() - started
        result.log_bytes_per_key = _size(home / "log") / result.keys
        result.state_bytes_per_key = _size(_state(home)) / result.keys
        say(f"{result.keys} keys built in {result.build_s:.1f} s")
        node.restart()
        wait_ready(node)
        result.snapshot_bytes_per_key = take_snapshot(node)["size_bytes"] / result.keys
        wrk_while(node.address, dengine_arguments(Load.PUT), CONNECTIONS, _for_seconds(3))
        take_snapshot(node)
        wrk_while(node.address, dengine_arguments(Load.PUT), CONNECTIONS, _for_seconds(3))
        time.sleep(5)  # for the purge, as far as this many entries let it come
        result.full_mib = resident_mib(node)
        view, applied = _view(node), _status(node)["last_applied"]
        result.log_entries = applied - view["purged_index"]
        result.entries_after = applied - view["snapshots"][-1]["index"]
        node.process.stop()
        result.clean_s = _restart_s(node)
        wrk_while(node.address, dengine_arguments(Load.PUT), CONNECTIONS, _for_seconds(1))
        node.process.kill()
        result.killed_s = _restart_s(node)
        node.process.kill()
        (home / "RUN").unlink()  # as after a power loss: the state cannot be trusted
        result.rebuilt_s = _restart_s(node)
        if "the state is rebuilt from snapshot-" not in node.log_path.read_text("utf-8"):
            raise BenchError("the state was not rebuilt from a snapshot")
    finally:
        stop([node])
        shutil.rmtree(directory / "grown", ignore_errors=True)


def build_keys(directory: Path, keys: int, form: str) -> None:
    """Write the keys, numbers in `form`, as committed entries with the node's own stores, as a
    follower would.

    Over HTTP a million PUTs would take minutes, and measure only what the load part measures.
    """
    from dengine.kv.commands import Put, encode_batch, encode_command
    from dengine.raft.types import Entry, EntryKind, HardState
    from dengine.storage.directory import DataDirectory
    from dengine.storage.recovery import open_stores

    data = DataDirectory.open(directory / "grown", 1)
    log, state = open_stores(data)
    hard_state, _ = log.load()
    value = os.urandom(KEY_VALUE_BYTES)
    entries: list[Entry] = []

    def flush() -> None:
        last = entries[-1].index
        log.save(HardState(hard_state.term, hard_state.voted_for, last), entries)
        state.apply(entries)
        entries.clear()

    index = log.last_index()
    if state.applied.index < index:
        state.apply(log.entries(state.applied.index + 1, index + 1, MIB))
    for first in range(0, keys, ENTRY_COMMANDS):
        index += 1
        numbers = range(first, min(keys, first + ENTRY_COMMANDS))
        # Spread over the key space, as the loads of real clients are.
        batch = [encode_command(Put(form.format(n * 7919 % keys).encode(), value)) for n in numbers]
        entries.append(Entry(index, hard_state.term, EntryKind.NORMAL, encode_batch(batch)))
        flush()  # one at a time: larger transactions would leave larger files
    state.sync()
    state.close()
    log.close()
    data.mark_clean()
    data.close()


def wait_ready(node: Node) -> None:
    def ready() -> bool:
        answer = http_request(node.address, "GET", "/readyz", timeout_s=1)
        return answer is not None and answer[0] == 200

    wait_until(ready, "a ready node", RESTART_MAX_S, [node.process])


def _restart_s(node: Node) -> float:
    """Seconds from the start of the process until it is ready for reads and writes."""
    started = time.monotonic()
    node.restart()
    wait_ready(node)
    return time.monotonic() - started


def _status(node: Node) -> dict[str, Any]:
    answer = http_request(node.address, "GET", "/v1/status")
    if answer is None or answer[0] != 200:
        raise BenchError(f"{node.address}: no status")
    status: dict[str, Any] = json.loads(answer[1])
    return status


def resident_mib(node: Node) -> tuple[float, float]:
    """Resident memory, and of that what is the process's own and not a page of a mapped file."""
    text = Path(f"/proc/{node.process.pid}/status").read_text()
    sizes = {name: int(kib) / 1024 for name, kib in _SIZES.findall(text)}
    return sizes["VmRSS"], sizes["RssAnon"]


def _state(home: Path) -> Path:
    return home / (home / "CURRENT").read_text().strip()


def _size(directory: Path) -> int:
    return (directory / "data.mdb").stat().st_size
