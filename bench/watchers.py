"""Many watchers of one node, in a process of their own: `python watchers.py ADDRESS ...`.

It follows `prefix=PREFIX` over `--count` connections, of which `--stalled` read nothing behind the
header. When all are there it prints a line `ready`. At the end of its standard input it prints one
JSON line with how long events took: each value begins with the time at which it was sent, in
nanoseconds of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import socket
import sys
import time

import uvloop

TIMES = re.compile(rb'"value":"(\d+)\b')
OPEN_MAX_S = 60.0
AT_ONCE = 50
SMALL_BUFFER = 4096


async def follow(
    address: str, query: str, stalled: bool, delays_ns: list[int], opened: asyncio.Semaphore
) -> None:
    """One watcher. One that is stalled holds its connection and takes nothing from it."""
    host, port = address.rsplit(":", 1)
    loop = asyncio.get_running_loop()
    connection = socket.socket()
    connection.setblocking(False)
    if stalled:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    await loop.sock_connect(connection, (host, int(port)))
    request = f"GET /v1/watch?{query} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()
    await loop.sock_sendall(connection, request)
    head = b""
    while b"\n\n" not in head:  # the greeting
        head += await _some(loop, connection)
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"{address}: {head!r}")
    opened.release()
    if stalled:
        await asyncio.get_running_loop().create_future()
    rest = b""
    while True:
        data = rest + await _some(loop, connection)
        now = time.monotonic_ns()
        *_, rest = data.rsplit(b"\n\n", 1)
        whole = data[: len(data) - len(rest)]
        delays_ns += [now - int(sent) for sent in TIMES.findall(whole)]


async def _some(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> bytes:
    data = await loop.sock_recv(connection, 65536)
    if not data:
        raise SystemExit("a node has closed a watch")
    return data


async def main() -> None:
    """Open all, say so, wait for the end of the input, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--query", required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--stalled", type=int, default=0)
    given = parser.parse_args()
    delays_ns: list[int] = []
    opened = asyncio.Semaphore(0)
    tasks = []
    async with asyncio.timeout(OPEN_MAX_S):
        for number in range(given.count):
            query = given.query.replace("NUMBER", str(number))
            stalled = number < given.stalled
            work = follow(given.address, query, stalled, delays_ns, opened)
            tasks.append(asyncio.create_task(work))
            if number >= AT_ONCE:
                await opened.acquire()
        for _ in range(min(given.count, AT_ONCE)):
            await opened.acquire()
    print("ready", flush=True)
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    await asyncio.wait({ended, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task.done():
            task.result()
    delays_ns.sort()

    def at(part: float) -> float:
        return delays_ns[min(int(part * len(delays_ns)), len(delays_ns) - 1)] / 1e6

    told = {"events": len(delays_ns)}
    if delays_ns:
        told |= {"p50_ms": at(0.5), "p99_ms": at(0.99), "max_ms": at(1.0)}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
