"""What one host says about its dengine: process, directory, file. Works on any Python 3.8."""

from __future__ import annotations

import hashlib
import json
import os

IDENTITY = "identity.json"
HALTED = "HALTED"  # in the data directory: why no start is to use it, "EXIT_CODE reason"
SECRETS = ("peer_secret", "token")
# Written by role rollout when a cluster was verified, into a directory that destroy.yml removes.
MARKER = "cluster.json"
UNIT = "/etc/systemd/system/dengine.service"
ENABLED_UNIT = "/etc/systemd/system/multi-user.target.wants/dengine.service"


def find_process(config):
    """Pid and start time (clock ticks after boot) of `dengine serve --config <config>`, or None.

    Looked up by what runs, never by a file that an earlier run wrote.
    """
    wanted = [b"serve", b"--config", os.fsencode(config)]
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                argv = file.read().split(b"\0")[:-1]
            if argv[-3:] != wanted:
                continue
            with open(f"/proc/{name}/stat", encoding="utf-8") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:  # it has just ended, or is somebody else's
            continue
        if fields[0] not in ("Z", "X"):
            return {"pid": int(name), "started": int(fields[19])}
    return None


def has_security(path):
    """Does the configuration there have the section [security]? None where there is no file."""
    try:
        with open(path, "rb") as file:
            lines = [line.split(b"#")[0].strip() for line in file]
    except OSError:
        return None
    return any(line.replace(b" ", b"") == b"[security]" for line in lines)


def read_identity(directory):
    """What `<data dir>/<node id>/identity.json` says, or {} where there is none."""
    try:
        with open(os.path.join(directory, IDENTITY), encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        return {}
    except ValueError:
        return {"error": "it is not JSON"}
    return found if isinstance(found, dict) else {"error": "it is not an object"}


def halted(directory):
    """Why the node refuses to start with this directory, or ""."""
    try:
        with open(os.path.join(directory, HALTED), encoding="utf-8", errors="replace") as file:
            return " ".join(file.read().split())
    except OSError:
        return ""


def has_secrets(directory):
    """Do the secrets of a cluster lie here?"""
    return any(os.path.exists(os.path.join(directory, name)) for name in SECRETS)


def trace(secrets_dir, unit=""):
    """What shows that a cluster was once at work on this host, whatever became of its data, or "".

    A configuration or a directory is no such trace: a first run that was killed leaves those.
    """
    marker = os.path.join(secrets_dir, MARKER)
    if os.path.exists(marker):
        return marker
    return f"{os.path.basename(unit)} is enabled" if unit and os.path.lexists(unit) else ""


def verified(secrets_dir):
    """Id of the cluster that was verified on this host, or "" where that is not known."""
    try:
        with open(os.path.join(secrets_dir, MARKER), encoding="utf-8") as file:
            return str(json.load(file)["cluster_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def is_empty(directory):
    """No directory, or nothing in it but a lock."""
    try:
        return not set(os.listdir(directory)) - {"LOCK"}
    except FileNotFoundError:
        return True


def data_bytes(directory):
    """What the data of a node take: its largest snapshot, or its state where there is none yet.

    A state on disk counts what it has room for, a snapshot what there is.
    """
    snapshots = _sizes(os.path.join(directory, "snapshots"), lambda name: name.endswith(".dsnap"))
    if snapshots:
        return max(found.st_size for found in snapshots)
    try:
        states = [name for name in os.listdir(directory) if name.startswith("state-")]
    except OSError:
        return 0
    taken = (_sizes(os.path.join(directory, name)) for name in states)
    return max((sum(512 * found.st_blocks for found in sizes) for sizes in taken), default=0)


def _sizes(directory, wanted=lambda name: True):
    try:
        return [entry.stat() for entry in os.scandir(directory) if wanted(entry.name)]
    except OSError:
        return []


def digest(path):
    """SHA-256 of a file, or "" where there is none."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return ""


def nearest(path):
    """`path`, or its nearest ancestor that exists."""
    path = os.path.abspath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def mount_of(path):
    """(mount point, file system type) of what holds `path`."""
    path = os.path.realpath(nearest(path))
    best = ("/", "")
    with open("/proc/self/mounts", encoding="utf-8") as file:
        for line in file:
            _, point, kind = line.split()[:3]
            point = point.encode().decode("unicode_escape")
            inside = path == point or path.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best[0]):
                best = (point, kind)
    return best


def machine_id():
    """Which machine this is; boot id where it has no name of its own."""
    for path in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"):
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read().strip()
        except OSError:
            continue
        if text:
            return text
    return ""
