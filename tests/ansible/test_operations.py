"""The playbooks of every day, on three nodes of this machine."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.ansible.local import Local
from tests.cluster import wait_for

pytestmark = [pytest.mark.playbooks, pytest.mark.timeout(900)]


def test_the_life_of_a_cluster(site: Local) -> None:
    """Verify, drift, backup, switchover, rolling restart, diagnose, destroy do what they say,
    one after the other on one cluster."""
    site.play("expand").ok()
    assert site.play("verify").ok().changed == {"n1": 0, "n2": 0, "n3": 0}

    config = site.state / "hosts" / "n2" / "dengine.toml"
    was = config.read_text()
    config.write_text(was.replace("az-b", "az-x"))
    assert "The configuration is that of the inventory" in site.play("verify").failed().output
    config.write_text(was)

    site.play("backup").ok()
    (copy,) = (site.state / "backups").glob("*.dsnap")
    assert not list((site.state / "hosts" / "n1" / "backups").iterdir()), "the leader was spared"
    site.set_group(dengine_backup_same_disk=False)
    group = site.inventory / "group_vars" / "dengine.yml"
    group.write_text(group.read_text().replace("dengine_backup_same_disk: true\n", ""))
    assert "is on the disk that holds the data" in site.play("backup").failed().output

    site.play("switchover", "-e", "dengine_leader=3").ok()
    assert site.get("n1", "/v1/cluster")["leader"]["id"] == 3
    assert not any(site.play("switchover", "-e", "dengine_leader=3").ok().changed.values())
    assert "leads; before it was node 3" in site.play("switchover").ok().output

    before = {host: site.pid(host) for host in site.hosts}
    leader = site.get("n1", "/v1/cluster")["leader"]["id"]
    said = site.play("rolling_restart").ok().output
    assert all(site.pid(host) != pid for host, pid in before.items())
    order = [line for line in said.splitlines() if "Run the node as a process" in line]
    assert len(order) == 3
    assert site.get("n1", "/v1/cluster")["leader"]["id"] != leader
    site.play("verify").ok()

    secrets = site.secrets
    site.play("diagnose").ok()
    for host in site.hosts:
        text = (site.state / "diagnose" / f"{host}.json").read_text()
        assert json.loads(text)["cluster"]["members"]
        assert not any(secret in text for secret in secrets.values())

    assert "-e dengine_confirm=local" in site.play("destroy").failed().output
    assert len(site.node_pids()) == 3
    site.play("destroy", "-e", "dengine_confirm=local").ok()
    assert site.node_pids() == []
    assert not Path(site.data("n1")).exists()
    assert not (site.state / "secrets.json").exists()
    assert copy.exists(), "backups stay"


def lose(site: Local, host: str) -> None:
    """The node is killed, and nobody reaches its host any more."""
    os.kill(site.pid(host), signal.SIGKILL)
    site.set_host(host, ansible_connection="ssh", ansible_host="127.0.0.1", ansible_port=1)
    wait_for(lambda: len(site.node_pids()) == 2, f"{host} to be gone")


def test_one_dead_host_of_three(site: Local) -> None:
    """Backup and switchover work, the latter never towards it; verify reports it, and destroy does
    not leave it behind without being told to."""
    site.play("expand").ok()
    lose(site, "n3")
    site.play("backup").ok()
    assert len(list((site.state / "hosts" / "n2" / "backups").glob("*.dsnap"))) == 1
    run = site.play("switchover", "-e", "dengine_leader=3").failed()
    assert "Who takes over is well" in run.output
    assert site.get("n1", "/v1/cluster")["leader"]["id"] == 1
    assert "node 2 leads" in site.play("switchover").ok().output

    site.play("verify").failed()
    assert "n3" in "".join(site.report("verify")["problems"])
    assert site.report("verify")["facts"]["keys compared"] == 3

    name = ("-e", "dengine_confirm=local")
    assert "n3 cannot be reached" in site.play("destroy", *name).failed().output
    site.play("destroy", *name, "-e", '{"destroy_without_unreachable": true}').ok()
    assert site.node_pids() == []
    assert [host for host in site.hosts if site.data(host).exists()] == ["n3"]


def test_destroy_leaves_another_clusters_data_alone(site: Local) -> None:
    """It is found by the cluster's id, also when it is the directory of another node."""
    site.play("site").ok()
    foreign = site.data("n3")
    foreign.mkdir(parents=True)
    identity = json.loads((site.data("n1") / "identity.json").read_text())
    identity |= {"node_id": 7, "cluster_id": "f" * 32}
    (foreign / "identity.json").write_text(json.dumps(identity))
    run = site.play("destroy", "-e", "dengine_confirm=local").failed()
    assert "is of 2 clusters" in run.output
    assert (foreign / "identity.json").exists()
    assert site.voters() == [1]


def test_verify_collects_all_that_is_wrong_and_leaves_no_older_report(site: Local) -> None:
    """A wrong file here, a dead node there: both are in the report, and check mode finds them. A
    run that cannot even begin leaves no report that says "Verified."."""
    site.play("expand").ok()
    site.play("verify", "--check").ok()
    site.play("verify").ok()
    assert site.report("verify")["verdict"] == "Verified."
    site.play("verify", "--limit", "n1").failed("n1")
    assert site.report("verify")["verdict"] == "NOT as it should be."
    assert "--limit is refused" in "".join(site.report("verify")["problems"])
    config = site.state / "hosts" / "n2" / "dengine.toml"
    was = config.read_text()
    config.write_text(was.replace("az-b", "az-x"))
    os.kill(site.pid("n3"), signal.SIGKILL)
    wait_for(lambda: len(site.node_pids()) == 2, "node 3 to be gone")
    site.play("verify", "--check").failed()
    assert site.play("verify").failed()
    report = site.report("verify")
    assert report["verdict"] == "NOT as it should be."
    text = "\n".join(report["problems"])
    assert "n2: the configuration is not that of the inventory" in text
    assert f"{site.endpoint('n3')}: Connection refused" in text
    assert report["facts"]["keys compared"] == 3, "the other two are compared all the same"


def test_verify_counts_the_voters_of_the_inventory(site: Local) -> None:
    """One voter of three hosts is a cluster that has shrunk, unless it was asked for."""
    site.play("site").ok()
    assert "sees the voters [1], not [1, 2, 3]" in site.play("verify").failed().output
    site.play("verify", "-e", "dengine_verify_voters=1").ok()


def test_a_single_voter_is_not_restarted_by_accident(site: Local) -> None:
    site.play("site").ok()
    pid = site.pid("n1")
    assert "A single voter cannot be restarted" in site.play("rolling_restart").failed().output
    assert site.pid("n1") == pid
    site.play("rolling_restart", "-e", '{"rolling_allow_downtime": true}').ok()
    wait_for(lambda: site.voters() == [1], "the node to be back")
    assert site.pid("n1") != pid


def test_a_node_that_was_stopped_comes_back_under_another_address(site: Local) -> None:
    """The inventory says where it is now, and one run of expand.yml makes it so."""
    site.play("expand").ok()
    os.kill(site.pid("n3"), signal.SIGTERM)
    wait_for(lambda: len(site.node_pids()) == 2, "node 3 to stop")
    site.set_host("n3", dengine_port=site.base + 7)
    site.play("expand").ok()
    wait_for(
        lambda: (
            {m["id"]: m["address"] for m in site.get("n1", "/v1/cluster")["members"]}[3]
            == f"127.0.0.1:{site.base + 7}"
        ),
        "the new address to be committed",
    )
    assert site.voters() == [1, 2, 3]
