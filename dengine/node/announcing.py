"""What a node announces when roles and the membership change: lines that people and scripts wait
for (examples/single-node-expansion/README.md, "What the lines mean").
"""

from __future__ import annotations

import logging

from dengine.config import InitialMember
from dengine.log import announce
from dengine.raft.membership import Membership
from dengine.raft.raft import Transition
from dengine.raft.types import MemberId

log = logging.getLogger("dengine.members")


def role_changed(me: MemberId, transition: Transition) -> None:
    old, new = transition.old.capitalize(), transition.new.capitalize()
    announce(f"[Node {me.id}] {old} → {new} (term {transition.term})")
    log.info("%s in term %d: %s", transition.new, transition.term, transition.reason)


def membership_committed(me: MemberId, old: Membership, new: Membership, term: int) -> None:
    """Say once what a committed membership changed. Joint states are on the way, not there."""
    if new.joint:
        log.info("joint membership: %s -> %s", _ids(new.outgoing), _ids(new.voters))
        return
    was_voter = set(old.outgoing or old.voters)
    for member in new.learners:
        if member in old.learners:
            continue
        if member == me:
            announce(f"✅ NODE {me.id} SUCCESSFULLY JOINED CLUSTER")
        else:
            log.info("node %d joined as a learner", member.id)
    for member in new.voters:
        if member in was_voter or not was_voter:
            continue
        if member == me:
            announce(f"[Node {me.id}] Learner → Follower (term {term})")
            announce(f"🎊 NODE {me.id} PROMOTED TO VOTER!")
        else:
            log.info("node %d is a voter now", member.id)
    gone = {m.id.id for m in old.members} - {m.id.id for m in new.members}
    for node_id in sorted(gone):
        log.info("node %d was removed", node_id)
    voters = len(new.voters)
    if voters % 2 == 0 and len(was_voter) != voters:
        log.warning(
            "%d voters tolerate no more failures than %d would: join one more node soon",
            voters,
            voters - 1,
        )


def membership_loaded(membership: Membership, initial_cluster: tuple[InitialMember, ...]) -> None:
    """Say where the file differs from the persisted membership, which wins."""
    addresses = {m.id.id: m.address for m in membership.members}
    for entry in initial_cluster if addresses else ():
        known = addresses.get(entry.id)
        if known is None:
            log.info("initial_cluster names node %d, which is not a member", entry.id)
        elif known != entry.address:
            log.info(
                "initial_cluster has node %d at %s; the cluster has it at %s",
                entry.id,
                entry.address,
                known,
            )


def _ids(members: tuple[MemberId, ...]) -> str:
    return ",".join(str(m.id) for m in members)
