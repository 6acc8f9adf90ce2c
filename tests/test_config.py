"""Configuration: the files in examples/ load as they are; every mistake is one clear sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

import pytest

from dengine import config
from dengine.config import InitialRole
from dengine.errors import ConfigError
from dengine.kv.recorder import WORK_KEYS_MAX
from dengine.raft.membership import Settings, Status

N1 = """\
[cluster]
node_id = 1
listen_address = "0.0.0.0:9081"
initial_cluster = [
{ id = 1, address = "0.0.0.0:9081", role = 2, status = 2 }
]
db_root_dir = "./db"
"""
N2 = """\
[cluster]
node_id = 2
listen_address = "0.0.0.0:9082"
initial_cluster = [
{ id = 1, address = "0.0.0.0:9081", role = 2, status = 2 }, # Existing leader
{ id = 2, address = "0.0.0.0:9082", role = 3, status = 0 }, # Self: Learner
]
db_root_dir = "./db"
"""
N3 = """\
[cluster]
node_id = 3
listen_address = "0.0.0.0:9083"
initial_cluster = [
{ id = 1, address = "0.0.0.0:9081", role = 2, status = 2 }, # Leader, ACTIVE
{ id = 2, address = "0.0.0.0:9082", role = 1, status = 2 }, # Follower (promoted), ACTIVE
{ id = 3, address = "0.0.0.0:9083", role = 3, status = 0 }, # Self: Learner, PROMOTABLE
]
db_root_dir = "./db"
"""
N3_SAFER = N3.replace("role = 1, status = 2", "role = 3, status = 0")
PRODUCTION = """\
# Node 2 on server 192.168.1.11
[cluster]
node_id = 2
listen_address = "192.168.1.11:9082"
initial_cluster = [
{ id = 1, address = "192.168.1.10:9081", role = 2, status = 2 },
{ id = 2, address = "192.168.1.11:9082", role = 3, status = 0 },
]
db_root_dir = "./db"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, where "./db" may be made."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, **environ: str) -> config.Config:
    Path("n.toml").write_text(text, encoding="utf-8")
    return config.load(Path("n.toml"), environ)


def mistake(text: str, **environ: str) -> str:
    """The sentence for a wrong configuration; nothing may have been written."""
    before = sorted(Path().iterdir())
    with pytest.raises(ConfigError) as caught:
        load(text, **environ)
    assert sorted({*Path().iterdir()} - {Path("n.toml")}) == [
        p for p in before if p.name != "n.toml"
    ]
    message = caught.value.message
    assert "\n" not in message
    assert caught.value.exit_code == 78
    return message


@pytest.mark.parametrize(
    ("text", "node_id", "joins"),
    [(N1, 1, False), (N2, 2, True), (N3, 3, True), (N3_SAFER, 3, True), (PRODUCTION, 2, True)],
    ids=["n1", "n2", "n3", "n3-safer", "production"],
)
def test_the_guides_files_load_unchanged(
    folder: Path, text: str, node_id: int, joins: bool
) -> None:
    """What the guide prints can be pasted into a file and started."""
    loaded = load(text)
    assert loaded.cluster.node_id == node_id
    assert loaded.own_entry.address == loaded.cluster.listen_address
    assert (loaded.own_entry.role is InitialRole.LEARNER) is joins
    assert loaded.cluster.db_root_dir == Path("./db")
    assert list(folder.iterdir()) == [folder / "n.toml"]


def test_names_mean_the_same_as_numbers(folder: Path) -> None:
    """`role = "learner"` is `role = 3`, `status = "promotable"` is `status = 0`."""
    named = N3.replace("role = 3, status = 0", 'role = "learner", status = "promotable"')
    assert load(named) == load(N3)
    read_only = load(N3.replace("role = 3, status = 0", 'role = "learner", status = "read_only"'))
    assert read_only.own_entry.status is Status.READ_ONLY


def test_every_other_key_has_the_documented_default(folder: Path) -> None:
    """A file with the four keys of [cluster] is complete."""
    loaded = load(N1)
    assert dataclasses.astuple(loaded.election) == (1000, 2000, 100)
    assert dataclasses.astuple(loaded.membership) == ("immediate", 100, 1000)
    assert dataclasses.astuple(loaded.read) == ("linearizable", 500)
    assert dataclasses.astuple(loaded.log) == ("info", "text", 500)
    assert (loaded.cluster.zone, loaded.cluster.founding_wait_ms) == ("", 2000)
    assert loaded.cluster.advertise_address is None
    assert (loaded.limits.key_bytes, loaded.limits.value_bytes) == (511, 1_048_576)
    settings = Settings()
    assert dataclasses.astuple(loaded.kv) == (
        settings.history_revisions,
        settings.history_bytes,
        settings.idempotency_window_s,
    )


def test_the_environment_overrides_the_file(folder: Path) -> None:
    """`DENGINE__SECTION__KEY` wins; strings need no quotes, lists are TOML."""
    loaded = load(
        N1,
        DENGINE__CLUSTER__NODE_ID="7",
        DENGINE__CLUSTER__ZONE="5",
        DENGINE__CLUSTER__INITIAL_CLUSTER=(
            '[{id = 7, address = "10.0.0.7:9081", role = "leader", status = "active"}]'
        ),
        DENGINE__RAFT__ELECTION__TIMEOUT_MS_MIN="1500",
        DENGINE__RAFT__MEMBERSHIP__PROMOTION="odd",
        DENGINE_ENDPOINTS="not a key",
    )
    assert loaded.cluster.node_id == 7
    assert loaded.cluster.zone == "5"
    assert loaded.own_entry.address == "10.0.0.7:9081"
    assert loaded.election.timeout_ms_min == 1500
    assert loaded.membership.promotion == "odd"


def test_config_path_names_the_file(folder: Path) -> None:
    """`CONFIG_PATH` serves where no file is given, and without a file the environment may do."""
    Path("n1.toml").write_text(N1, encoding="utf-8")
    assert config.load(None, {"CONFIG_PATH": "n1.toml"}).source == "n1.toml"
    bare = {
        "DENGINE__CLUSTER__NODE_ID": "1",
        "DENGINE__CLUSTER__LISTEN_ADDRESS": "[::1]:9081",
        "DENGINE__CLUSTER__INITIAL_CLUSTER": '[{id=1,address="[::1]:9081",role=2,status=2}]',
        "DENGINE__CLUSTER__DB_ROOT_DIR": "./db",
    }
    assert config.load(None, bare).own_entry.id == 1
    with pytest.raises(ConfigError, match=r"the environment: cluster\.node_id is missing"):
        config.load(None, {})


OWN = "{ id = 1, address = "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (N1.replace("node_id = 1\n", ""), "n.toml: cluster.node_id is missing"),
        (N1.replace("{ id = 1,", "{"), "cluster.initial_cluster entry 1 lacks the key 'id'"),
        (N2.replace("{ id = 2,", "{ id = 1,"), "cluster.initial_cluster names id 1 twice"),
        (N1.replace("node_id = 1", "node_id = 4"), "no entry with id = 4"),
        (N1.replace("node_id = 1", "node_id = 0"), "cluster.node_id must be an integer from 1 to"),
        (N1.replace("node_id = 1", "node_id = 4294967296"), "not 4294967296"),
        (N1.replace("node_id = 1", "node_id = 0x" + "f" * 5000), "not a number that large"),
        (N1.replace("node_id = 1", "node_id = true"), "cluster.node_id must be an integer"),
        (N1.replace("node_id = 1", "node_id = 1.0"), "cluster.node_id must be an integer"),
        (N1.replace("node_id = 1", 'node_id = "1"'), "cluster.node_id must be an integer"),
        (N1.replace("role = 2", "role = 4"), 'entry 1: role must be one of 0 or "follower"'),
        (N1.replace("role = 2", "role = true"), "entry 1: role must be one of"),
        (N1.replace("status = 2", 'status = "activ"'), "entry 1: status must be one of"),
        (N1.replace("status = 2", "status = 2, zone = 1"), "unknown key 'zone'"),
        (N1.replace("0.0.0.0:9081", "0.0.0.0"), "cluster.listen_address must be an address like"),
        (N1.replace("0.0.0.0:9081", "0.0.0.0:0"), "must be an address like"),
        (N1.replace("0.0.0.0:9081", "0.0.0.0:65536"), "must be an address like"),
        (N1.replace("0.0.0.0:9081", "300.0.0.1:9081"), "must be an address like"),
        (N1.replace("0.0.0.0:9081", "::1:9081"), "must be an address like"),
        (N1.replace("0.0.0.0:9081", "a b:9081"), "must be an address like"),
        (N1.replace("0.0.0.0:9081", "http://a:9081"), "must be an address like"),
        (N1.replace(OWN + '"0.0.0.0', OWN + '"bad_host!'), "entry 1: address must be an address"),
        (N2.replace("9081", "9082"), "gives nodes 1 and 2 the same address 0.0.0.0:9082"),
        (N1 + 'advertise_address = "0.0.0.0:9081"\n', "not a wildcard"),
        (N1.replace("role = 2", "role = 3"), "cluster.initial_cluster names nobody to join"),
        (N1.replace('"./db"', '"n.toml"'), "cluster.db_root_dir cannot hold n.toml/1"),
        (N1.replace('"./db"', '""'), "cluster.db_root_dir must be a path"),
        (
            N1 + "[raft.election]\ntimeout_ms_min = 2000\n",
            "must be less than raft.election.timeout",
        ),
        (N1 + "[raft.election]\nheartbeat_ms = 400\n", "must be at most a third of"),
        (N1 + "[read]\nlease_ms = 501\n", "read.lease_ms (501) must be at most half of"),
        (N1 + '[read]\ndefault = "stale"\n', "read.default must be one of 'linearizable', 'lease'"),
        (
            N1 + f"[limits]\nrange_delete = {WORK_KEYS_MAX + 1}\n",
            f"limits.range_delete must be an integer from 1 to {WORK_KEYS_MAX}, not",
        ),
        (N1 + "nodeid = 1\n", "unknown key 'cluster.nodeid'; did you mean 'cluster.node_id'?"),
        (N1 + "lease_ms = 1\n", "did you mean 'read.lease_ms'?"),
        (N1 + "[raft]\ntimeout_ms_min = 1\n", "did you mean 'raft.election.timeout_ms_min'?"),
        (N1 + "[raft.elections]\n", "did you mean 'raft.election'?"),
        (N1 + "[clustr]\n", "unknown key 'clustr'; did you mean 'cluster'?"),
        ("read = 1\n" + N1, "n.toml: read must be a table, written as [read]"),
        (N1 + '[security]\ntoken_file = "t"\n', "security.token_file: cannot read t: No such file"),
        (N1 + '[security]\npeer_secret_file = "/"\n', "security.peer_secret_file: cannot read /"),
        ("[cluster\n", "n.toml: is not valid TOML:"),
        ("a = " + "[" * 10_000, "n.toml: is not valid TOML:"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_file_and_key(
    folder: Path, text: str, expected: str
) -> None:
    """Whoever mistypes a file learns what is wrong and where, and nothing is written."""
    message = mistake(text)
    assert expected in message
    assert message.startswith("n.toml: ")


def test_a_wrong_variable_is_named(folder: Path) -> None:
    """A mistake in the environment names the variable, not the innocent file."""
    assert mistake(N1, DENGINE__CLUSTER__NODE_ID="one").startswith(
        "$DENGINE__CLUSTER__NODE_ID: cluster.node_id must be an integer"
    )
    assert "did you mean 'cluster.node_id'" in mistake(N1, DENGINE__CLUSTER__NODE="1")


def test_unreadable_files(folder: Path) -> None:
    """Missing, a directory, not UTF-8: each says so."""
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read: No such file"):
        config.load(Path("absent.toml"), {})
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        config.load(folder, {})
    Path("latin1.toml").write_bytes(N1.replace("# ", "").encode() + b"# caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin1\.toml: is not UTF-8 text"):
        config.load(Path("latin1.toml"), {})


def test_a_directory_without_write_permission(folder: Path) -> None:
    """The node would fail at its first write, so it is refused before it starts."""
    (folder / "db").mkdir(mode=0o500)
    (folder / "n.toml").write_text(N1, encoding="utf-8")
    folder.chmod(0o755)
    child = os.fork()
    if child == 0:  # root may write everywhere, so become nobody where nobody else looks
        with contextlib.suppress(BaseException):
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                config.load(Path("n.toml"), {})
            except ConfigError as error:
                os._exit(0 if "is not writable for user" in error.message else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("directory", "problem"),
    [
        (f"db/{'x' * 300}/y", "a name of 300 bytes is in it"),
        ("x/" * 1950, "it is longer than 3840 bytes"),
        ("/proc/x", "/proc is on a file system that stores nothing"),
        ("/proc/self/status", "/proc/self/status is not a directory"),
    ],
    ids=["long name", "long path", "proc", "file"],
)
def test_a_directory_that_can_never_be(folder: Path, directory: str, problem: str) -> None:
    """No restart helps: it is a mistake in the configuration, not a failure of a disk."""
    message = mistake(N1.replace("./db", directory))
    assert message.startswith("n.toml: cluster.db_root_dir cannot hold ")
    assert problem in message


def test_client_commands_read_a_file_whose_directory_is_not_theirs(folder: Path) -> None:
    """Only the node itself needs to write its data directory."""
    Path("n.toml").write_text(N1.replace('"./db"', '"n.toml"'), encoding="utf-8")
    assert config.read(Path("n.toml"), {}).cluster.node_id == 1


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:9081", ("127.0.0.1", 9081)),
        ("[fe80::1]:1", ("fe80::1", 1)),
        ("node-1.example.org:65535", ("node-1.example.org", 65535)),
        ("db_1:80", ("db_1", 80)),
    ],
)
def test_addresses(address: str, expected: tuple[str, int]) -> None:
    """IPv4, IPv6 in brackets and names are addresses."""
    assert config.parse_address(address) == expected


def test_which_addresses_need_care() -> None:
    """Wildcards are not dialled from afar; a loopback address needs no warning."""
    assert config.is_wildcard("0.0.0.0:1")
    assert config.is_wildcard("[::]:1")
    assert not config.is_wildcard("10.0.0.1:1")
    assert config.is_loopback("127.3.2.1:1")
    assert config.is_loopback("localhost:1")
    assert config.is_loopback("[::1]:1")
    assert not config.is_loopback("0.0.0.0:1")
    assert not config.is_loopback("example.org:1")
