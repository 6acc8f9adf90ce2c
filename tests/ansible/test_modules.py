"""The modules against a little HTTP server: exactly these calls, and in check mode no write."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ansible_collections.dengine.core.plugins.module_utils import checks, host

from tests.ansible.answers import healthy, member, view
from tests.ansible.server import COLLECTIONS, Answers, Say, Server, run_module, snapshot_file

TOKEN = "a-token-that-nobody-may-see-0123456789"


# --- dengine_cluster_info ----------------------------------------------------------------------


def test_info_only_reads() -> None:
    with Server(healthy(member(1), member(2, "promotable"))) as server:
        result = run_module("dengine_cluster_info", endpoints=[server.endpoint])
        assert server.lines == ["GET /v1/status", "GET /readyz", "GET /v1/cluster"]
    assert result["voters"] == [1]
    assert result["learners"] == [2]
    assert result["nodes"][server.endpoint]["ready"]


def test_info_waits_until_all_vote_and_answer_and_says_who_does_not() -> None:
    answers = healthy()
    answers["GET /v1/cluster"] = [view(member(1), joint=True), view(member(1), member(2))]
    with Server(answers) as server:
        result = run_module(
            "dengine_cluster_info", endpoints=[server.endpoint], voters=[1, 2], wait=10
        )
        assert result["message"] == ""
    late = member(2, ready=False, reason="it has not answered for 9 s")
    with Server(healthy(member(1), late)) as server:
        result = run_module(
            "dengine_cluster_info", endpoints=[server.endpoint], voters=[1, 2], wait=0.5
        )
        assert result["failed"]
        assert "node 2: it has not answered" in result["msg"]
        behind = run_module(
            "dengine_cluster_info",
            endpoints=[server.endpoint],
            max_lag=5,
            required=False,
        )
        assert behind["message"] == ""


def test_info_without_an_answer_fails_only_where_one_is_required() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoints = [f"127.0.0.1:{free.getsockname()[1]}"]
        assert run_module("dengine_cluster_info", endpoints=endpoints)["failed"]
        result = run_module("dengine_cluster_info", endpoints=endpoints, required=False)
        assert not result["answered"]


# --- dengine_kv --------------------------------------------------------------------------------


def test_kv_writes_under_the_condition_that_it_read() -> None:
    answers: Answers = {
        "GET /v1/kv/a%2Fb": Say(b"old", headers={"ETag": '"7"'}),
        "PUT /v1/kv/a%2Fb": Say({"revision": 8, "created": False}),
        "DELETE /v1/kv/a%2Fb": Say({"revision": 8, "deleted": 1}),
    }
    with Server(answers) as server:
        ask = {"endpoints": [server.endpoint], "key": "a/b"}
        result = run_module("dengine_kv", value="new", **ask)
        assert result["changed"]
        assert result["diff"] == {"before": "old\n", "after": "new\n"}
        put = server.asked[-1]
        assert (put.line, put.body, put.headers["If-Match"]) == ("PUT /v1/kv/a%2Fb", b"new", '"7"')
        assert not run_module("dengine_kv", value="old", **ask)["changed"]
        assert run_module("dengine_kv", state="absent", **ask)["changed"]
        assert server.asked[-1].headers["If-Match"] == '"7"'
        count = len(server.changes)
        assert run_module("dengine_kv", check=True, value="new", **ask)["changed"]
        assert len(server.changes) == count
        hidden = run_module("dengine_kv", value="s3cr3t-value", secret=True, **ask)
        assert "s3cr3t-value" not in hidden["raw"]


WRITES_DOWN = """
import runpy, sys
from ansible.module_utils import basic
basic.has_journal = False
basic.syslog.syslog = lambda *said: print("logged:", *said, file=sys.stderr)
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""


def test_kv_never_has_a_value_logged_on_the_host() -> None:
    """Ansible logs how a module is called before that module can say what is secret."""
    answers: Answers = {"GET /v1/kv/a": Say(b"old", headers={"ETag": '"7"'})}
    with Server(answers) as server:
        good = {"endpoints": [server.endpoint], "key": "a", "value": "s3cr3t-value", "secret": True}
        for ask in (good, {**good, "secret": "perhaps"}, {**good, "state": "absent", "key": None}):
            shown = run_module("dengine_kv", check=True, program=WRITES_DOWN, **ask)["raw"]
            assert "s3cr3t-value" not in shown
        shown = run_module("dengine_kv", check=True, program=WRITES_DOWN, **good)["raw"]
        assert "logged:" in shown
        assert "Invoked with" in shown
        open_ = {**good, "secret": False, "value": "plain"}
        told = run_module("dengine_kv", check=True, program=WRITES_DOWN, **open_)
        assert told["diff"]["after"] == "plain\n", "what is no secret is shown as before"


# --- dengine_snapshot --------------------------------------------------------------------------


def test_snapshot_is_taken_downloaded_checked_and_not_taken_twice(tmp_path: Path) -> None:
    file, said = snapshot_file()
    listing = {"snapshots": [], "job": None, "last_error": None}
    answers: Answers = {
        "GET /v1/snapshots": [Say(listing), Say({**listing, "snapshots": [said]})],
        "GET /v1/status": Say({"last_applied": 12}),
        "POST /v1/snapshots": Say({"state": "running"}, 202),
        f"GET /v1/snapshots/{said['sha256']}": Say(file),
    }
    with Server(answers) as server:
        ask = {"endpoints": [server.endpoint], "dest": str(tmp_path)}
        result = run_module("dengine_snapshot", **ask)
        assert result["changed"], result
        assert server.changes == ["POST /v1/snapshots"]
        kept = Path(result["file"])
        assert kept.read_bytes() == file
        assert kept.stat().st_mode & 0o777 == 0o600
        again = run_module("dengine_snapshot", **ask)
        assert not again["changed"]
        assert server.changes == ["POST /v1/snapshots"]
        dry = run_module("dengine_snapshot", check=True, **ask)
        assert dry["changed"]
        assert server.changes == ["POST /v1/snapshots"]
    assert list(tmp_path.iterdir()) == [kept]


def test_snapshot_download_goes_on_where_an_earlier_one_was_cut(tmp_path: Path) -> None:
    file, said = snapshot_file()
    part = tmp_path / f"backup-{12:012d}-{said['sha256'][:16]}.dsnap.{said['sha256'][:16]}.part"
    part.write_bytes(file[:1000])
    answers: Answers = {
        "GET /v1/snapshots": Say({"snapshots": [said]}),
        "GET /v1/status": Say({"last_applied": 12}),
        f"GET /v1/snapshots/{said['sha256']}": Say(file[1000:], 206),
    }
    with Server(answers) as server:
        result = run_module("dengine_snapshot", endpoints=[server.endpoint], dest=str(tmp_path))
        assert server.asked[-1].headers["Range"] == "bytes=1000-"
    assert Path(result["file"]).read_bytes() == file


def test_snapshot_that_arrives_damaged_is_no_backup(tmp_path: Path) -> None:
    file, said = snapshot_file()
    answers: Answers = {
        "GET /v1/snapshots": Say({"snapshots": [said]}),
        "GET /v1/status": Say({"last_applied": 12}),
        f"GET /v1/snapshots/{said['sha256']}": Say(bytes([file[0] ^ 1]) + file[1:]),
    }
    with Server(answers) as server:
        result = run_module("dengine_snapshot", endpoints=[server.endpoint], dest=str(tmp_path))
    assert "does not have the SHA-256" in result["msg"]
    assert list(tmp_path.iterdir()) == []


def test_snapshot_prunes_the_oldest_and_only_its_own(tmp_path: Path) -> None:
    for number in range(4):
        file = tmp_path / f"backup-{number}.dsnap"
        file.write_bytes(b"")
        os.utime(file, (number, number))
    (tmp_path / "dengine-20260101.dsnap").write_bytes(b"")
    ask = {"endpoints": [], "state": "pruned", "dest": str(tmp_path), "keep": 2}
    assert len(run_module("dengine_snapshot", check=True, **ask)["removed"]) == 2
    assert len(list(tmp_path.iterdir())) == 5
    assert run_module("dengine_snapshot", **ask)["changed"]
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["backup-2.dsnap", "backup-3.dsnap", "dengine-20260101.dsnap"]
    assert not run_module("dengine_snapshot", **ask)["changed"]


# --- dengine_verify ----------------------------------------------------------------------------


def holding(revision: int) -> Answers:
    """A node of two that holds one key at `revision`."""
    item = {"key": "k", "mod_revision": revision}
    return {
        "GET /v1/cluster": view(member(1), member(2), member(3)),
        "GET /v1/kv?limit=1000&keys_only=true": Say({"items": [item], "next": None}),
        "GET /v1/kv/k": Say(b"x", headers={"ETag": f'"{revision}"'}),
    }


def test_verify_finds_a_node_that_holds_something_else() -> None:
    with Server(holding(5)) as one, Server(holding(5)) as other:
        ask = {
            "endpoints": [one.endpoint, other.endpoint],
            "voters": [1, 2, 3],
            "canary_prefix": "",
        }
        result = run_module("dengine_verify", **ask)
        assert result["problems"] == []
        assert result["compared_keys"] == 1
        other.answers.update(holding(6))
        (problem,) = run_module("dengine_verify", **ask)["problems"]
        assert "differ at key 'k'" in problem
        assert one.changes == other.changes == []


def test_verify_compares_members_with_the_inventory() -> None:
    with Server({"GET /v1/cluster": view(member(1))}) as server:
        result = run_module(
            "dengine_verify",
            endpoints=[server.endpoint],
            voters=[1, 2, 3],
            zones={"1": "az-z"},
            max_keys=0,
            canary_prefix="",
        )
    text = "; ".join(result["problems"])
    assert "sees the voters [1], not [1, 2, 3]" in text
    assert "node 1 is in zone 'az-a', the inventory says 'az-z'" in text
    assert "only 0 more voters may fail, not 1" in text


# --- dengine_probe, dengine_process ---------------------------------------------------------------


def test_probe_stands_in_for_a_node_and_is_taken_for_none(tmp_path: Path) -> None:
    """The stand-in answers 503, tells the way and the clock, and ends when it is told to, or when
    the next run starts one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    ask = {"listen_address": endpoint, "config": str(tmp_path / "c"), "data_dir": str(tmp_path)}
    try:
        assert run_module("dengine_probe", action="listen", seconds=30, **ask)["listening"]
        assert run_module("dengine_probe", action="listen", seconds=30, **ask)["listening"]
        way = run_module("dengine_probe", action="connect", targets=[endpoint])["ways"][endpoint]
        assert way["error"] == ""
        assert 0 < way["rtt_ms"] < 1000
        assert abs(way["offset_ms"]) < 1000
        (row,) = run_module("dengine_probe", action="checks", checks=["port"], **ask)["rows"]
        assert row["status"] == "ok"
        info = run_module("dengine_cluster_info", endpoints=[endpoint], required=False)
        assert not info["nodes"][endpoint]["ready"]
    finally:
        assert run_module("dengine_probe", action="hush", **ask)["ended"]
    way = run_module("dengine_probe", action="connect", targets=[endpoint])["ways"][endpoint]
    assert "refused" in way["error"]


def test_probe_tells_traces_and_secrets_without_reading_them(tmp_path: Path) -> None:
    ask = {"action": "facts", "data_dir": str(tmp_path), "secrets_dir": str(tmp_path / "s")}
    found = run_module("dengine_probe", backend="process", **ask)["facts"]
    assert (found["secrets"], found["trace"]) == (False, "")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "token").write_text(TOKEN)
    (tmp_path / "s" / "cluster.json").write_text("{}")
    seen = run_module("dengine_probe", backend="process", **ask)
    assert seen["facts"]["secrets"]
    assert seen["facts"]["trace"].endswith("cluster.json")
    assert seen["facts"]["verified"] == "", "damaged, and a trace all the same"
    (tmp_path / "s" / "cluster.json").write_text('{"cluster_id": "c1", "node_id": 1}')
    assert host.verified(str(tmp_path / "s")) == "c1"
    assert TOKEN not in seen["raw"]
    assert host.trace(str(tmp_path), str(tmp_path / "dengine.service")) == ""
    (tmp_path / "dengine.service").symlink_to("/nowhere")
    assert "is enabled" in host.trace(str(tmp_path), str(tmp_path / "dengine.service"))


def test_probe_tells_whether_the_configuration_has_secrets(tmp_path: Path) -> None:
    config = tmp_path / "dengine.toml"
    assert host.has_security(str(config)) is None
    for text, there in (
        ("[security]\n", True),
        ("[cluster]\n [ security ] # all\n", True),
        ("#[security]\n[security_not]\n", False),
    ):
        config.write_text(text)
        assert host.has_security(str(config)) is there
    ask = {"action": "facts", "config": str(config), "data_dir": str(tmp_path)}
    facts = run_module("dengine_probe", backend="process", **ask)["facts"]
    assert facts["security"] is False


@pytest.mark.parametrize(
    ("version", "ok"), [((3, 10), 0), ((3, 11), 1), ((3, 13), 1), ((3, 14), 0)]
)
def test_probe_takes_the_pythons_that_there_are_wheels_for(
    version: tuple[int, int], ok: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    found = checks.python({"backend": "process"}, checks.LIMITS, None)
    assert found[0] is bool(ok)
    assert found[2] == "3.11 to 3.13"


def test_probe_tells_identity_and_checks_without_leaving_anything(tmp_path: Path) -> None:
    data = tmp_path / "1"
    data.mkdir()
    (data / "identity.json").write_text('{"node_id": 1, "cluster_id": "c1"}')
    facts = run_module("dengine_probe", action="facts", data_dir=str(data))["facts"]
    assert facts["identity"]["cluster_id"] == "c1"
    assert facts["halted"] == ""
    (data / "HALTED").write_text("76 an old copy;\nempty it")
    assert host.halted(str(data)) == "76 an old copy; empty it"
    (data / "HALTED").unlink()
    assert not facts["data_empty"]
    rows = run_module(
        "dengine_probe",
        action="checks",
        checks=["python", "architecture", "memory", "disk_space", "fsync", "open_files"],
        data_dir=str(data / "not" / "there"),
        config=str(tmp_path / "of-no-node.toml"),  # that of a lab on this machine may be running
        backend="process",
        limits={"memory_mb": 10**9},
    )["rows"]
    assert [r["check"] for r in rows if r["status"] != "ok"][:1] == ["memory"]
    assert [p.name for p in data.iterdir()] == ["identity.json"]
    assert run_module("dengine_probe", action="checks", checks=["luck"])["failed"]


def test_probe_wants_room_for_the_data_of_the_largest_member(tmp_path: Path) -> None:
    """A host that joins has no snapshot of its own to go by."""
    data = tmp_path / "2"
    ask = {"data_dir": str(data), "limits": {"disk_free_mb": 1}, "backend": "process"}
    check = {**ask, "action": "checks", "checks": ["disk_space"]}
    assert run_module("dengine_probe", action="facts", **ask)["facts"]["data_bytes"] == 0
    (row,) = run_module("dengine_probe", data_bytes=10**15, **check)["rows"]
    assert row["status"] == "FAILED"
    assert row["limit"] == "3000000000 MB, 3 times the data"
    (row,) = run_module("dengine_probe", data_bytes=10**5, **check)["rows"]
    assert (row["status"], row["limit"]) == ("ok", "1 MB")
    (data / "state-3").mkdir(parents=True)
    (data / "state-3" / "data.mdb").write_bytes(b"x" * 100_000)
    assert host.data_bytes(str(data)) >= 100_000, "there is no snapshot yet"
    (data / "snapshots").mkdir()
    (data / "snapshots" / "snapshot-1-9.dsnap").write_bytes(b"x" * 70_000)
    (data / "snapshots" / "snapshot-1-9.dsnap.partial").write_bytes(b"x" * 90_000)
    assert run_module("dengine_probe", action="facts", **ask)["facts"]["data_bytes"] == 70_000


def test_probe_does_not_judge_what_the_running_node_itself_takes(tmp_path: Path) -> None:
    """A second run is not refused for the memory and the writes of the first one's node."""
    node = tmp_path / "node.py"
    node.write_text("import time\ntime.sleep(60)\n")
    config = str(tmp_path / "c.toml")
    start = {"config": config, "command": [sys.executable, str(node)], "log": str(tmp_path / "log")}
    ask = {
        "action": "checks",
        "checks": ["memory", "fsync"],
        "config": config,
        "data_dir": str(tmp_path),
        "limits": {"memory_mb": 10**9, "fsync_p99_ms": 0},
    }
    rows = run_module("dengine_probe", **ask)["rows"]
    assert [r["status"] for r in rows] == ["FAILED", "FAILED"]
    try:
        assert run_module("dengine_process", **start)["changed"]
        rows = run_module("dengine_probe", **ask)["rows"]
        assert [r["status"] for r in rows] == ["ok", "ok"], rows
        assert all("not judged: the node runs" in r["measured"] for r in rows)
    finally:
        run_module("dengine_process", **start, state="stopped")


def test_probe_wants_the_systemd_that_the_units_need() -> None:
    assert checks.LIMITS["systemd_min"] == 251


def test_process_is_found_by_what_runs_and_outlives_the_module(tmp_path: Path) -> None:
    """Started once, whatever an earlier run knew; check mode starts and stops nothing."""
    node = tmp_path / "node.py"
    node.write_text("import time\ntime.sleep(60)\n")
    ask = {
        "config": str(tmp_path / "c.toml"),
        "command": [sys.executable, str(node)],
        "log": str(tmp_path / "log"),
    }
    assert run_module("dengine_process", check=True, **ask)["changed"]
    assert not (tmp_path / "log").exists()
    try:
        started = run_module("dengine_process", **ask)
        assert started["changed"]
        again = run_module("dengine_process", **ask)
        assert not again["changed"]
        assert again["process"] == started["process"]
        other = run_module("dengine_process", state="restarted", **ask)
        assert other["process"]["pid"] != started["process"]["pid"]
        assert run_module("dengine_process", check=True, state="stopped", **ask)["process"]
    finally:
        assert run_module("dengine_process", state="stopped", **ask)["process"] is None
    node.write_text("import sys\nsys.exit('no such file')\n")
    failed = run_module("dengine_process", **ask)
    assert "no such file" in failed["msg"]


def test_modules_need_the_standard_library_alone() -> None:
    """On a host nothing is installed but python3: no import of a module leaves Ansible's own."""
    plugins = COLLECTIONS / "ansible_collections" / "dengine" / "core" / "plugins"
    allowed = ("ansible.module_utils.", "ansible_collections.dengine.")
    files = [*plugins.glob("modules/*.py"), *plugins.glob("module_utils/*.py")]
    assert len(files) >= 15
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.partition(".")[0]
                assert name.startswith(allowed) or top in sys.stdlib_module_names, (file, name)


def test_documentation_of_every_module_can_be_read() -> None:
    """ansible-doc shows each of them, with the shared parameters and an example."""
    names = [
        f"dengine.core.{p.stem}"
        for p in (COLLECTIONS / "ansible_collections/dengine/core/plugins/modules").glob("*.py")
    ]
    began = time.monotonic()
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ansible-doc")), "--json", *names],
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    documents = json.loads(done.stdout)
    assert set(documents) == set(names), time.monotonic() - began
    for name, document in documents.items():
        assert document["doc"]["short_description"], name
        assert document["examples"], name
