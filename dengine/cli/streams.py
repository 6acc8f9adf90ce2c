"""The standard streams as a shell may leave them: closed, or on a disk that is full."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PUT_THERE = (os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)  # what is read from 0 or written to 1 fails


class InputClosed(Exception):
    """Standard input was to be read, and there is none."""


class OutputFailed(OSError):
    """Standard output did not take what was written to it."""

    def __str__(self) -> str:
        closed = self.errno == errno.EBADF
        return "standard output is closed" if closed else f"standard output: {self.strerror}"


class _Output(io.FileIO):
    """Standard output, whose errors say so: as an OSError, each could be about any other file."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:  # its reader left, as `head` does
            raise
        except OSError as error:
            raise OutputFailed(error.errno, error.strerror) from None


def prepare() -> None:
    """Before a file is opened: one would get the number of a stream that is closed, and what is
    printed would go into it.
    """
    for number, mode in enumerate(_PUT_THERE):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # gets the lowest number that is free: this one
    if sys.stdout is sys.__stdout__:  # nobody has put another one there
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(_Output(1, "w", closefd=False)))
    if sys.stderr is None:  # else `print` would take standard output for it
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(io.FileIO(2, "w", closefd=False)))


def read_input() -> bytes:
    """All of standard input.

    Raises:
        InputClosed: there is none.
        OSError: it cannot be read; it is named.
    """
    if sys.stdin is None:
        raise InputClosed("standard input is closed: nothing can be read from it")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard input") from None


def give_up(stream: TextIO) -> None:
    """What is still to be written is dropped: Python would try again at the end, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
