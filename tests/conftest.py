"""What all tests share: the order of the layers, and how random tests report."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

# The lowest layer first: a broken quorum function is easier to read than a broken cluster.
LAYERS = ("raft", "kv", "storage", "node", "api", "integration", "lab")

# The machine is shared, so time per example means nothing; a failure prints how to repeat it.
hypothesis.settings.register_profile("dengine", deadline=None, print_blob=True)
hypothesis.settings.load_profile("dengine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests/*.py first, then the layers from the bottom to the top."""
    here = Path(__file__).parent

    def rank(item: pytest.Item) -> int:
        top = item.path.relative_to(here).parts[0]
        return LAYERS.index(top) + 1 if top in LAYERS else 0

    items.sort(key=rank)
