"""Configuration: one TOML file and the environment become one frozen `Config`.

Each key stands once, as a field of a section's dataclass with its default and its parser; loading,
the environment's names, the type checks and the hints for misspelled keys all come from there.
Every mistake is a `ConfigError`: one sentence that names the file (or the variable) and the key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dengine.errors import ConfigError
from dengine.raft.membership import Status
from dengine.security import Secrets

ENVIRONMENT_PREFIX = "DENGINE__"
MAX_NODE_ID = 2**32 - 1
MAX_ZONE = 64  # characters
HARD_KEY_BYTES = 511  # LMDB's longest key
HARD_VALUE_BYTES = 1024 * 1024  # four of them fill the largest log entry
MAX_DIRECTORY_BYTES = 3840  # of Linux's 4096 for a path; the rest is for the files in it
HOUR_MS = 3_600_000
# Clients send a write again for up to 300 s (client/attempts.py), and what they send last may be
# under way for the 60 s that a request can take. It must still be remembered then.
IDEMPOTENCY_WINDOW_MIN_S = 360


class InitialRole(enum.IntEnum):
    """What a node starts as. Only LEARNER on a node's own entry decides anything: it joins."""

    FOLLOWER = 0
    CANDIDATE = 1
    LEADER = 2
    LEARNER = 3


# --- Parsers: a TOML value in, the typed value out, or a ValueError that says what it must be.


def _integer(value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"must be an integer from {low} to {high}")
    return value


def _zone(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > MAX_ZONE:
        raise ValueError(f"must be a string of at most {MAX_ZONE} printable characters")
    return value


def _path(value: object) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("must be a path")
    return Path(value)


def _choice(value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"must be one of {', '.join(repr(choice) for choice in choices)}")
    return str(value)


def _named_number(value: object, names: type[enum.IntEnum]) -> enum.IntEnum:
    """The guide writes roles and statuses as numbers; their names work too."""
    for item in names:
        if value == item.name.lower() or (type(value) is int and value == item):
            return item
    raise ValueError(
        "must be one of " + ", ".join(f'{item.value} or "{item.name.lower()}"' for item in names)
    )


def parse_address(text: str) -> tuple[str, int]:
    """Split "host:port" (IPv6 as "[::1]:9081") into host, without brackets, and port.

    Raises:
        ValueError: it is not an address; the message says what one looks like.
    """
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        known_host = ":" in host and _ip(host) is not None
    elif re.fullmatch(r"[0-9.]+", host):
        known_host = _ip(host) is not None
    else:
        known_host = bool(re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9])?", host))
    if not (known_host and re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise ValueError('must be an address like "192.168.1.10:9081" (host, colon, port 1-65535)')
    return host, int(port)


def is_wildcard(address: str) -> bool:
    """True for "0.0.0.0:p" and "[::]:p": good for listening, never for dialling another host."""
    ip = _ip(parse_address(address)[0])
    return ip is not None and ip.is_unspecified


def is_loopback(address: str) -> bool:
    """True when only this machine can reach `address`."""
    host = parse_address(address)[0]
    ip = _ip(host)
    return host == "localhost" if ip is None else ip.is_loopback


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _address(value: object) -> str:
    parse_address(value if isinstance(value, str) else "")
    return str(value)


def _advertised(value: object) -> str:
    address = _address(value)
    if is_wildcard(address):
        raise ValueError("must be an address that the other nodes can dial, not a wildcard")
    return address


def _members(value: object) -> tuple[InitialMember, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list with at least one { id, address, role, status }")
    return tuple(_member(entry, number) for number, entry in enumerate(value, start=1))


def _member(entry: object, number: int) -> InitialMember:
    """One table of `initial_cluster`; `number` counts from 1 for the error message."""
    keys = {item.name: item for item in dataclasses.fields(InitialMember)}
    if not isinstance(entry, dict):
        raise ConfigError(f"entry {number} must be a table {{ id, address, role, status }}")
    for name in entry:
        if name not in keys:
            raise ConfigError(f"entry {number} has an unknown key {_show(name)}{_hint(name, keys)}")
    for name in keys:
        if name not in entry:
            raise ConfigError(f"entry {number} lacks the key {name!r}")
    return InitialMember(
        **{
            name: _parse(item, f"entry {number}: {name}", entry[name])
            for name, item in keys.items()
        }
    )


def _parse(item: dataclasses.Field[Any], label: str, value: object) -> Any:
    """The typed value of one key; a ConfigError begins with `label`."""
    try:
        return item.metadata["parse"](value)
    except ValueError as error:
        raise ConfigError(f"{label} {error}, not {_show(value)}") from None
    except ConfigError as error:  # from inside a list
        raise ConfigError(f"{label} {error.message}") from None


# --- Field makers: the parser rides in the field's metadata. `Any` lets them type every field.


def _field(parse: Callable[[object], object], default: Any) -> Any:
    return field(default=default, metadata={"parse": parse})


def _required(parse: Callable[[object], object]) -> Any:
    return field(metadata={"parse": parse})


def _int(default: int, low: int, high: int) -> Any:
    return _field(lambda value: _integer(value, low, high), default)


def _one_of(*choices: str) -> Any:
    return _field(lambda value: _choice(value, choices), choices[0])


@dataclass(frozen=True, slots=True)
class InitialMember:
    id: int = _required(lambda value: _integer(value, 1, MAX_NODE_ID))
    address: str = _required(_address)
    role: InitialRole = _required(lambda value: _named_number(value, InitialRole))
    status: Status = _required(lambda value: _named_number(value, Status))


@dataclass(frozen=True, slots=True)
class Cluster:
    node_id: int = _required(lambda value: _integer(value, 1, MAX_NODE_ID))
    listen_address: str = _required(_address)
    initial_cluster: tuple[InitialMember, ...] = _required(_members)
    db_root_dir: Path = _required(_path)  # relative to the working directory, as in d-engine
    zone: str = _field(_zone, "")
    advertise_address: str | None = _field(_advertised, None)
    founding_wait_ms: int = _int(2000, 0, HOUR_MS)


@dataclass(frozen=True, slots=True)
class Election:
    timeout_ms_min: int = _int(1000, 50, HOUR_MS)
    timeout_ms_max: int = _int(2000, 50, HOUR_MS)
    heartbeat_ms: int = _int(100, 5, HOUR_MS)


@dataclass(frozen=True, slots=True)
class Membership:
    promotion: str = _one_of("immediate", "odd")
    catchup_entries: int = _int(100, 0, 10**9)
    stable_ms: int = _int(1000, 0, HOUR_MS)


@dataclass(frozen=True, slots=True)
class Snapshot:
    entries: int = _int(100_000, 1, 10**12)
    log_bytes: int = _int(268_435_456, 1, 2**50)
    retained_log_entries: int = _int(5000, 0, 10**12)
    keep: int = _int(3, 2, 1000)  # the log is purged behind the second-newest
    chunk_bytes: int = _int(1_048_576, 4096, 4 * 1024 * 1024)
    max_bytes_per_s: int = _int(67_108_864, 65_536, 2**50)
    hold_bytes: int = _int(4_294_967_296, 0, 2**50)


@dataclass(frozen=True, slots=True)
class Read:
    default: str = _one_of("linearizable", "lease", "eventual")
    lease_ms: int = _int(500, 1, HOUR_MS)


@dataclass(frozen=True, slots=True)
class Kv:
    """Founding values; afterwards the cluster's replicated settings count."""

    history_revisions: int = _int(100_000, 0, 10**12)
    history_bytes: int = _int(268_435_456, 0, 2**50)
    idempotency_window_s: int = _int(600, IDEMPOTENCY_WINDOW_MIN_S, 86_400)


@dataclass(frozen=True, slots=True)
class Limits:
    key_bytes: int = _int(HARD_KEY_BYTES, 1, HARD_KEY_BYTES)
    value_bytes: int = _int(HARD_VALUE_BYTES, 1, HARD_VALUE_BYTES)
    txn_ops: int = _int(128, 1, 1024)
    page: int = _int(1000, 1, 10_000)
    txn_bytes: int = _int(2_097_152, 1, 4 * 1024 * 1024)
    pending_writes: int = _int(10_000, 1, 1_000_000)
    pending_bytes: int = _int(67_108_864, HARD_VALUE_BYTES, 2**40)
    range_delete: int = _int(10_000, 1, 10_000)  # more is refused by the state machine
    watchers: int = _int(1000, 0, 100_000)
    reserve_bytes: int = _int(268_435_456, 0, 2**50)


@dataclass(frozen=True, slots=True)
class Log:
    level: str = field(
        default="info",
        metadata={"parse": lambda value: _choice(value, ("debug", "info", "warning", "error"))},
    )
    format: str = _one_of("text", "json")
    slow_request_ms: int = _int(500, 1, HOUR_MS)


@dataclass(frozen=True, slots=True)
class Security:
    peer_secret_file: Path | None = _field(_path, None)
    token_file: Path | None = _field(_path, None)


SECTIONS: dict[str, type[Any]] = {
    "cluster": Cluster,
    "raft.election": Election,
    "raft.membership": Membership,
    "raft.snapshot": Snapshot,
    "read": Read,
    "kv": Kv,
    "limits": Limits,
    "log": Log,
    "security": Security,
}
_KEYS = {
    f"{section}.{item.name}": item
    for section, cls in SECTIONS.items()
    for item in dataclasses.fields(cls)
}


@dataclass(frozen=True, slots=True)
class Config:
    """Everything an operator can set. `source` is the file's name, for messages."""

    source: str
    cluster: Cluster
    election: Election
    membership: Membership
    snapshot: Snapshot
    read: Read
    kv: Kv
    limits: Limits
    log: Log
    security: Security

    @property
    def own_entry(self) -> InitialMember:
        """This node's entry in `initial_cluster`."""
        return next(m for m in self.cluster.initial_cluster if m.id == self.cluster.node_id)


def load(path: Path | None, environ: Mapping[str, str], *, outside_unit: bool = False) -> Config:
    """Read the configuration of a node that is about to run here.

    Args:
        path: the TOML file; None takes `CONFIG_PATH`, and without that the environment alone.
        environ: `DENGINE__SECTION__KEY` overrides the file, for example
            `DENGINE__RAFT__ELECTION__TIMEOUT_MS_MIN=500`.
        outside_unit: see `Secrets.read`.

    Raises:
        ConfigError: any mistake. Nothing is created or changed on disk.
    """
    config = read(path, environ)
    # The node reads them again, strictly.
    Secrets.read(config.security, config.source, outside_unit=outside_unit)
    _check_directory(config)
    return config


def read(path: Path | None, environ: Mapping[str, str]) -> Config:
    """`load` without the checks that concern only a node running on this machine."""
    if path is None and environ.get("CONFIG_PATH"):
        path = Path(environ["CONFIG_PATH"])
    source = "the environment" if path is None else str(path)
    raw = {} if path is None else {key: (source, value) for key, value in _read_file(path)}
    raw.update({key: (f"${name}", value) for name, key, value in _read_environment(environ)})

    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, (where, value) in raw.items():
        section, _, name = key.rpartition(".")
        values[section][name] = _parse(_KEYS[key], f"{where}: {key}", value)
    for key, item in _KEYS.items():
        if item.default is dataclasses.MISSING and key not in raw:
            variable = ENVIRONMENT_PREFIX + key.upper().replace(".", "__")
            raise ConfigError(f"{source}: {key} is missing: set it there or as {variable}")
    sections = {
        section.rpartition(".")[2]: cls(**values[section]) for section, cls in SECTIONS.items()
    }
    config = Config(source=source, **sections)
    _check_relations(config)
    return config


def _read_file(path: Path) -> Iterator[tuple[str, object]]:
    """Yield (dotted key, TOML value) for every key of the file; unknown keys are errors."""
    try:
        document = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from None
    yield from _flatten(document, "", str(path))


def _flatten(table: dict[str, Any], prefix: str, source: str) -> Iterator[tuple[str, object]]:
    for name, value in table.items():
        key = prefix + name
        is_section = any(s == key or s.startswith(key + ".") for s in SECTIONS)
        if key in _KEYS:
            yield key, value
        elif not is_section:
            known = SECTIONS if isinstance(value, dict) else _KEYS
            raise ConfigError(f"{source}: unknown key {_show(key)}{_hint(key, known)}")
        elif isinstance(value, dict):
            yield from _flatten(value, key + ".", source)
        else:
            raise ConfigError(f"{source}: {key} must be a table, written as [{key}]")


def _read_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str, object]]:
    """Yield (variable, dotted key, value) for every `DENGINE__...` variable.

    A value that the key does not take as plain text is read as TOML: numbers, the member list.
    """
    for variable, text in sorted(environ.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        key = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
        if key not in _KEYS:
            raise ConfigError(f"${variable}: unknown key {_show(key)}{_hint(key, _KEYS)}")
        value: object = text
        try:
            _KEYS[key].metadata["parse"](text)
        except ValueError:
            with contextlib.suppress(ValueError, RecursionError):
                value = tomllib.loads(f"value = {text}")["value"]
        yield variable, key, value


def _check_relations(config: Config) -> None:
    """Everything that concerns more than one key."""
    cluster, election, source = config.cluster, config.election, config.source
    seen_ids: set[int] = set()
    seen_addresses: dict[str, int] = {}
    for member in cluster.initial_cluster:
        where = f"{source}: cluster.initial_cluster"
        if member.id in seen_ids:
            raise ConfigError(
                f"{where} names id {member.id} twice: every node has an id of its own"
            )
        seen_ids.add(member.id)
        other = seen_addresses.setdefault(member.address.lower(), member.id)
        if other != member.id:
            raise ConfigError(
                f"{where} gives nodes {other} and {member.id} the same address {member.address}"
            )
    if cluster.node_id not in seen_ids:
        raise ConfigError(
            f"{source}: cluster.node_id is {cluster.node_id}, and cluster.initial_cluster has no "
            f"entry with id = {cluster.node_id}: add this node's own entry"
        )
    if config.own_entry.role is InitialRole.LEARNER and len(seen_ids) == 1:
        raise ConfigError(
            f"{source}: cluster.initial_cluster names nobody to join: node {cluster.node_id} is a "
            "learner (role = 3), so add the entry of a running node"
        )
    if election.timeout_ms_min >= election.timeout_ms_max:
        raise ConfigError(
            f"{source}: raft.election.timeout_ms_min ({election.timeout_ms_min}) must be less than "
            f"raft.election.timeout_ms_max ({election.timeout_ms_max})"
        )
    if election.heartbeat_ms * 3 > election.timeout_ms_min:
        raise ConfigError(
            f"{source}: raft.election.heartbeat_ms ({election.heartbeat_ms}) must be at most a "
            f"third of raft.election.timeout_ms_min ({election.timeout_ms_min}), or one lost "
            "heartbeat starts an election"
        )
    if config.read.lease_ms * 2 > election.timeout_ms_min:
        raise ConfigError(
            f"{source}: read.lease_ms ({config.read.lease_ms}) must be at most half of "
            f"raft.election.timeout_ms_min ({election.timeout_ms_min}), or a deposed leader could "
            "answer with stale values"
        )


def _check_directory(config: Config) -> None:
    """The data directory exists or can be made, judged without making anything."""
    wanted = config.cluster.db_root_dir / str(config.cluster.node_id)
    nearest = Path(os.path.abspath(wanted))
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    problem = None
    longest = max(map(len, map(os.fsencode, wanted.parts)))
    if not os.path.isdir(nearest):
        problem = f"{nearest} is not a directory"
    elif longest > (name_max := os.pathconf(nearest, "PC_NAME_MAX")):
        problem = f"a name of {longest} bytes is in it, and {nearest} takes up to {name_max}"
    elif len(os.fsencode(os.path.abspath(wanted))) > MAX_DIRECTORY_BYTES:
        problem = f"it is longer than {MAX_DIRECTORY_BYTES} bytes"
    elif config.limits.reserve_bytes and not os.statvfs(nearest).f_blocks:
        problem = f"{nearest} is on a file system that stores nothing"
    elif not os.access(nearest, os.R_OK | os.W_OK | os.X_OK):
        problem = f"{nearest} is not writable for user {os.geteuid()}"
    if problem:
        raise ConfigError(f"{config.source}: cluster.db_root_dir cannot hold {wanted}: {problem}")


def _hint(key: str, known: Mapping[str, object]) -> str:
    """The known key nearest to `key`, by its whole path or by its last part."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2])
        return max(whole, last.ratio())

    return f"; did you mean {max(known, key=likeness)!r}?"


def _show(value: object) -> str:
    """`value` as it may stand in a one-line message."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) > 2**64:
        return "a number that large"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
