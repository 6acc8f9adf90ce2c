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
    from dengine.client.leases import Lease as Lease
    from dengine.client.locks import Lock as Lock
    from dengine.client.types import Change as Change
    from dengine.client.types import ClientClosed as ClientClosed
    from dengine.client.types import Compare as Compare
    from dengine.client.types import Delete as Delete
    from dengine.client.types import DeleteRange as DeleteRange
    from dengine.client.types import DeleteResult as DeleteResult
    from dengine.client.types import Event as Event
    from dengine.client.types import Get as Get
    from dengine.client.types import Item as Item
    from dengine.client.types import LeaseInfo as LeaseInfo
    from dengine.client.types import LeaseLost as LeaseLost
    from dengine.client.types import Listing as Listing
    from dengine.client.types import LockLost as LockLost
    from dengine.client.types import Page as Page
    from dengine.client.types import Put as Put
    from dengine.client.types import PutResult as PutResult
    from dengine.client.types import TxnResult as TxnResult
    from dengine.client.types import Value as Value
    from dengine.client.watching import Watch as Watch

_MODULES = {
    "client": ("Client",),
    "elections": ("Election", "Leader"),
    "leases": ("Lease",),
    "locks": ("Lock",),
    "types": (
        *("ClientClosed", "LeaseLost", "LockLost"),
        *("Compare", "Delete", "DeleteRange", "Get", "Put"),
        *("Change", "DeleteResult", "Event", "Item", "LeaseInfo", "Listing", "Page", "PutResult"),
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
