"""Who may call: the token of clients and operators, and the proof of another node.

With `security.token_file` every call needs `Authorization: Bearer TOKEN` but those that the route
table opens to all. With `security.peer_secret_file` joining needs a node's proof: the 401 brings a
challenge, which is good once and for a few seconds, and the next request answers it (security.py).
A member that fetches a snapshot shows such a proof instead of the token, which no node ever sends
where there is a peer secret.
"""

from __future__ import annotations

import hmac
import os
import time
from typing import TYPE_CHECKING

from multidict import istr

from dengine.errors import Unauthorized
from dengine.security import REPLY_HEADER, SCHEME, Answer, Secrets

if TYPE_CHECKING:
    from dengine.api.protocol import Request, Response
    from dengine.api.routes import Access, RouteTable

AUTHORIZATION = istr("Authorization")
CHALLENGE_S = 10.0
USED_MAX = 10_000  # challenges answered rightly within CHALLENGE_S: only nodes can do that


class Guard:
    """Judges a request by its header alone, before anything else is done with it."""

    def __init__(self, secrets: Secrets) -> None:
        self._bearer = None if secrets.token is None else f"Bearer {secrets.token}".encode()
        self._peer = secrets.peer
        self._challenges = _Challenges()

    @property
    def asks_for_token(self) -> bool:
        return self._bearer is not None

    def check(self, request: Request, table: RouteTable) -> None:
        """Let `request` pass.

        Raises:
            Unauthorized: it may not.
        """
        if self._bearer is None:
            return
        given = request.message.headers.get(AUTHORIZATION)
        if given is not None and hmac.compare_digest(_bytes(given), self._bearer):
            return
        scheme, _, token = (given or "").partition(" ")
        if scheme.lower() == "bearer":  # written in another way than most do
            again = b"Bearer " + _bytes(token.strip())
            if hmac.compare_digest(again, self._bearer):
                return
        access = table.access(request)
        if access == "open" or (self._peer is not None and access == "join"):
            return  # a join is judged by `check_join`
        if access == "fetch" and self._has_proof(request):
            return
        if scheme.lower() == "bearer":
            raise Unauthorized("the token in header Authorization is not the one of this cluster")
        raise Unauthorized("this call needs a token: send header Authorization: Bearer TOKEN")

    def check_join(self, request: Request) -> None:
        """Let a node in that asks to join: a token makes none of it where there is a secret."""
        if self._peer is not None and not self._has_proof(request):
            raise Unauthorized(
                "not authenticated: the nodes of this cluster prove to each other that they know "
                "its peer secret (security.peer_secret_file)"
            )

    def _has_proof(self, request: Request) -> bool:
        """Does a node speak? `request.proof` is set if so."""
        message = request.message
        answer = Answer.parse(message.headers.get(AUTHORIZATION, ""))
        if answer is None or self._peer is None:
            return False
        if not answer.is_of(self._peer, message.method, message.path):
            return False
        if not self._challenges.take(answer.nonce):
            return False
        request.proof = answer
        return True

    def challenges(self, access: Access) -> bytes:
        """The header lines of a 401."""
        lines = b""
        if self._peer is not None and access in ("fetch", "join"):
            nonce = self._challenges.issue()
            lines += f'WWW-Authenticate: {SCHEME} nonce="{nonce}"\r\n'.encode()
        if self._bearer is not None and not (self._peer is not None and access == "join"):
            lines += b"WWW-Authenticate: Bearer\r\n"
        return lines

    def sign(self, proof: Answer, response: Response) -> None:
        """Prove to the node that asked that a node answers."""
        if self._peer is not None:
            code = proof.reply(self._peer, response.status, response.body)
            response.headers += f"{REPLY_HEADER}: {code}\r\n".encode()


class _Challenges:
    """Random numbers that are recognised when they come back, without remembering those sent out:
    a stranger may ask for any number of them.
    """

    def __init__(self) -> None:
        self._key = os.urandom(32)
        self._used: dict[str, float] = {}  # the oldest first

    def issue(self) -> str:
        stamp = time.monotonic_ns().to_bytes(8, "big") + os.urandom(16)
        return (stamp + self._code(stamp)).hex()

    def take(self, nonce: str) -> bool:
        """True once for each that was issued in the last CHALLENGE_S."""
        try:
            raw = bytes.fromhex(nonce)
        except ValueError:
            return False
        stamp, now = raw[:24], time.monotonic()
        issued_s = int.from_bytes(stamp[:8], "big") / 1e9
        ours = hmac.compare_digest(self._code(stamp), raw[24:])
        if not ours or now - issued_s > CHALLENGE_S or nonce in self._used:
            return False
        while self._used and now - next(iter(self._used.values())) > CHALLENGE_S:
            del self._used[next(iter(self._used))]
        if len(self._used) >= USED_MAX:
            return False
        self._used[nonce] = now
        return True

    def _code(self, stamp: bytes) -> bytes:
        return hmac.digest(self._key, stamp, "sha256")


def _bytes(text: str) -> bytes:
    """As it came in: `compare_digest` takes no strings beyond ASCII."""
    return text.encode("utf-8", "surrogateescape")
