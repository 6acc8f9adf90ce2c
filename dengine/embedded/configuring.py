"""From what an app names to the configuration of its node, and to a port that is surely its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from dengine.config import ENVIRONMENT_PREFIX, Config, load, parse_address
from dengine.errors import ConfigError, TryAgain
from dengine.node.addresses import join_host_port

SOURCE: Final = "dengine.Engine"
NOWHERE: Final = "127.0.0.1:1"  # of a node without a port; a member has to have an address
ANY_PORT: Final = ":0"


class Setup(NamedTuple):
    """What a node is to be.

    Attributes:
        listens: it has a port, so others can reach it.
        any_port: whichever is free, not the one in `config`.
    """

    config: Config
    listens: bool = True
    any_port: bool = False


def setup_of(
    data_dir: Path | str | None,
    node_id: int,
    listen_address: str | None,
    initial_cluster: Mapping[int, str] | None,
    join: bool,
    settings: Mapping[str, int | str] | None,
    config: Config | Path | str | None,
) -> Setup:
    """What the arguments of an `Engine` stand for: `config`, or all the others.

    Raises:
        ValueError: both, or neither.
        ConfigError: a sentence that names the key.
    """
    if (data_dir is None) == (config is None):
        raise ValueError("an engine takes a data_dir, or a config that names it")
    if data_dir is not None:
        return _of_keys(
            data_dir, node_id, listen_address, initial_cluster or {}, join, settings or {}
        )
    if listen_address or initial_cluster or join or settings or node_id != 1:
        raise ValueError("all of that is in the config: give the config alone")
    if isinstance(config, Config):
        return Setup(config)
    return Setup(load(Path(config or ""), os.environ))


def _of_keys(
    data_dir: Path | str,
    node_id: int,
    listen_address: str | None,
    initial_cluster: Mapping[int, str],
    join: bool,
    settings: Mapping[str, int | str],
) -> Setup:
    """The environment has no say in it."""
    members = dict(initial_cluster)
    own = listen_address or members.get(node_id)
    if own is None and (members or join):
        raise ConfigError(
            f"{SOURCE}: cluster.listen_address is missing: the other members have to reach node "
            f"{node_id}"
        )
    any_port = own is not None and own.endswith(ANY_PORT)
    listen = own or NOWHERE
    if any_port:
        listen = listen.removesuffix(ANY_PORT) + ":1"  # until it is known which
    try:
        parse_address(listen)
    except ValueError as error:
        raise ConfigError(f"{SOURCE}: cluster.listen_address {error}, not {own!r}") from None
    members.setdefault(node_id, listen)
    if any_port and members[node_id] == own:
        members[node_id] = listen
    rows = [
        f"{{ id = {member}, address = {json.dumps(str(address))}, "
        + ("role = 3, status = 0 }" if join and member == node_id else "role = 0, status = 2 }")
        for member, address in members.items()
    ]
    keys: dict[str, int | str] = {
        "cluster.node_id": node_id,
        "cluster.listen_address": listen,
        "cluster.initial_cluster": f"[{', '.join(rows)}]",
        "cluster.db_root_dir": str(data_dir),
    }
    if own is None:
        keys["cluster.founding_wait_ms"] = 0  # who could call a node without a port?
    return Setup(_load(keys | dict(settings)), listens=own is not None, any_port=any_port)


def _load(keys: Mapping[str, int | str]) -> Config:
    """The configuration with these keys, checked as if they came from the environment."""
    environ = {
        ENVIRONMENT_PREFIX + key.upper().replace(".", "__"): str(value)
        for key, value in keys.items()
    }
    try:
        return replace(load(None, environ), source=SOURCE)
    except ConfigError as error:
        said = re.sub(rf"^(\${ENVIRONMENT_PREFIX}\w+|the environment)", SOURCE, error.message)
        raise ConfigError(said) from None


@asynccontextmanager
async def reserved(setup: Setup) -> AsyncIterator[Config]:
    """The configuration with the port that the node is to have, which nobody else gets meanwhile.

    A socket that is bound and does not listen keeps a port, and lets a listener of ours have it.

    Raises:
        TryAgain: the port is taken, or the address is not one of this machine.
        ConfigError: there is no such host.
    """
    address = setup.config.cluster.listen_address
    host, port = parse_address(address)
    wanted = 0 if setup.any_port else port
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, wanted, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ConfigError(
            f"{setup.config.source}: cluster.listen_address: cannot listen on {address}: "
            f"{error.strerror}; use an address of this machine"
        ) from None
    family, _, _, _, where = found[0]
    with socket.socket(family, socket.SOCK_STREAM) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind(where)
        except OSError as error:
            raise TryAgain(
                f"cannot listen on {address}: {error.strerror}; stop what uses that port, or "
                "change cluster.listen_address"
            ) from None
        yield _at(setup.config, join_host_port(host, held.getsockname()[1]))


def _at(config: Config, address: str) -> Config:
    """`config` with that address to listen on, by which the node is known unless it names another
    one.
    """
    cluster = config.cluster
    members = tuple(
        replace(member, address=address)
        if member.id == cluster.node_id and member.address == cluster.listen_address
        else member
        for member in cluster.initial_cluster
    )
    moved = replace(cluster, listen_address=address, initial_cluster=members)
    return replace(config, cluster=moved)
