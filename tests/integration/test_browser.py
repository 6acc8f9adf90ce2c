"""A page follows keys with the browser's own `EventSource`: a real browser beside a real node."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.cluster import Cluster, ServeProcess, config_text, free_port, wait_for

BROWSER = "chromium-headless-shell"
DEADLINE_S = 60.0
PATH = "/v1/openapi.json"  # any page of the node: its scripts may follow what that node tells
LOADED = "`${location.pathname} ${document.readyState}`"
FOLLOW = """
    window.seen = []; window.words = [];
    window.source = new EventSource('/v1/watch?prefix=page/&from_revision=1');
    source.addEventListener('change', message => {
        const change = JSON.parse(message.data);
        for (const event of change.events) seen.push([message.lastEventId, event.key, event.value]);
    });
    source.addEventListener('progress', () => words.push('progress'));
    source.onopen = () => words.push('open');
    source.onerror = () => words.push(source.readyState === EventSource.CLOSED ? 'over' : 'again');
"""


class Page:
    """One page, told what to do over the DevTools protocol."""

    def __init__(self, connection: aiohttp.ClientWebSocketResponse) -> None:
        self._connection = connection
        self._ids = itertools.count(1)

    async def command(self, method: str, **params: object) -> dict[str, Any]:
        number = next(self._ids)
        await self._connection.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._connection.receive_json(timeout=DEADLINE_S)
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    async def run(self, script: str) -> Any:
        """The value of the script's last expression."""
        done = await self.command("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    async def wait(self, script: str, wanted: object) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + DEADLINE_S
        while (found := await self.run(script)) != wanted:
            assert loop.time() < until, f"{script} is {found!r}, not {wanted!r}"
            await asyncio.sleep(0.05)


@asynccontextmanager
async def page_of(url: str, directory: Path) -> AsyncIterator[Page]:
    """A browser with nothing but the page at `url`."""
    browser = shutil.which(BROWSER)
    if browser is None:
        pytest.skip(f"{BROWSER} is not installed")
    process = await asyncio.create_subprocess_exec(
        browser,
        "--no-sandbox",  # which root cannot have
        "--remote-debugging-port=0",  # any that is free
        f"--user-data-dir={directory}",
        url,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "HOME": str(directory)},
    )
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(await _address_of_page(session, directory)) as connection,
        ):
            yield Page(connection)
    finally:
        process.terminate()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _address_of_page(session: aiohttp.ClientSession, directory: Path) -> str:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            await asyncio.sleep(0.05)
            try:
                port = int((directory / "DevToolsActivePort").read_text().split()[0])
                async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                    pages = [p for p in await reply.json() if p["type"] == "page"]
            except (OSError, IndexError, aiohttp.ClientError):  # not there, not written, not yet up
                continue
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])


def started(cluster: Cluster, extra: str = "") -> ServeProcess:
    port = free_port()
    node = cluster.node(1, config_text(1, {1: port}, 2, 2, extra), port).start()
    wait_for(node.ready, "the node to be ready")
    return node


def test_an_event_source_goes_on_by_itself_where_it_was(cluster: Cluster) -> None:
    """Nothing is lost and nothing comes twice, though the node ends, and is killed, meanwhile."""
    node = started(cluster)
    written: list[list[str]] = []

    def write(value: str) -> None:
        reply = node.put("page/a", value)
        written.append([str(reply.json()["revision"]), "page/a", value])
        node.put("elsewhere", value)

    async def scenario(directory: Path) -> None:
        async with page_of(f"http://127.0.0.1:{node.port}{PATH}", directory) as page:
            await page.wait(LOADED, f"{PATH} complete")
            write("before")
            await page.run(FOLLOW)
            await page.wait("seen", written)
            write("blue €")
            await page.wait("seen", written)
            for end in (node.stop, node.kill):
                end()
                await page.wait("words.includes('again')", True)
                await page.run("words.length = 0")
                node.start()
                wait_for(node.ready, "the node to be ready")
                write("while it was away, perhaps")
                await page.wait("seen", written)
                write("after")
                await page.wait("seen", written)
            assert await page.run("words.includes('over')") is False

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(scenario(Path(directory)))


def test_an_event_source_is_over_where_the_history_is(cluster: Cluster) -> None:
    """410 ends it for good, as README says, and the page can see that: it begins anew."""
    node = started(cluster, "[kv]\nhistory_revisions = 10\n")
    for n in range(20):
        assert node.put("page/a", str(n)).ok

    def is_cut() -> bool:
        return node.call("GET", "/v1/watch?prefix=page/&from_revision=1").status == 410

    wait_for(is_cut, "the history to be cut")

    async def scenario(directory: Path) -> None:
        async with page_of(f"http://127.0.0.1:{node.port}{PATH}", directory) as page:
            await page.wait(LOADED, f"{PATH} complete")
            await page.run(FOLLOW)
            await page.wait("words", ["over"])
            await page.run(FOLLOW.replace("&from_revision=1", ""))
            await page.wait("words", ["open", "progress"])
            revision = node.put("page/a", "new").json()["revision"]
            await page.wait("seen", [[str(revision), "page/a", "new"]])

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(scenario(Path(directory)))
