"""What is to be done, computed from what the inventory and the hosts say. Pure functions.

A *problem* is a row of the one table that stops a run.
"""

from __future__ import annotations

from typing import Any

from ansible_collections.dengine.core.plugins.plugin_utils.rows import Row, row


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
