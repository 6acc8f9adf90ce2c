"""The same calls through a node that is not the leader: same answers, same refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.raw import Wire, assert_error, wire
from tests.cluster import Cluster, ServeProcess, static_cluster, wait_for


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServeProcess, ServeProcess]]:
    """Leader and a follower of a cluster of three."""
    with Cluster(tmp_path_factory.mktemp("three")) as cluster:
        static_cluster(cluster, 1, 2, 3)
        leader = cluster.wait_leader()
        yield leader, next(n for n in cluster.nodes.values() if n is not leader)
        print(cluster.describe())
        for node in cluster.nodes.values():
            assert "Traceback" not in node.output(), node.tail()


@pytest.fixture
def leader(pair: tuple[ServeProcess, ServeProcess]) -> Iterator[Wire]:
    with wire(pair[0]) as connection:
        yield connection


@pytest.fixture
def follower(pair: tuple[ServeProcess, ServeProcess]) -> Iterator[Wire]:
    with wire(pair[1]) as connection:
        yield connection


def test_writes_and_their_conditions_through_a_follower(leader: Wire, follower: Wire) -> None:
    written = follower.request("PUT", "/v1/kv/through", b"one")
    revision = written.json()["revision"]
    assert leader.request("GET", "/v1/kv/through").body == b"one"
    stale = follower.request("PUT", "/v1/kv/through", b"two", 'If-Match: "987654"\r\n')
    assert assert_error(stale, 412, "precondition_failed")["current_revision"] == revision
    assert follower.request("DELETE", "/v1/kv?prefix=thr").json()["deleted"] == 1
    assert_error(leader.request("GET", "/v1/kv/through"), 404, "key_not_found")


@pytest.mark.parametrize("number", range(10))
def test_a_follower_reads_what_was_just_written(leader: Wire, follower: Wire, number: int) -> None:
    """A linearizable read sees every write acknowledged before it, on any node."""
    value = str(number).encode()
    assert leader.request("PUT", "/v1/kv/fresh", value).status == 200
    assert follower.request("GET", "/v1/kv/fresh").body == value
    page = follower.request("GET", "/v1/kv?prefix=fresh").json()
    assert page["items"][0]["value"] == str(number)


def test_a_follower_is_a_replica_and_says_who_leads(
    pair: tuple[ServeProcess, ServeProcess], leader: Wire, follower: Wire
) -> None:
    for path in ("/replica", "/replica?lag=1000", "/readyz", "/livez"):
        assert follower.request("GET", path).status == 200
    refused = follower.request("GET", "/leader")
    error = assert_error(refused, 503, "not_leader")
    assert (error["code"], error["retryable"], refused.headers["retry-after"]) == (4001, True, "1")
    assert error["leader"] == {"id": pair[0].node_id, "address": f"127.0.0.1:{pair[0].port}"}
    assert leader.request("GET", "/leader").status == 200
    assert leader.request("GET", "/replica").status == 503


def test_both_nodes_show_the_same_cluster(
    pair: tuple[ServeProcess, ServeProcess], leader: Wire, follower: Wire
) -> None:
    wait_for(lambda: pair[0].cluster()["fault_tolerance"] == 1, "all to have answered the leader")
    ours, theirs = (w.request("GET", "/v1/cluster").json() for w in (leader, follower))
    for name in ("cluster_id", "leader", "term", "settings", "joint", "fault_tolerance"):
        assert ours[name] == theirs[name]
    assert sorted(m["role"] for m in theirs["members"]) == ["follower", "follower", "leader"]
    assert theirs["fault_tolerance"] == 1


def metrics(node: ServeProcess) -> dict[str, float]:
    """Every sample of /metrics by its name with labels."""
    text = node.request("GET", "/metrics").body.decode()
    samples = [line.rpartition(" ") for line in text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, _, value in samples}


def test_metrics_of_a_leader_and_a_follower(pair: tuple[ServeProcess, ServeProcess]) -> None:
    """Dashboards and alerts rely on these names. Only the leader knows how far the others are."""
    leader, follower = pair
    before = metrics(leader)
    for number in range(10):
        assert leader.put(f"metric/{number}", "value").ok
    status = leader.status()
    peers = sorted({1, 2, 3} - {leader.node_id})

    def level() -> bool:
        return all(metrics(leader)[f'dengine_peer_lag_entries{{peer="{i}"}}'] == 0 for i in peers)

    wait_for(level, "the followers to have it all")
    now = metrics(leader)
    roles = {role: now[f'dengine_role{{role="{role}"}}'] for role in ("leader", "follower")}
    assert roles == {"leader": 1, "follower": 0}
    assert {'dengine_role{role="candidate"}', 'dengine_role{role="learner"}'} <= set(now)
    assert now["dengine_term"] == status["term"]
    assert now["dengine_commit_index"] == now["dengine_applied_index"] >= status["commit_index"]
    for peer in peers:
        assert now[f'dengine_peer_match_index{{peer="{peer}"}}'] == now["dengine_commit_index"]
    assert now["dengine_proposals_total"] == before["dengine_proposals_total"] + 10
    assert now["dengine_log_fsync_seconds_count"] > before["dengine_log_fsync_seconds_count"]
    assert now["dengine_log_fsync_seconds_sum"] > before["dengine_log_fsync_seconds_sum"]
    assert (
        now['dengine_log_fsync_seconds_bucket{le="+Inf"}']
        == (now["dengine_log_fsync_seconds_count"])
    )
    assert now['dengine_request_seconds_count{route="PUT /v1/kv/{key}"}'] >= 10
    theirs = metrics(follower)
    assert theirs['dengine_role{role="follower"}'] == 1
    assert not [name for name in theirs if name.startswith("dengine_peer_")]


def test_membership_calls_through_a_follower(leader: Wire, follower: Wire) -> None:
    changed = follower.json("PUT", "/v1/cluster/settings", {"promotion": "odd"})
    assert changed.status == 200, changed
    assert leader.request("GET", "/v1/cluster").json()["settings"]["promotion"] == "odd"
    assert_error(follower.json("POST", "/v1/cluster/leader", {"id": 9}), 404, "not_found")
