"""The systemd units as files: what `systemd-analyze` says of them, and what must agree with what.

Whether they also *run* is the business of tests/lab.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dengine import errors
from tests.cluster import ROOT

SYSTEMD = ROOT / "systemd"
SERVICES = ("dengine.service", "dengine-backup.service")
EXPOSURE_MAX = 1.5

needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed"
)


def unit(name: str) -> dict[str, list[str]]:
    """`Section.Key` -> every value it was given, in order."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in (SYSTEMD / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(f"{section}.{key}", []).append(value)
    return found


@needs_systemd
def test_systemd_finds_nothing_to_say(tmp_path: Path) -> None:
    """`systemd-analyze verify` on all units, as they stand on a host that has a release."""
    root = tmp_path / "root"
    units = root / "etc" / "systemd" / "system"
    units.mkdir(parents=True)
    for path in SYSTEMD.glob("dengine*"):
        shutil.copy(path, units)
    (root / "usr" / "lib").mkdir(parents=True)
    shutil.copytree("/usr/lib/systemd/system", root / "usr" / "lib" / "systemd" / "system")
    (root / "bin").symlink_to("usr/bin")
    (root / "usr" / "bin").mkdir()
    release = root / "opt" / "dengine" / "current" / "bin"
    release.mkdir(parents=True)
    for program in (root / "usr" / "bin" / "sh", release / "dengine"):
        program.write_text("#!/bin/true\n")
        program.chmod(0o755)
    names = sorted(path.name for path in units.iterdir())
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={root}", *names],
        capture_output=True,
        timeout=60,
        check=False,
    )
    said = [line for line in done.stderr.decode().splitlines() if "dengine" in line]
    assert (done.returncode, said) == (0, [])


@needs_systemd
@pytest.mark.parametrize("name", SERVICES)
def test_the_sandbox_is_tight(name: str) -> None:
    """`systemd-analyze security` rates both services 1.5 or better."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(SYSTEMD / name)],
        capture_output=True,
        timeout=60,
        check=False,
    )
    rated = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout.decode())
    assert rated, done
    assert float(rated[1]) <= EXPOSURE_MAX


def test_what_no_restart_mends_is_not_restarted() -> None:
    """The exit codes that need a person are those of dengine/errors.py, and none is missing."""
    ours = {cls.exit_code: cls for cls in all_errors(errors.FatalError)}
    listed = {
        int(code) for code in unit("dengine.service")["Service.RestartPreventExitStatus"][0].split()
    }
    assert listed == {65, 70, 76, 78}
    assert set(ours) - listed == {74, 75}, "these two a restart may mend"


def all_errors(cls: type[errors.FatalError]) -> set[type[errors.FatalError]]:
    below = cls.__subclasses__()
    return set(below).union(*(all_errors(sub) for sub in below))


@pytest.mark.parametrize("name", ["dengine.service", "dengine-backup.service"])
def test_no_core_dump_holds_a_secret(name: str) -> None:
    """A process that aborts, as the watchdog has it, leaves nothing of its memory behind."""
    assert unit(name)["Service.LimitCORE"] == ["0"]


def test_both_services_share_one_sandbox() -> None:
    """What is tightened for the node is tightened for its backups."""
    node, backup = (
        (SYSTEMD / name).read_text().partition("# --- The sandbox")[2].partition("[Install]")[0]
        for name in SERVICES
    )

    def settings(text: str) -> list[str]:
        return [line for line in text.splitlines()[1:] if line and not line.startswith("#")]

    assert settings(node) == settings(backup)


def test_the_units_name_the_same_places() -> None:
    """Paths of the units, of sysusers.d and of tmpfiles.d belong together."""
    service, backup = unit("dengine.service"), unit("dengine-backup.service")
    made = {
        line.split()[1]: line.split()[2:5]
        for line in (SYSTEMD / "tmpfiles.d" / "dengine.conf").read_text().splitlines()
        if line and not line.startswith("#")
    }
    assert made["/etc/dengine/secrets"] == ["0700", "root", "root"]
    assert made[backup["Service.ReadWritePaths"][0]] == ["0700", "dengine", "dengine"]
    assert service["Service.StateDirectory"] == ["dengine"]
    assert service["Service.StateDirectoryMode"] == ["0700"]
    credentials = dict(value.split(":") for value in service["Service.LoadCredential"])
    assert credentials == {
        name: f"/etc/dengine/secrets/{name}" for name in ("peer_secret", "token")
    }
    for name in (service, backup):
        assert name["Service.User"] == name["Service.Group"] == ["dengine"]
        assert name["Service.Slice"] == ["dengine.slice"]
        assert name["Service.ExecStart"][0].find("/opt/dengine/current/bin/dengine ") >= 0
