"""What operators do while faults go on: transfers, growth, new nodes in the place of others."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Collection, Sequence

from tests.nemesis.client import Unanswered, call
from tests.nemesis.faults import OPERATION_S, Band, Faults, names
from tests.nemesis.nodes import READY_S, Node, holds_within
from tests.nemesis.plan import Action

REMOVED = 76
TRANSFERRED_S = 3.0
JOIN = "join"  # the growth that makes a shape; it is in no schedule


async def transfer(faults: Faults, action: Action) -> None:
    """It counts when another node leads because of it."""
    target = (await faults.hit(action))[0].id
    asked = random.Random(action.dice).choice(faults.nodes.wanted()).id
    before = await faults.nodes.leader()

    async def transferred() -> bool:
        return await faults.nodes.leader() == target

    whom = f"to node {target}, by node {asked}"
    with faults.band(action, whom) as band, contextlib.suppress(Unanswered):
        await call(asked, "POST", "/v1/cluster/leader", {"id": target})
        if before not in (None, target):
            band.effective = await holds_within(transferred, TRANSFERRED_S)


def grow(faults: Faults, joiners: Sequence[int]) -> None:
    """These nodes are started with empty directories, and will vote."""
    faults.drawn[JOIN] += 1

    async def growing() -> None:
        with faults.open_band(JOIN, str(list(joiners))) as band:
            async with faults.operating:
                faults.say(f"nodes {list(joiners)} join")
                for node_id in joiners:
                    faults.nodes.all[node_id].wanted = True
                faults.nodes.voters |= set(joiners)
            await until_they_vote(faults, band, joiners)

    faults.operate(growing())


async def until_they_vote(faults: Faults, band: Band, ids: Collection[int]) -> None:
    """It is an effect that they do; whether that comes in time is judged when all is healed."""

    async def voting() -> bool:
        return set(ids) <= await faults.nodes.voting()

    band.effective = await holds_within(voting, OPERATION_S)


async def replace(faults: Faults, action: Action) -> None:
    """A node is removed for good and a new one joins. Faults go on meanwhile."""
    faults.operate(replaced(faults, action))


async def replaced(faults: Faults, action: Action) -> None:
    nodes = faults.nodes
    async with faults.operating:
        if not nodes.spares:
            return faults.skip(action, "no id is left")
        old = await removable(faults, action)
        if old is None:
            return faults.skip(action, "a damaged node could become more than a minority")
        new = nodes.all[nodes.spares.pop(0)]
        with faults.band(action, f"node {old.id} by node {new.id}") as band:
            with old.excuse((REMOVED,), "it is removed"):
                removed = await nodes.wait(
                    lambda: remove(faults, old.id), f"node {old.id} to be removed", OPERATION_S
                )
                if not removed:
                    return
                old.wanted = False
                nodes.voters.discard(old.id)
                faults.budget.forget(old.id)

                async def gone() -> bool:
                    return not old.up

                await holds_within(gone, action.seconds)
                old.kill("it is removed, and never heard of it")
                old.notice()
            nodes.will_join(new)
            nodes.voters.add(new.id)
            new.wanted = True
            await until_they_vote(faults, band, [new.id])


async def removable(faults: Faults, action: Action) -> Node | None:
    """Whom it hits, or else a node that is damaged already."""
    every = {node.id: node for node in faults.nodes.wanted()}
    wished = [node.id for node in await faults.hit(action)]
    for node_id in (*wished, *sorted(faults.budget.damaged())):
        if node_id in every and faults.budget.may_remove(faults.nodes.voters, node_id):
            return every[node_id]
    return None


async def remove(faults: Faults, node_id: int) -> bool:
    """One try through every node in turn."""
    for node in faults.nodes.wanted():
        with contextlib.suppress(Unanswered):
            await call(node.id, "DELETE", f"/v1/cluster/members/{node_id}", timeout_s=6.0)
            return True
    return False


async def wipe_and_join(faults: Faults, action: Action) -> None:
    """A new disk: the id comes back as another member, in the place of the lost one."""
    hit = await faults.damageable(action)
    if not hit:
        return faults.skip(action, "more than a minority would be damaged")
    node, before = hit[0], hit[0].incarnation()
    with faults.band(action, names([node])) as band:
        with node.down():
            await asyncio.sleep(action.seconds)
            faults.nodes.wipe(node)
        whole = await faults.nodes.wait(
            faults.nodes.whole, f"node {node.id} to be replaced", READY_S
        )
        band.effective = whole and node.incarnation() not in ("", before)


FAULTS = {"transfer": transfer, "replace": replace, "wipe and join": wipe_and_join}
