"""A disk with less free space than `limits.reserve_bytes`."""

from __future__ import annotations

from pathlib import Path

from tests.api.conftest import start_node
from tests.api.raw import assert_error, wire
from tests.cluster import Cluster, wait_for


def test_below_the_reserve_writes_are_refused_and_reads_go_on(tmp_path: Path) -> None:
    """507 before anything is proposed: nothing happened, and what is there stays readable."""
    with Cluster(tmp_path) as cluster:
        node = start_node(cluster)
        assert node.put("kept", "value").ok
        assert node.stop() == 0
        text = node.config.read_text(encoding="utf-8")
        node.config.write_text(f"{text}[limits]\nreserve_bytes = {2**50}\n", encoding="utf-8")
        node.start()
        wait_for(node.ready, "the node to be ready again")
        with wire(node) as client:
            before = client.request("GET", "/v1/status").json()["last_index"]
            for method, path in (
                ("PUT", "/v1/kv/new"),
                ("PUT", "/v1/kv/kept"),
                ("DELETE", "/v1/kv?prefix=k"),
            ):
                refused = client.request(method, path, b"other" if method == "PUT" else b"")
                error = assert_error(refused, 507, "disk_full")
                assert (error["code"], error["outcome"], error["retryable"]) == (3001, "none", True)
                assert "limits.reserve_bytes" in error["message"]
            for consistency in ("linearizable", "lease", "eventual"):
                target = f"/v1/kv/kept?consistency={consistency}"
                assert client.request("GET", target).body == b"value"
            assert client.request("GET", "/v1/kv?prefix=k").json()["count"] == 1
            assert client.request("GET", "/v1/status").json()["last_index"] == before
