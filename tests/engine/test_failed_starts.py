"""Starts that fail when the directory is open already: nothing of it stays locked."""

from __future__ import annotations

from pathlib import Path

import pytest
import uvloop

from dengine.engine import EngineClosed
from dengine.errors import DataCorruption, IdentityError, StorageIO
from dengine.node.node import Node
from dengine.storage.directory import DataDirectory
from tests.engine.apps import PATIENT_S, alone, on


def test_a_directory_that_was_removed_from_its_cluster(tmp_path: Path) -> None:
    """It is refused, and can be looked at, or deleted, while the app goes on."""

    async def app() -> None:
        async with alone(tmp_path) as engine:
            await engine.wait_ready(PATIENT_S)
            engine._embedded.node._directory.set_removed("by a person")
        for _ in range(2):
            with pytest.raises(IdentityError, match="was removed"):
                await alone(tmp_path).__aenter__()
        DataDirectory.open(tmp_path, 1).close()

    on(uvloop.new_event_loop, app)


def test_a_log_that_is_lost(tmp_path: Path) -> None:
    async def app() -> None:
        async with alone(tmp_path) as engine:
            await engine.put("k", b"v", timeout_s=PATIENT_S)
        for file in (tmp_path / "1" / "log").iterdir():
            file.unlink()
        for _ in range(2):
            with pytest.raises(DataCorruption):
                await alone(tmp_path).__aenter__()
        DataDirectory.open(tmp_path, 1).close()

    on(uvloop.new_event_loop, app)


def test_a_node_that_cannot_be_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log and state are closed: the next start may open them."""

    async def app() -> None:
        def refuse(_: Node) -> None:
            raise StorageIO("one file too many")

        with monkeypatch.context() as broken:
            broken.setattr(Node, "_build", refuse)
            with pytest.raises(StorageIO, match="one file too many"):
                await alone(tmp_path).__aenter__()
        async with alone(tmp_path) as engine:
            await engine.wait_ready(PATIENT_S)

    on(uvloop.new_event_loop, app)


def test_a_node_that_has_failed_leads_no_more(tmp_path: Path) -> None:
    """At once, before anything has had the time to end."""

    async def app() -> None:
        engine = alone(tmp_path)
        await engine.__aenter__()
        await engine.wait_ready(PATIENT_S)
        assert engine.is_leader
        engine._embedded.node.fail(StorageIO("the disk is gone"))
        assert not engine.is_leader
        assert not engine._embedded.node.readiness().ready
        with pytest.raises(EngineClosed):
            await engine.__aexit__(None, None, None)

    on(uvloop.new_event_loop, app)
