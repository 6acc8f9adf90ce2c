"""A joiner's errand: ask every address it knows, again and again, until the cluster has it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from typing import Any

import aiohttp
import orjson

from dengine.errors import IdentityError
from dengine.node.stream import explain
from dengine.security import REPLY_HEADER, Secrets

log = logging.getLogger("dengine.join")

ATTEMPT_TIMEOUT_S = 5.0
ANSWER_SHARE = 0.8  # of it is for the node that is asked, so that its own reason arrives in time
PAUSE_S_MIN, PAUSE_S_MAX = 0.1, 2.0
REPORT_EVERY_S = 10.0
NOBODY_TO_ASK = "no other node is known: name one or more members in cluster.initial_cluster"
TARGET = "/v1/cluster/members"


class NotAuthenticated(Exception):
    """The other side did not prove that it knows the peer secret."""


async def join(
    request: dict[str, Any],
    addresses: Callable[[], Iterable[str]],
    joined: Callable[[dict[str, Any]], bool],
    secrets: Secrets,
) -> None:
    """Ask to be let in until `joined` says that it is done.

    Args:
        request: the body of POST /v1/cluster/members.
        addresses: whom to ask, in order; read anew for every round.
        joined: takes an accepting answer, and is asked with {} before every round; True ends.
        secrets: the token or the peer secret, where the cluster asks for one.

    Raises:
        IdentityError: the cluster says that this id can never join.
    """
    loop = asyncio.get_running_loop()
    pause_s = PAUSE_S_MIN
    next_report = loop.time() + REPORT_EVERY_S
    timeout = aiohttp.ClientTimeout(total=ATTEMPT_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while not joined({}):
            known = list(addresses())
            failures = [] if known else [NOBODY_TO_ASK]
            for address in known:
                failure = await _ask(session, address, request, joined, secrets)
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
    secrets: Secrets,
) -> str | None:
    """One request to one address; why it failed, or None."""
    try:
        status, text = await _exchange(session, address, orjson.dumps(request), secrets)
        body = orjson.loads(text)
    except NotAuthenticated as error:
        return str(error)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return explain(error)
    if not isinstance(body, dict):
        return "not a dengine node: its answer is no JSON object"
    if status != 200:
        if body.get("removed"):
            raise IdentityError(str(body.get("message")))
        return str(body.get("message", f"HTTP {status}"))
    if not isinstance(body.get("cluster_id"), str):
        return "not a dengine node: its answer names no cluster"
    joined(body)
    return None


async def _exchange(
    session: aiohttp.ClientSession, address: str, body: bytes, secrets: Secrets
) -> tuple[int, bytes]:
    """Status and body of one request, with the token or, where there is one, the peer secret.

    With a peer secret the first request is empty: who we are is for those who know it as well, and
    what the answer says counts only from them.

    Raises:
        NotAuthenticated: that node has no peer secret, or another one.
        TimeoutError, aiohttp.ClientError: no answer.
    """
    url = f"http://{address}{TARGET}"
    answer_ms = int(ANSWER_SHARE * ATTEMPT_TIMEOUT_S * 1000)
    headers = {"Content-Type": "application/json", "Dengine-Timeout-Ms": str(answer_ms)}
    if secrets.peer is None:
        if secrets.token is not None:
            headers["Authorization"] = f"Bearer {secrets.token}"
        async with session.post(url, data=body, headers=headers) as reply:
            return reply.status, await reply.read()
    async with session.post(url, data=b"{}", headers=headers) as asked:
        challenges = asked.headers.getall("WWW-Authenticate", [])
    answer = secrets.peer.answer(challenges, "POST", TARGET, body)
    if answer is None:
        raise NotAuthenticated("not authenticated: that node asks for no peer secret")
    headers["Authorization"] = answer.header
    async with session.post(url, data=body, headers=headers) as reply:
        text = await reply.read()
        given = reply.headers.get(REPLY_HEADER, "")
        if not answer.confirmed_by(given, secrets.peer, reply.status, text):
            raise NotAuthenticated(
                "not authenticated: security.peer_secret_file must hold the same on every node"
            )
        return reply.status, text
