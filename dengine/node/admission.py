"""Who may talk to whom: what this node says of itself, and what it makes of a stranger's Hello."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from dengine.config import MAX_ZONE, Config, parse_address
from dengine.errors import IdentityError
from dengine.kv.commands import COMMAND_VERSION
from dengine.node.addresses import AddressBook
from dengine.node.founding import Founding
from dengine.node.wire import PROTOCOL_VERSION, Hello, Refused
from dengine.raft.membership import Member
from dengine.raft.raft import Raft
from dengine.raft.types import MemberId
from dengine.storage.directory import DataDirectory

STRANGERS_MAX = 1000  # senders of this cluster that are remembered beside its members


class Admission:
    """The handshake's judgement. Refuses foreign clusters and tombstones; an unknown sender of
    this cluster is listened to, for the one that lags may be this node.

    Args:
        connected: the Hello of the stream that is open to a node id, if any.
        found: called when an unfounded node learned something new.
        fail: ends the process.
    """

    def __init__(
        self,
        config: Config,
        directory: DataDirectory,
        raft: Raft,
        book: AddressBook,
        founding: Founding,
        *,
        connected: Callable[[int], Hello | None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._config = config
        self._directory = directory
        self._raft = raft
        self._book = book
        self._founding = founding
        self._connected = connected
        self._fail = fail
        self.announcing = directory.identity.address not in ("", book.own)
        self._announced: dict[MemberId, Hello] = {}
        self._boots: dict[MemberId, int] = {}

    @property
    def cluster_id(self) -> str:
        return self._directory.identity.cluster_id

    def hello(self, expects: int | None, dialled: str) -> Hello:
        """What this node says of itself in one handshake."""
        raft = self._raft
        return Hello(
            protocol_version=PROTOCOL_VERSION,
            command_version=COMMAND_VERSION,
            cluster_id=self.cluster_id,
            member=raft.me,
            boot=self._directory.boot,
            address=self._book.own if self.announcing else "",
            timeout_ms_min=self._config.election.timeout_ms_min,
            last_index=raft.log.stable_index,
            expects=expects,
            dialled=dialled,
            list_digest="" if self.cluster_id else self._founding.list_digest,
            founders=tuple(m.id for m in raft.membership.members),
            zone=self._config.cluster.zone,
            term=raft.term,
            is_sole_voter=raft.membership.is_sole_voter(raft.me),
            membership_version=raft.membership.version,
        )

    def admit(self, theirs: Hello, host: str) -> Refused | None:
        """Refuse `theirs`, or None."""
        refused = self._judge(theirs, host)
        if refused is None:
            self._remember(theirs)
        return refused

    def _judge(self, theirs: Hello, host: str) -> Refused | None:
        if theirs.protocol_version != PROTOCOL_VERSION:
            return Refused(
                "protocol",
                f"node {self._raft.me.id} speaks peer protocol {PROTOCOL_VERSION}, not "
                f"{theirs.protocol_version}: run the same release on both",
            )
        if not (_may_be_address(theirs.address) and _may_be_address(theirs.dialled)):
            return Refused("protocol", "an address in this Hello is none: host, colon, port")
        if len(theirs.zone) > MAX_ZONE:
            return Refused("protocol", f"a zone has at most {MAX_ZONE} characters")
        if theirs.boot == self._directory.boot:
            return Refused("this_node_itself", "that address leads back to this node")
        if not self.cluster_id:
            return self._admit_unfounded(theirs)
        if theirs.cluster_id != self.cluster_id:
            return self._refuse_stranger(theirs)
        return self._admit_member(theirs, host)

    def _admit_unfounded(self, theirs: Hello) -> Refused | None:
        if theirs.cluster_id and theirs.cluster_id == self._raft.membership.cluster_id:
            # Our own: the founding entry is durable and somebody was let in, all before the
            # identity on disk names the cluster. To anyone else this directory would be empty.
            return Refused("again", f"node {self._raft.me.id} has only just founded this cluster")
        try:
            useless = self._founding.offer(theirs)
        except IdentityError as error:
            self._fail(error)
            return Refused("foreign_cluster", error.message)
        return None if useless is None else Refused("different_lists", useless)

    def _refuse_stranger(self, theirs: Hello) -> Refused | None:
        raft = self._raft
        if theirs.cluster_id:
            return Refused(
                "foreign_cluster",
                f"node {raft.me.id} belongs to cluster {self.cluster_id}, not {theirs.cluster_id}",
            )
        if raft.membership.get(theirs.member) is not None:
            return self._refuse_old_copy(theirs)  # else a founder that has not heard everybody yet
        known = bool(raft.membership.find(theirs.member.id))
        if known and theirs.list_digest:
            return Refused(
                "wiped",
                f"node {theirs.member.id} is a member of cluster {self.cluster_id} already, but "
                "this directory is empty: set role = 3 to join",
            )
        if theirs.list_digest and raft.membership.members:
            # It would found, and waits for us to do so with it. Only who knows all the members can
            # say for certain that it is none: we may be a founder that has just come late itself.
            return Refused(
                "wiped",
                f"node {raft.me.id} belongs to cluster {self.cluster_id} already, and the directory"
                f" of node {theirs.member.id} is empty, so it must not found another one: set role"
                " = 3 to join",
            )
        return Refused(
            "foreign_cluster",
            f"node {raft.me.id} belongs to cluster {self.cluster_id}: set role = 3 to join it",
        )

    def _admit_member(self, theirs: Hello, host: str) -> Refused | None:
        raft = self._raft
        committed = raft.committed_membership
        who = theirs.member
        if who in committed.tombstones or committed.was_removed(who.id):
            return Refused(
                "removed",
                f"node {who.id} was removed from cluster {self.cluster_id}",
                membership_version=committed.version,
            )
        if who == raft.me:
            return Refused("duplicate", f"node {who.id} runs here already, from the same directory")
        present = self._connected(who.id)
        if present is not None and present.member == who and present.boot != theirs.boot:
            return Refused(
                "duplicate", f"node {who.id} is running already, from a copy of this directory"
            )
        refused = self._refuse_old_copy(theirs)
        if refused is not None:
            return refused
        self._book.saw(who.id, host)
        self._book.reached_at(theirs.dialled)
        return None

    def _refuse_old_copy(self, theirs: Hello) -> Refused | None:
        raft, who = self._raft, theirs.member
        if self._boots.get(who) == theirs.boot:
            return None  # it may be older than an acknowledgement on the stream it replaces
        # In a higher term than ours another leader may have replaced what was never committed.
        progress = raft.progress.get(who) if theirs.term <= raft.term else None
        if progress is not None and theirs.last_index < progress.match_index:
            return Refused(
                "rolled_back",
                f"node {who.id} acknowledged entry {progress.match_index} and now ends at "
                f"{theirs.last_index}: its directory is an old copy",
            )
        if theirs.is_sole_voter:
            return self._refuse_old_sole_voter(theirs)
        if theirs.cluster_id and not theirs.last_index and who in raft.membership.all_voters:
            return Refused(
                "empty",
                f"node {who.id} is a voter, and there is nothing in its log: its directory is an "
                "old copy",
            )
        return None

    def _refuse_old_sole_voter(self, theirs: Hello) -> Refused | None:
        """Whoever votes alone has all that is committed, and to vote with others it had to agree. A
        copy may have led by itself until its log was the longer one; that others vote by now it
        still does not know. Of who knows more of that the log is the right one, however short.
        """
        raft, who = self._raft, theirs.member
        committed, membership = raft.log.commit_index, raft.committed_membership
        if (theirs.membership_version, theirs.last_index) >= (membership.version, committed):
            return None
        if theirs.membership_version < membership.version:
            where = f"node {who.id} takes itself for the only voter, but others have come to vote"
        else:
            where = (
                f"node {who.id} takes itself for the only voter and ends at entry "
                f"{theirs.last_index}, but entry {committed} is committed"
            )
        where += ": its directory is an old copy"
        if membership.is_sole_voter(who):  # and nobody could do without it
            here = f"node {raft.me.id} has what it lacks: save a snapshot there first"
            return Refused("foreign_cluster", f"{where}; {here}")
        return Refused("sole_voter", where, committed, membership.version)

    def _remember(self, theirs: Hello) -> None:
        """Note an admitted Hello. Members are as many as the membership says; of strangers, which
        may be members that this node does not know of yet, a bounded number is remembered.
        """
        who = theirs.member
        if len(self._boots) >= STRANGERS_MAX and who not in self._boots:
            members = {m.id for m in self._raft.membership.members}
            for stranger in self._boots.keys() - members:
                del self._boots[stranger], self._announced[stranger]
        self._boots[who] = theirs.boot
        self._announced[who] = theirs

    def outdated(self, me: MemberId, members: tuple[Member, ...]) -> Iterator[Member]:
        """Each member as it should be, where what is committed differs from what it says of
        itself. The leader commits one such correction at a time.
        """
        for member in members:
            address, zone, version = member.address, member.zone, member.command_version
            hello = self._announced.get(member.id)
            if hello is not None and hello.address == member.address:
                # Done with: a later move by an operator must not be undone by it.
                hello = self._announced[member.id] = msgspec.structs.replace(hello, address="")
            if hello is not None:
                address, zone = hello.address or address, hello.zone or zone
                version = hello.command_version
            elif member.id == me:
                address = self._book.own if self.announcing else address
                zone = self._config.cluster.zone or zone
                version = COMMAND_VERSION
            address = (
                self._book.correction(member.id.id, address, is_self=member.id == me) or address
            )
            announced = Member(member.id, address, zone, member.status, version)
            if announced != member:
                yield announced


def _may_be_address(text: str) -> bool:
    try:
        return text == "" or bool(parse_address(text))
    except ValueError:
        return False
