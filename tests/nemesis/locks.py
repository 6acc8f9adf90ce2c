"""Holders of a lock, each a process of its own that is stopped (SIGSTOP) for longer than its lease.

python -m tests.nemesis.locks NUMBER SEED ENDPOINT...   is one: it takes the lock of `client.lock`
again and again, and writes while it holds it, and goes on writing when it may have lost it, as
somebody does who does not know yet. Each line that it prints is a Note; it ends with SIGTERM.

Two keys are guarded, in the two ways that there are: one by the lock's own key, as `lock.guard`
has it, and one by a resource that remembers the highest token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dengine.client import Client, Compare, Lock, LockLost, Put
from dengine.errors import DengineError
from tests.linearizability.checker import FOREVER

ROOT = Path(__file__).resolve().parents[2]
NAME = "nemesis"  # of the lock
GUARDED, FENCED = "g/guarded", "g/fenced"
DIGITS = 20  # of a token, so that values compare as tokens do
HOLDERS = 3
TTL_S = 2
WAITS_S = 5.0  # for the lock, and for an answer
WRITES = (5, 30)  # while it holds the lock
THINK_S = 0.05
STOPS = 0.5  # how often a holder is stopped, and
STOPS_AFTER_S = (0.0, 1.0)  # when
STOPPED_S = (1.1 * TTL_S, 2.5 * TTL_S)
ENDS_S = 2.0  # a killed process

HELD, CERTAIN, WRITE = "held", "certain", "write"


@dataclass(frozen=True, slots=True)
class Note:
    """What a holder says. Times are time.monotonic(), the same for all processes.

    Attributes:
        what: HELD: it has got the lock, by then. CERTAIN: the lock was certainly its own then.
            WRITE: it writes under the lock's token; told before, and again with what became of it.
        token: of the lock.
        accepted: None: nobody knows.
    """

    holder: int
    what: str
    token: int
    called: float
    returned: float = FOREVER
    key: str = ""
    value: str = ""
    accepted: bool | None = None
    revision: int = 0


def token_of(value: str) -> int:
    """Under which a value of a guarded key was written."""
    return int(value.partition(" ")[0])


@dataclass
class Holds:
    """What all holders have said, and how often they were stopped."""

    notes: list[Note] = field(default_factory=list)
    stopped: int = 0
    _open: dict[str, int] = field(default_factory=dict)  # places of writes under way, by value

    @property
    def held(self) -> list[Note]:
        """Who has got the lock, and when that was said."""
        return [note for note in self.notes if note.what == HELD]

    def add(self, note: Note) -> None:
        """What became of a write takes the place of what was said before it."""
        place = self._open.pop(note.value, None) if note.what == WRITE else None
        if place is not None:
            self.notes[place] = note
            return
        if note.what == WRITE:
            self._open[note.value] = len(self.notes)
        self.notes.append(note)


class Holder:
    """One of the processes, as the run has it.

    Args:
        endpoints: of all nodes that there may be.
    """

    def __init__(
        self, number: int, rng: random.Random, endpoints: Sequence[str], holds: Holds
    ) -> None:
        self._number = number
        self._rng = rng
        self._endpoints = endpoints
        self._holds = holds
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    async def run(self) -> None:
        """Until it was asked to end, and has."""
        # The kernel ends it when this process dies, however it dies.
        command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "tests.nemesis.locks"]
        seed = str(self._rng.randrange(2**31))
        process = self._process = await asyncio.create_subprocess_exec(
            *[*command, str(self._number), seed, *self._endpoints],
            cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        if self._stopping:  # meanwhile
            self.ask_to_end()
        stops = set[asyncio.Task[None]]()
        try:
            assert process.stdout is not None
            while line := await process.stdout.readline():
                note = Note(**json.loads(line))
                self._holds.add(note)
                if note.what == HELD and self._rng.random() < STOPS:
                    stops.add(asyncio.create_task(self._stop(process)))
            code = await process.wait()
            if not self._stopping or code not in (0, -signal.SIGTERM):
                raise RuntimeError(f"holder {self._number} of the lock ended with {code}")
        finally:
            for stop in stops:
                stop.cancel()
            await asyncio.gather(*stops, return_exceptions=True)
            if process.returncode is None:
                process.kill()
                await asyncio.wait_for(process.wait(), ENDS_S)

    def ask_to_end(self) -> None:
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        """For longer than its lease lasts, which it has just got."""
        await asyncio.sleep(self._rng.uniform(*STOPS_AFTER_S))
        if self._stopping or process.returncode is not None:
            return
        process.send_signal(signal.SIGSTOP)
        self._holds.stopped += 1
        try:
            await asyncio.sleep(self._rng.uniform(*STOPPED_S))
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGCONT)


# --- the process ----------------------------------------------------------------------------------


class _Writer:
    """Takes the lock and writes, until `over` is set."""

    def __init__(self, number: int, rng: random.Random, client: Client) -> None:
        self.over = asyncio.Event()
        self._number = number
        self._rng = rng
        self._client = client
        self._made = 0

    async def run(self) -> None:
        while not self.over.is_set():
            # Lost, or not to be had: others hold it, or there is no majority to ask.
            with contextlib.suppress(DengineError):
                async with self._client.lock(NAME, ttl_s=TTL_S, timeout_s=WAITS_S) as lock:
                    self._say(Note(self._number, HELD, lock.token, time.monotonic()))
                    await self._work(lock)
            await self._pause()

    async def _work(self, lock: Lock) -> None:
        for _ in range(self._rng.randint(*WRITES)):
            if self.over.is_set():
                return
            now = time.monotonic()
            with contextlib.suppress(LockLost):
                lock.check()
                self._say(Note(self._number, CERTAIN, lock.token, now))
            token = lock.token
            if self._rng.random() < 0.5:
                await self._write(GUARDED, token, [lock.guard])
            else:
                await self._write(FENCED, token, [await self._not_above(token)])
            await self._pause()

    async def _not_above(self, token: int) -> Compare:
        """Nobody has written with a higher token."""
        if await self._client.get(FENCED, consistency="linearizable", timeout_s=WAITS_S) is None:
            return Compare(FENCED, "exists", "=", False)
        return Compare(FENCED, "value", "<", f"{token + 1:0{DIGITS}}".encode())

    async def _write(self, key: str, token: int, holds: Sequence[Compare]) -> None:
        self._made += 1
        value = f"{token:0{DIGITS}} {self._number}.{self._made}"
        note = Note(self._number, WRITE, token, time.monotonic(), key=key, value=value)
        self._say(note)
        accepted, revision = False, 0
        try:
            done = await self._client.txn(holds, [Put(key, value.encode())], timeout_s=WAITS_S)
        except DengineError as error:
            if error.outcome != "none":
                return
        else:
            if done.succeeded:
                accepted, revision = True, done.revision
        now = time.monotonic()
        self._say(replace(note, returned=now, accepted=accepted, revision=revision))

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.over.wait(), self._rng.expovariate(1 / THINK_S))

    @staticmethod
    def _say(note: Note) -> None:
        print(json.dumps(asdict(note)), flush=True)


async def main(number: int, seed: int, endpoints: Sequence[str]) -> None:
    async with Client(endpoints) as client:
        writer = _Writer(number, random.Random(seed), client)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, writer.over.set)
        await writer.run()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
