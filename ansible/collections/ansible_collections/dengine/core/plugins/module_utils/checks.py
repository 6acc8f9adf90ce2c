"""The checks of one host. Each returns (ok, measured, limit, hint); none changes anything.

`limits` holds the operator's limits; the names here are those that `dengine_preflight_skip` takes.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time

from ansible_collections.dengine.core.plugins.module_utils import firewall as packets
from ansible_collections.dengine.core.plugins.module_utils import host, network
from ansible_collections.dengine.core.plugins.module_utils.client import ApiError, split_endpoint

LIMITS = {
    "python_min": "3.11",
    "python_max": "3.13",  # wheels are pinned for these
    "memory_mb": 512,
    "disk_free_mb": 2048,
    "disk_times_data": 3,
    "fsync_p99_ms": 10.0,
    "open_files": 4096,
    "systemd_min": 251,  # the unit of the backup names its credentials with %d
}
ARCHITECTURES = ("x86_64", "aarch64")
VOLATILE = ("tmpfs", "ramfs", "overlay")
NETWORK_FS = ("nfs", "nfs4", "cifs", "9p", "fuse.sshfs", "glusterfs", "ceph")
FSYNC_WRITES = 50
STA_UNSYNC = 0x40


def python(params, limits, run):
    have = sys.version_info[:2]
    least, most = (
        tuple(int(n) for n in str(limits[name]).split(".")) for name in ("python_min", "python_max")
    )
    allowed = "{} to {}".format(limits["python_min"], limits["python_max"])
    shown = "{} at {}".format(".".join(map(str, have)), sys.executable)
    if not least <= have <= most:
        return False, shown, allowed, f"install a python3 of version {allowed}"
    if params["backend"] == "systemd":
        code = run([sys.executable, "-c", "import ensurepip, venv"])[0]
        if code:
            return False, shown + " without venv", "venv", "apt-get install python3-venv"
    return True, shown, allowed, ""


def architecture(params, limits, run):
    have = platform.machine()
    return have in ARCHITECTURES, have, " or ".join(ARCHITECTURES), "use another machine"


def systemd(params, limits, run):
    if params["backend"] != "systemd":
        return None
    need = limits["systemd_min"]
    if not os.path.isdir("/run/systemd/system"):
        return False, "not running", f">= {need}", "boot the host with systemd"
    code, out, _ = run(["systemctl", "--version"])
    have = out.split()[1] if not code and len(out.split()) > 1 else "0"
    have = "".join(c for c in have if c.isdigit())[:3] or "0"
    return int(have) >= need, have, f">= {need}", "upgrade the system (Debian 12 has 252)"


def privileges(params, limits, run):
    if params["backend"] != "systemd":
        return None
    uid = os.getuid()
    return uid == 0, f"uid {uid}", "root", "set ansible_become: true for the group"


def memory(params, limits, run):
    with open("/proc/meminfo", encoding="utf-8") as file:
        sizes = dict(line.split(":", 1) for line in file)
    have = int(sizes["MemAvailable"].split()[0]) // 1024
    need = limits["memory_mb"]
    return _unless_it_runs(
        params, have >= need, f"{have} MB free", f"{need} MB", "give the host more memory"
    )


def _unless_it_runs(params, ok, measured, limit, hint):
    """A node that runs has its memory already, and its own writes are what slows the disk."""
    if not ok and host.find_process(params["config"]):
        return True, f"{measured}, not judged: the node runs", limit, hint
    return ok, measured, limit, hint


def open_files(params, limits, run):
    if params["backend"] == "systemd":  # the unit sets its own limit
        return None
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    need = limits["open_files"]
    unlimited = hard == resource.RLIM_INFINITY
    shown = "unlimited" if unlimited else str(hard)
    return unlimited or hard >= need, shown, str(need), "raise `ulimit -Hn`"


def disk_space(params, limits, run):
    """A newcomer gets what the members have, so that counts, and not its own empty directory."""
    data = max(host.data_bytes(params["data_dir"]), params["data_bytes"]) // 10**6
    least, times = int(limits["disk_free_mb"]), int(limits["disk_times_data"])
    need = max(least, times * data)
    limit = f"{need} MB" + (f", {times} times the data" if need > least else "")
    point = host.nearest(params["data_dir"])
    have = shutil.disk_usage(point).free // 10**6
    return have >= need, f"{have} MB at {point}", limit, "make room, or use a larger disk"


def filesystem(params, limits, run):
    point, kind = host.mount_of(params["data_dir"])
    bad = kind in VOLATILE or kind in NETWORK_FS
    hint = "put the data directory on a local disk"
    return not bad, f"{kind} at {point}", "a local disk", hint


def fsync(params, limits, run):
    point = host.nearest(params["data_dir"])
    while not os.access(point, os.W_OK):
        if point == "/":
            return False, "no directory to write in", "", "run as a user that may write there"
        point = os.path.dirname(point)
    times = []
    with tempfile.NamedTemporaryFile(dir=point, prefix=".dengine-probe-") as file:
        for _ in range(FSYNC_WRITES):
            began = time.monotonic()
            file.write(b"\0" * 4096)
            file.flush()
            os.fdatasync(file.fileno())
            times.append(1000 * (time.monotonic() - began))
    times.sort()
    p99 = times[(len(times) - 1) * 99 // 100]
    need = float(limits["fsync_p99_ms"])
    shown = f"p99 {p99:.1f} ms, median {times[len(times) // 2]:.1f} ms"
    hint = "every write waits for this: use an SSD or NVMe"
    return _unless_it_runs(params, p99 <= need, shown, f"p99 {need:g} ms", hint)


def time_sync(params, limits, run):
    """Does the kernel say that something keeps its clock right?"""
    buffer = ctypes.create_string_buffer(512)  # struct timex; modes = 0 only reads
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except AttributeError:
        state = -1
    offset = 8 + 4 * ctypes.sizeof(ctypes.c_long)
    status = int.from_bytes(buffer.raw[offset : offset + 4], sys.byteorder)
    synced = state >= 0 and not status & STA_UNSYNC
    shown = "synchronized" if synced else "not synchronized"
    return synced, shown, "synchronized", "install and start chrony or systemd-timesyncd"


def port(params, limits, run):
    """Free, or ours: a node that runs already, or a stand-in that an earlier run left."""
    endpoint = params["listen_address"]
    number = split_endpoint(endpoint)[1]
    if host.find_process(params["config"]) or network.stand_in_pid(endpoint) is not None:
        return True, f"{number} is ours", "free or ours", ""
    try:
        network.bind(endpoint).close()
    except OSError as failure:
        if "assign" in (failure.strerror or ""):
            return False, f"{endpoint} is not of this host", "", "correct dengine_address"
        owner = network.owner_of(number)
        hint = "stop it, or set another dengine_port"
        return False, f"{number} is taken by {owner}", "free or ours", hint
    return True, f"{number} is free", "free or ours", ""


def firewall(params, limits, run):
    """A packet filter that stops what it does not name, and does not name the port.

    Where the way from another host was measured, that decides instead: see `host_rows`.
    """
    number = split_endpoint(params["listen_address"])[1]
    if os.getuid() != 0 or not _which("nft"):
        return None
    code, rules, _ = run([_which("nft"), "--json", "list", "ruleset"])
    if code:
        return None
    closed, opened, unread = packets.judge(json.loads(rules), number)
    wanted, hint = f"port {number} open", f"allow TCP {number} from the peers"
    if not closed:
        return True, "lets everything in", wanted, ""
    if unread and not opened:
        return True, f"stops the rest; not all of its rules can be read for {number}", wanted, ""
    return opened, f"stops the rest, {number} is {'' if opened else 'not '}let in", wanted, hint


CHECKS = {
    f.__name__: f
    for f in (
        python,
        architecture,
        systemd,
        privileges,
        memory,
        open_files,
        disk_space,
        filesystem,
        fsync,
        time_sync,
        port,
        firewall,
    )
}


def run(params, run_command):
    """One row for each of `params["checks"]`; those that do not apply here give none."""
    limits = {**LIMITS, **params["limits"]}
    rows = []
    for name in params["checks"]:
        try:
            outcome = CHECKS[name](params, limits, run_command)
        except (ApiError, OSError, ValueError, KeyError) as failure:
            outcome = (False, f"could not be checked: {failure}", "", "")
        if outcome is not None:
            ok, measured, limit, hint = outcome
            rows.append(
                {
                    "check": name,
                    "status": "ok" if ok else "FAILED",
                    "measured": measured,
                    "limit": limit,
                    "hint": "" if ok else hint,
                }
            )
    return rows


def _which(name):
    return shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
