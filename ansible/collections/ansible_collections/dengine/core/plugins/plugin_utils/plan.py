"""What is to be done, computed from what the inventory and the hosts say. Pure functions.

A *problem* is a row of the one table that stops a run.
"""

from __future__ import annotations

from typing import Any

from ansible_collections.dengine.core.plugins.plugin_utils.faults import faults
from ansible_collections.dengine.core.plugins.plugin_utils.inventory import crowded_zones
from ansible_collections.dengine.core.plugins.plugin_utils.rows import Row, row
from ansible_collections.dengine.core.plugins.plugin_utils.survey import Survey

Node = dict[str, Any]


class Planner:
    """Turns what was observed into the plan of one run. Use `expansion_plan`."""

    def __init__(self, survey: Survey, target: int, mode: str, options: dict[str, Any]) -> None:
        self.survey = survey
        self.nodes = survey.nodes
        self.mode = mode
        self.options = options
        # site.yml never calls an existing larger cluster wrong.
        self.target = max(target, len(survey.voters)) if mode == "site" else target
        self.wanted = target

    def plan(self) -> dict[str, Any]:
        survey = self.survey
        founder = self._founder()
        members = self._members()
        start = [] if founder else self._start()
        join = [
            {"host": n["host"], "id": n["id"], "endpoint": n["endpoint"]}
            for n in members
            if n["id"] not in survey.voters and n["host"] != founder and n["host"] not in start
        ]
        return {
            "cluster_id": survey.view.get("cluster_id", ""),
            "voters": survey.voters,
            "learners": survey.learners,
            "leader": survey.leader,
            "founder": founder,
            "start": start,
            "join": join,
            "members": [n["host"] for n in members],
            "target": [n["id"] for n in members],
            "endpoints": [n["endpoint"] for n in members],
            "voter_endpoints": [n["endpoint"] for n in members if n["id"] in survey.voters],
            "coordinator": self._coordinator(members),
            "backup_host": self._backup_host(members),
            "running": [n["host"] for n in members if survey.process(n["host"])],
            "unreachable": list(survey.unreachable),
            "data_bytes": max((f.get("data_bytes", 0) for f in survey.facts.values()), default=0),
            "processes": {n["host"]: survey.process(n["host"]) for n in self.nodes},
            "blank": [n["host"] for n in members if not survey.identity(n["host"])],
            "done": not (founder or start or join),
            "problems": faults(survey, founder, start, self.options),
            "goal_problems": self._goal_problems(members, bool(join)),
            "summary": self._summary(founder, start, join),
        }

    def _founder(self) -> str:
        """The lowest id founds, and only where nobody has a cluster or data of one. Who cannot be
        looked at may have."""
        survey = self.survey
        if survey.view or survey.unreachable or not self.nodes:
            return ""
        if any(survey.belongs(n["host"]) for n in self.nodes):
            return ""
        return str(self.nodes[0]["host"])

    def _members(self) -> list[Node]:
        """The voters, filled up to the target: learners first, then the lowest ids. A learner for
        which there is no room stays one: with it the voters would be even, or more than asked for.
        """
        survey = self.survey
        if survey.view:
            ranks = [survey.voters, survey.learners]
        else:  # who has data is started first, and then says what it is
            ranks = [[n["id"] for n in self.nodes if survey.belongs(n["host"])]]
        chosen = [n for n in self.nodes if n["id"] in ranks[0]]
        for rank in [*ranks[1:], [n["id"] for n in self.nodes]]:
            for node in self.nodes:
                fits = node["id"] in rank and node["id"] not in survey.readers
                if fits and node not in chosen and len(chosen) < self.target:
                    chosen.append(node)
        return sorted(chosen, key=lambda node: node["id"])

    def _start(self) -> list[str]:
        """Members with data whose node does not run. Learners are started when it is their turn."""
        survey = self.survey
        return [
            n["host"]
            for n in self.nodes
            if n["host"] not in survey.unreachable
            and not survey.process(n["host"])
            and survey.belongs(n["host"])
            and not survey.halted(n["host"])
            and (not survey.view or n["id"] in {*survey.voters, *survey.readers})
        ]

    def _coordinator(self, members: list[Node]) -> str:
        """Where the cluster is asked from: the first node where possible, for it has the lock."""
        ids = {*(m["id"] for m in self.survey.members), *(n["id"] for n in members)}
        able = [n["host"] for n in self.nodes if n["host"] not in self.survey.unreachable]
        known = [n["host"] for n in self.nodes if n["id"] in ids and n["host"] in able]
        return str([*known, *able, ""][0])

    def _backup_host(self, members: list[Node]) -> str:
        """A voter that runs, and a follower where there is one: the leader has enough to do."""
        survey = self.survey
        running = [
            n
            for n in members
            if n["id"] in survey.voters
            and survey.process(n["host"])
            and n["host"] not in survey.unreachable
        ]
        followers = [n["host"] for n in running if n["id"] != survey.leader]
        return str([*followers, *(n["host"] for n in running), self._coordinator(members)][0])

    def _goal_problems(self, members: list[Node], grows: bool) -> list[Row]:
        """What is wrong with what is to be, not with what is: it stops site.yml and expand.yml."""
        survey, voters = self.survey, len(members)
        found = []

        def wrong(measured: str, hint: str, limit: str = "") -> None:
            found.append(row("cluster", "cluster", measured, hint, limit))

        if len(survey.voters) > self.target:
            wrong(
                f"{len(survey.voters)} voters",
                "growing does not remove: use dengine remove, or leave the target out",
                f"dengine_target_voters {self.target}",
            )
        elif voters < self.target:
            readers = [n["host"] for n in self.nodes if n["id"] in survey.readers]
            why = f", for {', '.join(readers)} are read_only" if readers else ""
            wrong(
                f"only {voters} of {len(self.nodes)} hosts can vote{why}",
                "add hosts, set a member promotable (PUT /v1/cluster/members/ID), or ask for fewer",
                f"{self.target} voters",
            )
        elif survey.view and voters % 2 == 0:
            wrong(
                f"{voters} voters are an even number: no more may fail than of {voters - 1}",
                f"expand.yml with -e dengine_target_voters={voters + 1}",
                "an odd number",
            )
        if voters > 1 and (grows or self.mode == "expand") and not self.options.get("shared_zones"):
            for problem in crowded_zones(members, voters):
                wrong(problem, "spread them, or set dengine_shared_zones: true", "zones")
        return found

    def _summary(self, founder: str, start: list[str], join: list[dict[str, Any]]) -> list[str]:
        lines = []
        if self.survey.view:
            lines.append(f"cluster {self.survey.view['cluster_id']}, voters {self.survey.voters}")
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
    nodes: list[Node],
    facts: dict[str, dict[str, Any]],
    infos: dict[str, dict[str, Any]],
    target: int,
    mode: str = "expand",
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The plan of one run.

    Args:
        nodes: `topology`.
        facts: by host, what `dengine_probe` says; or {"unreachable": why}.
        infos: by host, what `dengine_cluster_info` got from the host's own endpoint.
        target: voters that there are to be.
        mode: "expand", or "site", which never calls an existing larger cluster wrong.
        options: shared_zones (their loss may stop the cluster), secrets (does the controller have
            them?), secrets_file (where), started (hosts whose node this run has started).
    """
    return Planner(Survey(nodes, facts, infos), int(target), mode, options or {}).plan()
