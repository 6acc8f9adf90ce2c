"""Faults of the network: cut cables, and links that are slow, narrow or stuck."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from functools import partial

from tests.nemesis.faults import Faults, across, arrows
from tests.nemesis.links import Link
from tests.nemesis.machines import Pair
from tests.nemesis.plan import Action


async def cut_for(faults: Faults, action: Action, pairs: Iterable[Pair], whom: str) -> None:
    """It counts when a cut has kept a packet from somebody."""
    made = list(pairs)
    receivers = {target for _, target in made}
    with faults.band(action, whom) as band, faults.machines.cut(made):
        before = faults.machines.dropped(receivers)
        await asyncio.sleep(action.seconds)
        band.effective = faults.machines.dropped(receivers) > before


async def one_way_cut(faults: Faults, action: Action) -> None:
    pairs = await faults.pairs(action)
    await cut_for(faults, action, pairs, arrows(pairs))


async def two_way_cut(faults: Faults, action: Action) -> None:
    pairs = await faults.pairs(action)
    both = {*pairs, *((j, i) for i, j in pairs)}
    await cut_for(faults, action, both, arrows(sorted(both)))


async def bridge(faults: Faults, action: Action) -> None:
    """Two halves that only one node reaches both of."""
    middle = (await faults.hit(action))[0].id
    others = [node.id for node in faults.nodes.wanted() if node.id != middle]
    random.Random(action.dice).shuffle(others)
    half = others[: len(others) // 2]
    whom = f"{half} and {others[len(half) :]} over node {middle} only"
    await cut_for(faults, action, across(half, others[len(half) :]), whom)


async def isolate(faults: Faults, action: Action) -> None:
    inside = [node.id for node in await faults.hit(action)]
    outside = [node.id for node in faults.nodes.wanted() if node.id not in inside]
    await cut_for(faults, action, across(inside, outside), f"{inside} from {outside}")


async def isolate_majority(faults: Faults, action: Action) -> None:
    """Each of a majority is on its own: nobody can decide anything."""
    voting = sorted(faults.nodes.voters)
    leader = await faults.nodes.leader()
    voting.sort(key=lambda i: (i != leader) == (action.whom == "with leader"))
    alone = voting[: len(voting) // 2 + 1]
    everyone = [node.id for node in faults.nodes.wanted()]
    pairs = {pair for i in alone for pair in across([i], [j for j in everyone if j != i])}
    await cut_for(faults, action, pairs, f"each of {alone} from everybody")


async def on_links(faults: Faults, action: Action, change: Callable[[Link, float], None]) -> None:
    """It counts when one of the links that are hit had something to carry.

    Args:
        change: what is done to each of them; with 0, it is undone.
    """
    assert faults.links is not None, "a plan without proxies has no such fault"
    pairs = await faults.pairs(action)
    amount = f" ({action.amount:.0f})" if action.amount else ""
    links = [faults.links.between(*pair) for pair in pairs]
    with faults.band(action, arrows(pairs) + amount) as band:
        before = sum(link.touched for link in links)
        try:
            for link in links:
                change(link, action.amount or 1.0)
            await asyncio.sleep(action.seconds)
        finally:
            for link in links:
                change(link, 0.0)
            band.effective = sum(link.touched for link in links) > before


def slow(link: Link, delay_ms: float) -> None:
    """So much more in each direction, and up to as much again as jitter."""
    link.delay_ms = delay_ms


def narrow(link: Link, bytes_per_s: float) -> None:
    """No more than that."""
    link.bytes_per_s = bytes_per_s


def stick(link: Link, stuck: float) -> None:
    """Nothing arrives, and the sender's kernel thinks it does: no reset, no lost segment."""
    if stuck:
        link.open.clear()
    else:
        link.open.set()


FAULTS = {
    "one-way cut": one_way_cut,
    "two-way cut": two_way_cut,
    "bridge": bridge,
    "isolate": isolate,
    "isolate majority": isolate_majority,
    "slow links": partial(on_links, change=slow),
    "narrow links": partial(on_links, change=narrow),
    "stuck links": partial(on_links, change=stick),
}
