"""One process per core, each with one seed at a time: the parent always knows who does what.

So a seed that ends its process (out of memory, a fault in a C extension) is known and told like any
other failure, and to stop means to kill: nothing waits for a seed that may never end.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar

T = TypeVar("T")

PARENT_S = 2.0  # so often an idle worker looks whether its parent is still there

_fork = multiprocessing.get_context("fork")  # what is imported is there at once


def _work(pipe: Connection, job: Callable[[int], object]) -> None:
    """In the worker: a seed in, what came of it out, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told to stop, and stops us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()
    gc.freeze()  # what is there already is not looked through after each seed
    while os.getppid() == parent:
        if pipe.poll(PARENT_S):
            try:
                pipe.send(job(pipe.recv()))
            except EOFError:
                return


class _Worker(Generic[T]):
    def __init__(self, job: Callable[[int], T]) -> None:
        self.pipe, theirs = _fork.Pipe()
        self.process = _fork.Process(target=_work, args=(theirs, job), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is ours to see
        self.seed = -1

    def begin(self, seed: int) -> None:
        self.seed = seed
        self.pipe.send(seed)

    def kill(self) -> int:
        """Returns the exit code, which is minus the signal that ended it."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return self.process.exitcode or 0


def each(
    seeds: Iterator[int],
    job: Callable[[int], T],
    died: Callable[[int, int], T],
    count: int | None = None,
) -> Iterator[T]:
    """What `job` says of each of `seeds`, as they end. They are begun in their order, `count` at a
    time (one per core), and killed when nobody asks any more.

    Args:
        died: what to say of a seed whose process ended with that exit code.
    """
    count = count or os.cpu_count() or 1
    idle: list[_Worker[T]] = []
    busy: dict[Connection, _Worker[T]] = {}
    try:
        while True:
            while len(busy) < count and (seed := next(seeds, None)) is not None:
                worker = idle.pop() if idle else _Worker(job)
                busy[worker.pipe] = worker
                worker.begin(seed)
            if not busy:
                return
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                worker = busy.pop(pipe)
                try:
                    result = pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()  # its own exit code, not that of our kill
                    result = died(worker.seed, worker.kill())
                else:
                    idle.append(worker)
                yield result
    finally:
        for worker in (*idle, *busy.values()):
            worker.kill()
