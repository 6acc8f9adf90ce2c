"""What GET /v1/cluster says, in the words of the modules. Pure functions."""

from __future__ import annotations


def voters(view):
    """Ids of the voters, sorted. A replaced incarnation counts once."""
    return sorted({m["id"] for m in view.get("members", ()) if m["status"] == "active"})


def learners(view):
    """Ids of the learners, sorted."""
    return sorted({m["id"] for m in view.get("members", ()) if m["status"] != "active"})


def sets(view):
    """The two member sets, for `diff` and results."""
    return {"voters": voters(view), "learners": learners(view)}


def newest(view, node_id):
    """The member of that id that counts for a newcomer: its learner if any, else its voter."""
    found = [m for m in view.get("members", ()) if m["id"] == node_id]
    found.sort(key=lambda m: m["status"] != "active")
    return found[-1] if found else None


def progress_line(view, node_id):
    """How far a member is, for a person."""
    member = newest(view, node_id)
    if member is None:
        return f"node {node_id}: not a member yet"
    if member["status"] == "active":
        return f"node {node_id}: voter"
    transfer = member.get("transfer")
    if transfer:
        return "node {}: snapshot {} % of {:.1f} MB, {:.1f} MB/s".format(
            node_id,
            transfer["percent"],
            transfer["size_bytes"] / 1e6,
            transfer["bytes_per_s"] / 1e6,
        )
    lag = member.get("lag")
    commit = view.get("commit_index") or 0
    if lag:
        return "node {}: log {} % ({} entries behind)".format(
            node_id, 100 * (member.get("match") or 0) // max(commit, 1), lag
        )
    reason = member.get("reason") or ("ready" if member.get("ready") else "learner")
    return f"node {node_id}: {reason}"


def progress_mark(view, ids):
    """Something that differs exactly when one of `ids` has got further."""
    marks = []
    for node_id in ids:
        member = newest(view, node_id) or {}
        transfer = member.get("transfer") or {}
        marks.append(
            [
                member.get("status"),
                member.get("match"),
                transfer.get("index"),
                transfer.get("sent_bytes"),
                bool(member.get("ready")),
            ]
        )
    return marks
