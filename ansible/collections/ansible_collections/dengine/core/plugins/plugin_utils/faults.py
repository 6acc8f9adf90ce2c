"""What is wrong with the hosts and the cluster as they are: rows of the one table. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ansible_collections.dengine.core.plugins.plugin_utils.rows import Row, row
from ansible_collections.dengine.core.plugins.plugin_utils.survey import Survey


def faults(survey: Survey, founder: str, start: list[str], options: dict[str, Any]) -> list[Row]:
    """Every fault, each once.

    Args:
        founder: host that is to found a cluster, or "".
        start: hosts whose node is started again; that it does not answer is no fault.
        options: see `expansion_plan`.
    """
    found = [
        row(
            host, "unreachable", why, "repair the connection, or take the host out of the inventory"
        )
        for host, why in survey.unreachable.items()
    ]
    found += _secrets(survey, options)
    for node in survey.nodes:
        if node["host"] not in survey.unreachable:
            found += _identity(survey, node)
            found += _other(survey, node)
            found += _another_cluster(survey, node)
    found += _clusters(survey)
    if founder:
        found += _lost(survey)
    known = {r["host"] for r in found}
    found += [r for r in _ended(survey, options) if r["host"] not in known]
    if not any(r["check"] == "secrets" for r in found):
        found += [r for r in _silent(survey) if r["host"] not in known]
    found += _members(survey, start, {r["host"] for r in found})
    if not (survey.view or start or found):
        found += _leaderless(survey)
    return found


def _secrets(survey: Survey, options: dict[str, Any]) -> list[Row]:
    """New secrets would shut out every node that runs, and be written over the old ones."""
    if options.get("secrets", True):
        return []
    hosts = [n["host"] for n in survey.nodes]
    holders = [h for h in hosts if survey.facts[h].get("secrets")]
    holders += [h for h in hosts if survey.belongs(h)]
    if not holders:
        return []
    where, file = survey.facts[holders[0]].get("secrets_dir", ""), options.get("secrets_file", "")
    hint = (
        f"copy {file} from the controller that has it; or write it (mode 0600) as "
        '{"peer_secret": "...", "token": "..."} from the files of these names in '
        f"{where} on {holders[0]}"
    )
    problem = "the cluster has secrets, and this controller has none"
    return [row(holders[0], "secrets", problem, hint, file)]


def _identity(survey: Survey, node: dict[str, Any]) -> Iterator[Row]:
    host, node_id = node["host"], node["id"]
    identity, directory = survey.identity(host), survey.facts[host]["data_dir"]
    aside = f"on {host}: mv {directory} {directory}.aside, then run this playbook again"
    problem = hint = ""
    own = [m for m in survey.members if m["id"] == node_id]
    if identity.get("error"):
        problem, hint = f"{directory}: identity.json: {identity['error']}", aside
    elif identity.get("removed"):
        problem = f"{directory} was removed from its cluster"
        hint = f"give {host} a dengine_node_id that was never used, and {aside}"
    elif survey.halted(host):
        code, _, reason = survey.halted(host).partition(" ")
        problem = f"{directory} is not to be used (exit code {code}): {reason}"
        hint = (
            f"docs/operations.md, exit code {code}. An old copy (76): empty {directory}, HALTED "
            f"too, see that the file of {host} has role = 3, start dengine there, and when it has "
            "joined run this again. Else decide first, then remove HALTED"
        )
    elif identity and identity.get("node_id") != node_id:
        problem = f"{directory} is of node {identity.get('node_id')}, not {node_id}"
        hint = aside
    elif survey.view and survey.belongs(host) not in ("", survey.view["cluster_id"]):
        problem = f"{directory} belongs to cluster {survey.belongs(host)}, a foreign one"
        hint = aside
    elif any(m["status"] == "active" for m in own) and not _is_known(identity, own):
        state = "is empty" if not identity else "has another incarnation"
        problem = f"node {node_id} is a voter, and its directory {directory} {state}"
        hint = (
            f"bring the directory back if you can. If it is lost: with role = 3 in its file, start "
            f"dengine on {host}, and it joins again; or dengine remove {node_id} (through another "
            f"node), give {host} a new dengine_node_id, run this again"
        )
    elif survey.view and node is survey.nodes[0] and not own and not survey.belongs(host):
        problem = f"a cluster exists without node {node_id}, which has the lowest id"
        hint = f"give {host} a dengine_node_id above {max(survey.voters)}"
    if problem:
        yield row(host, "identity", problem, hint, "its own directory")


def _other(survey: Survey, node: dict[str, Any]) -> Iterator[Row]:
    """At the address of this node another one answers."""
    said = (survey.said(node).get("status") or {}).get("node_id", node["id"])
    if said != node["id"]:
        yield row(
            node["host"],
            "identity",
            f"{node['endpoint']} is node {said}, the inventory says {node['id']}: swapped "
            "addresses?",
            "put dengine_address and dengine_port right in the inventory; a node that is to have "
            "another address is stopped first",
            "its own address",
        )


def _another_cluster(survey: Survey, node: dict[str, Any]) -> Iterator[Row]:
    """An earlier run has verified one cluster here, and now there is another one: what a host with
    an empty disk has founded, or what somebody has restored."""
    host, facts = node["host"], survey.facts[node["host"]]
    verified = facts.get("verified")
    said = (survey.infos[host].get("cluster") or {}).get("cluster_id") or survey.belongs(host)
    known = said or survey.view.get("cluster_id")
    if verified and known and verified != known:
        there = f"{known} answers" if said else f"the others have {known}"
        yield row(
            host,
            "identity",
            f"this host was verified in cluster {verified}, and {there}",
            f"if a backup was restored, or a node repaired, by hand: rm {facts['marker']} on "
            f"{host}, then run this again. Else stop dengine, move {facts['data_dir']} aside, "
            f"and bring back the data of {verified}",
            "the cluster that was verified",
        )


def _is_known(identity: dict[str, Any], own: list[dict[str, Any]]) -> bool:
    mine = str(identity.get("incarnation", ""))
    return bool(mine) and any(int(m["incarnation"], 16) == int(mine, 16) for m in own)


def _clusters(survey: Survey) -> Iterator[Row]:
    found: dict[str, list[str]] = {}
    for node in survey.nodes:
        said = survey.infos[node["host"]].get("cluster") or {}
        cluster_id = said.get("cluster_id") or ("" if survey.view else survey.belongs(node["host"]))
        if cluster_id:
            found.setdefault(cluster_id, []).append(node["host"])
    if len(found) > 1:
        text = "; ".join(f"{c}: {', '.join(hosts)}" for c, hosts in sorted(found.items()))
        yield row(
            "cluster",
            "identity",
            f"{len(found)} clusters: {text}",
            "keep the one with your data; on the other hosts stop dengine and move the "
            "data directory aside",
            "one cluster",
        )


def _lost(survey: Survey) -> Iterator[Row]:
    """Nobody has data, and yet a host shows that a cluster was at work on it: a disk that is lost,
    or just not mounted. To found a second one would hide that."""
    for node in survey.nodes:
        host, facts = node["host"], survey.facts[node["host"]]
        trace = facts.get("trace")
        if trace:
            yield row(
                host,
                "identity",
                f"a cluster was at work here ({trace}); {facts['data_dir']} holds nothing of it",
                "mount its disk if it is not, and run this again. If the data are lost: "
                "docs/operations.md, 'Restore a backup on the hosts'; or, for a new and empty "
                "cluster, destroy.yml and then this again",
                "no trace of an earlier cluster",
            )


def _silent(survey: Survey) -> Iterator[Row]:
    for node in survey.nodes:
        process, said = survey.process(node["host"]), survey.said(node)
        if process and not said.get("status"):
            yield row(
                node["host"],
                "cluster",
                f"process {process['pid']} runs and does not answer: {said.get('reason')}",
                "look at its log; diagnose.yml collects it",
                node["endpoint"],
            )


def _ended(survey: Survey, options: dict[str, Any]) -> Iterator[Row]:
    """What this very run has started, and is not there any more."""
    for node in survey.nodes:
        host = node["host"]
        if host in options.get("started", []) and not survey.process(host):
            yield row(
                host,
                "cluster",
                f"node {node['id']} was started, and has ended again",
                "see its log; diagnose.yml collects it",
                "a node that runs",
            )


def _members(survey: Survey, start: list[str], known: set[str]) -> Iterator[Row]:
    """What is wrong with the members; `known` hosts have a row already."""
    by_id = {n["id"]: n["host"] for n in survey.nodes}
    for member in survey.members:
        node_id, host = member["id"], by_id.get(member["id"])
        if host is None:
            yield row(
                "cluster",
                "cluster",
                f"node {node_id} at {member['address']} is a member",
                f"add it to the inventory, or: dengine remove {node_id}",
                "members of the inventory",
            )
        elif (
            member["status"] == "active"
            and member["ready"] is False
            and host not in {*start, *known}
        ):
            yield row(
                host,
                "cluster",
                f"node {node_id}: {member['reason']}",
                f"repair {host} before you grow the cluster",
                "every voter answers",
            )
    if survey.view.get("joint"):
        yield row("cluster", "cluster", "a change of members is under way", "run again", "none")


def _leaderless(survey: Survey) -> Iterator[Row]:
    for node in survey.nodes:
        if survey.process(node["host"]) and survey.belongs(node["host"]):
            reason = survey.said(node).get("reason") or survey.infos[node["host"]].get("message")
            yield row(
                "cluster",
                "cluster",
                f"no leader: {reason}",
                "start the missing voters; docs/operations.md, 'When something is lost'",
                "a leader",
            )
            return
