"""What an argument of the command line may be; argparse makes a usage error of everything else."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def client(timeout_s: float, what: str) -> argparse.ArgumentParser:
    """What every command that asks a node takes; a parent for its parser.

    Args:
        timeout_s: the default of `--timeout`.
        what: the seconds that `--timeout` means.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--endpoint", action="append", default=[], metavar="HOST:PORT", help="a node; repeats"
    )
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="holds the token that the cluster asks for"
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=timeout_s,
        metavar="S",
        help=f"seconds {what} (default {timeout_s:g})",
    )
    return parser


def add_idempotency_key(command: argparse.ArgumentParser) -> None:
    """For every command that writes."""
    command.add_argument(
        "--idempotency-key",
        type=idempotency_key,
        metavar="KEY",
        help="the same command with the same key happens once (default: a new key)",
    )


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isascii() or not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def revision(text: str) -> str:
    """A revision, or "*"."""
    return text if text == "*" else str(positive(text))


def ttl(text: str) -> int:
    """Whole seconds, up to ten years."""
    if (number := positive(text)) > 315_360_000:
        raise argparse.ArgumentTypeError("at most 315360000 seconds, which are ten years")
    return number


def idempotency_key(text: str) -> str:
    """1 to 128 visible ASCII characters."""
    if not 0 < len(text) <= 128 or not all("!" <= c <= "~" for c in text):
        raise argparse.ArgumentTypeError("a key has 1 to 128 visible ASCII characters")
    return text


def lock_name(text: str) -> str:
    """1 to 400 bytes."""
    if not 0 < len(os.fsencode(text)) <= 400:
        raise argparse.ArgumentTypeError("a name has 1 to 400 bytes")
    return text


def bench_keys(text: str) -> int:
    """At most 10 000: all of them are deleted again."""
    if (number := positive(text)) > 10_000:
        raise argparse.ArgumentTypeError("at most 10000 keys")
    return number


def seconds(text: str) -> float:
    """From a tenth of a second to a day."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 86400")
    return seconds


def node_id(text: str) -> int:
    """1 to 2^32 - 1."""
    if (number := positive(text)) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is above 2^32 - 1")
    return number


def change(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value
