"""A joiner's errand: ask every address it knows, again and again, until the cluster has it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from typing import Any

import aiohttp

from dengine.errors import IdentityError

log = logging.getLogger("dengine.join")

ATTEMPT_TIMEOUT_S = 5.0
PAUSE_S_MIN, PAUSE_S_MAX = 0.1, 2.0
REPORT_EVERY_S = 10.0


async def join(
    request: dict[str, Any],
    addresses: Callable[[], Iterable[str]],
    joined: Callable[[dict[str, Any]], bool],
) -> None:
    """Ask to be let in until `joined` says that it is done.

    Args:
        request: the body of POST /v1/cluster/members.
        addresses: whom to ask, in order; read anew for every round.
        joined: takes an accepting answer, and is asked with {} before every round; True ends.

    Raises:
        IdentityError: the cluster says that this id can never join.
    """
    loop = asyncio.get_running_loop()
    pause_s = PAUSE_S_MIN
    next_report = loop.time() + REPORT_EVERY_S
    timeout = aiohttp.ClientTimeout(total=ATTEMPT_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while not joined({}):
            failures = []
            for address in addresses():
                failure = await _ask(session, address, request, joined)
                if failure is None:
                    pause_s = PAUSE_S_MAX  # accepted: what is left is to be caught up with
                    break
                failures.append(f"{address}: {failure}")
            if failures and loop.time() >= next_report:
                next_report = loop.time() + REPORT_EVERY_S
                log.warning("cannot join yet; %s", "; ".join(failures))
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, PAUSE_S_MAX)


async def _ask(
    session: aiohttp.ClientSession,
    address: str,
    request: dict[str, Any],
    joined: Callable[[dict[str, Any]], bool],
) -> str | None:
    """One request to one address; why it failed, or None."""
    try:
        async with session.post(f"http://{address}/v1/cluster/members", json=request) as response:
            body = await response.json(content_type=None)
    except TimeoutError:
        return "timed out"
    except aiohttp.ClientConnectorError as error:
        return error.os_error.strerror or "refused"
    except (aiohttp.ClientError, ValueError) as error:
        return str(error) or type(error).__name__
    if not isinstance(body, dict):
        return "not a dengine node: its answer is no JSON object"
    if response.status != 200:
        if body.get("removed"):
            raise IdentityError(str(body.get("message")))
        return str(body.get("message", f"HTTP {response.status}"))
    if not isinstance(body.get("cluster_id"), str):
        return "not a dengine node: its answer names no cluster"
    joined(body)
    return None
