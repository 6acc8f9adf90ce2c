"""One of many that want the same lock: `python lock_holder.py NAME ENDPOINT...`, until it is ended.

Whoever holds it writes its token and its name under the guard, again and again. Who was refused
leaves a key under refused/.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys

from dengine.client import Client, LockLost, Put
from dengine.errors import DengineError

TTL_S = 2
WRITES = 10
PAUSE_S = 0.05


async def main(name: str, endpoints: list[str]) -> None:
    async with Client(endpoints, timeout_s=20.0) as client:
        while True:
            with contextlib.suppress(LockLost):
                async with client.lock("resource", ttl_s=TTL_S) as lock:
                    value = f"{lock.token} {name}".encode()
                    for _ in range(random.randrange(1, WRITES)):
                        with contextlib.suppress(DengineError):
                            done = await client.txn([lock.guard], [Put("resource", value)])
                            if not done.succeeded:
                                await client.put(f"refused/{name}", value)
                                break
                        # It does not ask whether it still holds the lock: the guard has to.
                        await asyncio.sleep(PAUSE_S)
            await asyncio.sleep(PAUSE_S)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
