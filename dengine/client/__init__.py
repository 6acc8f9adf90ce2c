"""The client library: `Client` for asyncio, `dengine.client.sync.Client` for everybody else.

It needs aiohttp and orjson and nothing of a node. What is named here is loaded when it is first
used, so that a program which needs only a part, as the command line does, does not wait for all.

    async with Client(["10.0.0.1:9081", "10.0.0.2:9081"]) as client:
        await client.put("config/color", b"blue")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dengine.client.client import Client as Client
    from dengine.client.elections import Election as Election
    from dengine.client.elections import Leader as Leader
    from dengine.client.failures import ClientClosed as ClientClosed
    from dengine.client.failures import LeaseLost as LeaseLost
    from dengine.client.failures import LockLost as LockLost
    from dengine.client.leases import Lease as Lease
    from dengine.client.listing import Listing as Listing
    from dengine.client.locks import Lock as Lock
    from dengine.client.operations import Compare as Compare
    from dengine.client.operations import Delete as Delete
    from dengine.client.operations import DeleteRange as DeleteRange
    from dengine.client.operations import Get as Get
    from dengine.client.operations import Put as Put
    from dengine.client.results import Change as Change
    from dengine.client.results import DeleteResult as DeleteResult
    from dengine.client.results import Event as Event
    from dengine.client.results import Item as Item
    from dengine.client.results import LeaseInfo as LeaseInfo
    from dengine.client.results import Page as Page
    from dengine.client.results import PutResult as PutResult
    from dengine.client.results import TxnResult as TxnResult
    from dengine.client.results import Value as Value
    from dengine.client.watching import Watch as Watch

_MODULES = {
    "client": ("Client",),
    "elections": ("Election", "Leader"),
    "failures": ("ClientClosed", "LeaseLost", "LockLost"),
    "leases": ("Lease",),
    "listing": ("Listing",),
    "locks": ("Lock",),
    "operations": ("Compare", "Delete", "DeleteRange", "Get", "Put"),
    "results": (
        *("Change", "DeleteResult", "Event", "Item", "LeaseInfo", "Page", "PutResult"),
        *("TxnResult", "Value"),
    ),
    "watching": ("Watch",),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_WHERE)
