"""A counter that survives its app and, with two more of it, the loss of any one.

`python app.py`: a cluster of one inside this process, without a port.
`python app.py 1`: one of three; start 1, 2 and 3, in a terminal each.
"""

import asyncio
import contextlib
import sys

import dengine
from dengine.client import Compare, Put
from dengine.errors import DengineError

ADDRESSES = {1: "127.0.0.1:9081", 2: "127.0.0.1:9082", 3: "127.0.0.1:9083"}
SETTINGS = {"raft.membership.promotion": "odd"}  # from one voter to three: two tolerate no failure


def engine_of(node_id: int | None) -> dengine.Engine:
    """Number 1 goes on with what it has counted alone; the others join it."""
    if node_id is None:
        return dengine.Engine("db", settings=SETTINGS)
    own = ADDRESSES[node_id]
    if node_id == 1:
        return dengine.Engine("db", node_id=1, listen_address=own, settings=SETTINGS)
    first = {1: ADDRESSES[1]}
    return dengine.Engine(
        "db", node_id=node_id, listen_address=own, initial_cluster=first, join=True
    )


async def count(engine: dengine.Engine) -> None:
    """Add one, also when others do so at the same moment: whoever is late reads again."""
    done = False
    while not done:
        found = await engine.get("count")
        before, revision = (0, 0) if found is None else (int(found.value), found.mod_revision)
        unchanged = Compare("count", "mod_revision", "=", revision)
        done = (await engine.txn([unchanged], [Put("count", b"%d" % (before + 1))])).succeeded


async def tell_changes(engine: dengine.Engine) -> None:
    async for change in engine.watch("count"):
        for event in change.events:
            print("count:", event.value.decode() if event.value else "gone", flush=True)


async def tell_leader(engine: dengine.Engine) -> None:
    async for now in engine.leadership():
        print("leader:", "this one" if now.is_leader else now.leader, flush=True)


async def main(node_id: int | None) -> None:
    async with engine_of(node_id) as engine, asyncio.TaskGroup() as tasks:
        await engine.wait_ready()
        tasks.create_task(tell_changes(engine))
        tasks.create_task(tell_leader(engine))
        while True:
            try:
                await count(engine)
            except DengineError as error:
                if not error.retryable:
                    raise
                print("not counted:", error.message, flush=True)  # there is no majority now
            await asyncio.sleep(1)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # which leaves the engine in good order
        asyncio.run(main(int(sys.argv[1]) if sys.argv[1:] else None))
