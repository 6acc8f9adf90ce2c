"""Fixtures of the playbooks' tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ansible.local import Local, local

FULL = bool(os.environ.get("DENGINE_ANSIBLE_FULL"))  # `make ansible-full`


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: only in `make ansible-full`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long is left out of `make test`, and is not called skipped."""
    left_out = [item for item in items if item.get_closest_marker("full") and not FULL]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Local]:
    with local(tmp_path) as found:
        yield found
