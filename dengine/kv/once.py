"""Exactly once: the results of commands that come under a key, and what is done with repetitions.

Two kinds of keys. A client that numbers its requests ("CLIENT:N") costs one record, and the newest
of its results; older numbers are refused, for nobody knows any more what they came to. Any other
key is remembered by itself. Neither is ever forgotten before its time to make room: a repetition
would be carried out again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from dengine.kv import tables
from dengine.kv.commands import (
    Deferred,
    Full,
    Invalid,
    Mismatch,
    Once,
    Result,
    Stale,
    decode_result,
    encode_result,
)
from dengine.kv.recorder import Recorder
from dengine.kv.store import Totals
from dengine.kv.tables import FINGERPRINT_BYTES, Client, Due

RESULTS_MAX: Final = 1000  # of one client
CLIENTS_MAX: Final = 10_000
OPAQUE_MAX: Final = 100_000
RESULT_BYTES_MAX: Final = 64 * 1024
REMEMBERED_BYTES_MAX: Final = 256 * 1024 * 1024
KEY_CHARACTERS_MAX: Final = 128
_NUMBER_MAX: Final = 2**63 - 1
_TIME_BYTES: Final = 8


class Remembered(NamedTuple):
    """What came back for a repetition, not for a command that was carried out now."""

    result: Result


def carry_out(recorder: Recorder, once: Once, run: Callable[[], Result]) -> Result | Remembered:
    """The first result of the command in `once`, which `run` carries out if it has none yet.

    What was refused because it could not be remembered was not carried out either.
    """
    totals = recorder.totals
    if totals is None:
        return Invalid("this state cannot remember results")
    wrong = _flaw(once)
    if wrong is not None:
        return Invalid(wrong)
    room = totals.remembered_bytes + RESULT_BYTES_MAX + len(once.key) <= REMEMBERED_BYTES_MAX
    if once.number is None:
        return _opaque(recorder, totals, once, run, room)
    return _numbered(recorder, totals, once, once.number, run, room)


def is_key(text: str) -> bool:
    """1 to 128 visible ASCII characters."""
    fits = 1 <= len(text) <= KEY_CHARACTERS_MAX
    return fits and text.isascii() and text.isprintable() and " " not in text


def _flaw(once: Once) -> str | None:
    key = once.key
    if not is_key(key):
        return f"an idempotency key has 1 to {KEY_CHARACTERS_MAX} visible ASCII characters"
    if once.number is not None and not 1 <= once.number <= _NUMBER_MAX:
        return f"the number of a request is 1 to {_NUMBER_MAX}"
    if len(once.fingerprint) != FINGERPRINT_BYTES:
        return f"a request's fingerprint has {FINGERPRINT_BYTES} bytes"
    return None


# --- clients that number their requests -----------------------------------------------------------


def _numbered(
    recorder: Recorder,
    totals: Totals,
    once: Once,
    number: int,
    run: Callable[[], Result],
    room: bool,
) -> Result | Remembered:
    view, name = recorder.view, once.key.encode()
    data = view.read("clients", name)
    client = Client(0, 0, 0) if data is None else tables.decode_client(data)
    known = view.read("results", tables.result_key(name, number)) if data is not None else None
    if known is not None:
        _store_client(recorder, name, client._replace(used_ms=recorder.clock_ms))
        return _compare(once, known)
    oldest = None
    if client.kept >= RESULTS_MAX:
        oldest = view.first("results", tables.result_key(name, 0))
    if number <= client.forgotten or _is_before(number, oldest):
        return Stale(client.forgotten)
    if data is None and totals.clients >= CLIENTS_MAX:
        return Full("clients")
    if not room:
        return Full("bytes")
    result = run()
    if isinstance(result, Deferred):
        return result
    if data is None:
        totals.clients += 1
        tables.set_due(view, _over_at(recorder), tables.CLIENT, name)
    stored = once.fingerprint + encode_result(result)
    view.write("results", tables.result_key(name, number), stored)
    totals.remembered_bytes += len(stored)
    kept, forgotten = client.kept + 1, client.forgotten
    if oldest is not None:
        gone = view.remove("results", oldest[0])
        totals.remembered_bytes -= len(gone or b"")
        kept, forgotten = kept - 1, tables.result_number(oldest[0])
    _store_client(recorder, name, Client(kept, forgotten, recorder.clock_ms))
    return result


def _is_before(number: int, oldest: tuple[bytes, bytes] | None) -> bool:
    """Would it be the first to be forgotten, at once? Then it is not carried out at all."""
    return oldest is not None and number < tables.result_number(oldest[0])


def _store_client(recorder: Recorder, name: bytes, client: Client) -> None:
    recorder.view.write("clients", name, tables.encode_client(client))


def expire_client(recorder: Recorder, due: Due) -> int:
    """A client's window is over, unless it was used since: the index learns of that only here.

    Returns:
        How many of its results went.
    """
    view, totals = recorder.view, recorder.totals
    data = view.read("clients", due.name)
    view.remove("due", due.at)
    if data is None or totals is None:
        return 0
    client = tables.decode_client(data)
    over_ms = client.used_ms + recorder.rules.idempotency_window_ms + 1
    if over_ms > recorder.clock_ms:
        tables.set_due(view, over_ms, tables.CLIENT, due.name)
        return 0
    prefix, gone = due.name + b"\0", 0
    while (found := view.first("results", prefix)) is not None and found[0].startswith(prefix):
        view.remove("results", found[0])
        totals.remembered_bytes -= len(found[1])
        gone += 1
    view.remove("clients", due.name)
    totals.clients -= 1
    return gone


# --- any other key --------------------------------------------------------------------------------


def _opaque(
    recorder: Recorder, totals: Totals, once: Once, run: Callable[[], Result], room: bool
) -> Result | Remembered:
    view, name = recorder.view, once.key.encode()
    known = view.read("opaque", name)
    if known is not None:
        return _compare(once, known[_TIME_BYTES:])
    if totals.opaque >= OPAQUE_MAX:
        return Full("keys")
    if not room:
        return Full("bytes")
    result = run()
    if isinstance(result, Deferred):
        return result
    over_ms = _over_at(recorder)
    stored = tables.number_key(over_ms) + once.fingerprint + encode_result(result)
    view.write("opaque", name, stored)
    tables.set_due(view, over_ms, tables.OPAQUE, name)
    totals.opaque += 1
    totals.remembered_bytes += len(stored)
    return result


def expire_opaque(recorder: Recorder, due: Due) -> None:
    """A key's window is over."""
    recorder.view.remove("due", due.at)
    gone = recorder.view.remove("opaque", due.name)
    if gone is not None and recorder.totals is not None:
        recorder.totals.opaque -= 1
        recorder.totals.remembered_bytes -= len(gone)


def _over_at(recorder: Recorder) -> int:
    return recorder.clock_ms + recorder.rules.idempotency_window_ms + 1


def _compare(once: Once, known: bytes) -> Mismatch | Remembered:
    if known[:FINGERPRINT_BYTES] != once.fingerprint:
        return Mismatch()
    return Remembered(decode_result(known[FINGERPRINT_BYTES:]))
