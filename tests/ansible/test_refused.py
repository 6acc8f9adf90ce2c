"""What is refused because of what there was before, and what no tag may leave out: each ends the
run, changes nothing, and says what to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import urllib.request

import pytest

from tests.ansible.local import Local
from tests.ansible.server import run_module
from tests.ansible.test_gate import failed_rows
from tests.cluster import wait_for

pytestmark = [pytest.mark.playbooks, pytest.mark.timeout(1800)]


def lock_of(site: Local) -> dict[str, object]:
    file = site.state / "hosts" / "n1" / "dengine-deploy.json"
    found: dict[str, object] = json.loads(file.read_text())
    return found


def set_status(site: Local, node_id: int, status: str) -> None:
    url = f"http://{site.endpoint('n1')}/v1/cluster/members/{node_id}"
    body = json.dumps({"status": status}).encode()
    ask = urllib.request.Request(url, body, method="PUT")
    ask.add_header("Authorization", f"Bearer {site.secrets['token']}")
    ask.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(ask, timeout=10) as answer:
        assert answer.status == 200


def test_the_only_voter_lost_its_disk_and_no_second_cluster_is_founded(site: Local) -> None:
    """An unmounted data disk looks like an empty one. Mounted again, all is as it was; destroy.yml
    is the word that a new cluster is meant."""
    site.play("site").ok()
    os.kill(site.pid("n1"), signal.SIGTERM)
    wait_for(lambda: not site.node_pids(), "node 1 to stop")
    aside = site.directory / "aside"
    shutil.move(site.data("n1").parent, aside)
    for playbook in ("expand", "site"):
        run = site.play(playbook)
        assert failed_rows(run) == {("n1", "identity")}
        assert "mount its disk" in run.output
        assert lock_of(site) == {}, "a run that failed lets the lock go"
        report = site.report(playbook)
        assert report["verdict"].startswith("NOT at its end"), report
        assert "mount its disk" in "".join(report["problems"])
    assert site.node_pids() == []
    shutil.move(aside, site.data("n1").parent)
    site.play("site").ok()
    assert site.voters() == [1]
    site.play("destroy", "-e", "dengine_confirm=local").ok()
    site.play("site").ok()
    assert site.voters() == [1]


def test_the_host_that_founded_does_not_found_again(site: Local) -> None:
    """Its disk is lost, and it is started by hand or at boot with the file that a run has left:
    it waits for a cluster to join. That file is no drift and changes in no later run."""
    site.play("site").ok()
    place = site.state / "hosts" / "n1"
    assert "role = 2" not in (place / "dengine.toml").read_text()
    assert set(site.play("site").ok().changed.values()) == {0}
    site.play("verify", "-e", "dengine_verify_voters=1").ok()
    os.kill(site.pid("n1"), signal.SIGTERM)
    wait_for(lambda: not site.node_pids(), "node 1 to stop")
    shutil.rmtree(site.data("n1"))
    log = place / "dengine.log"
    before = len(log.read_text())
    started = run_module(
        "dengine_process",
        config=str(place / "dengine.toml"),
        log=str(log),
        command=[sys.executable, "-m", "dengine"],
    )
    assert started["changed"]
    wait_for(lambda: "cannot join yet" in log.read_text()[before:], "node 1 to ask", 30)
    identity = json.loads((site.data("n1") / "identity.json").read_text())
    assert not identity.get("cluster_id")
    assert failed_rows(site.play("site")) == {("n1", "identity")}


def test_a_directory_that_does_not_fit_is_told_and_left_alone(site: Local) -> None:
    """An old copy is not started; the proof that there was another cluster is not overwritten; a
    node that ends soon after its start is a row with the place to look."""
    site.play("site").ok()
    os.kill(site.pid("n1"), signal.SIGTERM)
    wait_for(lambda: not site.node_pids(), "node 1 to stop")
    data = site.data("n1")

    (data / "HALTED").write_text("76 the others know more; empty it, and set role = 3 to join")
    run = site.play("site")
    assert failed_rows(run) == {("n1", "identity")}
    assert "the others know more" in run.output
    assert not site.node_pids()
    (data / "HALTED").unlink()

    marker = site.state / "hosts" / "n1" / "secrets" / "cluster.json"
    said = marker.read_text()
    other = json.dumps({"cluster_id": "f" * 32, "node_id": 1})
    marker.write_text(other)
    run = site.play("site")
    assert failed_rows(run) == {("n1", "identity")}
    assert f"rm {marker}" in run.output
    assert marker.read_text() == other
    marker.write_text(said)

    node = [sys.executable, "-m", "dengine"]
    site.set_group(
        dengine_process_command=["timeout", "15", *node],  # and it does not lead before
        dengine_config={"cluster": {"founding_wait_ms": 60_000}},
        dengine_leader_timeout=20,
    )
    run = site.play("site")
    assert run.code
    assert "node 1 was started, and has ended again" in run.output
    site.set_group(dengine_process_command=node, dengine_config={}, dengine_leader_timeout=60)
    site.play("site").ok()
    assert site.voters() == [1]


def test_a_controller_without_the_secrets_makes_no_new_ones(site: Local) -> None:
    """Whether the cluster runs or not. Copied back, everything goes on."""
    site.play("site").ok()
    file = site.state / "secrets.json"
    kept = file.read_bytes()
    on_host = site.state / "hosts" / "n1" / "secrets" / "token"
    before = on_host.read_bytes()
    for stop in (False, True):
        file.unlink()
        if stop:
            os.kill(site.pid("n1"), signal.SIGTERM)
            wait_for(lambda: not site.node_pids(), "node 1 to stop")
        run = site.play("expand")
        assert failed_rows(run) == {("n1", "secrets")}
        assert str(on_host.parent) in run.output
        assert not file.exists()
        assert on_host.read_bytes() == before
        file.write_bytes(kept)
        file.chmod(0o600)
    site.play("expand").ok()
    assert site.voters() == [1, 2, 3]


def test_security_is_switched_for_all_nodes_at_once(site: Local) -> None:
    """While one runs that is refused, and no file is written. With all stopped, it is done."""
    site.play("site").ok()
    config = site.state / "hosts" / "n1" / "dengine.toml"
    before = config.read_bytes()
    off = ("-e", '{"dengine_security_enabled": false}')
    assert ("n1", "security") in failed_rows(run := site.play("site", *off))
    assert "stop all, then expand.yml" in run.output
    assert config.read_bytes() == before
    os.kill(site.pid("n1"), signal.SIGTERM)
    wait_for(lambda: not site.node_pids(), "node 1 to stop")
    site.play("site", *off).ok()
    assert b"[security]" not in config.read_bytes()


@pytest.mark.parametrize(
    ("tags", "target", "said"),
    [
        ("--skip-tags always", 2, "A step was left out"),
        ("--skip-tags always,backup,install", 2, "A step was left out"),
        ("--skip-tags gate,discover,preflight", 2, "it must be odd"),
        ("--skip-tags backup", 3, "A step was left out"),
        ("--tags untagged", 3, "A step was left out"),
        ("--start-at-task join", 2, "is undefined"),
    ],
)
def test_no_tag_leaves_out_what_comes_before(
    tags: str, target: int, said: str, site: Local
) -> None:
    """Not even with a target that the gate refuses; nothing is started or changed."""
    tags = tags.replace("join", "*All become voters*")
    how, names = tags.split(" ", 1)
    run = site.play("expand", how, names, "-e", f"dengine_target_voters={target}")
    assert said in run.failed().output
    assert site.node_pids() == []


def test_tags_end_a_run_early(site: Local) -> None:
    site.play("expand", "--tags", "always").ok()
    assert not (site.state / "hosts" / "n1" / "dengine.toml").exists()
    site.play("expand", "--tags", "install").ok()
    assert (site.state / "hosts" / "n3" / "dengine.toml").exists()
    assert site.node_pids() == []
    site.play("expand").ok()
    assert site.voters() == [1, 2, 3]


def test_a_host_that_cannot_be_reached_is_a_row_where_it_matters(site: Local) -> None:
    """expand.yml and rolling_restart.yml stop with a row. The first host, which has the run lock,
    may be the one: the lock then lies on the next."""
    site.play("expand").ok()
    for host in ("n3", "n1"):
        values = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}
        site.set_host(host, **values)
        assert failed_rows(site.play("expand")) == {(host, "unreachable")}
        assert f"{host}" in site.play("rolling_restart").failed().output
        (site.inventory / "host_vars" / f"{host}.yml").unlink()
    assert not any(site.play("expand").ok().changed.values())


def test_joiners_get_the_release_that_the_members_have(site: Local) -> None:
    """A checkout of another version is a row for each host that would get it."""
    opt = site.state / "hosts" / "n1" / "opt"
    (opt / "releases" / "9.9.9-0123abcd").mkdir(parents=True)
    (opt / "current").symlink_to("releases/9.9.9-0123abcd")
    ask = ("--tags", "always", "-e", '{"dengine_release_enabled": true}')
    run = site.play("expand", *ask)
    assert failed_rows(run) == {("n2", "release"), ("n3", "release")}
    assert "9.9.9, as on n1" in run.output
    site.skip_checks(["time_sync", "filesystem", "fsync", "memory", "release"])
    site.play("expand", *ask).ok()


def test_a_read_only_member_is_left_alone(site: Local) -> None:
    """It neither blocks what is there already nor is taken for a voter to be; where it is needed
    as one, the row says so."""
    site.play("site").ok()
    name = "dengine.core.rollout : The cluster is well before the join of node 3"
    assert site.play("expand", KILL_AT=name).code == -9
    set_status(site, 2, "read_only")
    run = site.play("expand", "-e", "dengine_target_voters=1")
    assert not any(run.ok().changed.values())
    run = site.play("expand")
    assert failed_rows(run) == {("cluster", "cluster")}
    assert "only 2 of 3 hosts can vote, for n2 are read_only" in run.output
    set_status(site, 2, "promotable")
    site.play("expand").ok()
    assert site.voters() == [1, 2, 3]
