"""`make run`: Ansible takes a cluster from nothing to three nodes while a client writes.

It runs ansible/expand.yml on inventories/local: three processes of this machine, no root, no
systemd. A client writes over plain HTTP from the moment the first node answers, and every write
that is not acknowledged counts. Exit code 0: the cluster was verified and no write failed. Nothing
stays behind. It uses the ports 9081-9083, or others where those are taken.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from examples.ansible.load import Clients, Watch, Writer  # noqa: E402

NODES = (1, 2, 3)
WRITES_PER_S = 200
AFTERWARDS_S = 2.0  # the client writes so long through all three before it stops
STOP_S = 15.0
ANSIBLE = Path(sys.executable).with_name("ansible-playbook")


def say(text: str = "") -> None:
    print(text, flush=True)


def port_base() -> int:
    """9080, or another base where one of its ports, 9081 to 9083, is taken."""
    # Below the range of outgoing connections: those could take a port in between.
    for base in (9080, *range(20_000, 32_000, 10)):
        if all(is_free(base + node_id) for node_id in NODES):
            return base
    raise SystemExit("no three free ports were found")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def nodes_of(directory: Path) -> list[int]:
    """Process ids of the nodes whose configuration lies in `directory`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                argv = (entry / "cmdline").read_bytes().split(b"\0")
                if b"serve" in argv and any(a.startswith(os.fsencode(directory)) for a in argv):
                    found.append(int(entry.name))
    return found


def stop_nodes(directory: Path) -> None:
    """SIGTERM, then SIGKILL for those that are still there."""
    deadline = time.monotonic() + STOP_S
    for pid in nodes_of(directory):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    while nodes_of(directory):
        if time.monotonic() >= deadline:
            for pid in nodes_of(directory):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)  # the pace of the polling


def summary(report: Path) -> str:
    """The report up to the long table of checks."""
    return report.read_text(encoding="utf-8").partition("\n## Preflight")[0].strip()


def run(directory: Path) -> int:
    base = port_base()
    endpoints = [f"127.0.0.1:{base + node_id}" for node_id in NODES]
    command = ["ansible-playbook", "-i", "inventories/local", "ansible/expand.yml"]
    if base != 9080:
        command += ["-e", f"dengine_port_base={base}"]
    clients = Clients(endpoints, directory / "secrets.json")
    writer = Writer(clients, "orders", WRITES_PER_S)
    watch = Watch(clients, endpoints[0])
    writer.start()
    watch.start()
    say("$ " + " ".join(command))
    environment = {**os.environ, "DENGINE_LOCAL_DIR": str(directory)}
    playbook = subprocess.Popen([str(ANSIBLE), *command[1:]], cwd=ROOT, env=environment)
    try:
        code = playbook.wait()
    except BaseException:
        playbook.terminate()
        playbook.wait()
        raise
    clients.stopping.wait(AFTERWARDS_S)
    clients.stopping.set()
    writer.join(15)
    if code:
        say(f"\nThe playbook failed ({code}). Its last message says why and what to do.")
        return 1
    say(summary(directory / "reports" / "expand.md"))
    say()
    say(f"voters over time   {' -> '.join(str(set(v)) for v in watch.voters())}")
    acknowledged, failed = len(writer.acknowledged), len(writer.failures)
    say(f"writes             {acknowledged} acknowledged, {failed} failed")
    latencies = sorted(writer.latencies_ms) or [0.0]
    say(f"latency            p99 {latencies[len(latencies) * 99 // 100]:.1f} ms")
    for failure in writer.failures[:3]:
        say(f"                   {failure}")
    return 1 if failed or not acknowledged else 0


def terminate(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, terminate)
    with tempfile.TemporaryDirectory(prefix="dengine-run-") as name:
        directory = Path(name).resolve()
        try:
            code = run(directory)
        except KeyboardInterrupt:
            say("\nInterrupted: the nodes are ended and their data is removed.")
            code = 130
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave nodes behind
            stop_nodes(directory)
    if code == 0:
        say("\nAll as promised; three nodes stopped, their data removed.")
    return code


if __name__ == "__main__":
    sys.exit(main())
