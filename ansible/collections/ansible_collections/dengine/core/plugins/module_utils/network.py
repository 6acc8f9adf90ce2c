"""Reachability and clocks between hosts: a listener that stands in for a node not started yet.

The stand-in answers one request per connection with 503, so that no load balancer takes it for a
node, and says what it is and what its clock shows. It ends by itself, and at once when it is told
to by somebody on its own machine.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import socket
import time

from ansible_collections.dengine.core.plugins.module_utils.client import ApiError, split_endpoint

PROBE_PATH = "/v1/probe"
HUSH_PATH = "/v1/probe/end"
STAND_IN = "dengine-probe"
REQUEST_S = 2.0


def bind(endpoint):
    """A bound socket. Raises OSError with the reason."""
    host, port = split_endpoint(endpoint)
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    server = socket.socket(family, kind, protocol)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
    except BaseException:
        server.close()
        raise
    return server


def local_endpoint(endpoint):
    """Where this machine itself reaches what listens on `endpoint`."""
    host, port = split_endpoint(endpoint)
    return {"0.0.0.0": f"127.0.0.1:{port}", "::": f"[::1]:{port}"}.get(host, endpoint)


def stand_in_pid(endpoint):
    """Process id of a stand-in that listens here, or None."""
    try:
        said = _get(local_endpoint(endpoint), PROBE_PATH)[1]
        return said["pid"] if said.get("server") == STAND_IN else None
    except (OSError, http.client.HTTPException, ValueError):
        return None


def listen(endpoint, seconds):
    """Start a stand-in in the background; False where something else listens already."""
    hush(endpoint)
    try:
        server = bind(endpoint)
    except OSError:
        return False
    server.listen(64)
    if os.fork() == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                null = os.open(os.devnull, os.O_RDWR)
                for number in (0, 1, 2):
                    os.dup2(null, number)
                _close_others(server.fileno())
                _serve(server, seconds)
        finally:
            os._exit(0)
    os.wait()
    server.close()
    return True


def hush(endpoint):
    """End a stand-in that listens here; returns whether there was one."""
    if stand_in_pid(endpoint) is None:
        return False
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        _get(local_endpoint(endpoint), HUSH_PATH)
    deadline = time.monotonic() + REQUEST_S
    while stand_in_pid(endpoint) is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    return True


def _close_others(keep):
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != keep:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _serve(server, seconds):
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([server], [], [], left)[0]:
            return
        link, peer = server.accept()
        with contextlib.closing(link):
            link.settimeout(REQUEST_S)
            with contextlib.suppress(OSError):
                target = link.recv(4096).split(b" ")[1:2]
                said = {"server": STAND_IN, "pid": os.getpid(), "time": time.time()}
                body = json.dumps(said).encode()
                link.sendall(
                    b"HTTP/1.1 503 Not a node\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
                    % (len(body), body)
                )
                own = link.getsockname()[0] == peer[0]
                if own and target == [HUSH_PATH.encode()]:
                    return


def _get(endpoint, path):
    """(seconds, JSON body) of one request on a connection of its own."""
    host, port = split_endpoint(endpoint)
    connection = http.client.HTTPConnection(host, port, timeout=REQUEST_S)
    began = time.monotonic()
    try:
        connection.request("GET", path)
        body = connection.getresponse().read()
    finally:
        connection.close()
    return time.monotonic() - began, json.loads(body.decode("utf-8"))


def measure(endpoint, count):
    """How far away a node or a stand-in is.

    Returns `error`, or `rtt_ms` (median and p99 of a connect; p99 of a whole exchange less the
    connect is added, so that something slow on the way shows) and `offset_ms` where a clock was
    told.
    """
    connects, answers, offsets = [], [], []
    try:
        host, port = split_endpoint(endpoint)
        for _ in range(count):
            began = time.monotonic()
            with socket.create_connection((host, port), REQUEST_S) as link:
                connects.append(time.monotonic() - began)
                link.settimeout(REQUEST_S)
                asked, asked_at = time.monotonic(), time.time()
                link.sendall(b"GET /livez HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n\r\n")
                said = link.recv(4096)
                took = time.monotonic() - asked
                answers.append(took)
            body = said.partition(b"\r\n\r\n")[2]
            with contextlib.suppress(ValueError, KeyError, TypeError):
                offsets.append((took, json.loads(body)["time"] - asked_at - took / 2))
    except ApiError as failure:
        return {"error": failure.message}
    except OSError as failure:
        reason = "timed out" if isinstance(failure, socket.timeout) else failure.strerror
        return {"error": reason or str(failure)}
    connects.sort()
    answers.sort()
    result = {
        "error": "",
        # An exchange includes the other side's work, which is not the way: the fastest counts.
        "rtt_ms": round(1000 * max(connects[len(connects) // 2], answers[0]), 3),
        "rtt_p99_ms": round(1000 * connects[(len(connects) - 1) * 99 // 100], 3),
        "offset_ms": None,
    }
    if offsets:
        result["offset_ms"] = round(1000 * min(offsets)[1], 1)
    return result


def owner_of(port):
    """Who listens on `port` here, as far as this user may know."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table, encoding="utf-8") as file:
            for line in file.read().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{name}/fd"):
                if os.readlink(f"/proc/{name}/fd/{fd}") in inodes:
                    with open(f"/proc/{name}/comm", encoding="utf-8") as file:
                        return f"process {name} ({file.read().strip()})"
    return "another process"
