"""Two nodes prove to each other that they know the peer secret, before either says who it is.

    dialler -> acceptor   Challenge(random)
    acceptor -> dialler   Challenge(random)
    dialler -> acceptor   Ping      } sealed, as is everything from here on: the Hellos, and each
    acceptor -> dialler   Ping      } frame as long as the stream lasts

A seal is an HMAC-SHA256 over the frame and its number, with a key of this stream and direction that
both random numbers went into. So nothing of another stream is good here, nothing of this one can be
sent again, sent back, left out, or added by whoever sits in between; it can be read, though.

The dialler proves first: who merely calls learns nothing, not even something to guess at offline.
"""

from __future__ import annotations

import hmac
import logging
import os
import time

from dengine.node.stream import Stream, StreamEnded
from dengine.node.wire import Challenge, Ping, Refused
from dengine.security import NONCE_BYTES, PeerSecret

log = logging.getLogger("dengine.peers")

SEAL_BYTES = 32
UNPROVEN_BYTES_MAX = 256
REPEAT_S = 60.0  # so long nothing more is said of the same address
ADDRESSES_MAX = 256

NOT_AUTHENTICATED = Refused("not_authenticated", "not authenticated")


class NotAuthenticated(StreamEnded):
    """The other side did not prove that it knows the secret; says nothing more than that."""

    def __init__(self) -> None:
        super().__init__("not authenticated", garbled=True)


ENDS = ("dialler", "acceptor")


class Seal:
    """What protects the frames of one stream, each direction with its own key and numbers."""

    def __init__(self, secret: PeerSecret, dialler: bytes, acceptor: bytes, *, dials: bool) -> None:
        """`dialler`, `acceptor`: the random numbers of the two ends; `dials`: which one we are."""
        keys = [secret.code(f"frames of the {end}", dialler, acceptor) for end in ENDS]
        ours, theirs = keys if dials else reversed(keys)
        # Prepared once: a copy costs a third of a new one.
        self._ours = hmac.new(ours, digestmod="sha256")
        self._theirs = hmac.new(theirs, digestmod="sha256")
        self._sent = self._received = 0

    def close(self, frame: bytes) -> bytes:
        """The next frame to send, with its seal in front."""
        code = self._ours.copy()
        code.update(self._sent.to_bytes(8, "big"))
        code.update(frame)
        self._sent += 1
        return code.digest() + frame

    def open(self, data: bytes) -> memoryview:
        """The next frame that was received.

        Raises:
            NotAuthenticated: the other side did not send exactly this as its next one.
        """
        frame = memoryview(data)[SEAL_BYTES:]
        code = self._theirs.copy()
        code.update(self._received.to_bytes(8, "big"))
        code.update(frame)
        self._received += 1
        if not hmac.compare_digest(code.digest(), data[:SEAL_BYTES]):
            raise NotAuthenticated
        return frame


class Unproven:
    """Before the proof and after a failed one: nothing is sealed, nothing long is looked at."""

    def close(self, frame: bytes) -> bytes:
        return frame

    def open(self, data: bytes) -> memoryview:
        if len(data) > UNPROVEN_BYTES_MAX:
            raise NotAuthenticated
        return memoryview(data)


async def authenticate(stream: Stream, secret: PeerSecret) -> None:
    """Leave `stream` sealed, with the other side known to be a node that knows `secret`.

    Raises:
        NotAuthenticated: it is none, or somebody interferes.
        StreamEnded: the stream is lost.
    """
    stream.seal = Unproven()
    dials, ours = stream.dialled is not None, Challenge(os.urandom(NONCE_BYTES))
    if dials:
        stream.send(ours)
    theirs = await stream.receive()
    if type(theirs) is not Challenge or len(theirs.nonce) != NONCE_BYTES:
        raise NotAuthenticated
    if dials:
        stream.seal = Seal(secret, ours.nonce, theirs.nonce, dials=True)
        stream.send(Ping())
    else:
        stream.send(ours)
        stream.seal = Seal(secret, theirs.nonce, ours.nonce, dials=False)
    if type(await stream.receive()) is not Ping:
        raise NotAuthenticated
    if not dials:
        stream.send(Ping())


class Complaints:
    """Warnings about addresses, one a minute for each, so that no stranger can fill the log."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def about(self, address: str, message: str) -> None:
        """Log `message`, which names `address`, unless that was complained about lately."""
        now = time.monotonic()
        if now - self._said.get(address, now - REPEAT_S) < REPEAT_S:
            return
        self._said.pop(address, None)
        if len(self._said) >= ADDRESSES_MAX:
            del self._said[next(iter(self._said))]
        self._said[address] = now
        log.warning("%s", message)
