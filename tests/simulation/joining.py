"""A joiner's errand, as dengine.node.joining.join: HTTP is left out, the requests are the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from dengine.errors import DengineError, IdentityError, JoinError

if TYPE_CHECKING:
    from tests.simulation.machine import Process

ATTEMPT_S = 1.0


async def join(
    request: dict[str, Any],
    addresses: Callable[[], Iterable[str]],
    joined: Callable[[dict[str, Any]], bool],
    secrets: object,
) -> None:
    """Ask to be let in until `joined` says that it is done. Raises IdentityError."""
    loop: Any = asyncio.get_running_loop()
    me: Process = loop.process
    world = me.machine.world
    while not joined({}):
        for address in addresses():
            machine = world.machine_at(address)
            if machine is None or machine.process is None or not machine.process.serves:
                continue
            world.durability.says(
                me.machine, int(request["incarnation"], 16), request["cluster_id"]
            )
            answer: asyncio.Future[dict[str, Any]] = loop.create_future()
            network = world.network
            if network.up(me.machine.id, machine.id):
                network.sure(
                    me.machine.id, machine.id, _ask, me, machine.process, dict(request), answer
                )
            try:
                async with asyncio.timeout(ATTEMPT_S):
                    accepted = await answer
            except TimeoutError:
                continue
            except JoinError as error:
                if error.details.get("removed"):
                    raise IdentityError(error.message) from None
                continue
            except DengineError:
                continue
            joined(accepted)
            break
        await asyncio.sleep(world.rng.uniform(0.02, 0.2))


def _ask(me: Process, other: Process, request: dict[str, Any], answer: Any) -> None:
    """At the node that was asked."""
    world = me.machine.world

    def reply(task: Any) -> None:
        error = None if task.cancelled() else task.exception()
        result = None if task.cancelled() or error else task.result()
        if not task.cancelled() and world.network.up(other.machine.id, me.machine.id):
            world.network.sure(other.machine.id, me.machine.id, me.arrived, take, error, result)

    def take(error: Exception | None, result: dict[str, Any] | None) -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)

    def serve() -> None:
        assert other.node is not None
        deadline = other.loop.time() + ATTEMPT_S
        coro = other.node.join(request, me.machine.host, deadline)
        other.loop.create_task(coro).add_done_callback(reply)

    other.arrived(serve)
