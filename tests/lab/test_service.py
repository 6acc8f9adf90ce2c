"""The units on a real host: one node under systemd, in its sandbox."""

from __future__ import annotations

import re
import signal
import threading

import pytest

from dengine import __version__
from tests.cluster import wait_for
from tests.lab.machines import Machine

EXPOSURE_MAX = 1.5
UNITS = "/etc/systemd/system/dengine*"


def test_systemd_finds_nothing_to_say(node: Machine) -> None:
    """`systemd-analyze verify` prints nothing, on the systemd that Debian 12 has."""
    assert node.run("systemctl --version").startswith("systemd 252")
    assert node.run(f"systemd-analyze verify --man=no {UNITS} 2>&1") == ""


@pytest.mark.parametrize("unit", ["dengine.service", "dengine-backup.service"])
def test_the_sandbox_is_tight(node: Machine, unit: str) -> None:
    """Rated by the host itself, drop-ins and all."""
    said = node.run(f"systemd-analyze security --no-pager {unit}")
    rated = re.search(r"Overall exposure level for \S+: ([\d.]+)", said)
    assert rated, said
    assert float(rated[1]) <= EXPOSURE_MAX


def test_it_serves_from_within(node: Machine) -> None:
    """Active means ready, as the right user, in the right slice, from the linked release."""
    assert node.request("PUT", "/v1/kv/color", b"blue").ok
    assert node.request("GET", "/v1/kv/color").body == b"blue"
    service = node.host.service("dengine")
    assert service.is_running
    assert node.host.socket(f"tcp://{node.address}:{node.port}").is_listening
    assert (
        node.host.file("/opt/dengine/current").linked_to == f"/opt/dengine/releases/{__version__}"
    )
    unit = node.unit()
    assert (unit["Slice"], unit["User"], unit["NRestarts"]) == ("dengine.slice", "dengine", "0")
    process = node.host.process.get(pid=node.pid)
    assert process.user == "dengine"
    assert f"/opt/dengine/releases/{__version__}/bin/" in process.args
    assert node.run("systemctl --failed --no-legend") == ""


def test_what_the_sandbox_leaves(node: Machine) -> None:
    """No capabilities, a call filter, nothing writable but the data directory."""
    status = dict(
        line.partition(":\t")[::2] for line in node.run(f"cat /proc/{node.pid}/status").splitlines()
    )
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    inside = f"nsenter --mount --target {node.pid}"
    assert b"Read-only" in node.attempt(f"{inside} touch /etc/mark").stderr
    assert b"Read-only" in node.attempt(f"{inside} touch /opt/dengine/mark").stderr
    assert b"Read-only" in node.attempt(f"{inside} touch /var/backups/dengine/mark").stderr
    assert node.attempt(f"{inside} ls /home/vagrant").returncode != 0
    node.run(f"{inside} touch /var/lib/dengine/mark; rm /var/lib/dengine/mark")
    limits = node.run(f"cat /proc/{node.pid}/limits")
    assert re.search(r"Max core file size +0 +0", limits)
    assert node.unit()["LimitNOFILE"] == "65536"
    files = re.search(r"Max open files +(\d+) +(\d+)", limits)
    assert files, limits
    assert files[1] == files[2], "all that the host allows: a container may allow less than asked"


def test_who_may_read_what(node: Machine) -> None:
    """Secrets are root's and reach the service as credentials; data is the service's alone."""
    expected = {
        "/etc/dengine": ("750", "root", "dengine"),
        "/etc/dengine/dengine.toml": ("640", "root", "dengine"),
        "/etc/dengine/secrets": ("700", "root", "root"),
        "/etc/dengine/secrets/token": ("600", "root", "root"),
        "/etc/dengine/secrets/peer_secret": ("600", "root", "root"),
        "/var/lib/dengine": ("700", "dengine", "dengine"),
        "/var/backups/dengine": ("700", "dengine", "dengine"),
        "/opt/dengine": ("755", "root", "root"),
    }
    said = node.run(f"stat --format='%n %a %U %G' {' '.join(expected)}")
    found = {path: tuple(rest) for path, *rest in map(str.split, said.splitlines())}
    assert found == expected
    account = node.host.user("dengine")
    assert account.shell == "/usr/sbin/nologin"
    assert account.groups == ["dengine"]
    places = ("/etc/dengine/secrets", "/run/credentials/dengine.service")
    for path in (f"{place}/{name}" for place in places for name in ("token", "peer_secret")):
        node.run(f"test -s {path}")
        for user in ("vagrant", "nobody"):
            refused = node.attempt(f"setpriv --reuid={user} --clear-groups cat {path}").stderr
            assert b"Permission denied" in refused
    for place in ("cmdline", "environ"):
        assert node.lab.token.encode() not in node.run(f"cat /proc/{node.pid}/{place}").encode()
    assert node.lab.token not in node.journal()


def test_the_token_is_asked_for(node: Machine) -> None:
    """The credential that systemd hands over is the one that counts."""
    assert node.request("GET", "/v1/cluster").ok
    assert node.request("GET", "/v1/cluster", headers={}).status == 401
    wrong = {"Authorization": "Bearer wrong"}
    assert node.request("GET", "/v1/cluster", headers=wrong).status == 401


SEE_WRITER = """
import glob, json, os, subprocess, time

end = time.monotonic() + 30
while time.monotonic() < end:
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        pid = path.split("/")[2]
        try:
            if b"dengine.snapshot_writer" not in open(path, "rb").read().split(bytes(1)):
                continue
            seen = {
                "nice": os.getpriority(os.PRIO_PROCESS, int(pid)),
                "ionice": subprocess.run(
                    ["ionice", "-p", pid], capture_output=True, text=True
                ).stdout.strip(),
                "oom": int(open(f"/proc/{pid}/oom_score_adj").read()),
                "cgroup": open(f"/proc/{pid}/cgroup").read(),
                "seccomp": "Seccomp:\\t2" in open(f"/proc/{pid}/status").read(),
            }
        except OSError:
            continue
        if seen["nice"]:
            print(json.dumps(seen))
            raise SystemExit
    time.sleep(0.02)
raise SystemExit("no snapshot writer was seen")
"""


def test_a_snapshot_is_taken_within_the_sandbox(node: Machine) -> None:
    """The writer process starts, lowers its priorities and goes first when memory runs out."""
    for number in range(32):  # 2 MiB, 8 s at the configured pace
        assert node.request("PUT", f"/v1/kv/large/{number}", bytes([number]) * 65_536).ok
    before = node.json("/v1/snapshots")["snapshots"]
    asked = threading.Thread(
        target=lambda: node.request("POST", "/v1/snapshots", b"", timeout_s=30), daemon=True
    )
    asked.start()
    seen = node.python(SEE_WRITER)
    assert seen["nice"] == 10
    assert seen["ionice"] == "best-effort: prio 7"
    assert seen["oom"] == 900
    # What the unit asks for; a container may not be allowed to lower it.
    assert node.unit()["OOMScoreAdjust"] == "-500"
    assert "dengine.service" in seen["cgroup"]
    assert seen["seccomp"]
    assert node.request("PUT", "/v1/kv/meanwhile", b"written").ok
    wait_for(
        lambda: len(node.json("/v1/snapshots")["snapshots"]) > len(before),
        "the snapshot to be complete",
        60,
    )
    asked.join(30)
    assert node.json("/v1/snapshots")["last_error"] in (None, "")


def test_a_crash_is_followed_by_a_restart(node: Machine) -> None:
    """kill -9: systemd starts it again within seconds, with everything that was acknowledged."""
    assert node.request("PUT", "/v1/kv/color", b"green").ok
    pid = node.pid
    node.run(f"kill -KILL {pid}")
    wait_for(lambda: node.pid not in (0, pid), "another process", 15)
    wait_for(node.ready, "the node to be ready again", 30)
    assert node.unit()["NRestarts"] == "1"
    assert node.request("GET", "/v1/kv/color").body == b"green"


def test_a_wrong_configuration_is_not_restarted(node: Machine) -> None:
    """Exit code 78: the reason is in the journal, once, and nothing tries again."""
    node.run("systemctl stop dengine")
    node.configure('\n[nonsense]\nkey = "value"\n')
    cursor = node.journal_cursor()
    assert node.attempt("systemctl start dengine").returncode != 0
    unit = node.unit()
    assert (unit["ActiveState"], unit["ExecMainStatus"], unit["NRestarts"]) == ("failed", "78", "0")
    assert node.says("unknown key", cursor).count("unknown key") == 1


def test_a_taken_port_is_tried_again_and_then_given_up(node: Machine) -> None:
    """Exit code 75 is worth another try, every three seconds; a hundred of them within a quarter of
    an hour are the end. (Here six are, and they follow at once.)"""
    unit = node.unit()
    found = [unit[name] for name in ("RestartUSec", "StartLimitBurst", "StartLimitIntervalUSec")]
    assert found == ["3s", "100", "15min"]
    node.run("systemctl stop dengine")
    node.override({"StartLimitBurst": "6"}, RestartSec="100ms")
    listener = f"import socket, time; s = socket.create_server(('{node.address}', {node.port}))"
    node.run(
        f'systemd-run --quiet --collect --unit=squatter python3 -c "{listener}; time.sleep(600)"'
    )
    try:
        wait_for(
            lambda: node.host.socket(f"tcp://{node.address}:{node.port}").is_listening,
            "the port to be taken",
        )
        assert node.attempt("systemctl start dengine").returncode != 0
        wait_for(lambda: node.unit()["ActiveState"] == "failed", "systemd to give up", 60)
        unit = node.unit()
        assert (unit["ExecMainStatus"], unit["NRestarts"]) == ("75", "6")
        node.says("the port is taken")
    finally:
        node.run("systemctl stop squatter")
    node.run("systemctl reset-failed dengine")
    node.start()


def test_a_hung_node_is_killed_and_restarted(node: Machine) -> None:
    """Stopped for longer than WatchdogSec, it is aborted; the journal shows where it hung."""
    node.run("systemctl stop dengine")
    node.override(WatchdogSec="3")
    cursor = node.journal_cursor()
    node.start()
    pid = node.pid
    node.run("sleep 7")  # an idle node is fed all the time
    assert node.pid == pid
    node.run(f"kill -STOP {pid}")
    wait_for(lambda: node.pid not in (0, pid), "another process", 30)
    wait_for(node.ready, "the node to be ready again", 30)
    assert node.unit()["NRestarts"] == "1"
    said = node.says('File "/opt/dengine/releases', cursor)
    assert "Watchdog timeout" in said
    assert "Fatal Python error: Aborted" in said


def test_a_stop_is_clean(node: Machine) -> None:
    """`systemctl stop`: exit code 0, quickly; the next start trusts the state it finds."""
    assert node.request("PUT", "/v1/kv/color", b"red").ok
    cursor = node.journal_cursor()
    node.run("systemctl stop dengine", timeout_s=20)
    unit = node.unit()
    assert (unit["Result"], unit["ExecMainStatus"]) == ("success", "0")
    assert unit["ActiveState"] == "inactive"
    node.says("stopping: finishing requests", cursor)
    cursor = node.journal_cursor()
    node.start()
    assert "rebuil" not in node.journal(cursor)
    assert node.request("GET", "/v1/kv/color").body == b"red"


def test_a_stopped_node_can_be_looked_at(node: Machine) -> None:
    """Its credentials are gone with the unit; who looks after it as root needs none of them."""
    dengine, config = "/opt/dengine/current/bin/dengine", "/etc/dengine/dengine.toml"
    assert b"leader" in node.attempt(f"{dengine} members").stdout
    node.run("systemctl stop dengine")
    assert "was not looked at" in node.run(f"{dengine} check-config {config}")
    repair = node.attempt(f"{dengine} repair --config {config}")
    assert repair.returncode == 1
    assert b"needs no repair" in repair.stderr
    members = node.attempt(f"{dengine} members")
    assert members.returncode == 1
    assert b"no endpoint answered" in members.stderr
    node.start()


def test_an_interrupt_is_a_clean_end_too(node: Machine) -> None:
    """SIGINT works as SIGTERM does: nothing is restarted."""
    node.run(f"kill -{int(signal.SIGINT)} {node.pid}")
    wait_for(lambda: node.unit()["ActiveState"] == "inactive", "the end", 20)
    assert node.unit()["NRestarts"] == "0"


def test_backups_are_made_and_the_oldest_go(node: Machine) -> None:
    """The timer's service saves a verified snapshot, keeps the newest and removes old leftovers."""
    assert node.request("PUT", "/v1/kv/color", b"blue").ok
    node.run("mkdir -p /run/systemd/system/dengine-backup.service.d")
    node.write(
        "/run/systemd/system/dengine-backup.service.d/test.conf", "[Service]\nEnvironment=KEEP=2\n"
    )
    place = "/var/backups/dengine"
    node.run(f"""
        systemctl daemon-reload
        rm -f {place}/*
        touch {place}/dengine-2001010{{1,2,3}}T000000Z.dsnap {place}/mine.dsnap
        touch -d '2 days ago' {place}/dengine-20010104T000000Z.dsnap.partial
        touch {place}/dengine-20010105T000000Z.dsnap.partial
        systemctl start dengine-backup
    """)
    names = node.run(f"ls {place}").splitlines()
    (made,) = (name for name in names if re.fullmatch(r"dengine-20[2-9]\d{5}T\d{6}Z.dsnap", name))
    assert sorted(set(names) - {made}) == [
        "dengine-20010103T000000Z.dsnap",
        "dengine-20010105T000000Z.dsnap.partial",
        "mine.dsnap",
    ]
    file = f"{place}/{made}"
    assert node.run(f"stat --format='%a %U' {file}") == "600 dengine"
    node.run(f"/opt/dengine/current/bin/dengine snapshot verify {file}")

    node.run("systemctl stop dengine")
    assert node.attempt("systemctl start dengine-backup").returncode != 0
    assert node.run(f"ls {place}").splitlines() == names, "a failed backup removes nothing"
    node.run(
        "systemctl reset-failed dengine-backup; rm -r /run/systemd/system/dengine-backup.service.d"
    )


def test_the_backup_timer(node: Machine) -> None:
    """Once a day, also when the host was off at that time."""
    node.run("systemctl start dengine-backup.timer")
    timer = node.unit("dengine-backup.timer")
    node.run("systemctl stop dengine-backup.timer")
    assert (timer["ActiveState"], timer["Persistent"]) == ("active", "yes")
    assert timer["NextElapseUSecRealtime"]
