"""The inventory: its nodes, and what can be known to be wrong without asking any host. Pure."""

from __future__ import annotations

from typing import Any

MAX_NODE_ID = 2**32 - 1
PORT_BASE = 9080
SAMPLE_SECRETS = ("CHANGE-ME", "changeme", "secret")
MIN_SECRET = 32
RESERVED = {  # of dengine.toml: what the template writes itself
    "cluster": {
        "node_id", "listen_address", "advertise_address", "initial_cluster", "db_root_dir", "zone"
    },
    "raft.membership": {"promotion"},
    "security": {"peer_secret_file", "token_file"},
}  # fmt: skip


def topology(hosts: list[str], hostvars: Any) -> list[dict[str, Any]]:
    """The group's hosts in order of node id; what is missing or wrong is None.

    The default port is 9080 + node id. Addresses come from the inventory, never from facts.
    """
    found = []
    for host in hosts:
        values = hostvars[host]
        node_id = _integer(values.get("dengine_node_id"))
        port = _integer(values.get("dengine_port"))
        if port is None and node_id is not None:
            port = PORT_BASE + node_id
        address = values.get("dengine_address")
        if address and address[0] == "[" and address[-1] == "]":
            address = address[1:-1]  # an IPv6 address, written as in an endpoint
        bracketed = f"[{address}]" if address and ":" in address else address
        found.append(
            {
                "host": host,
                "id": node_id,
                "address": address,
                "port": port,
                "endpoint": f"{bracketed}:{port}",
                "zone": values.get("dengine_zone") or "",
            }
        )
    found.sort(key=lambda node: (node["id"] is None, node["id"], node["host"]))
    return found


def observed(nodes: list[dict[str, Any]], hostvars: Any) -> dict[str, Any]:
    """What role `discover` registered on each host, as `expansion_plan` takes it.

    A host that could not be looked at has {"unreachable": why} as its facts.
    """
    facts: dict[str, dict[str, Any]] = {}
    infos: dict[str, dict[str, Any]] = {}
    for node in nodes:
        values = hostvars[node["host"]]
        probe, info = values.get("discover_probe") or {}, values.get("discover_info") or {}
        if "facts" in probe and "nodes" in info:
            facts[node["host"]], infos[node["host"]] = probe["facts"], info
        else:
            why = " ".join(str(probe.get("msg") or "it could not be looked at").split())
            why = why.removeprefix("Task failed: ")
            facts[node["host"]] = {"unreachable": why}
            infos[node["host"]] = {"cluster": {}, "nodes": {}, "message": ""}
    unreachable = [host for host, said in facts.items() if "unreachable" in said]
    return {"facts": facts, "infos": infos, "unreachable": unreachable}


def _integer(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def inventory_problems(nodes: list[dict[str, Any]], options: dict[str, Any]) -> list[str]:
    """Everything that can be known to be wrong without asking any host.

    `options`: target, limit (what --limit said), zones (that must all be there), shared_zones,
    local (all on one machine), secrets (peer_secret and token where the inventory sets them),
    secrets_file (where generated ones are kept, and its mode or None), paths (by variable what it
    is and what it has to be). No target: nothing is to grow.
    """
    problems = []
    if options.get("limit") not in (None, "", "all"):
        problems.append(
            "--limit is refused: quorums are counted over all hosts. Leave it out; hosts that are "
            "not concerned are not touched"
        )
    problems += _target_problems(nodes, options)
    problems += _node_problems(nodes, bool(options.get("local")))
    problems += _zone_problems(nodes, options)
    for name, (value, unit) in sorted((options.get("paths") or {}).items()):
        if str(value).rstrip("/") != unit:
            problems.append(
                f"{name} is {value}, and the unit of backend systemd has {unit}: leave it out; to "
                f"have the data elsewhere, mount that disk on {unit}"
            )
    problems += _config_problems(options.get("config") or {})
    problems += _secret_problems(options.get("secrets") or {})
    file, mode = options.get("secrets_file") or ("", None)
    if mode is not None and mode & 0o077:
        problems.append(
            f"{file} has mode {mode:04o}: it holds the secrets of the cluster, and is for its "
            f"owner only. Run: chmod 0600 {file}"
        )
    return problems


def _secret_problems(secrets: dict[str, Any]) -> list[str]:
    """What the node itself would refuse, once the files are written. No value is ever told."""
    no_text = [
        name
        for name, value in sorted(secrets.items())
        if isinstance(value, (int, float, type(None)))
    ]
    if no_text:
        return [
            f"dengine_{name} is no text: YAML takes it for a number, or for nothing. Quote it: "
            f'dengine_{name}: "..."'
            for name in no_text
        ]
    problems = []
    for name, value in sorted(secrets.items()):
        if value and (len(value) < MIN_SECRET or value in SAMPLE_SECRETS):
            problems.append(
                f"dengine_{name} has fewer than {MIN_SECRET} characters: leave it out to have one "
                "generated, or set it to the output of `openssl rand -hex 32` in the vault file"
            )
    token = secrets.get("token") or ""
    if any(not "!" <= letter <= "~" for letter in token):
        problems.append(
            "dengine_token is no line of visible ASCII characters without blanks: it stands in a "
            "header of HTTP"
        )
    if token and token == (secrets.get("peer_secret") or "").rstrip("\r\n"):
        problems.append(
            "dengine_peer_secret and dengine_token are the same: each client would know what only "
            "nodes may know. Set one of them to another output of `openssl rand -hex 32`"
        )
    return problems


def _config_problems(config: Any) -> list[str]:
    wrong = "dengine_config has the sections of dengine.toml, each a dictionary"
    if not isinstance(config, dict):
        return [f"{wrong}; it is {config!r}"]
    problems = []
    for section, values in sorted(config.items()):
        if not isinstance(values, dict):
            problems.append(f"{wrong}; {section} is {values!r}")
            continue
        problems += [
            f"dengine_config sets {section}.{name}, which follows from the inventory: leave it out"
            for name in sorted(RESERVED.get(section, set()) & values.keys())
        ]
    return problems


def _target_problems(nodes: list[dict[str, Any]], options: dict[str, Any]) -> list[str]:
    if options.get("target") is None:
        return []
    target = _integer(options["target"])
    if target is None or target < 1 or target % 2 == 0:
        return [
            f"dengine_target_voters is {options.get('target')}: it must be odd (1, 3 or 5), since "
            "an even number tolerates no more failures than one less"
        ]
    if target > len(nodes):
        return [
            f"dengine_target_voters is {target}, and the inventory has only {len(nodes)} hosts in "
            "group dengine: add the missing hosts, or pass all inventory files (-i the directory)"
        ]
    return []


def _node_problems(nodes: list[dict[str, Any]], local: bool) -> list[str]:
    problems = []
    ids: dict[int, str] = {}
    endpoints: dict[str, str] = {}
    for node in nodes:
        host, node_id = node["host"], node["id"]
        if node_id is None or not 1 <= node_id <= MAX_NODE_ID:
            problems.append(f"{host}: dengine_node_id must be a whole number above 0")
        elif ids.setdefault(node_id, host) != host:
            problems.append(
                f"{ids[node_id]} and {host} both have dengine_node_id {node_id}: every node has an "
                "id of its own, for all time"
            )
        address = node["address"]
        if not address:
            problems.append(f"{host}: dengine_address is missing: the address that peers dial")
        elif address in ("0.0.0.0", "::"):
            problems.append(f"{host}: dengine_address is a wildcard, which nobody can dial")
        elif not local and (address.startswith("127.") or address in ("localhost", "::1")):
            problems.append(f"{host}: dengine_address is {address}, which no other host can reach")
        elif endpoints.setdefault(node["endpoint"], host) != host:
            problems.append(
                f"{endpoints[node['endpoint']]} and {host} both have {node['endpoint']}"
            )
        if node["port"] is not None and not 1 <= node["port"] <= 65535:
            problems.append(f"{host}: dengine_port is {node['port']}")
    return problems


def _zone_problems(nodes: list[dict[str, Any]], options: dict[str, Any]) -> list[str]:
    problems = []
    used: dict[str, list[str]] = {}
    for node in nodes:
        used.setdefault(node["zone"], []).append(node["host"])
    for zone in options.get("zones") or []:
        if zone not in used:
            problems.append(
                f"zone {zone} of dengine_zones has no host: its inventory file is missing. Pass "
                "the whole directory with -i"
            )
    for host in used.pop("", []):
        problems.append(f"{host}: dengine_zone is missing: the availability zone of the host")
    target = _integer(options.get("target")) or 1
    # With hosts to spare it depends on who is chosen: the plan knows that.
    if 1 < target == len(nodes) and not options.get("shared_zones"):
        problems += [
            f"{crowded}. Spread them, or set dengine_shared_zones: true"
            for crowded in crowded_zones(nodes, target)
        ]
    return problems


def crowded_zones(nodes: list[dict[str, Any]], voters: int) -> list[str]:
    """A sentence for each zone with so many of the `voters` that its loss would stop them all."""
    used: dict[str, list[str]] = {}
    for node in nodes:
        used.setdefault(node["zone"], []).append(node["host"])
    allowed = max(1, (voters - 1) // 2)
    return [
        f"zone {zone} has {len(hosts)} of {voters} voters ({', '.join(hosts)}): losing it would "
        "stop the cluster"
        for zone, hosts in sorted(used.items())
        if zone and len(hosts) > allowed
    ]
