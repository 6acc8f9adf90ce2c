"""Where members can be dialled, and what to correct when a member announced a wildcard.

A wildcard (0.0.0.0) is a fine address while all nodes share a machine, and is never dialled from
another one: there the own file's entry for that id serves, else where the member was seen.
"""

from __future__ import annotations

from collections.abc import Mapping

from dengine.config import Config, is_loopback, is_wildcard, parse_address

SEEN_HOSTS_MAX = 1000  # members and strangers; who calls again is seen again


def join_host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _local(address: str) -> str:
    """`address`, where a wildcard means this machine."""
    if not is_wildcard(address):
        return address
    return join_host_port("127.0.0.1", parse_address(address)[1])


class AddressBook:
    """What this node knows about addresses beyond the membership itself."""

    def __init__(self, config: Config) -> None:
        self._file = {m.id: m.address for m in config.cluster.initial_cluster}
        self.own = config.cluster.advertise_address or config.own_entry.address
        self._told: dict[int, str] = {}
        self._seen_hosts: dict[int, str] = {}
        self._reached_at: str | None = None

    def saw(self, node_id: int, host: str) -> None:
        """A stream from `node_id` came from `host`."""
        if host and not is_loopback(join_host_port(host, 1)):
            self._seen_hosts.pop(node_id, None)
            self._seen_hosts[node_id] = host  # the newest last
            if len(self._seen_hosts) > SEEN_HOSTS_MAX:
                del self._seen_hosts[next(iter(self._seen_hosts))]

    def told(self, addresses: Mapping[int, str]) -> None:
        """The cluster named all its members' addresses when it let this node in."""
        self._told = dict(addresses)

    def source(self, node_id: int, address: str | None) -> list[str]:
        """Where to fetch from a member, best first; `address` None: no membership names it yet."""
        known = address or self._told.get(node_id) or self._file.get(node_id)
        return [] if known is None else self.dial(node_id, known)

    def reached_at(self, address: str) -> None:
        """Another node reached this one at `address`."""
        if address and not is_wildcard(address) and not is_loopback(address):
            self._reached_at = address

    def dial(self, node_id: int, address: str) -> list[str]:
        """Addresses to try for a member that announced `address`, best first.

        Last comes the own file's address for it: when everyone moved while the cluster was down,
        nobody is where the membership says. The handshake makes sure that it is that member.
        """
        better = self._better(node_id, address) if is_wildcard(address) else None
        first = better or _local(address)
        in_file = self._file.get(node_id, first)
        if is_wildcard(in_file) and not is_wildcard(address):
            return [first]  # a wildcard is never dialled from another machine
        return list(dict.fromkeys([first, _local(in_file)]))

    def bootstrap(self, own_id: int) -> Mapping[int, list[str]]:
        """Whom the own file names, for a node that has no membership yet."""
        return {i: self.dial(i, address) for i, address in self._file.items() if i != own_id}

    def correction(self, node_id: int, address: str, *, is_self: bool) -> str | None:
        """A real address for a member whose committed one is a wildcard, when one is known."""
        if not is_wildcard(address):
            return None
        return self._reached_at if is_self else self._better(node_id, address)

    def _better(self, node_id: int, address: str) -> str | None:
        in_file = self._file.get(node_id)
        if in_file is not None and not is_wildcard(in_file) and not is_loopback(in_file):
            return in_file
        host = self._seen_hosts.get(node_id)
        return None if host is None else join_host_port(host, parse_address(address)[1])
