from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.raw import Wire, wire
from tests.cluster import Cluster, ServeProcess, config_text, free_port, wait_for


def start_node(cluster: Cluster, extra: str = "") -> ServeProcess:
    """A ready single node with `extra` lines of configuration."""
    port = free_port()
    node = cluster.node(1, config_text(1, {1: port}, 2, 2, extra), port).start()
    wait_for(node.ready, "the node to be ready")
    return node


@pytest.fixture(scope="session")
def shared_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    with Cluster(tmp_path_factory.mktemp("node")) as cluster:
        yield start_node(cluster)
        print(cluster.describe())


@pytest.fixture
def node(shared_node: ServeProcess) -> Iterator[ServeProcess]:
    """One node for all tests of this directory: whatever a test does to it, it lives on, serves
    the next request, and never printed a traceback."""
    yield shared_node
    assert shared_node.running, shared_node.tail()
    assert shared_node.request("GET", "/readyz").status == 200
    assert "Traceback" not in shared_node.output(), shared_node.tail()


@pytest.fixture
def client(node: ServeProcess) -> Iterator[Wire]:
    """A raw connection to the node."""
    with wire(node) as connection:
        yield connection


@pytest.fixture(scope="session")
def small_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """A node with limits small enough to be reached."""
    limits = "[limits]\nrange_delete = 5\nwatchers = 2\npending_writes = 8\n"
    with Cluster(tmp_path_factory.mktemp("small")) as cluster:
        yield start_node(cluster, limits)
        print(cluster.describe())
