"""A little HTTP server that says what it is told to, and writes down what it was asked."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLLECTIONS = Path(__file__).resolve().parents[2] / "ansible" / "collections"
MODULES = "ansible_collections.dengine.core.plugins.modules"
MODULE_S = 60


@dataclass
class Asked:
    method: str
    path: str
    body: bytes
    headers: dict[str, str]

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Say:
    """One answer."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


Answers = dict[str, "Say | list[Say] | Callable[[Asked], Say]"]


class IPv6Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6


class Server:
    """Answers by "METHOD /path". A list is given out one by one; its last answer stays."""

    def __init__(self, answers: Answers, host: str = "127.0.0.1") -> None:
        self.answers = answers
        self.asked: list[Asked] = []
        self.connections = 0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                server.connections += 1
                super().setup()

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                asked = Asked(
                    self.command, self.path, self.rfile.read(length), dict(self.headers.items())
                )
                server.asked.append(asked)
                say = server.choose(asked)
                body = say.body if isinstance(say.body, bytes) else json.dumps(say.body).encode()
                self.send_response(say.status)
                for name, value in say.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        kind = IPv6Server if ":" in host else http.server.ThreadingHTTPServer
        self._http = kind((host, 0), Handler)
        shown = f"[{host}]" if ":" in host else host
        self.endpoint = f"{shown}:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))

    def choose(self, asked: Asked) -> Say:
        found = self.answers.get(asked.line)
        if found is None:
            return Say({"error": "not_found", "message": asked.line, "outcome": "none"}, 404)
        if isinstance(found, list):
            return found.pop(0) if len(found) > 1 else found[0]
        return found if isinstance(found, Say) else found(asked)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    @property
    def lines(self) -> list[str]:
        return [a.line for a in self.asked]

    @property
    def changes(self) -> list[str]:
        """What was asked that is no reading."""
        return [a.line for a in self.asked if a.method != "GET"]


def run_module(
    name: str, /, check: bool = False, program: str = "", **arguments: Any
) -> dict[str, Any]:
    """Run a module as Ansible does: a process of its own, arguments on standard input.

    Args:
        program: runs the module that is its argument; Python itself does without one.
    """
    options = {**arguments, "_ansible_check_mode": check, "_ansible_diff": True}
    done = subprocess.run(
        [sys.executable, *(("-c", program) if program else ("-m",)), f"{MODULES}.{name}"],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": options}),
        env={"PYTHONPATH": str(COLLECTIONS), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=MODULE_S,
        check=False,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    result["raw"] = done.stdout + done.stderr
    return result


def ad_hoc(name: str, **arguments: Any) -> dict[str, Any]:
    """The same with its action plugin: what a task of a playbook gets."""
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("ansible")),
                *("localhost", "-i", "localhost,", "-c", "local"),
                *("-m", f"dengine.core.{name}", "-a", json.dumps(arguments)),
            ],
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(COLLECTIONS.parent / "ansible.cfg"),
                "ANSIBLE_HOME": home,
                "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
                "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
                "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
                "ANSIBLE_NOCOLOR": "1",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=MODULE_S,
            check=False,
        )
    start = done.stdout.find("{", done.stdout.find("=>") + 1)
    assert start >= 0, done.stdout + done.stderr
    result: dict[str, Any] = json.JSONDecoder().raw_decode(done.stdout[start:])[0]
    return result


def snapshot_file(size: int = 3000) -> tuple[bytes, dict[str, Any]]:
    """A file that ends with the SHA-256 of the rest, as a snapshot does, and what a node says."""
    rest = os.urandom(size)
    digest = hashlib.sha256(rest)
    file = rest + digest.digest()
    said = {"index": 12, "term": 2, "sha256": digest.hexdigest(), "size_bytes": len(file)}
    return file, said
