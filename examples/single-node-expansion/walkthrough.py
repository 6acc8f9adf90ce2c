"""The README of this directory, driven by itself: one node grows to three and survives a kill -9.

It starts real nodes on this machine with the files in `config/`, keeps writing to them all the
while, and checks every promise on the way. Exit code 0: nothing broke; where only the pause after
the kill was longer than promised, as on a busy machine, the last line says so. It needs about half
a minute, leaves nothing behind, and uses the ports 9081-9083, or others where those are taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STEP_S = 20.0  # the longest wait for one thing
TOTAL_S = 90.0  # the longest walkthrough; it usually takes a third of that
PAUSE_PROMISED_S = 2.0  # in writes, after the kill of the leader
PAUSE_MAX_S = 5.0  # longer than that is no busy machine any more, but a broken promise
# For nodes that ask for a token (DENGINE__SECURITY__TOKEN_FILE), as `dengine` finds it.
TOKEN_FILE = os.environ.get("DENGINE_TOKEN_FILE")
TOKEN = Path(TOKEN_FILE).read_text("ascii").strip() if TOKEN_FILE else ""
AUTHORIZATION = {"Authorization": f"Bearer {TOKEN}"} if TOKEN else {}
T = TypeVar("T")
started = time.monotonic()


class NotAsPromisedError(Exception):
    """What was promised and what was seen, in one sentence."""


# ---------------------------------------------------------------- what a person sees


def paint(code: str, text: str) -> str:
    wanted = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\033[{code}m{text}\033[0m" if wanted else text


def say(text: str = "") -> None:
    print(text, flush=True)


def title(number: int, text: str) -> None:
    say(f"\n{paint('1;36', f'{number}  {text}')}")


def fact(text: str) -> None:
    say(f"   {paint('32', '✓')} {text}")


def quote(node_id: int, line: str) -> None:
    say(f"   {paint('2', f'node {node_id} │')} {line}")


def thousands(number: int) -> str:
    return f"{number:,}".replace(",", " ")


# ---------------------------------------------------------------- nodes and requests


def wait_for(condition: Callable[[], T | None], promise: str) -> T:
    """The first truthy value of `condition`; a node that cannot be reached counts as "not yet"."""
    end = min(time.monotonic() + STEP_S, started + TOTAL_S)
    while time.monotonic() < end:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if value := condition():
                return value
        time.sleep(0.02)  # the pace of the polling
    raise NotAsPromisedError(f"{promise}: that did not happen in time.")


def request(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """One HTTP exchange with the node on `port`: (status, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection):
        connection.request(method, path, body, AUTHORIZATION)
        response = connection.getresponse()
        return response.status, response.read()


class ServedNode:
    """One `dengine serve`, run in the walkthrough's directory with its file of `config/`."""

    def __init__(self, node_id: int, port: int, directory: Path) -> None:
        self.id = node_id
        self.port = port
        self.directory = directory
        self.log = directory / f"{node_id}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        file = f"config/n{self.id}.toml"
        say(f"   {paint('2', f'$ dengine serve --config {file}')}")
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dengine", "serve", "--config", file],
                cwd=self.directory,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the walkthrough, which ends its nodes
            )

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def end(self, number: signal.Signals) -> int | None:
        """Send a signal and wait; the exit code, or None for a node that does not run."""
        if self.process is None or not self.running:
            return None
        os.kill(self.process.pid, number)
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
            raise NotAsPromisedError(f"Node {self.id} did not stop within 10 s.") from None

    def lines(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []

    def expect(self, *promised: str) -> None:
        """Wait for whole lines that the README promises, in this order, and show them."""

        def printed() -> bool:
            if self.process is not None and not self.running:
                code = self.process.returncode
                raise NotAsPromisedError(f"Node {self.id} ended with exit code {code}.")
            rest = iter(self.lines())
            return all(line in rest for line in promised)

        wait_for(printed, f"Node {self.id} prints {' and '.join(map(repr, promised))}")
        for line in promised:
            quote(self.id, line)

    def json(self, path: str) -> dict[str, Any]:
        """The JSON body of a GET, or {} unless the node answered 200."""
        status, body = request(self.port, "GET", path)
        answer: dict[str, Any] = json.loads(body) if status == 200 else {}
        return answer

    def items(self) -> dict[str, Any]:
        """Every key this node holds, after a linearizable read barrier on the node itself."""
        found: dict[str, Any] = {}
        after = ""
        while True:
            page = self.json(f"/v1/kv?limit=1000{after}")
            if not page:
                raise NotAsPromisedError(f"Node {self.id} does not list its keys.")
            found.update(
                (item["key"], (item["value"], item["mod_revision"])) for item in page["items"]
            )
            if page["next"] is None:
                return found
            after = f"&after={page['next']}"


class Client(threading.Thread):
    """An application that never stops writing: key after key, each to the next node in turn.

    A write that is refused or cut off goes to the next node: the same key with the same value, so
    it makes no difference whether the first attempt arrived.
    """

    def __init__(self) -> None:
        super().__init__(name="client", daemon=True)
        self.ports: list[int] = []
        self.failures: list[str] = []
        self.acknowledged: dict[str, str] = {}
        self.acknowledged_at: list[float] = []
        self.stopping = threading.Event()

    def run(self) -> None:
        connections: dict[int, http.client.HTTPConnection] = {}
        attempt = 0
        while not self.stopping.wait(0.002):
            attempt += 1
            port = self.ports[attempt % len(self.ports)]
            link = connections.setdefault(
                port, http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            )
            number = len(self.acknowledged) + 1
            key, value = f"orders/{number:06d}", f"order {number}"
            try:
                link.request("PUT", f"/v1/kv/{key}", value.encode(), AUTHORIZATION)
                response = link.getresponse()
                body = response.read()
            except (OSError, http.client.HTTPException) as error:
                link.close()
                self.failures.append(f"{key} to port {port}: {error!r}")
                continue
            if response.status == 200:
                self.acknowledged[key] = value
                self.acknowledged_at.append(time.monotonic())
            else:
                self.failures.append(f"{key} to port {port}: {response.status} {body[:200]!r}")
        for link in connections.values():
            link.close()

    def wait_more(self, count: int) -> None:
        goal = len(self.acknowledged) + count
        wait_for(lambda: len(self.acknowledged) >= goal, "The client's writes are acknowledged")

    def gap_s(self, since: float) -> float:
        """The longest pause between two acknowledged writes that ended after `since`."""
        times = self.acknowledged_at
        return max((b - a for a, b in itertools.pairwise(times) if b > since), default=0.0)


class MembershipReporter(threading.Thread):
    """Prints every membership that the cluster commits, as node 1 announces it."""

    def __init__(self, node: ServedNode) -> None:
        super().__init__(name="membership", daemon=True)
        self.node = node
        self.last = ""

    def run(self) -> None:
        link = http.client.HTTPConnection("127.0.0.1", self.node.port, timeout=TOTAL_S)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(link):
            link.request("GET", "/v1/cluster/watch", headers=AUTHORIZATION)
            for line in link.getresponse():
                if line.startswith(b"data:"):
                    self.show(json.loads(line[5:]))

    def show(self, view: dict[str, Any]) -> None:
        voters = [str(m["id"]) for m in view["members"] if m["status"] == "active"]
        learners = [str(m["id"]) for m in view["members"] if m["status"] != "active"]
        text = f"voters {{{', '.join(voters)}}}"
        text += f" · learners {{{', '.join(learners)}}}" if learners else ""
        text += " · joint: majorities of old and new voters both decide" if view["joint"] else ""
        if text != self.last:
            self.last = text
            say(f"   {paint('33', 'membership')} {text}")


# ---------------------------------------------------------------- the story


class Walkthrough:
    def __init__(self, directory: Path) -> None:
        ports = choose_ports()
        write_configs(directory / "config", ports)
        self.nodes = {i: ServedNode(i, port, directory) for i, port in ports.items()}
        self.client = Client()

    def run(self) -> None:
        self.start_alone()
        self.join(2)
        self.join(3)
        self.check_growth()
        killed = self.kill_leader()
        self.restart(killed)
        self.compare()
        self.stop()

    def start_alone(self) -> None:
        title(1, "One node, which takes traffic at once")
        node = self.nodes[1]
        began = time.monotonic()
        node.start()
        node.expect(
            "[Node 1] Follower → Candidate (term 1)", "[Node 1] Candidate → Leader (term 2)"
        )
        self.client.ports.append(node.port)
        self.client.start()
        self.client.wait_more(1)
        fact(f"first write acknowledged after {time.monotonic() - began:.1f} s")
        MembershipReporter(node).start()
        self.client.wait_more(200)
        fact("a client writes orders to it, and will not stop until the end")
        self.first_pid = node.pid

    def join(self, node_id: int) -> None:
        title(node_id, f"Node {node_id} joins while the client writes")
        node = self.nodes[node_id]
        began = time.monotonic()
        node.start()
        node.expect(
            f"✅ NODE {node_id} SUCCESSFULLY JOINED CLUSTER",
            f"[Node {node_id}] Learner → Follower (term 2)",
            f"🎊 NODE {node_id} PROMOTED TO VOTER!",
        )
        took_s = time.monotonic() - began
        wanted = list(range(1, node_id + 1))
        wait_for(lambda: self.voters() == wanted, f"The voters are {wanted}")
        self.client.ports.append(node.port)
        self.client.wait_more(100)
        fact(f"a voter after {took_s:.1f} s; the client now writes through node {node_id} too")
        if node_id == 2:
            say("     Two voters tolerate no failure, so the third node joins at once.")

    def view(self) -> dict[str, Any]:
        """What any living node says about the cluster; {} while none can tell."""
        for node in self.nodes.values():
            with contextlib.suppress(OSError, http.client.HTTPException):
                if view := node.json("/v1/cluster"):
                    return view
        return {}

    def voters(self) -> list[int]:
        view = self.view()
        if not view or view["joint"]:
            return []
        return sorted(m["id"] for m in view["members"] if m["status"] == "active")

    def table(self) -> None:
        say(paint("2", "   node  address         role      status   behind"))
        for member in sorted(self.view()["members"], key=lambda m: m["id"]):
            line = f"   {member['id']:<4}  {member['address']:<14}  {member['role']:<8}"
            say(f"{line}  {member['status']:<7}  {member['lag']}")

    def check_growth(self) -> None:
        title(4, "Three voters: the loss of any one is survived")
        self.table()
        if self.client.failures:
            raise NotAsPromisedError(f"A write failed while it grew: {self.client.failures[0]}")
        if self.nodes[1].pid != self.first_pid or not self.nodes[1].running:
            raise NotAsPromisedError("Node 1 did not stay up while the cluster grew.")
        fact(f"{thousands(len(self.client.acknowledged))} writes while it grew, none failed")
        fact(f"node 1 is still the same process ({self.first_pid})")

    def leader(self, but: int = 0) -> ServedNode | None:
        leader = self.view().get("leader") or {}
        return self.nodes[leader["id"]] if leader and leader["id"] != but else None

    def kill_leader(self) -> ServedNode:
        title(5, "kill -9 of the leader")
        leader = wait_for(self.leader, "There is a leader")
        acknowledged = len(self.client.acknowledged)
        at = time.monotonic()
        leader.end(signal.SIGKILL)
        say(f"   {paint('2', f'$ kill -9 {leader.pid}')}   node {leader.id}, the leader")
        successor = wait_for(lambda: self.leader(but=leader.id), "A new leader is elected")
        self.client.wait_more(200)
        self.pause_s = self.client.gap_s(at)
        if self.pause_s > PAUSE_MAX_S:
            raise NotAsPromisedError(f"Writes stood still for {self.pause_s:.1f} s after the kill.")
        for line in successor.lines():
            if line.endswith(")") and "→" in line and "Learner" not in line:
                quote(successor.id, line)
        measured = paint("1", f"{self.pause_s:.2f} s")
        promised = f"promised: at most {PAUSE_PROMISED_S:g} s"
        fact(f"node {successor.id} leads; writes paused for {measured} ({promised})")
        if len(self.client.acknowledged) < acknowledged:
            raise NotAsPromisedError("Acknowledged writes were lost.")
        return leader

    def restart(self, node: ServedNode) -> None:
        title(6, f"Node {node.id} comes back with the same file, as a follower")
        began = time.monotonic()
        node.start()

        wait_for(
            lambda: request(node.port, "GET", "/replica?lag=100")[0] == 200,
            f"Node {node.id} follows the new leader",
        )
        self.client.wait_more(200)
        fact(f"follows after {time.monotonic() - began:.1f} s, while the client goes on writing")

    def compare(self) -> None:
        title(7, "All three hold the same data")
        self.client.stopping.set()
        self.client.join(10)
        held = {node.id: node.items() for node in self.nodes.values()}
        for node_id, items in held.items():
            digest = hashlib.sha256(json.dumps(sorted(items.items())).encode()).hexdigest()
            say(f"   node {node_id}   {thousands(len(items))} keys   sha256 {digest[:16]}…")
        if not held[1] == held[2] == held[3]:
            raise NotAsPromisedError("The three nodes do not hold the same data.")
        lost = [k for k, v in self.client.acknowledged.items() if held[1].get(k, ("",))[0] != v]
        if lost:
            raise NotAsPromisedError(f"{len(lost)} acknowledged writes are lost, first {lost[0]}.")
        fact(
            f"every one of {thousands(len(self.client.acknowledged))} acknowledged writes is there"
        )

    def stop(self) -> None:
        title(8, "Clean up")
        for node in self.nodes.values():
            code = node.end(signal.SIGTERM)
            if code != 0:
                raise NotAsPromisedError(f"Node {node.id} stopped with exit code {code}, not 0.")
        fact("three nodes stopped on SIGTERM with exit code 0, their data removed")

    def abandon(self) -> None:
        """End whatever still runs, by pid."""
        self.client.stopping.set()
        for node in self.nodes.values():
            node.end(signal.SIGKILL)

    def explain(self) -> None:
        """The last lines of every node, for the person who wonders what went wrong."""
        for node in self.nodes.values():
            for line in node.lines()[-12:]:
                quote(node.id, line)


def choose_ports() -> dict[int, int]:
    """9081 to 9083 by node id if all three are free, else three others."""
    ports = {node_id: 9080 + node_id for node_id in (1, 2, 3)}
    if all(is_free(port) for port in ports.values()):
        return ports
    # Below the range of outgoing connections: those could take the port of a killed node.
    candidates = (port for port in range(20_001, 32_000) if is_free(port))
    ports = {node_id: next(candidates) for node_id in ports}
    say(f"   Some of the ports 9081-9083 are taken, so the nodes use {list(ports.values())}.")
    return ports


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def write_configs(directory: Path, ports: dict[int, int]) -> None:
    """The files of `config/`, with other ports where it had to be."""
    directory.mkdir()
    for node_id in ports:
        text = (HERE / "config" / f"n{node_id}.toml").read_text(encoding="utf-8")
        for other, port in ports.items():
            text = text.replace(f":908{other}", f":{port}")
        (directory / f"n{node_id}.toml").write_text(text, encoding="utf-8")


def verdict(pause_s: float) -> str:
    """The last word where nothing broke and writes paused for `pause_s` seconds."""
    if pause_s <= PAUSE_PROMISED_S:
        return paint("1;32", "All as promised.")
    slower = f"writes paused for {pause_s:.2f} s, not at most {PAUSE_PROMISED_S:g} s."
    return paint("1;33", "Slower than promised:") + f" {slower} All else held."


interrupted = False


def terminate(*_: object) -> NoReturn:
    global interrupted
    interrupted = True
    raise KeyboardInterrupt


def main() -> int:
    """Run the walkthrough; 0 when nothing broke (see `verdict`), 130 when interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, terminate)
    say(paint("1", "One node becomes three, and outlives its leader"))
    with tempfile.TemporaryDirectory(prefix="dengine-walkthrough-") as directory:
        story = Walkthrough(Path(directory))
        try:
            story.run()
        except NotAsPromisedError as broken:
            story.explain()
            say(f"\n{paint('1;31', '✗')} {broken}")
            return 1
        except (KeyboardInterrupt, RuntimeError):
            if not interrupted:  # within a lock it may become "release unlocked lock"
                raise
            say("\nInterrupted: the nodes are ended and their data is removed.")
            return 130
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave nodes behind
            story.abandon()
    say(f"\n{verdict(story.pause_s)} It took {time.monotonic() - started:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
