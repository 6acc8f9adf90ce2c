"""Service discovery with leases and a watch: who offers a service, where, and is it still there?

    python discovery.py register web 10.0.0.7:80     until Ctrl-C; run one beside each instance
    python discovery.py watch web                    prints the live instances, at every change

An instance is a key under `services/NAME/` that ends with a lease. While the instance lives, its
lease is renewed; when it dies, or is cut off for longer than the lease, the key goes by itself. Who
uses the service reads the keys once and follows the changes from there.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator

from dengine.client import Client, LeaseLost
from dengine.errors import Compacted, DengineError, NotFound

TTL_S = 5  # an instance that died is gone after so many seconds
PAUSE_S = 1.0


def say(text: str) -> None:
    print(text, flush=True)


async def register(client: Client, service: str, instance: str, address: str) -> None:
    """Keep `instance` registered until this is cancelled, over any outage.

    An outage that is longer than the lease ends the registration; as soon as the cluster answers
    again, there is a new one.
    """
    key = f"services/{service}/{instance}"
    while True:
        try:
            async with client.lease(TTL_S) as lease:
                await client.put(key, address.encode(), lease=lease)
                say(f"registered {key} at {address}")
                await lease.lost.wait()
        except (LeaseLost, NotFound) as error:  # or it ended before the key was put
            say(f"not registered any more: {error}")
        except DengineError as error:
            if not error.retryable:
                raise
            say(f"cannot register now: {error}")
            await asyncio.sleep(PAUSE_S)


async def instances(client: Client, service: str) -> AsyncIterator[dict[str, str]]:
    """The live instances and their addresses: now, and again after every change.

    In an outage there is no news, and what was known last is the best there is.
    """
    prefix = f"services/{service}/".encode()
    while True:
        try:
            known, revision = await _read(client, prefix)
            yield dict(known)
            async with client.watch(prefix=prefix, from_revision=revision + 1) as watch:
                async for change in watch:
                    for event in change.events:
                        name = event.key.removeprefix(prefix).decode()
                        if event.value is None:
                            known.pop(name, None)
                        else:
                            known[name] = event.value.decode()
                    yield dict(known)
        except Compacted:
            continue  # the history is shorter than we were away: read anew
        except DengineError as error:
            if not error.retryable:
                raise
            say(f"no news: {error}")
            await asyncio.sleep(PAUSE_S)


async def _read(client: Client, prefix: bytes) -> tuple[dict[str, str], int]:
    """All instances, and the revision after which changes have to be followed: that of the first
    page, for later pages may be newer, and to hear of a change twice does no harm.
    """
    known: dict[str, str] = {}
    revision = 0
    async for page in client.list(prefix).pages():
        revision = revision or page.revision
        for item in page.items:
            known[item.key.removeprefix(prefix).decode()] = item.value.decode()
    return known, revision


async def _run(args: argparse.Namespace) -> None:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    endpoints = os.environ.get("DENGINE_ENDPOINTS", "127.0.0.1:9081").replace(",", " ").split()
    async with Client(endpoints) as client:
        if args.command == "register":
            await register(client, args.service, args.instance, args.address)
        else:
            async for live in instances(client, args.service):
                shown = ", ".join(f"{name} at {address}" for name, address in sorted(live.items()))
                say(shown or "nobody")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    registering = commands.add_parser("register", help="keep an instance registered")
    registering.add_argument("service")
    registering.add_argument("address", help="where it can be reached")
    registering.add_argument("--instance", default=f"{socket.gethostname()}-{os.getpid()}")
    watching = commands.add_parser("watch", help="print the live instances at every change")
    watching.add_argument("service")
    try:
        asyncio.run(_run(parser.parse_args()))
    except asyncio.CancelledError:
        pass  # told to stop: the lease was revoked on the way out
    except DengineError as error:
        print(f"discovery: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
