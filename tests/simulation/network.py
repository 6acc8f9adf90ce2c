"""The network between machines, and the streams of one process as `dengine.node.peers` has them.

What travels is the encoded bytes. Raft's messages are treated worse than TCP would: they may be
lost, repeated and overtaken on a stream that lives on. Every other frame arrives once and in order,
or the stream breaks. The handshake is the real one: `Admission.hello` and `admit` on both ends.

Every directed link has habits of its own, drawn from those of the run.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dengine.node.peers import PeerStatus
from dengine.node.wire import Frame, Hello, Pledge, RaftFrame, Refused, decode, encode
from dengine.raft.types import MemberId
from tests.simulation.loop import MS
from tests.simulation.violation import Violation

if TYPE_CHECKING:
    from tests.simulation.machine import Process
    from tests.simulation.world import World

REDIAL_MS = (20, 120)
SILENCE_MS = (300, 900)  # after which an end notices that nothing arrives any more
LATE_NS = 50 * MS  # a heartbeat at least: what is as late as that has an effect


@dataclass(slots=True)
class Habits:
    """How badly the links of a run behave, or one of them."""

    loss: float = 0.0
    repeat: float = 0.0
    tail: float = 0.0  # how often a delay is extreme
    tail_ms: int = 500
    slow_us: int = 400
    ordered: bool = True

    def of_link(self, rng: random.Random) -> Habits:
        """One way between two machines may be sound and the way back the worst of all."""
        return Habits(
            min(0.5, self.loss * rng.choice((0, 1, 1, 2))),
            self.repeat * rng.choice((0, 1, 2)),
            self.tail * rng.choice((0, 1, 3)),
            self.tail_ms,
            int(self.slow_us * rng.choice((0.25, 1, 1, 4))),
            self.ordered,
        )


class Network:
    """Delays, losses and cuts.

    Attributes:
        habits: of the run; see `link`.
        slow: further ns on a directed link.
        slow_by: the fault that has made it so.
    """

    def __init__(self, world: World, rng: random.Random, habits: Habits) -> None:
        self.world = world
        self.rng = rng
        self.habits = habits
        self.messages = 0
        self.slow: dict[tuple[int, int], int] = {}
        self.slow_by: dict[tuple[int, int], str] = {}
        self._cuts: dict[tuple[int, int], Counter[str]] = {}  # by which faults at once
        self._links: dict[tuple[int, int], Habits] = {}
        self._last: dict[tuple[int, int], int] = {}
        self._last_sure: dict[tuple[int, int], int] = {}

    def link(self, one: int, other: int) -> Habits:
        found = self._links.get((one, other))
        if found is None:
            rng = random.Random(f"{self.world.seed} link {one} {other}")
            found = self._links[(one, other)] = self.habits.of_link(rng)
        return found

    def _delay_ns(self, link: Habits) -> int:
        rng = self.rng
        if link.tail and rng.random() < link.tail:
            late_ns = int(rng.random() ** 2 * link.tail_ms * MS)
            if late_ns > LATE_NS:
                self.world.count_quietly("fault: tail")
            return late_ns
        return 50_000 + int(rng.expovariate(1.0) * link.slow_us * 1000)

    def up(self, one: int, other: int) -> bool:
        return not self._cuts or not self._cuts.get((one, other))

    def cut(self, pairs: Iterable[tuple[int, int]], by: str = "") -> None:
        """Nothing gets from the first of a pair to the second, until as often mended as cut."""
        for pair in pairs:
            self._cuts.setdefault(pair, Counter())[by] += 1

    def mend(self, pairs: Iterable[tuple[int, int]], by: str = "") -> None:
        for pair in pairs:
            left = self._cuts.get(pair, Counter()) - Counter((by,))
            if left:
                self._cuts[pair] = left
            else:
                self._cuts.pop(pair, None)

    def heal(self) -> None:
        self._cuts.clear()
        self.slow.clear()
        self._links.clear()
        self.habits = Habits()

    def raft_frame(self, sender: MemberId, to: MemberId, data: bytes, count: int) -> None:
        """Any number of copies arrive, in any order."""
        one, other = sender.id, to.id
        link, rng, hit = self.link(one, other), self.rng, self.world.count_quietly
        if not self.up(one, other):
            for by in self._cuts[(one, other)]:
                hit(f"cut off by {by}")
            return
        if link.loss and rng.random() < link.loss:
            hit("fault: loss")
            return
        when = self._when(one, other, link)
        self.world.scheduler.at(when, self._arrive, sender, to, data, count)
        if link.repeat and rng.random() < link.repeat:
            hit("fault: repeat")
            again = when + self._delay_ns(link) * rng.choice((1, 20))
            self.world.scheduler.at(again, self._arrive, sender, to, data, count)

    def _when(self, one: int, other: int, link: Habits) -> int:
        pair = (one, other)
        when = self.world.scheduler.now + self._delay_ns(link)
        slow_ns, last = self.slow.get(pair), self._last.get(pair, 0)
        if slow_ns:
            self.world.count_quietly(f"slowed down by {self.slow_by.get(pair, '')}")
            when += slow_ns
        if when < last and link.ordered:
            when = last
        elif when < last:
            self.world.count_quietly("fault: reorder")
        self._last[pair] = max(when, last)
        return when

    def _arrive(self, sender: MemberId, to: MemberId, data: bytes, count: int) -> None:
        process = self.world.machines[to.id].process
        if process is None or not process.serves or not self.up(sender.id, to.id):
            return
        self.messages += count
        self.world.saw(sender.id, to.id, data)
        process.arrived(process.peers.take_frame, sender, data)

    def sure(self, one: int, other: int, fn: Callable[..., Any], *args: Any) -> None:
        """Call `fn` after the way from `one` to `other`, in the order of the calls."""
        last = self._last_sure.get((one, other), 0)
        slow_ns = self.slow.get((one, other), 0)
        delay_ns = self._delay_ns(self.link(one, other)) + slow_ns
        when = max(self.world.scheduler.now + delay_ns, last)
        self._last_sure[(one, other)] = when
        self.world.scheduler.at(when, fn, *args)


class Stream:
    """A connection between two processes; each end learns by itself that it is over."""

    __slots__ = ("alive", "ends", "hello")

    def __init__(self, dialler: Process, acceptor: Process, hellos: tuple[Hello, Hello]) -> None:
        self.ends = (dialler, acceptor)
        self.hello = hellos  # by end
        self.alive = [True, True]

    def other(self, process: Process) -> Process:
        return self.ends[1] if process is self.ends[0] else self.ends[0]

    def theirs(self, process: Process) -> Hello:
        return self.hello[1] if process is self.ends[0] else self.hello[0]

    def is_alive(self, process: Process) -> bool:
        return self.alive[process is self.ends[1]]

    def end(self, process: Process) -> None:
        self.alive[process is self.ends[1]] = False


class Peers:
    """Takes the place of dengine.node.peers.Peers."""

    def __init__(
        self,
        *,
        hello: Callable[[int | None, str], Hello],
        admit: Callable[[Hello, str], Refused | None],
        on_refused: Callable[[int | None, Refused], None],
        on_connected: Callable[[Hello], None],
        on_frame: Callable[[MemberId, Frame], None],
        on_disconnected: Callable[[MemberId], None],
        secret: object = None,
    ) -> None:
        loop: Any = asyncio.get_running_loop()
        self.process: Process = loop.process
        self.process.peers = self
        self._world = self.process.machine.world
        self.hello, self.admit = hello, admit
        self.on_refused, self.on_connected = on_refused, on_connected
        self._on_frame, self._on_disconnected = on_frame, on_disconnected
        self.failed = loop.create_future()
        self._streams: dict[MemberId, Stream] = {}
        self._accepted: dict[Stream, None] = {}  # open, and this process has not looked yet
        self._targets: dict[int, tuple[str, ...]] = {}
        self._dialling: set[int] = set()

    # --- what the node calls ----------------------------------------------------------------------

    def set_targets(self, targets: Mapping[int, Sequence[str]]) -> None:
        self._targets = {node_id: tuple(addresses) for node_id, addresses in targets.items()}
        for node_id in self._targets:
            if node_id not in self._dialling:
                self._dialling.add(node_id)
                self._world.scheduler.after(1, self._dial, node_id)

    def send(self, to: MemberId, frame: Frame) -> bool:
        stream = self._streams.get(to)
        if stream is None:
            return False
        network, me = self._world.network, self.process.member
        self.process.machine.disk.effect()
        data = encode(frame)
        if type(frame) is Pledge:
            self._world.durability.pledges(self.process.machine, frame)
        if type(frame) is RaftFrame:
            check = self._world.checker.sent
            for message in frame.messages:
                check(self.process, message)
            network.raft_frame(me, to, data, len(frame.messages))
        elif network.up(me.id, to.id):
            other = stream.other(self.process)
            network.sure(me.id, to.id, self._deliver, stream, other, data)
        else:
            self._notice(stream)
        return True

    def disconnect(self, node_id: int, refused: Refused) -> None:
        for member, stream in list(self._streams.items()):
            if member.id == node_id:
                self._tell(stream.other(self.process), refused)
                self.drop(stream)
                self._world.network.sure(
                    self.process.member.id, node_id, self._over, stream, stream.other(self.process)
                )

    def connected(self, node_id: int) -> Hello | None:
        for member in reversed(self._streams):
            if member.id == node_id:
                return self._streams[member].theirs(self.process)
        return None

    def status(self) -> dict[int, PeerStatus]:
        report = {
            node_id: PeerStatus(node_id, ", ".join(addresses), False, None, "is not there")
            for node_id, addresses in self._targets.items()
        }
        for member in self._streams:
            report[member.id] = PeerStatus(member.id, "", True, member, None)
        return report

    async def close(self) -> None:
        self._targets = {}

    # --- streams ----------------------------------------------------------------------------------

    def take_frame(self, sender: MemberId, data: bytes) -> None:
        """One frame has come; Raft's messages are held back by no stream."""
        self._call(self._on_frame, sender, decode(data))

    def _call(self, fn: Callable[..., None], *args: Any) -> None:
        """As the tasks of the real ones do: an error ends the node."""
        try:
            fn(*args)
        except Violation:
            raise
        except Exception as error:
            if not self.failed.done():
                self.failed.set_exception(error)

    @staticmethod
    def _deliver(stream: Stream, receiver: Process, data: bytes) -> None:
        """Any other frame: in order, and only while its stream lasts."""

        def take() -> None:
            if stream.is_alive(receiver):
                sender = stream.theirs(receiver).member
                receiver.machine.world.saw(sender.id, receiver.machine.id, data)
                receiver.peers.take_frame(sender, data)

        receiver.arrived(take)

    def _dial(self, node_id: int) -> None:
        """One attempt, and the next one in a while."""
        world, process = self._world, self.process
        if process.loop.dead or node_id not in self._targets:
            self._dialling.discard(node_id)
            return
        world.scheduler.after(world.rng.randint(*REDIAL_MS) * MS, self._dial, node_id)
        for address in self._targets[node_id]:
            other = world.machine_at(address)
            me = process.machine.id
            if self.connected(node_id) is None and other is not None and other.id != me:
                if world.network.up(me, other.id) and process.serves:
                    process.run(self._greet, node_id, address)
                return

    def _hello(self, expects: int | None, address: str) -> Hello:
        hello = self.hello(expects, address)
        machine = self.process.machine
        self._world.durability.says(machine, hello.member.incarnation, hello.cluster_id)
        return hello

    def _greet(self, expects: int, address: str) -> None:
        hello = encode(self._hello(expects, address))
        other = self._world.machine_at(address)
        assert other is not None
        network = self._world.network
        network.sure(self.process.machine.id, other.id, self._knock, other.id, expects, hello)

    def _knock(self, machine_id: int, expects: int, hello: bytes) -> None:
        acceptor = self._world.machines[machine_id].process
        if acceptor is not None and acceptor.serves:
            acceptor.arrived(acceptor.peers._answer, self, expects, hello)

    def _answer(self, dialler: Peers, expects: int, data: bytes) -> None:
        """On the acceptor's side."""
        theirs = decode(data)
        assert isinstance(theirs, Hello)
        me, them = self.process.machine.id, dialler.process.machine
        refused = self.admit(theirs, them.host)
        if not self._world.network.up(me, them.id):
            return
        if refused is not None:
            self._tell(dialler.process, refused, expects)
            return
        ours = encode(self._hello(None, ""))
        self._world.network.sure(
            me, them.id, dialler.process.arrived, dialler._settle, self, theirs, ours
        )

    def _settle(self, acceptor: Peers, ours: Hello, data: bytes) -> None:
        """On the dialler's side: both ends use the stream from now on."""
        theirs = decode(data)
        assert isinstance(theirs, Hello)
        other = acceptor.process
        if other.loop.dead or not self._world.network.up(self.process.machine.id, other.machine.id):
            return
        refused = self.admit(theirs, other.machine.host)
        if refused is not None:
            self._tell(other, refused, ours.member.id)
            return
        stream = Stream(self.process, other, (ours, theirs))
        acceptor._accepted[stream] = None
        self._use(stream)
        other.arrived(acceptor._use, stream)

    def _use(self, stream: Stream) -> None:
        """A newer stream takes the place of an older one."""
        self._accepted.pop(stream, None)
        theirs = stream.theirs(self.process)
        if not stream.is_alive(self.process):
            return
        old = self._streams.get(theirs.member)
        if old is not None:
            self.drop(old)
            self._over(old, old.other(self.process))
        self._streams[theirs.member] = stream
        self._world.note("connected", self.process.machine.id, "to", theirs.member.id)
        self._call(self.on_connected, theirs)

    def _tell(self, other: Process, refused: Refused, expected: int | None = None) -> None:
        """The other side learns why it is not wanted."""
        data, me = encode(refused), self.process.machine.id

        def learn() -> None:
            frame = decode(data)
            assert isinstance(frame, Refused)
            self._world.note("node", me, "refuses", other.machine.id, frame.reason)
            other.peers._call(other.peers.on_refused, me, frame)

        if self._world.network.up(me, other.machine.id):
            self._world.network.sure(me, other.machine.id, other.arrived, learn)

    def drop(self, stream: Stream) -> None:
        """This end does not use the stream any more."""
        stream.end(self.process)
        member = stream.theirs(self.process).member
        if self._streams.get(member) is stream:
            del self._streams[member]
            self._call(self._on_disconnected, member)

    @staticmethod
    def _over(stream: Stream, end: Process) -> None:
        """`end` learns that its stream is over."""
        if not end.loop.dead and stream.is_alive(end):
            end.arrived(end.peers.drop, stream)

    def _notice(self, stream: Stream) -> None:
        """Nothing gets through: both ends will see that, each in its time."""
        for end in stream.ends:
            if not end.loop.dead and stream.is_alive(end):
                silent_ms = self._world.rng.randint(*SILENCE_MS)
                self._world.scheduler.after(silent_ms * MS, self._over, stream, end)

    def cut(self, node_id: int) -> None:
        """The link to `node_id` does not work in one direction or both."""
        for member, stream in list(self._streams.items()):
            if member.id == node_id:
                self._notice(stream)

    def reset(self, *, silent: bool) -> None:
        """This process is gone: its kernel says so to the other ends, or does not any more."""
        for stream in (*self._streams.values(), *self._accepted):
            other = stream.other(self.process)
            bounds = SILENCE_MS if silent else (0, 20)
            self._world.scheduler.after(
                self._world.rng.randint(*bounds) * MS, self._over, stream, other
            )
