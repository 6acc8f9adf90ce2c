"""What is to be done, computed from what the inventory and the hosts say. Pure functions.

A *problem* is a row of the one table that stops a run: host, check, measured, limit, hint. The hint
is what to do next.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
MAX_NODE_ID = 2**32 - 1
PORT_BASE = 9080
SAMPLE_SECRETS = ("CHANGE-ME", "changeme", "secret")
MIN_SECRET = 32


def row(host: str, check: str, measured: str, hint: str, limit: str = "") -> Row:
    return {
        "host": host,
        "check": check,
        "status": "FAILED",
        "measured": measured,
        "limit": limit,
        "hint": hint,
    }


# --- the inventory ---------------------------------------------------------------------------


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


def _integer(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def inventory_problems(nodes: list[dict[str, Any]], options: dict[str, Any]) -> list[str]:
    """Everything that can be known to be wrong without asking any host.

    `options`: target, limit (what --limit said), zones (that must all be there), shared_zones,
    local (all on one machine), secrets (peer_secret and token where the inventory sets them).
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
    for name, value in sorted((options.get("secrets") or {}).items()):
        if value and (len(value) < MIN_SECRET or value in SAMPLE_SECRETS):
            problems.append(
                f"dengine_{name} has fewer than {MIN_SECRET} characters: leave it out to have one "
                "generated, or set it to the output of `openssl rand -hex 32` in the vault file"
            )
    return problems


def _target_problems(nodes: list[dict[str, Any]], options: dict[str, Any]) -> list[str]:
    target = _integer(options.get("target"))
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
    allowed = max(1, (target - 1) // 2)
    if target > 1 and not options.get("shared_zones"):
        for zone, hosts in sorted(used.items()):
            if len(hosts) > allowed and len(nodes) <= target:
                problems.append(
                    f"zone {zone} has {len(hosts)} of {target} voters ({', '.join(hosts)}): losing "
                    "it would stop the cluster. Spread them, or set dengine_shared_zones: true"
                )
    return problems


# --- the plan --------------------------------------------------------------------------------


class Planner:
    """Turns what was observed into the plan of one run. Use `expansion_plan`."""

    def __init__(
        self,
        nodes: list[dict[str, Any]],
        facts: dict[str, dict[str, Any]],
        infos: dict[str, dict[str, Any]],
        target: int,
        mode: str,
    ) -> None:
        self.nodes = nodes
        self.facts = facts
        self.infos = infos
        self.target = target
        self.mode = mode
        self.problems: list[Row] = []
        self.view = self._best_view()
        self.voter_ids = sorted({m["id"] for m in self._members() if m["status"] == "active"})
        self.learner_ids = sorted({m["id"] for m in self._members() if m["status"] != "active"})

    def _best_view(self) -> dict[str, Any]:
        views = [i["cluster"] for i in self.infos.values() if i.get("cluster")]
        return max(views, key=lambda v: (v["term"], v["commit_index"]), default={})

    def _members(self) -> list[dict[str, Any]]:
        members: list[dict[str, Any]] = self.view.get("members", [])
        return members

    def _identity(self, host: str) -> dict[str, Any]:
        identity: dict[str, Any] = self.facts[host]["identity"]
        return identity

    def _belongs(self, host: str) -> str:
        return str(self._identity(host).get("cluster_id") or "")

    def _runs(self, host: str) -> bool:
        return bool(self.facts[host]["process"])

    def plan(self) -> dict[str, Any]:
        founder = self._founder()
        members = self._target_nodes()
        start = [
            n["host"]
            for n in self.nodes
            if not self._runs(n["host"]) and self._belongs(n["host"]) and not founder
        ]
        for node in self.nodes:
            self._check_identity(node)
        self._check_clusters()
        self._check_health(start)
        join = [
            {"host": n["host"], "id": n["id"], "endpoint": n["endpoint"]}
            for n in members
            if n["id"] not in self.voter_ids and n["host"] != founder
        ]
        if not self.view and start:
            join = [j for j in join if j["host"] not in start]
        running = [n["host"] for n in members if self._runs(n["host"])]
        return {
            "cluster_id": self.view.get("cluster_id", ""),
            "voters": self.voter_ids,
            "learners": self.learner_ids,
            "leader": (self.view.get("leader") or {}).get("id"),
            "founder": founder,
            "start": start,
            "join": join,
            "members": [n["host"] for n in members],
            "target": [n["id"] for n in members],
            "endpoints": [n["endpoint"] for n in members],
            "voter_endpoints": [n["endpoint"] for n in members if n["id"] in self.voter_ids],
            "coordinator": members[0]["host"] if members else "",
            "running": running,
            "processes": {n["host"]: self.facts[n["host"]]["process"] for n in self.nodes},
            "blank": [n["host"] for n in members if not self._identity(n["host"])],
            "done": not (founder or start or join),
            "problems": self.problems,
            "summary": self._summary(founder, start, join),
        }

    def _founder(self) -> str:
        """The lowest id founds, and only where there is no cluster and no data of one."""
        if self.view or any(self._belongs(n["host"]) for n in self.nodes) or not self.nodes:
            return ""
        return str(self.nodes[0]["host"])

    def _target_nodes(self) -> list[dict[str, Any]]:
        """Members as they are, filled up to the target with the lowest ids."""
        known = {*self.voter_ids, *self.learner_ids}
        if not self.view:
            known = {n["id"] for n in self.nodes if self._belongs(n["host"])}
        target = self.target
        if self.mode == "site":
            target = max(target, len(self.voter_ids))
        elif len(self.voter_ids) > target:
            self.problems.append(
                row(
                    "cluster",
                    "cluster",
                    f"{len(self.voter_ids)} voters",
                    "growing does not remove: use dengine remove, or leave the target out",
                    f"dengine_target_voters {target}",
                )
            )
        chosen = [n for n in self.nodes if n["id"] in known]
        for node in self.nodes:
            if len(chosen) < target and node not in chosen:
                chosen.append(node)
        return sorted(chosen, key=lambda node: node["id"])

    def _check_identity(self, node: dict[str, Any]) -> None:
        host, node_id = node["host"], node["id"]
        identity, directory = self._identity(host), self.facts[host]["data_dir"]
        aside = f"on {host}: mv {directory} {directory}.aside, then run this playbook again"
        problem = hint = ""
        own = [m for m in self._members() if m["id"] == node_id]
        if identity.get("error"):
            problem, hint = f"{directory}: identity.json: {identity['error']}", aside
        elif identity.get("removed"):
            problem = f"{directory} was removed from its cluster"
            hint = f"give {host} a dengine_node_id that was never used, and {aside}"
        elif identity and identity.get("node_id") != node_id:
            problem, hint = (
                f"{directory} is of node {identity.get('node_id')}, not {node_id}",
                aside,
            )
        elif self.view and self._belongs(host) not in ("", self.view["cluster_id"]):
            problem = f"{directory} belongs to cluster {self._belongs(host)}, a foreign one"
            hint = aside
        elif any(m["status"] == "active" for m in own) and not self._is_known(identity, own):
            state = "is empty" if not identity else "has another incarnation"
            problem = f"node {node_id} is a voter, and its directory {directory} {state}"
            hint = (
                f"bring the directory back if you can. If it is lost: dengine remove {node_id} "
                f"(through another node), give {host} a new dengine_node_id, run this again"
            )
        elif self.view and node is self.nodes[0] and not own and not self._belongs(host):
            problem = f"a cluster exists without node {node_id}, which has the lowest id"
            hint = f"give {host} a dengine_node_id above {max(self.voter_ids)}"
        if problem:
            self.problems.append(row(host, "identity", problem, hint, "its own directory"))

    @staticmethod
    def _is_known(identity: dict[str, Any], own: list[dict[str, Any]]) -> bool:
        mine = str(identity.get("incarnation", ""))
        return bool(mine) and any(int(m["incarnation"], 16) == int(mine, 16) for m in own)

    def _check_clusters(self) -> None:
        found: dict[str, list[str]] = {}
        for node in self.nodes:
            said = self.infos[node["host"]].get("cluster") or {}
            cluster_id = said.get("cluster_id") or (
                "" if self.view else self._belongs(node["host"])
            )
            if cluster_id:
                found.setdefault(cluster_id, []).append(node["host"])
        if len(found) > 1:
            text = "; ".join(f"{c}: {', '.join(hosts)}" for c, hosts in sorted(found.items()))
            self.problems.append(
                row(
                    "cluster",
                    "identity",
                    f"{len(found)} clusters: {text}",
                    "keep the one with your data; on the other hosts stop dengine and move the "
                    "data directory aside",
                    "one cluster",
                )
            )

    def _check_health(self, start: list[str]) -> None:
        by_id = {n["id"]: n for n in self.nodes}
        for node in self.nodes:
            host = node["host"]
            said = self.infos[host]["nodes"].get(node["endpoint"], {})
            if self._runs(host) and not said.get("status"):
                self.problems.append(
                    row(
                        host,
                        "cluster",
                        f"process {self.facts[host]['process']['pid']} runs and does not answer: "
                        f"{said.get('reason')}",
                        "look at its log; diagnose.yml collects it",
                        node["endpoint"],
                    )
                )
        for member in self._members():
            known = by_id.get(member["id"])
            if known is None:
                self.problems.append(
                    row(
                        "cluster",
                        "cluster",
                        f"node {member['id']} at {member['address']} is a member",
                        f"add it to the inventory, or: dengine remove {member['id']}",
                        "members of the inventory",
                    )
                )
            elif (
                member["status"] == "active"
                and member["ready"] is False
                and known["host"] not in start
                and not any(p["host"] == known["host"] for p in self.problems)
            ):
                self.problems.append(
                    row(
                        known["host"],
                        "cluster",
                        f"node {member['id']}: {member['reason']}",
                        f"repair {known['host']} before you grow the cluster",
                        "every voter answers",
                    )
                )
        if self.view.get("joint"):
            self.problems.append(
                row("cluster", "cluster", "a change of members is under way", "run again", "none")
            )
        self._check_leader(start)

    def _check_leader(self, start: list[str]) -> None:
        if self.view or start or any(p["check"] == "identity" for p in self.problems):
            return
        for node in self.nodes:
            if self._runs(node["host"]) and self._belongs(node["host"]):
                said = self.infos[node["host"]]["nodes"].get(node["endpoint"], {})
                reason = said.get("reason") or self.infos[node["host"]].get("message")
                self.problems.append(
                    row(
                        "cluster",
                        "cluster",
                        f"no leader: {reason}",
                        "start the missing voters; docs/operations.md, 'Lost quorum'",
                        "a leader",
                    )
                )
                return

    def _summary(self, founder: str, start: list[str], join: list[dict[str, Any]]) -> list[str]:
        lines = []
        if self.view:
            lines.append(f"cluster {self.view['cluster_id']}, voters {self.voter_ids}")
        if founder:
            lines.append(f"found a new cluster on {founder}")
        if start:
            lines.append("start again: " + ", ".join(start))
        if join:
            lines.append("join, in this order: " + ", ".join(j["host"] for j in join))
        if not (founder or start or join):
            lines.append("nothing to do: the cluster is as it should be")
        return lines


def expansion_plan(
    nodes: list[dict[str, Any]],
    facts: dict[str, dict[str, Any]],
    infos: dict[str, dict[str, Any]],
    target: int,
    mode: str = "expand",
) -> dict[str, Any]:
    """The plan of one run.

    Args:
        nodes: `topology`.
        facts: by host, what `dengine_probe` says, with `data_dir` added.
        infos: by host, what `dengine_cluster_info` got from the host's own endpoint.
        target: voters that there are to be.
        mode: "expand", or "site", which never calls an existing larger cluster wrong.
    """
    return Planner(nodes, facts, infos, int(target), mode).plan()


# --- preflight -------------------------------------------------------------------------------


def host_rows(found: dict[str, list[Row]]) -> list[Row]:
    """The rows of `dengine_probe` by host, as rows of the one table."""
    return [{"host": host, **r} for host, rows in found.items() for r in rows]


def way_rows(
    nodes: list[dict[str, Any]], ways: dict[str, dict[str, Any]], limits: dict[str, Any]
) -> list[Row]:
    """A row per host and check `connect`, `rtt`, `clock_offset`: its way to the others."""
    rows = []
    by_endpoint = {n["endpoint"]: n["host"] for n in nodes}
    for host, found in ways.items():
        rtts: list[tuple[float, str]] = []
        offsets: list[tuple[float, str]] = []
        broken = []
        for endpoint, way in found.items():
            other = by_endpoint[endpoint]
            if way["error"]:
                broken.append(f"{other} ({endpoint}) {way['error']}")
                continue
            rtts.append((way["rtt_ms"], other))
            if way["offset_ms"] is not None:
                offsets.append((abs(way["offset_ms"]), other))
        rows.append(
            _judged(
                host,
                "connect",
                not broken,
                "; ".join(broken) or f"reaches {len(found)}",
                "TCP to every other node",
                "open the port in the firewall of the other host, and on the network between",
            )
        )
        for name, values, limit in (
            ("rtt", rtts, float(limits["rtt_ms"])),
            ("clock_offset", offsets, float(limits["clock_offset_ms"])),
        ):
            if values:
                worst, other = max(values)
                rows.append(
                    _judged(
                        host,
                        name,
                        worst <= limit,
                        f"{worst:g} ms to {other}",
                        f"{limit:g} ms",
                        "place the nodes nearer to each other"
                        if name == "rtt"
                        else "synchronize the clocks of both hosts",
                    )
                )
    return rows


def _judged(host: str, check: str, ok: bool, measured: str, limit: str, hint: str) -> Row:
    return {
        "host": host,
        "check": check,
        "status": "ok" if ok else "FAILED",
        "measured": measured,
        "limit": limit,
        "hint": "" if ok else hint,
    }


def skipping(rows: list[Row], skip: list[str]) -> list[Row]:
    """The same rows; a failure whose check is named in `skip` counts no more, and says so."""
    return [
        {**r, "status": "skipped"} if r["status"] == "FAILED" and r["check"] in skip else r
        for r in rows
    ]


def verdict(rows: list[Row]) -> list[str]:
    """What a person wants to read when nothing failed."""
    passed = [r for r in rows if r["status"] == "ok"]
    hosts = {r["host"] for r in rows}
    lines = [f"{len(passed)} checks passed on {len(hosts)} hosts"]
    return lines + [
        f"skipped by name: {r['check']} on {r['host']} ({r['measured']})"
        for r in rows
        if r["status"] == "skipped"
    ]


def failures(rows: list[Row]) -> list[Row]:
    return [r for r in rows if r["status"] == "FAILED"]


def table(rows: list[Row]) -> list[str]:
    """The rows as lines of text with aligned columns; hints stand below their row."""
    names = ("host", "check", "status", "measured", "limit")
    cells = [[str(r.get(n, "")) for n in names] for r in rows]
    widths = [max(len(c) for c in column) for column in zip(names, *cells, strict=True)]
    lines = ["  ".join(n.ljust(w) for n, w in zip(names, widths, strict=True)).rstrip()]
    for cell, source in zip(cells, rows, strict=True):
        lines.append("  ".join(c.ljust(w) for c, w in zip(cell, widths, strict=True)).rstrip())
        if source.get("hint") and source["status"] == "FAILED":
            lines.append(f"    -> {source['hint']}")
    return lines
