"""The playbooks of every day on three booted machines, while clients write."""

from __future__ import annotations

import json
import re

from tests.cluster import wait_for
from tests.lab.load import CONNECTIONS, WRITERS
from tests.lab.site import Grown, losses, missing, written

PATIENCE_S = 5.0


def test_a_rolling_restart_costs_no_write(grown: Grown) -> None:
    """Every node gets another process, one after the other, the leader last and after it has handed
    over; clients that try the next node lose nothing. They do so on a 503, where nobody listens,
    and where a node closed a connection, which each ends once, before it had read their request.
    What a node has read it answers."""
    site = grown.site
    n1 = site.machines[1]
    before = {i: machine.pid for i, machine in site.machines.items()}
    leader = n1.json("/v1/cluster")["leader"]["id"]
    load = site.load(patience_s=PATIENCE_S)
    try:
        count = written(n1)
        wait_for(lambda: written(n1) > count + 500, "the clients to write", 60)
        load.phase("restart")
        said = site.play("rolling_restart").ok().output
        found = load.end()
    finally:
        load.close()
    print(json.dumps(found["phases"]), "retries:", json.dumps(found["retries"]))
    assert found["failures"] == []
    for name, reasons in losses(found).items():
        assert set(reasons) <= {"refused", "closed"}, name
        assert reasons.get("closed", 0) <= WRITERS * CONNECTIONS, name
    assert missing(found, site.machines.values()) == []
    assert all(machine.pid != before[i] for i, machine in site.machines.items())
    order = re.findall(r"TASK \[Restart n(\d)\]", said)
    assert sorted(order) == ["1", "2", "3"]
    assert order[-1] == str(leader)
    # A node that is told to stop hands over by itself; this is about what comes before.
    first = rf"TASK \[[^\n]*Hand leadership over, where it is with node {leader}\] \*+\nchanged: "
    assert re.search(first, said), "the leader was not asked to hand over"
    assert n1.json("/v1/cluster")["leader"]["id"] != leader
    site.play("verify").ok()


def test_a_backup_comes_from_a_follower_and_can_be_read(grown: Grown) -> None:
    site = grown.site
    leader = site.machines[1].json("/v1/cluster")["leader"]["id"]
    before = set((site.state / "backups").glob("*.dsnap"))
    site.play("backup").ok()
    (copy,) = set((site.state / "backups").glob("*.dsnap")) - before
    holders = [
        i
        for i, machine in site.machines.items()
        if copy.name in machine.run("ls /var/backups/dengine")
    ]
    assert holders
    assert leader not in holders
    assert copy.stat().st_mode & 0o777 == 0o600


def test_switchover_moves_leadership_once(grown: Grown) -> None:
    site = grown.site
    leader = site.machines[1].json("/v1/cluster")["leader"]["id"]
    other = leader % 3 + 1
    site.play("switchover", "-e", f"dengine_leader={other}").ok()
    assert site.machines[1].json("/v1/cluster")["leader"]["id"] == other
    again = site.play("switchover", "-e", f"dengine_leader={other}").ok()
    assert not any(again.changed.values())


def test_any_host_may_die(grown: Grown) -> None:
    """kill -9 of the leader: another one within seconds, and systemd brings the node back."""
    site = grown.site
    leader = site.machines[1].json("/v1/cluster")["leader"]["id"]
    victim = site.machines[leader]
    witness = site.machines[leader % 3 + 1]
    pid = victim.pid
    victim.run(f"kill -KILL {pid}")
    wait_for(lambda: witness.request("PUT", "/v1/kv/after/the/kill", b"written").ok, "a write", 10)
    wait_for(lambda: victim.pid not in (0, pid), "another process", 15)
    wait_for(victim.ready, "the node to be ready again", 30)
    site.play("verify").ok()


def test_an_ordinary_user_finds_the_command(grown: Grown) -> None:
    """The configuration is not for everybody: who names an endpoint and a token does without."""
    for machine in grown.site.machines.values():
        machine.run("install -m 600 -o vagrant /etc/dengine/secrets/token /tmp/token")
        try:
            where = f"--endpoint {machine.address}:{machine.port} --token-file /tmp/token"
            said = machine.run(f"runuser -u vagrant -- dengine members {where}")
        finally:
            machine.run("rm /tmp/token")
        assert "leader" in said


def test_a_voter_that_lost_its_directory_stops_the_run(grown: Grown) -> None:
    """Its row names it and what to do, and nothing is changed."""
    n3 = grown.site.machines[3]
    n3.run("systemctl stop dengine; mv /var/lib/dengine/3 /var/lib/dengine/lost")
    try:
        run = grown.site.play("expand").failed()
        assert n3.attempt("systemctl is-active --quiet dengine").returncode != 0
    finally:
        n3.run("rm -rf /var/lib/dengine/3; mv /var/lib/dengine/lost /var/lib/dengine/3")
        n3.start()
    assert set(re.findall(r"([\w-]+) +(\w+) +FAILED", run.output)) == {("n3", "identity")}
    assert "dengine remove 3" in run.output


def test_destroy_stops_a_node_whose_file_is_gone(grown: Grown) -> None:
    """With dengine.toml deleted by hand the unit still runs: it is stopped before its data goes."""
    site = grown.site
    n2 = site.machines[2]
    n2.run("rm /etc/dengine/dengine.toml")
    site.play("destroy", "-e", "dengine_confirm=lab").ok()
    for machine in site.machines.values():
        assert machine.unit()["ActiveState"] == "inactive", machine.name
        assert machine.unit()["UnitFileState"] == "disabled", machine.name
        assert machine.run("pgrep -c -u dengine || true") == "0"
        assert machine.attempt("ls -d /var/lib/dengine/*").returncode != 0
        assert machine.attempt("test -L /usr/local/bin/dengine").returncode != 0


def test_a_cluster_is_made_again_where_one_was_destroyed(grown: Grown) -> None:
    """From nothing to three on the hosts that the test before has cleared, after `--check --diff`
    has told how much that changes on each, and has changed nothing."""
    site = grown.site
    predicted = site.play("expand", "--check", "--diff").ok()
    for machine in site.machines.values():
        assert machine.attempt("ls -d /var/lib/dengine/*").returncode != 0
        assert machine.unit()["ActiveState"] == "inactive"
    assert site.play("expand").ok().changed == predicted.changed
    site.learn_secrets()
    members = site.machines[1].json("/v1/cluster")["members"]
    assert {m["id"]: m["status"] for m in members} == dict.fromkeys(site.machines, "active")


def test_a_backup_is_restored_on_the_hosts(grown: Grown) -> None:
    """Step by step as in docs/operations.md, "Restore a backup on the hosts": two directories of
    three are lost, and what the third one has is there again, on three voters of a new cluster."""
    site = grown.site
    n1 = site.machines[1]
    dengine, backup = "/opt/dengine/current/bin/dengine", "/var/backups/dengine/last.dsnap"
    assert n1.request("PUT", "/v1/kv/before/the/loss", b"kept").ok
    assert n1.request("GET", "/v1/kv/before/the/loss").body == b"kept", "n1 has it"
    lost = n1.json("/v1/cluster")["cluster_id"]
    for i in (2, 3):
        site.machines[i].run("systemctl stop dengine; rm -r /var/lib/dengine/*")

    n1.run("systemctl stop dengine")
    n1.run(f"{dengine} snapshot save {backup} --data-dir /var/lib/dengine --node-id 1")
    site.play("destroy", "-e", "dengine_confirm=lab").ok()
    site.play("expand", "--tags", "install").ok()
    for machine in site.machines.values():
        assert machine.unit()["ActiveState"] == "inactive", machine.name
    n1.run(
        f"{dengine} snapshot restore {backup} --data-dir /var/lib/dengine --node-id 1 "
        f"--address {n1.address}:{n1.port}"
    )
    assert n1.run("find /var/lib/dengine ! -user dengine") == ""
    site.play("expand").ok()

    site.learn_secrets()
    view = n1.json("/v1/cluster")
    assert view["cluster_id"] != lost
    assert {m["id"]: m["status"] for m in view["members"]} == dict.fromkeys(site.machines, "active")
    for machine in site.machines.values():
        assert machine.request("GET", "/v1/kv/before/the/loss").body == b"kept", machine.name
    n1.run(f"rm {backup}")
    site.play("verify").ok()
