"""What the command line does in an event loop: following changes, and running a command while
something is held.

While COMMAND runs, this process adopts everything that COMMAND starts and leaves behind (Linux's
child subreaper), so that nothing of it outlives the lock when that is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from dengine.cli.commands import print_json_line, printable, shortened
from dengine.cli.remote import Remote
from dengine.client import Change, Client, Lock
from dengine.client.encoding import json_bytes
from dengine.client.leases import margin_s
from dengine.client.locks import TAKEN, UNTOLD

FAILED = 1
NOT_EXECUTABLE, NO_COMMAND = 126, 127  # as a shell says it
BY_SIGNAL = 128
TERMINATE_MAX_S = 0.5  # for what is ended to clean up
GONE_S = 5.0  # for what was killed to be gone
WAITING_S = 3.0  # before it is said what is waited for
REAP_S = 1.0  # how often what COMMAND has left behind is looked after
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

_libc = ctypes.CDLL(None, use_errno=True)


def _client(remote: Remote) -> Client:
    return Client(remote.endpoints, token=remote.token, timeout_s=remote.timeout_s)


# --- following ------------------------------------------------------------------------------------


def watch(args: Namespace, remote: Remote) -> int:
    """Print changes until interrupted."""

    async def follow() -> None:
        key = None if args.key is None else os.fsencode(args.key)
        prefix = None if args.prefix is None else os.fsencode(args.prefix)
        async with (
            _client(remote) as client,
            client.watch(
                key, prefix=prefix, from_revision=args.from_revision, prev=args.prev
            ) as watching,
        ):
            async for change in watching:
                _show(change, as_json=args.json)

    asyncio.run(follow())
    return 0


def _show(change: Change, *, as_json: bool) -> None:
    if as_json:
        events = []
        for event in change.events:
            shown: dict[str, Any] = {"type": event.type, **json_bytes("key", event.key)}
            if event.value is not None:
                shown |= {**json_bytes("value", event.value), "created": event.created}
            if event.prev is not None:
                shown |= json_bytes("prev", event.prev)
            events.append(shown)
        print_json_line({"revision": change.revision, "events": events})
        return
    for event in change.events:
        line = f"{change.revision}  {event.type:6}  {printable(event.key)}"
        if event.value is not None:
            line += f"  {shortened(printable(event.value))}"
        if event.prev is not None:
            line += f"  (was {shortened(printable(event.prev))})"
        print(line, flush=True)


def observe(args: Namespace, remote: Remote) -> int:
    """Print who leads until interrupted."""

    async def follow() -> None:
        async with _client(remote) as client:
            async for leader in client.election(os.fsencode(args.name)).observe():
                if args.json:
                    known = leader and {**json_bytes("value", leader.value), "token": leader.token}
                    print_json_line({"leader": known})
                elif leader is None:
                    print("nobody leads", flush=True)
                else:
                    print(f"{printable(leader.value)} leads (token {leader.token})", flush=True)

    asyncio.run(follow())
    return 0


# --- holding --------------------------------------------------------------------------------------


def run_holding(
    remote: Remote, what: str, command: list[str], ttl_s: int, take: Callable[[Client], Lock]
) -> int:
    """Run `command` while what `take` makes is held, or without one hold it until interrupted.

    Args:
        what: names it in messages, such as "lock 'nightly'".
        ttl_s: of the lease of what is held.

    Returns: the exit code.
    """
    if command and shutil.which(command[0]) is None:
        is_path = os.sep in command[0]
        there = os.path.exists(command[0]) if is_path else shutil.which(command[0], os.F_OK)
        problem = "is not executable" if there else "there is no such command"
        print(f"dengine: {command[0]}: {problem}", file=sys.stderr)
        return NOT_EXECUTABLE if there else NO_COMMAND
    return asyncio.run(_Holding(remote, what, command, ttl_s).run(take))


class _Holding:
    """One run of a command, and the signals that concern it."""

    def __init__(self, remote: Remote, what: str, command: list[str], ttl_s: int) -> None:
        self._remote = remote
        self._what = what
        self._command = command
        self._ttl_s = ttl_s
        self._process: asyncio.subprocess.Process | None = None
        self._ended_by: signal.Signals | None = None
        self._over = False  # the command has ended: what is left to do is quick

    async def run(self, take: Callable[[Client], Lock]) -> int:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def pass_on(number: signal.Signals) -> None:
            if self._over:
                return
            if self._process is None:  # nothing runs yet: leave the queue
                self._ended_by = number
                task.cancel()
            elif number != signal.SIGINT or not in_foreground():  # a terminal told it already
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(number)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # What is ignored, by nohup say, stays so: here, and in the command, which inherits it.
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, pass_on, number)
        try:
            async with _client(self._remote) as client:
                return await self._hold(take(client))
        except asyncio.CancelledError:
            if self._ended_by is None:
                raise
            return BY_SIGNAL + self._ended_by

    async def _hold(self, lock: Lock) -> int:
        telling = asyncio.create_task(self._tell_why_it_waits(lock))
        try:
            await lock.__aenter__()
        finally:
            telling.cancel()
        try:
            if not self._command:
                print(f"{self._what}: held, token {lock.token}", flush=True)
                await lock.lost.wait()
                self._shout(lock, "")
                return FAILED
            return await self._run_command(lock)
        finally:
            if not lock.lost.is_set():
                await lock.release()

    async def _tell_why_it_waits(self, lock: Lock) -> None:
        """On stderr, when it has lasted a while, and again when it is for another sort of reason.
        Never where that would have to wait: our turn may come meanwhile.
        """
        said = ""
        pause_s = WAITING_S
        while True:
            await asyncio.sleep(pause_s)
            pause_s = 1.0
            sort = lock.why if lock.why in (UNTOLD, TAKEN) else "it fails"
            if lock.why and sort != said and is_taken_at_once(sys.stderr):
                print(f"dengine: waiting for {self._what}: {lock.why}", file=sys.stderr, flush=True)
                said = sort

    async def _run_command(self, lock: Lock) -> int:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *self._command,
                env={**os.environ, "DENGINE_LOCK_TOKEN": str(lock.token)},
                preexec_fn=partial(end_with_parent, os.getpid()),
            )
        except OSError as error:  # a format or an interpreter that is not there, arguments too long
            print(f"dengine: {self._command[0]}: {error.strerror}", file=sys.stderr)
            return NOT_EXECUTABLE
        ended = asyncio.create_task(process.wait())
        lost = asyncio.create_task(lock.lost.wait())
        reaper = asyncio.create_task(reap_orphans(process.pid))
        await asyncio.wait({ended, lost}, return_when=asyncio.FIRST_COMPLETED)
        for task in (lost, reaper):
            task.cancel()
        self._over = ended.done()
        if self._over and not lock.lost.is_set():
            code = ended.result()
            return code if code >= 0 else BY_SIGNAL - code
        survivors = await end_descendants(terminate_s(self._ttl_s))
        await asyncio.wait({ended}, timeout=GONE_S)
        # Only now: where nobody takes what we say, saying it stops this process.
        if survivors:
            those = ", ".join(map(str, survivors))
            self._shout(lock, f"; process {those} could not be ended and goes on without it")
        else:
            self._shout(lock, "; the command and everything that it started were ended")
        return FAILED

    def _shout(self, lock: Lock, consequence: str) -> None:
        print(
            f"dengine: {self._what} is LOST: {lock.why}; another may hold it now{consequence}",
            file=sys.stderr,
            flush=True,
        )


def is_taken_at_once(stream: TextIO | None) -> bool:
    """Can a line be written to it without waiting for its reader? None: it was closed."""
    return stream is not None and bool(select.select([], [stream], [], 0)[1])


def end_with_parent(parent: int) -> None:
    """In the child of `parent`, before it becomes COMMAND: when `parent` is killed, nobody holds
    the lock for it any more, so it ends, too. Also where that happened before this call.
    """
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


async def reap_orphans(command: int) -> None:
    """Take leave of children that have ended, again and again: those that this process has adopted
    have nobody else who does. The status of the child `command` is left to whoever waits for it.
    """
    while True:
        _reap(command)
        await asyncio.sleep(REAP_S)


def _reap(command: int) -> None:
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    with contextlib.suppress(ChildProcessError):  # there are no children
        while (child := os.waitid(os.P_ALL, 0, ended)) and child.si_pid != command:
            os.waitpid(child.si_pid, 0)


def in_foreground() -> bool:
    """Is this process one of those that its terminal, wherever it reads from, sends Ctrl-C to?"""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:  # it has none
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def terminate_s(ttl_s: float) -> float:
    """From SIGTERM to SIGKILL: what ignores the first has to be gone before another may hold the
    lock, which is `margin_s` after we hear that it is lost.
    """
    return min(TERMINATE_MAX_S, margin_s(ttl_s) / 2)


async def end_descendants(terminate_s: float) -> list[int]:
    """SIGTERM to everything below this process, then SIGKILL until nothing is left.

    Returns: the processes that are still there, which the kernel holds up or which are not ours.
    """
    _signal_all(signal.SIGTERM)
    loop = asyncio.get_running_loop()
    until = loop.time() + terminate_s
    while any(_descendants()):
        if loop.time() >= until:
            break
        await asyncio.sleep(0.02)
    until = loop.time() + GONE_S
    while any(_descendants()) and loop.time() < until:
        _signal_all(signal.SIGKILL)
        await asyncio.sleep(0.02)
    return list(_descendants())


def _signal_all(number: signal.Signals) -> None:
    for pid in _descendants():
        try:
            os.kill(pid, number)
        except OSError:  # gone meanwhile, or not ours to end
            continue


def _descendants() -> Iterator[int]:
    """The processes below this one that have not ended."""
    children: dict[int, list[int]] = {}
    for directory in Path("/proc").iterdir():
        if not directory.name.isdecimal():
            continue
        try:
            text = (directory / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        state, parent = text.rpartition(")")[2].split()[:2]
        if state not in "ZX":
            children.setdefault(int(parent), []).append(int(directory.name))
    found = list(children.get(os.getpid(), ()))
    while found:
        pid = found.pop()
        found += children.get(pid, ())
        yield pid
