"""The ceiling dengine is measured against: one uvloop process, aiohttp's `web.Server`, a dict.

It reads the same requests as a dengine node does and answers from memory: no log, no disk, no
peers. `python baseline.py --port P` serves on 127.0.0.1 until SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import signal

import uvloop
from aiohttp import web


async def serve(port: int) -> None:
    """Keep the bodies of PUT and POST, give them back to GET, on 127.0.0.1:`port` until SIGTERM."""
    values: dict[str, bytes] = {}

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        if request.method != "GET":
            values[request.path] = await request.read()
            return web.Response()
        value = values.get(request.path)
        if value is None:
            return web.Response(status=404)
        return web.Response(body=value)

    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    server = web.Server(handle, access_log=None)
    listener = await loop.create_server(server, "127.0.0.1", port)
    await stop.wait()
    listener.close()
    await server.shutdown(timeout=1)


def main() -> None:
    """Parse `--port` and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    uvloop.run(serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
