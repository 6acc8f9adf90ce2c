"""`dengine bench`: load from N connections for S seconds, and what came of it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from argparse import Namespace
from array import array

import aiohttp
from yarl import URL

from dengine.cli.remote import Remote
from dengine.client.encoding import target
from dengine.errors import ClusterUnavailable, DengineError

REQUEST_TIMEOUT_S = 5.0
PAUSE_AFTER_FAILURE_S = 0.05
DELETED_KEYS, DELETED_BYTES = 1000, 8 * 1024 * 1024  # far below what one change may meet


class _Tally:
    """What the workers found: seconds per successful request, and failures by kind."""

    def __init__(self) -> None:
        self.latencies_s = array("d")
        self.failures: dict[str, int] = {}

    def fail(self, kind: str) -> None:
        self.failures[kind] = self.failures.get(kind, 0) + 1


def bench(args: Namespace, remote: Remote) -> int:
    """Measure `put` or `get` on the endpoints that answer; 1 when a request failed."""
    endpoints = [endpoint for endpoint in remote.endpoints if _answers(remote, endpoint)]
    if not endpoints:
        raise ClusterUnavailable(f"no endpoint answered: {', '.join(remote.endpoints)}")
    prefix = f"dengine-bench/{os.urandom(4).hex()}/"
    keys = [f"{prefix}{number:05}" for number in range(args.keys)]
    try:
        if args.operation == "get":
            asyncio.run(_fill(remote, endpoints[0], keys, args.value_bytes))
        started = time.monotonic()
        tally = asyncio.run(_load(args, remote, endpoints, keys))
        _report(args, endpoints, tally, time.monotonic() - started)
        sys.stdout.flush()
    finally:
        _delete(remote, keys, args.value_bytes)
    return 1 if tally.failures else 0


def _delete(remote: Remote, keys: list[str], value_bytes: int) -> None:
    """Delete all of `keys`, so many at once as a node takes away with one change."""
    count = max(1, min(DELETED_KEYS, DELETED_BYTES // value_bytes))
    starts = keys[::count]
    for start, end in zip(starts, [*starts[1:], f"{keys[-1]}\0"], strict=True):
        remote.call("DELETE", target("/v1/kv", start=start, end=end))


def _answers(remote: Remote, endpoint: str) -> bool:
    try:
        remote.only(endpoint).call("GET", "/v1/status")
    except DengineError:
        return False
    return True


def _session(remote: Remote, connections: int) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        headers=remote.authorization,
        connector=aiohttp.TCPConnector(limit=connections),
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
    )


def _url(endpoint: str, path: str) -> URL:
    return URL(f"http://{endpoint}{path}", encoded=True)


async def _fill(remote: Remote, endpoint: str, keys: list[str], value_bytes: int) -> None:
    """Store every key once, 64 at a time; raises ClusterUnavailable when that fails."""
    waiting = iter(keys)

    async def worker() -> None:
        for key in waiting:
            url = _url(endpoint, f"/v1/kv/{key}")
            try:
                async with session.put(url, data=os.urandom(value_bytes)) as reply:
                    problem = "" if reply.status == 200 else await reply.text()
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = f"{type(error).__name__} {error}"
            if problem:
                raise ClusterUnavailable(f"{endpoint} did not store the keys to get: {problem}")

    async with _session(remote, 64) as session:
        await asyncio.gather(*(worker() for _ in range(64)))


async def _load(args: Namespace, remote: Remote, endpoints: list[str], keys: list[str]) -> _Tally:
    """One task per connection, each with one request under way, until the time is over."""
    tally = _Tally()
    end = time.monotonic() + args.seconds
    query = "" if args.consistency is None else f"?consistency={args.consistency}"
    value = os.urandom(args.value_bytes)

    async def worker(number: int) -> None:
        urls = [
            _url(endpoints[number % len(endpoints)], f"/v1/kv/{key}{query}")
            for key in keys[number % len(keys) :: args.connections] or keys[:1]
        ]
        turn = 0
        while (before := time.monotonic()) < end:
            url = urls[turn % len(urls)]
            turn += 1
            try:
                async with (
                    session.put(url, data=value) if args.operation == "put" else session.get(url)
                ) as reply:
                    await reply.read()
            except (aiohttp.ClientError, TimeoutError) as error:
                tally.fail(type(error).__name__)
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S)
                continue
            if reply.status == 200:
                tally.latencies_s.append(time.monotonic() - before)
            else:
                tally.fail(f"HTTP {reply.status}")
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S)

    async with _session(remote, args.connections) as session, asyncio.TaskGroup() as group:
        for number in range(args.connections):
            group.create_task(worker(number))
    return tally


def _report(args: Namespace, endpoints: list[str], tally: _Tally, elapsed_s: float) -> None:
    ordered_ms = sorted(1000 * latency for latency in tally.latencies_s)

    def percentile_ms(share: float) -> float | None:
        return round(ordered_ms[int(share * (len(ordered_ms) - 1))], 3) if ordered_ms else None

    result = {
        "operation": args.operation,
        "endpoints": endpoints,
        "connections": args.connections,
        "value_bytes": args.value_bytes,
        "seconds": round(elapsed_s, 2),
        "ops_per_s": round(len(ordered_ms) / elapsed_s, 1),
        "p50_ms": percentile_ms(0.5),
        "p99_ms": percentile_ms(0.99),
        "max_ms": percentile_ms(1.0),
        "failures": tally.failures,
    }
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{args.operation} on {', '.join(endpoints)}: {args.connections} connections, ", end="")
    print(f"{args.value_bytes}-byte values, {elapsed_s:.1f} s")
    for name in ("ops_per_s", "p50_ms", "p99_ms", "max_ms"):
        print(f"  {name:10} {result[name]}")
    for kind, count in tally.failures.items():
        print(f"  failed     {count} x {kind}")
