"""An app with its own replicated store: a counter that survives the app, and news of it.

    python app.py                                  # founds a cluster of one
    python app.py --id 2 --port 9082 --join 1=127.0.0.1:9081      # another terminal: joins it
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import secrets

import dengine
from dengine.errors import DengineError
from dengine.kv.commands import Compare, Put, Txn
from dengine.node.watch_hub import Changes


async def count(engine: dengine.Engine) -> int:
    """Add one to the counter: read, compare and swap, again if somebody else was quicker.

    The key `once` makes each attempt safe to repeat, should its outcome not be known.
    """
    while True:
        found = await engine.get("counter")
        before, revision = (0, 0) if found is None else (int(found.value), found.mod_revision)
        unchanged = Compare(b"counter", "mod_revision", "=", revision)
        swap = Txn((unchanged,), (Put(b"counter", b"%d" % (before + 1)),), ())
        if (await engine.txn(swap, once=secrets.token_hex(16))).succeeded:
            return before + 1


async def tell(engine: dengine.Engine) -> None:
    """Print every change of the counter, whichever node made it."""
    async with contextlib.aclosing(await engine.watch(key="counter")) as watch:
        async for message in watch:
            if isinstance(message, Changes):
                record = message.events[-1].record
                print("the counter is", record.value.decode() if record else "gone", flush=True)


async def main(engine: dengine.Engine) -> None:
    async with engine:
        await engine.wait_ready()
        print("ready;", "leading" if engine.is_leader else "following", flush=True)
        telling = asyncio.create_task(tell(engine))
        try:
            while True:
                try:
                    await count(engine)
                except DengineError as error:  # no majority just now, for example
                    print("not counted:", error.message, flush=True)
                await asyncio.sleep(1)
        finally:
            telling.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--id", type=int, default=1)
    parser.add_argument("--port", type=int, default=9081)
    parser.add_argument("--join", metavar="ID=HOST:PORT", action="append", default=[])
    asked = parser.parse_args()
    joined = dict(pair.split("=", 1) for pair in asked.join)
    node = dengine.Engine(
        "./data",
        node_id=asked.id,
        listen_address=f"127.0.0.1:{asked.port}",
        join={int(number): address for number, address in joined.items()},
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(node))
