"""`dengine repair`: what only a person may accept, on directories of real nodes."""

from __future__ import annotations

import os
from pathlib import Path

import lmdb

from tests.cluster import Cluster, ServeProcess, config_text, joiner, static_cluster, wait_for
from tests.integration.backups import dengine, fill, one_sentence, records, single, tree


def flip_entry(node: ServeProcess, index: int) -> None:
    """Let a bit rot in the record of one log entry."""
    file = node.directory / "log" / "data.mdb"
    with (
        lmdb.open(str(file.parent), readonly=True, lock=False) as environment,
        environment.begin() as txn,
    ):
        record = txn.get(b"e" + index.to_bytes(8, "big"))
    assert record is not None
    content = file.read_bytes()
    places = [i for i in range(len(content)) if content.startswith(record, i)]
    with file.open("r+b") as stream:
        for place in places:
            stream.seek(place + len(record) - 6)
            stream.write(bytes([content[place + len(record) - 6] ^ 1]))


def repair(node: ServeProcess, *more: str) -> tuple[int, str]:
    done = dengine("repair", "--config", node.config, *more, cwd=node.cwd)
    return done.returncode, done.stdout + done.stderr


def refused_start(node: ServeProcess) -> str:
    """What the node says as it refuses to start (65)."""
    node.start()
    assert node.wait_exit() == 65, node.tail()
    return node.tail()


def test_a_single_node_with_a_damaged_log_keeps_its_state(cluster: Cluster) -> None:
    """The log rots in the middle: the state has everything, and not one write is lost."""
    node = single(cluster)
    fill(node, 40)
    before, view = records(node), node.cluster()
    node.stop()
    flip_entry(node, 20)
    assert "dengine repair --accept-data-loss --config FILE`" in refused_start(node)
    old = tree(node.directory)
    code, said = repair(node)
    assert code == 1, said
    assert "entry 20 fails its CRC" in said
    assert "nothing of this node's log" in said
    assert "Nothing was changed" in said
    assert tree(node.directory) == old
    assert os.listdir(node.directory.parent) == ["1"]

    code, said = repair(node, "--accept-data-loss")
    assert code == 0, said
    node.start()
    cluster.wait_leader()
    assert records(node) == before
    now = node.cluster()
    assert now["revision"] >= view["revision"] + 1_000_000
    assert now["cluster_id"] != view["cluster_id"]
    (evidence,) = node.directory.parent.glob("1.before-repair-*")
    assert tree(evidence) == old
    assert node.put("k/after", "v").ok
    joiner(cluster, 2).start()
    cluster.wait_voters(1, 2)


def test_without_a_state_the_sound_beginning_of_the_log_is_kept(cluster: Cluster) -> None:
    """State and log damaged: everything before the damage is there, and what is lost is named."""
    node = single(cluster)
    written = fill(node, 40)
    node.kill()
    (node.directory / "RUN").unlink()
    for state in node.directory.glob("state-*/data.mdb"):
        with state.open("r+b") as stream:  # the pages of the tree, not the two at the beginning
            stream.seek(8192)
            stream.write(os.urandom(max(0, state.stat().st_size - 8192)))
    flip_entry(node, 30)
    assert "dengine repair" in refused_start(node)
    code, said = repair(node)
    assert code == 1, said
    assert "everything up to entry 29" in said
    assert "entries 30 to" in said
    code, said = repair(node, "--accept-data-loss")
    assert code == 0, said
    node.start()
    cluster.wait_leader()
    kept = {r["key"]: r["value"] for r in records(node)}
    # 1 is the founding, 2 the leader's first, and 3 marks version 2 unless a write came just then.
    assert len(kept) in (26, 27)
    assert kept.items() <= written.items()


def test_the_survivor_of_two_goes_on_alone(cluster: Cluster) -> None:
    """One of two directories is lost: the other becomes a new cluster, and a lost one may join."""
    static_cluster(cluster, 1, 2)
    lost, kept = cluster.nodes[1], cluster.nodes[2]
    fill(lost, 20)
    cluster.wait_applied()
    before = records(kept)
    running = dengine("repair", "--config", kept.config, "--accept-data-loss", cwd=kept.cwd)
    assert "in use by process" in one_sentence(running, 75)
    for node in (lost, kept):
        node.kill()
    lost.directory.rename(lost.directory.with_name("lost"))
    code, said = repair(kept)
    assert code == 1, said
    assert f"node 1 at 127.0.0.1:{lost.port}" in said
    assert "start it instead" in said
    code, said = repair(kept, "--accept-data-loss")
    assert code == 0, said
    kept.start()
    wait_for(kept.ready, "the survivor to be ready")
    assert records(kept) == before
    # The lost directory turns up again: it is refused, and an empty one is let in.
    lost.directory.with_name("lost").rename(lost.directory)
    lost.start()
    wait_for(
        lambda: f"node 2 at 127.0.0.1:{kept.port}: foreign cluster" in lost.output(),
        "the old member to be refused",
    )
    lost.kill()
    lost.directory.rename(lost.directory.with_name("lost"))
    ports = {1: lost.port, 2: kept.port}
    lost.config.write_text(config_text(1, ports, 3, 0))
    lost.start()
    cluster.wait_voters(1, 2)
    assert records(lost) == before


def test_repair_is_refused_where_it_would_only_do_harm(cluster: Cluster, tmp_path: Path) -> None:
    """A sound single node needs none; what is no directory of a node gets a sentence."""
    node = single(cluster)
    fill(node, 3)
    node.stop()
    old = tree(node.directory)
    done = dengine("repair", "--config", node.config, "--accept-data-loss", cwd=node.cwd)
    assert "needs no repair" in one_sentence(done, 1)
    assert tree(node.directory) == old
    secret = 'peer_secret_file = "/run/credentials/no-such-unit.service/peer_secret"'
    node.config.write_text(f"{node.config.read_text()}\n[security]\n{secret}\n")
    done = dengine("repair", "--config", node.config, cwd=node.cwd)
    assert "needs no repair" in one_sentence(done, 1), "systemd has taken it away with the unit"
    absent = dengine("repair", "--data-dir", tmp_path / "none", "--node-id", 1)
    assert "not the data directory" in one_sentence(absent, 1)
    assert not (tmp_path / "none").exists()
    assert dengine("repair").returncode == 2
    assert dengine("repair", "--data-dir", tmp_path).returncode == 2


def test_nothing_left_is_said_plainly(cluster: Cluster) -> None:
    """No state, no snapshot and no log: 65, and the way to a backup."""
    node = single(cluster)
    fill(node, 3)
    node.kill()
    for file in node.directory.rglob("data.mdb"):
        file.write_bytes(b"")
    done = dengine("repair", "--config", node.config, "--accept-data-loss", cwd=node.cwd)
    assert "dengine snapshot restore" in one_sentence(done, 65)
