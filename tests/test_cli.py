"""The command line as people and scripts meet it: real processes, and a small real HTTP server.

The server here answers what it is told to and remembers what it was asked, which shows things a
healthy node never lets one see: what is sent again, what is not, and in which bytes.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
N1 = """\
[cluster]
node_id = 1
listen_address = "0.0.0.0:{port}"
initial_cluster = [ {{ id = 1, address = "0.0.0.0:{port}", role = 2, status = 2 }} ]
db_root_dir = "./db"
"""


@dataclass(frozen=True)
class Asked:
    method: str
    target: str  # as it stood in the request line
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b"{}"
    headers: Mapping[str, str] = field(default_factory=dict)


HANG_UP = Answer(status=0)  # close the connection without a word
Script = Callable[[Asked], Answer]


class Server(ThreadingHTTPServer):
    """Answers with `script` and keeps every request in `asked`."""

    daemon_threads = True

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.asked: list[Asked] = []
        self.endpoint = f"127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = Asked(self.command, self.path, dict(self.headers.items()), body)
        self.server.asked.append(asked)
        answer = self.server.script(asked)
        if answer is HANG_UP:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: pytest shows what matters."""


@pytest.fixture
def serving() -> Iterator[Callable[[Script | Answer], Server]]:
    """Start servers that end with the test."""
    servers: list[tuple[Server, threading.Thread]] = []

    def start(script: Script | Answer) -> Server:
        server = Server((lambda _: script) if isinstance(script, Answer) else script)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join(5)
        server.server_close()


Serving = Callable[[Script | Answer], Server]
FORMS = [(), ("--keys-only",), ("--json",)]  # of a listing


def dengine(
    *args: str | bytes, stdin: bytes = b"", cwd: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[bytes]:
    """Run the command line in a clean environment and wait for its end."""
    return subprocess.run(
        [sys.executable, "-m", "dengine", *args],
        input=stdin,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LC_ALL": "C", **environ},
        capture_output=True,
        timeout=30,
        check=False,
    )


def as_json(value: Any) -> Answer:
    return Answer(body=json.dumps(value).encode())


def refusal(name: str, status: int, *, retryable: bool, outcome: str) -> Answer:
    body = {
        "error": name, "code": 1, "message": f"a {name}", "retryable": retryable,
        "outcome": outcome,
    }  # fmt: skip
    return Answer(status, json.dumps(body).encode())


def unused_endpoint() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


# --- Keys and values


@pytest.mark.parametrize(
    ("key", "target"),
    [
        (b"greeting", "/v1/kv/greeting"),
        (b"a/b c+d%", "/v1/kv/a%2Fb%20c%2Bd%25"),
        (b"\xff\xfe", "/v1/kv/%FF%FE"),
        ("ключ".encode(), "/v1/kv/%D0%BA%D0%BB%D1%8E%D1%87"),
        (b"..", "/v1/kv?key_base64=Li4%3D"),
    ],
)
def test_every_key_arrives_as_it_was_typed(serving: Serving, key: bytes, target: str) -> None:
    """Slashes, blanks, dots and bytes that are no text reach the node unchanged."""
    server = serving(Answer(body=b"\x00value\xff\n"))
    done = dengine("get", key, "--endpoint", server.endpoint)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"\x00value\xff\n", "the value's own bytes, nothing added"
    assert [asked.target for asked in server.asked] == [target]


def test_a_value_comes_from_the_argument_stdin_or_a_file(serving: Serving, tmp_path: Path) -> None:
    """`put KEY VALUE`, `put KEY -`, `put KEY --file F`; an empty value is a value."""
    server = serving(as_json({"revision": 3, "created": True}))
    (tmp_path / "f").write_bytes(b"\x00file")
    at = ("--endpoint", server.endpoint)
    assert dengine("put", "k", "arg", *at).stdout == b"revision 3 (created)\n"
    assert dengine("put", "k", "-", *at, stdin=b"\xffstdin").returncode == 0
    assert dengine("put", "k", "--file", str(tmp_path / "f"), *at).returncode == 0
    assert dengine("put", "k", "", *at).returncode == 0
    assert [asked.body for asked in server.asked] == [b"arg", b"\xffstdin", b"\x00file", b""]
    assert dengine("put", "k", *at).returncode == 2
    missing = dengine("put", "k", "--file", str(tmp_path / "absent"), *at)
    assert missing.returncode == 1
    assert b"absent: No such file" in missing.stderr


def test_conditions_become_headers(serving: Serving) -> None:
    """`--if-match` quotes the revision as an ETag; `--if-none-match` means "create only"."""
    server = serving(as_json({"revision": 3, "created": True, "deleted": 1}))
    at = ("--endpoint", server.endpoint)
    dengine("put", "k", "v", "--if-match", "7", *at)
    dengine("put", "k", "v", "--if-none-match", *at)
    dengine("delete", "k", "--if-match", "*", *at)
    assert server.asked[0].headers["If-Match"] == '"7"'
    assert server.asked[1].headers["If-None-Match"] == "*"
    assert server.asked[2].headers["If-Match"] == "*"


def test_nothing_asked_for_is_dropped_on_the_way(serving: Serving) -> None:
    """A condition on a range goes out, for the node to refuse; a count reads as it was told."""
    server = serving(as_json({"revision": 3, "deleted": 1, "count": 0}))
    at = ("--endpoint", server.endpoint)
    dengine("delete", "--prefix", "k", "--if-match", "7", *at)
    dengine("list", "--count", "--consistency", "eventual", *at)
    assert server.asked[0].headers["If-Match"] == '"7"'
    assert "consistency=eventual" in server.asked[1].target


@pytest.mark.parametrize("name", ["data_corruption", "storage_io", "internal"])
def test_a_node_that_fails_is_a_failed_request(serving: Serving, name: str) -> None:
    """Exit codes from 65 on speak of the process itself, never of the node it asked."""
    server = serving(refusal(name, 500, retryable=False, outcome="unknown"))
    done = dengine("get", "k", "--endpoint", server.endpoint)
    assert done.returncode == 1
    assert f"({name}, outcome none)" in done.stderr.decode(), "a read has done nothing"
    done = dengine("put", "k", "v", "--endpoint", server.endpoint)
    assert done.returncode == 1
    assert f"({name}, outcome unknown)" in done.stderr.decode()


def test_a_listing_follows_its_pages(serving: Serving) -> None:
    """However long the listing, one command prints it all, and a terminal sees nothing unsafe."""

    def script(asked: Asked) -> Answer:
        row = {"mod_revision": 1, "create_revision": 1, "version": 1, "ttl": None, "lease": None}
        if "after" not in asked.target:
            items = [{"key": "a/1", "value": "\x1b[31mred", **row}]
            return as_json({"revision": 5, "items": items, "count": 1, "next": "dG9rZW4="})
        items = [{"key_base64": "/w==", "value": "v", **row}]
        return as_json({"revision": 6, "items": items, "count": 1, "next": None})

    server = serving(script)
    done = dengine("list", "a/", "--endpoint", server.endpoint)
    assert done.stdout.decode().splitlines() == [
        "KEY  REVISION  VERSION  TTL  VALUE",
        "a/1         1        1       \\x1b[31mred",
        "\\xff         1        1       v",
    ]
    assert server.asked[0].target == "/v1/kv?prefix=a%2F"
    assert server.asked[1].target == "/v1/kv?prefix=a%2F&after=dG9rZW4%3D"
    whole = json.loads(dengine("list", "--json", "--endpoint", server.endpoint).stdout)
    assert (whole["count"], whole["revision"], whole["next"]) == (2, 6, None)


def test_numbers_are_keys_and_values_like_any_others(serving: Serving) -> None:
    """What the first page happens to hold says nothing of the columns of the next."""
    row = {"create_revision": 1, "version": 1, "ttl": None, "lease": None}

    def script(asked: Asked) -> Answer:
        if "after" not in asked.target:
            items = [{"key": "7", "value": "5", "mod_revision": 10, **row}]
            return as_json({"revision": 20, "items": items, "count": 1, "next": "dG9rZW4="})
        items = [{"key": "long-key", "value": "other", "mod_revision": 20, **row}]
        return as_json({"revision": 20, "items": items, "count": 1, "next": None})

    done = dengine("list", "--endpoint", serving(script).endpoint)
    assert done.stdout.decode().splitlines() == [
        "KEY  REVISION  VERSION  TTL  VALUE",
        "7          10        1       5",
        "long-key        20        1       other",
    ]


@pytest.mark.parametrize("form", FORMS)
def test_a_listing_that_is_refused_prints_nothing(serving: Serving, form: tuple[str, ...]) -> None:
    """A program that reads it sees no half of an object."""
    refusing = serving(refusal("unauthorized", 401, retryable=False, outcome="none"))
    for endpoint in (unused_endpoint(), refusing.endpoint):
        done = dengine("list", *form, "--endpoint", endpoint)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.startswith(b"dengine: ")


@pytest.mark.parametrize("form", FORMS)
def test_a_listing_whose_reader_leaves_early(serving: Serving, form: tuple[str, ...]) -> None:
    """As in `dengine list | head -1`: the node is not asked for all the rest, standard error is
    empty, and the exit code is that of a request that failed. A page is one write, so one that
    fits into the pipe is all there before `head` leaves; here each read takes one write."""
    left = threading.Event()
    row = {"mod_revision": 1, "create_revision": 1, "version": 1, "value": "v"}

    def script(asked: Asked) -> Answer:
        first = "after" not in asked.target
        if not first and not left.wait(60):
            return refusal("internal", 500, retryable=False, outcome="none")
        items = [{"key": f"{'a' if first else 'b'}/{n}", **row} for n in range(3)]
        return as_json({"revision": 5, "items": items, "count": 3, "next": "dG9rZW4="})

    server = serving(script)
    reads, writes = os.pipe2(os.O_DIRECT)
    with subprocess.Popen(
        [sys.executable, "-m", "dengine", "list", *form, "--endpoint", server.endpoint],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        stdout=writes,
        stderr=subprocess.PIPE,
    ) as listing:
        os.close(writes)
        page = os.read(reads, 65536)
        os.close(reads)
        left.set()
        assert listing.stderr is not None
        assert listing.stderr.read() == b""
    assert listing.returncode == 1
    assert page.count(b"a/") == 3
    assert len(server.asked) == 2


@pytest.mark.parametrize("form", FORMS)
def test_a_listing_is_printed_page_by_page(serving: Serving, form: tuple[str, ...]) -> None:
    """However long it is, it begins at once, and nothing of it is kept: the last page is only
    there once the first was read. Widths grow, and the JSON is one object."""
    first_read = threading.Event()
    row = {"mod_revision": 1, "create_revision": 1, "version": 1, "ttl": None, "lease": None}

    def script(asked: Asked) -> Answer:
        if "after" not in asked.target:
            items = [{"key": "a/1", "value": "é", **row}]
            return as_json({"revision": 5, "items": items, "count": 1, "next": "dG9rZW4="})
        if not first_read.wait(60):
            return refusal("internal", 500, retryable=False, outcome="none")
        items = [{"key": f"a/{n}" * 3, "value": "v", **row} for n in (2, 3)]
        return as_json({"revision": 6, "items": items, "count": 2, "next": None})

    at = ("--endpoint", serving(script).endpoint)
    with subprocess.Popen(
        [sys.executable, "-m", "dengine", "list", "a/", *form, *at],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"},
        stdout=subprocess.PIPE,
    ) as listing:
        assert listing.stdout is not None
        out = b""
        while b"a/1" not in out:
            data = os.read(listing.stdout.fileno(), 65536)
            assert data, "it has ended without the first page"
            out += data
        first_read.set()
        out += listing.stdout.read()
    assert listing.returncode == 0
    lines = out.decode().splitlines()
    if form == ("--json",):
        whole = json.loads(out)
        assert [item["key"] for item in whole["items"]] == ["a/1", "a/2a/2a/2", "a/3a/3a/3"]
        assert {**whole, "items": []} == {"revision": 6, "items": [], "count": 3, "next": None}
        by_line = json.dumps({"items": whole["items"]}, ensure_ascii=False, indent=2).splitlines()
        assert lines[: len(by_line) - 2] == by_line[:-2], "as one page is printed"
    elif form:
        assert lines == ["a/1", "a/2a/2a/2", "a/3a/3a/3"]
    else:
        assert lines == [
            "KEY  REVISION  VERSION  TTL  VALUE",
            "a/1         1        1       é",
            "a/2a/2a/2         1        1       v",
            "a/3a/3a/3         1        1       v",
        ]


def test_an_empty_listing_is_one_too(serving: Serving) -> None:
    empty: dict[str, Any] = {"revision": 5, "items": [], "count": 0, "next": None}
    at = ("--endpoint", serving(as_json(empty)).endpoint)
    assert json.loads(dengine("list", "--json", *at).stdout) == empty
    assert dengine("list", *at).stdout == b"KEY  REVISION  VERSION  TTL  VALUE\n"


def test_what_came_before_a_page_that_fails_is_printed(serving: Serving) -> None:
    def script(asked: Asked) -> Answer:
        if "after" in asked.target:
            return refusal("invalid_request", 400, retryable=False, outcome="none")
        row = {"key": "a/1", "mod_revision": 1, "create_revision": 1, "version": 1}
        return as_json({"revision": 5, "items": [row], "count": 1, "next": "dG9rZW4="})

    server = serving(script)
    done = dengine("list", "a/", "--keys-only", "--endpoint", server.endpoint)
    assert done.returncode == 1
    assert done.stdout.decode().splitlines() == ["a/1"]


# --- Where a request goes, and whether it is sent again


def test_a_write_whose_answer_is_lost_is_sent_again_under_its_key(serving: Serving) -> None:
    """The node may have done it, so only with the key under which it happens once."""
    first, second = serving(HANG_UP), serving(as_json({"revision": 1, "created": True}))
    both = ("--endpoint", first.endpoint, "--endpoint", second.endpoint)
    done = dengine("put", "k", "v", *both)
    assert (done.returncode, done.stdout) == (0, b"revision 1 (created)\n")
    keys = {asked.headers["Idempotency-Key"] for asked in (*first.asked, *second.asked)}
    assert len(first.asked) == len(second.asked) == len(keys) == 1


def test_a_write_that_is_never_answered_names_its_key(serving: Serving) -> None:
    """With that the user can find out, and does nothing twice."""
    server = serving(HANG_UP)
    done = dengine("delete", "k", "--endpoint", server.endpoint, "--idempotency-key", "job-7")
    assert done.returncode == 1
    assert b"may or may not have happened" in done.stderr
    assert b"--idempotency-key job-7" in done.stderr
    assert b"outcome unknown" in done.stderr
    assert {asked.headers["Idempotency-Key"] for asked in server.asked} == {"job-7"}


def test_a_refusal_after_a_lost_answer_is_unknown(serving: Serving) -> None:
    """One attempt may have happened; that another was refused does not change it."""
    first = serving(HANG_UP)
    second = serving(refusal("cluster_unavailable", 503, retryable=True, outcome="none"))
    both = ("--endpoint", first.endpoint, "--endpoint", second.endpoint)
    done = dengine("put", "k", "v", *both)
    assert done.returncode == 1
    assert b"outcome unknown" in done.stderr


def test_a_change_to_the_cluster_is_never_sent_again(serving: Serving) -> None:
    """It has no key: only the user may decide to do it twice."""
    first, second = serving(HANG_UP), serving(as_json({}))
    both = ("--endpoint", first.endpoint, "--endpoint", second.endpoint)
    done = dengine("remove", "3", *both)
    assert done.returncode == 1
    assert b"may or may not have happened" in done.stderr
    assert (len(first.asked), len(second.asked)) == (1, 0)


@pytest.mark.parametrize(
    "problem",
    [None, HANG_UP, refusal("not_leader", 503, retryable=True, outcome="none")],
    ids=["refused", "hangs up", "503"],
)
def test_a_read_goes_on_to_the_next_endpoint(serving: Serving, problem: Answer | None) -> None:
    """One node that is down does not hide the others."""
    first = unused_endpoint() if problem is None else serving(problem).endpoint
    second = serving(Answer(body=b"v"))
    done = dengine("get", "k", DENGINE_ENDPOINTS=f"{first}, {second.endpoint}")
    assert (done.returncode, done.stdout) == (0, b"v")


def test_a_write_that_certainly_did_nothing_goes_on(serving: Serving) -> None:
    """A refused connection, or `outcome: none`, means that the next node may be asked."""
    first = serving(refusal("cluster_unavailable", 503, retryable=True, outcome="none"))
    second = serving(as_json({"revision": 1, "created": False}))
    endpoints = f"{unused_endpoint()} {first.endpoint} {second.endpoint}"
    done = dengine("put", "k", "v", DENGINE_ENDPOINTS=endpoints)
    assert (done.returncode, done.stdout) == (0, b"revision 1 (replaced)\n")


def test_redirects_and_strangers_are_refused(serving: Serving) -> None:
    """dengine never redirects, so a redirect comes from somebody else."""
    other = serving(Answer(body=b"not for us"))
    away = {"Location": f"http://{other.endpoint}/v1/kv/k"}
    server = serving(Answer(302, b"moved", away))
    done = dengine("get", "k", "--endpoint", server.endpoint)
    assert done.returncode == 1
    assert b"is that a dengine node?" in done.stderr
    assert other.asked == []


def test_endpoints_come_from_the_configuration_file(serving: Serving, tmp_path: Path) -> None:
    """On a node's own host no endpoint need be typed; a wildcard address means this machine."""
    server = serving(Answer(body=b"v"))
    config = tmp_path / "n1.toml"
    config.write_text(N1.format(port=server.server_address[1]))
    assert dengine("get", "k", CONFIG_PATH=str(config)).stdout == b"v"
    config.write_text("node_id = 1")
    done = dengine("get", "k", CONFIG_PATH=str(config))
    assert done.returncode == 78
    assert done.stderr.startswith(f"dengine: {config}: unknown key 'node_id'".encode())
    for wrong in ("ftp://x:1", "a b:1", "x:99999", "x:1/path", "http://"):
        done = dengine("get", "k", "--endpoint", wrong)
        assert done.returncode == 2
        assert b"is not an endpoint: write it like" in done.stderr


def test_nobody_there(serving: Serving) -> None:
    """Exit code 1, and each address with its reason."""
    nobody = unused_endpoint()
    done = dengine("get", "k", "--endpoint", nobody)
    assert done.returncode == 1
    expected = (
        f"dengine: no endpoint answered: {nobody}: refused (cluster_unavailable, outcome none)"
    )
    assert done.stderr.decode().strip() == expected


def test_a_missing_key(serving: Serving) -> None:
    """Nothing on stdout, a sentence on stderr, exit code 1."""
    server = serving(refusal("key_not_found", 404, retryable=False, outcome="none"))
    done = dengine("get", "k", "--endpoint", server.endpoint)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"there is no key 'k'" in done.stderr


# --- The cluster


CLUSTER = {
    "cluster_id": "c1", "leader": {"id": 1, "address": "a:1"}, "term": 2, "revision": 7,
    "settings": {"promotion": "immediate"}, "joint": False, "fault_tolerance": 1, "advice": "",
    "members": [
        {"id": 1, "address": "a:1", "zone": "z", "role": "leader", "status": "active",
         "match": 9, "lag": 0, "ready": True, "reason": None},
        {"id": 12, "address": "b:1", "zone": "", "role": "learner", "status": "promotable",
         "match": 4, "lag": 5, "ready": False, "reason": "5 entries behind"},
    ],
}  # fmt: skip


def test_members_as_a_table_and_as_json(serving: Serving) -> None:
    """People get aligned columns, programs the node's own JSON."""
    server = serving(as_json(CLUSTER))
    done = dengine("members", "--endpoint", server.endpoint)
    assert done.stdout.decode().splitlines() == [
        "ID  ADDRESS  ZONE  ROLE     STATUS      MATCH  LAG  READY  REASON",
        " 1  a:1      z     leader   active          9    0  yes    -",
        "12  b:1      -     learner  promotable      4    5  no     5 entries behind",
        "",
        "cluster id       c1",
        "leader           1",
        "term             2",
        "revision         7",
        "joint            no",
        "fault tolerance  1",
    ]
    assert json.loads(dengine("members", "--json", "--endpoint", server.endpoint).stdout) == CLUSTER


def test_status_of_several_endpoints(serving: Serving) -> None:
    """A line for each; one dead endpoint is shown and does not fail the command, all dead do."""
    node = {"node_id": 1, "role": "leader", "term": 2, "leader": 1, "revision": 7}
    server, nobody = serving(as_json(node)), unused_endpoint()
    done = dengine("status", "--endpoint", server.endpoint, "--endpoint", nobody)
    assert done.returncode == 0
    _, alive, dead = done.stdout.decode().splitlines()
    assert alive.split() == [server.endpoint, "1", "leader", "2", "1", "-", "-", "7"]
    assert "refused" in dead
    assert dengine("status", "--endpoint", nobody).returncode == 1


def test_changes_to_the_cluster_are_the_documented_calls(serving: Serving) -> None:
    """Each command is one call of the HTTP interface."""
    server = serving(as_json({**CLUSTER, "promoted": [2, 3], "voters": [1, 2, 3]}))
    at = ("--endpoint", server.endpoint)
    for args in (
        ("promote", "2", "3"),
        ("remove", "3"),
        ("move", "2", "10.0.0.2:9081"),
        ("transfer-leader", "2"),
        ("settings", "promotion=odd"),
    ):
        done = dengine(*args, *at)
        assert (done.returncode, done.stderr) == (0, b"")
    calls = [(a.method, a.target, json.loads(a.body or b"null")) for a in server.asked]
    assert calls == [
        ("POST", "/v1/cluster/promote", {"ids": [2, 3]}),
        ("DELETE", "/v1/cluster/members/3", None),
        ("PUT", "/v1/cluster/members/2", {"address": "10.0.0.2:9081"}),
        ("POST", "/v1/cluster/leader", {"id": 2}),
        ("PUT", "/v1/cluster/settings", {"promotion": "odd"}),
        ("GET", "/v1/cluster", None),
    ]
    assert server.asked[0].headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("operation", ["put", "get"])
def test_bench_measures_and_cleans_up(serving: Serving, operation: str) -> None:
    """It reports rates and percentiles, and takes its keys away again."""
    server = serving(as_json({"revision": 1, "created": True, "deleted": 5}))
    done = dengine(
        "bench", operation, "--connections", "2", "--seconds", "0.3", "--keys", "5", "--json",
        "--endpoint", server.endpoint,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    result = json.loads(done.stdout)
    assert result["ops_per_s"] > 0
    assert 0 < result["p50_ms"] <= result["p99_ms"] <= result["max_ms"]
    last = server.asked[-1]
    assert last.method == "DELETE"
    assert last.target.startswith("/v1/kv?start=dengine-bench%2F")


def test_bench_takes_large_values_away_in_parts(serving: Serving) -> None:
    """One change may delete 16 MiB of values: of 20 keys with 1 MiB each, all are covered, and no
    key twice."""
    server = serving(as_json({"revision": 1, "deleted": 8}))
    done = dengine(
        "bench", "put", "--connections", "1", "--seconds", "0.1", "--keys", "20",
        "--value-bytes", "1048576", "--endpoint", server.endpoint,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    queries = [
        parse_qs(urlsplit(asked.target).query) for asked in server.asked if asked.method == "DELETE"
    ]
    ranges = [(query["start"][0], query["end"][0]) for query in queries]
    prefix = ranges[0][0].rpartition("/")[0]
    for number in range(20):
        key = f"{prefix}/{number:05}"
        assert sum(start <= key < end for start, end in ranges) == 1, key
    for start, end in ranges:
        assert sum(start <= f"{prefix}/{number:05}" < end for number in range(20)) <= 16


def test_bench_tells_what_it_measured_also_where_it_cannot_clean_up(serving: Serving) -> None:
    def script(asked: Asked) -> Answer:
        if asked.method == "DELETE":
            return refusal("too_large", 413, retryable=False, outcome="none")
        return as_json({"revision": 1, "created": True})

    server = serving(script)
    done = dengine("bench", "put", "--seconds", "0.1", "--json", "--endpoint", server.endpoint)
    assert done.returncode == 1
    assert b"a too_large" in done.stderr
    assert json.loads(done.stdout)["ops_per_s"] > 0


def test_bench_counts_what_fails(serving: Serving) -> None:
    """Anything but a 200 is a failure, is named, and ends in exit code 1."""

    def script(asked: Asked) -> Answer:
        if asked.method == "PUT":
            return refusal("disk_full", 507, retryable=True, outcome="none")
        return as_json({"revision": 1, "deleted": 0})

    server = serving(script)
    done = dengine("bench", "put", "--seconds", "0.2", "--endpoint", server.endpoint)
    assert done.returncode == 1
    assert b"x HTTP 507" in done.stdout
    done = dengine("bench", "get", "--seconds", "0.2", "--endpoint", server.endpoint)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"did not store the keys to get" in done.stderr


# --- The program itself


COMMANDS = (
    "serve", "check-config", "get", "put", "delete", "list", "status", "members", "settings",
    "promote", "remove", "move", "transfer-leader", "bench", "watch", "lease", "lock", "elect",
    "completion",
)  # fmt: skip


def test_help_teaches() -> None:
    """`--help` of every command shows it at work."""
    overview = dengine("--help").stdout.decode()
    for command in COMMANDS:
        assert f"    {command}" in overview
        shown = dengine(command, "--help").stdout.decode()
        assert f"  dengine {command}" in shown or f"| dengine {command}" in shown
    shown = dengine("snapshot", "save", "--help").stdout.decode()
    _, codes = shown.split("Exit codes:")
    assert re.findall(r"\b\d+\b(?= )", codes) == ["0", "1", "2", "78", "65", "74", "75", "76"]


def test_check_config(tmp_path: Path) -> None:
    """It says what the node would do, or the first mistake, and leaves no trace."""
    (tmp_path / "n1.toml").write_text(N1.format(port=9081))
    done = dengine("check-config", "n1.toml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (
        0,
        b"n1.toml: ok (node 1 founds a cluster of 1)\n",
    )
    done = dengine("check-config", "n1.toml", cwd=tmp_path, DENGINE__READ__LEASE_MS="900")
    assert done.returncode == 78
    assert b"n1.toml: read.lease_ms (900) must be at most half" in done.stderr
    text = N1.format(port=9081).replace(
        " } ]", ' }, { id = 2, address = "n2:9082", role = 3, status = 0 } ]'
    )
    (tmp_path / "n1.toml").write_text(text)
    done = dengine("check-config", "n1.toml", cwd=tmp_path)
    assert done.stdout.endswith(b"(node 1 founds a cluster of 1)\n"), "who joins does not found"
    assert list(tmp_path.iterdir()) == [tmp_path / "n1.toml"]


def test_the_client_commands_need_no_node_packages(serving: Serving) -> None:
    """`pip install dengine` alone reads and writes; what is missing is named by what needs it."""
    server = serving(Answer(body=b"v"))
    absent = ["lmdb", "msgspec", "prometheus_client", "psutil", "uvloop", "xxhash", "zlib_ng"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "from dengine.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )

    def run(*args: str) -> subprocess.CompletedProcess[bytes]:
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program, *args]
        return subprocess.run(command, env=environ, capture_output=True, timeout=30, check=False)

    assert run("get", "k", "--endpoint", server.endpoint).stdout == b"v"
    restore = ("restore", "f", "--data-dir", "d", "--node-id", "1", "--address", "h:1")
    for needing in (
        ("check-config", "n1.toml"),
        ("snapshot", *restore),
        ("snapshot", "verify", "f"),
    ):
        done = run(*needing)
        assert done.returncode == 78
        assert b"pip install 'dengine[node]'" in done.stderr


def test_a_reader_that_leaves_early_is_no_error(serving: Serving) -> None:
    """`dengine get big | head -c 1` prints no traceback."""
    server = serving(Answer(body=b"x" * 1_000_000))
    process = subprocess.Popen(
        [sys.executable, "-m", "dengine", "get", "k", "--endpoint", server.endpoint],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 1


# --- Standard streams that are closed, or on a full disk; and Ctrl-C


def redirected(how: str, *args: str, **environ: str) -> subprocess.CompletedProcess[bytes]:
    """`dengine ARGS` with such a redirection of a shell behind it."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {how}', "sh", sys.executable, "-m", "dengine", *args],
        stdin=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("args", [("txn",), ("put", "k", "-")])
def test_a_closed_input_is_said_to_be_closed(serving: Serving, args: tuple[str, ...]) -> None:
    """It is no empty value: nothing is sent."""
    server = serving(Answer())
    done = redirected("<&-", *args, "--endpoint", server.endpoint)
    said = b"dengine: standard input is closed: nothing can be read from it\n"
    assert (done.returncode, done.stderr) == (2, said)
    assert server.asked == []


WRITTEN = as_json({"revision": 7, "created": True, "deleted": 1})
DONE = b"; what was asked for was carried out"


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        (">/dev/full", b"standard output: No space left on device"),
        (">&-", b"standard output is closed"),
    ],
)
@pytest.mark.parametrize(
    ("args", "answer", "end"),
    [
        (("put", "k", "v"), WRITTEN, DONE),
        (("delete", "k"), WRITTEN, DONE),
        (("get", "k"), Answer(body=b"v"), b""),
        (("get", "k"), Answer(body=bytes(2**20)), b""),
        (("list",), as_json({"items": [], "count": 0, "next": None}), b""),
    ],
)
def test_output_that_cannot_be_written_is_said_to_be_that(
    serving: Serving, how: str, problem: bytes, args: tuple[str, ...], answer: Answer, end: bytes
) -> None:
    """And that a write was carried out all the same: a script must not take it for failed."""
    done = redirected(how, *args, "--endpoint", serving(answer).endpoint)
    assert (done.returncode, done.stderr) == (1, b"dengine: " + problem + end + b"\n")


@pytest.mark.parametrize("how", [">/dev/full", ">&-"])
def test_help_that_nobody_gets_is_no_success(how: str) -> None:
    done = redirected(how, "--help")
    assert done.returncode == 1
    assert done.stderr.startswith(b"dengine: standard output")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("how", ["2>&-", "2>/dev/full", "<&- 2>&-"])
def test_without_standard_error_the_exit_code_tells(how: str, tmp_path: Path) -> None:
    """And what is for people to read does not get among the output."""
    done = redirected(how, "check-config", str(tmp_path / "absent.toml"))
    assert (done.returncode, done.stdout, done.stderr) == (78, b"", b"")


def test_ctrl_c_while_it_is_still_loading_is_quiet(tmp_path: Path) -> None:
    """Here it comes while the first module is imported."""
    early = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit('too late')\n"
    (tmp_path / "argparse.py").write_text(early)
    done = dengine("get", "k", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
