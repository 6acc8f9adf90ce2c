"""examples/quick-start-embedded, as its README says: alone, then three processes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import ROOT, ServeProcess, free_port, node_environment, wait_for

pytestmark = pytest.mark.timeout(300)
EXAMPLE = ROOT / "examples" / "quick-start-embedded"
PATIENT_S = 60.0


class Apps:
    """Processes of the app in one copy of its directory, each with what it has printed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ports = {node_id: free_port() for node_id in (1, 2, 3)}
        text = (EXAMPLE / "app.py").read_text(encoding="utf-8")
        for node_id, port in self.ports.items():
            text = text.replace(f"127.0.0.1:908{node_id}", f"127.0.0.1:{port}")
        (directory / "app.py").write_text(text, encoding="utf-8")
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, log: str, *args: str) -> subprocess.Popen[bytes]:
        guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with (self.directory / log).open("ab") as output:
            process = subprocess.Popen(
                [*guard, sys.executable, "app.py", *args],
                cwd=self.directory,
                env=node_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._started.append(process)
        return process

    def end(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()

    def lines(self, log: str) -> list[str]:
        file = self.directory / log
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []

    def counted(self, log: str) -> list[int]:
        return [int(line.split()[1]) for line in self.lines(log) if line.startswith("count: ")]

    def wait_counted(self, log: str, least: int) -> None:
        wait_for(
            lambda: max(self.counted(log), default=0) >= least,
            f"a count of {least} in {log}: {self.lines(log)[-5:]}",
            PATIENT_S,
        )


@pytest.fixture
def apps(tmp_path: Path) -> Iterator[Apps]:
    started = Apps(tmp_path)
    yield started
    started.end()


def test_alone_and_then_three(apps: Apps) -> None:
    """The count goes on over a kill, over Ctrl-C, into three, and over the loss of any one."""
    app = apps.start("alone.log")
    apps.wait_counted("alone.log", 2)
    app.kill()
    app.wait()
    before = max(apps.counted("alone.log"))

    app = apps.start("alone.log")
    apps.wait_counted("alone.log", before + 2)
    app.send_signal(signal.SIGINT)
    assert app.wait(PATIENT_S) == 0, apps.lines("alone.log")
    assert (apps.directory / "db" / "1" / "CLEAN").exists()
    counted = apps.counted("alone.log")
    assert counted == sorted(set(counted)), "each change is printed once"

    processes = {n: apps.start(f"{n}.log", str(n)) for n in (1, 2, 3)}
    node = ServeProcess(1, apps.ports[1], apps.directory, apps.directory, apps.directory / "1.log")
    wait_for(
        lambda: [m["status"] for m in node.cluster().get("members", ())] == ["active"] * 3,
        "three voters",
        PATIENT_S,
    )
    for n in (1, 2, 3):
        apps.wait_counted(f"{n}.log", max(counted) + 3)

    processes[1].kill()  # it led
    processes[1].wait()
    gone_at = max(max(apps.counted(f"{n}.log")) for n in (1, 2, 3))
    for n in (2, 3):
        apps.wait_counted(f"{n}.log", gone_at + 3)
        assert "Traceback" not in "\n".join(apps.lines(f"{n}.log"))

    processes[1] = apps.start("1.log", "1")
    apps.wait_counted("1.log", gone_at + 6)
    for n in (1, 2, 3):
        processes[n].send_signal(signal.SIGINT)
    for n in (1, 2, 3):
        assert processes[n].wait(PATIENT_S) == 0, apps.lines(f"{n}.log")


def test_a_newcomer_understands_it() -> None:
    """One file that fits on two screens, and a README that shows every command it needs."""
    assert len((EXAMPLE / "app.py").read_text(encoding="utf-8").splitlines()) <= 75
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    for command in ("python app.py", "python app.py 1", "python app.py 2", "python app.py 3"):
        assert command in readme
