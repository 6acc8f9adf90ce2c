"""What GET /v1/cluster says, in the words of the modules. Pure functions."""

from __future__ import annotations

FETCHING = (
    "fetching a snapshot"  # so begins the `job` of a node that gets one, until it is unpacked
)


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


def is_on_its_way(member):
    """Are bytes of a snapshot still to come to that member?"""
    transfer = member.get("transfer") or {}
    return transfer.get("sent_bytes", 0) < transfer.get("size_bytes", 0)


def unpacks(member, own):
    """Has it all of a snapshot, which it reads through and unpacks: a minute for some GB?

    Args:
        own: what the node says of itself, see `dengine_member`.
    """
    busy = own.get("job", "").startswith(FETCHING) or (own.get("error") and member.get("transfer"))
    return bool(busy) and not is_on_its_way(member)


def progress_line(view, node_id, own=None):
    """How far a member is, for a person; `own` is what the node says of itself."""
    own = own or {}
    silent = "; it does not answer itself: {}".format(own["error"]) if own.get("error") else ""
    member = newest(view, node_id)
    if member is None:
        return f"node {node_id}: not a member yet{silent}"
    if member["status"] == "active":
        return f"node {node_id}: voter"
    if unpacks(member, own):
        return f"node {node_id}: it has the snapshot, and verifies and unpacks it{silent}"
    return f"node {node_id}: {_progress(view, member)}{silent}"


def _progress(view, member):
    transfer = member.get("transfer")
    if transfer:
        return "snapshot {} % of {:.1f} MB, {:.1f} MB/s".format(
            transfer["percent"], transfer["size_bytes"] / 1e6, transfer["bytes_per_s"] / 1e6
        )
    lag = member.get("lag")
    commit = view.get("commit_index") or 0
    if lag:
        done = 100 * (member.get("match") or 0) // max(commit, 1)
        return f"log {done} % ({lag} entries behind)"
    return member.get("reason") or ("ready" if member.get("ready") else "learner")


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
