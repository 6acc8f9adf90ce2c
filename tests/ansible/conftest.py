"""Fixtures of the playbooks' tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ansible.local import Local, local


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Local]:
    with local(tmp_path) as found:
        yield found
