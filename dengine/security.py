"""Secrets: read from files, compared in constant time, and never shown.

Two of them. The *token* is what clients and operators send with every call. The *peer secret* is
what the nodes know of each other: it never travels, only codes (HMAC-SHA256) made with it do. Each
code begins with what it is for, and every part of it with its length, so that none can stand for
another; each covers random numbers of both sides, so that none is good twice.

Both are read once, at the start. Changing them without downtime needs two accepted ones for a
while: `Secrets` is the one place that would hold the second.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from dengine.errors import ConfigError

MIN_BYTES: Final = 16
MAX_BYTES: Final = 4096
NONCE_BYTES: Final = 32
OTHERS: Final = 0o077  # the permissions of everybody but the owner
CREDENTIALS: Final = "/run/credentials/"  # systemd's own, with an access list that reads as group
SCHEME: Final = "Dengine-Peer"
REPLY_HEADER: Final = "Dengine-Proof"

_CHALLENGE = re.compile(SCHEME + r' nonce="([0-9a-f]{16,256})"')
_ANSWER = re.compile(
    SCHEME + r' nonce="([0-9a-f]{16,256})", own="([0-9a-f]{64})", '
    r'body="([0-9a-f]{64})", proof="([0-9a-f]{64})"'
)


def is_absent_credential(path: Path) -> bool:
    """Is it one of those that systemd makes for a unit, and that are there only while it runs?"""
    try:
        path.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError) and str(path).startswith(CREDENTIALS)
    return False


def read_secret(path: Path, key: str) -> bytes:
    """The content of a secret's file, without the newline at its end.

    Args:
        key: what the messages call it, for example "n1.toml: security.token_file".

    Raises:
        ConfigError: it cannot be read, is no plain file, too short, too long, or not kept private.
    """
    try:
        # A pipe that nobody writes to must not hang a start.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as stream:
            mode = os.fstat(fd).st_mode
            text = stream.read(MAX_BYTES + 1) if stat.S_ISREG(mode) else b""
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{key}: {path} is not a plain file")
    if mode & OTHERS and not os.path.realpath(path).startswith(CREDENTIALS):
        raise ConfigError(
            f"{key}: {path} is open to other users (mode {stat.S_IMODE(mode):04o}): chmod 600 it"
        )
    text = text.rstrip(b"\r\n")
    if not text:
        raise ConfigError(f"{key}: {path} is empty: `openssl rand -hex 32` makes a good secret")
    if not MIN_BYTES <= len(text) <= MAX_BYTES:
        raise ConfigError(
            f"{key}: {path} must hold {MIN_BYTES} to {MAX_BYTES} bytes: "
            "`openssl rand -hex 32` makes a good secret"
        )
    return text


def read_token(path: Path, key: str) -> str:
    """A secret that can stand in an HTTP header.

    Raises:
        ConfigError: as `read_secret`, or it cannot.
    """
    text = read_secret(path, key)
    if any(not 0x21 <= byte <= 0x7E for byte in text):
        raise ConfigError(
            f"{key}: {path} must hold one line of visible ASCII characters without blanks"
        )
    return text.decode("ascii")


class Files(Protocol):
    """What of the configuration counts here: the section [security]."""

    @property
    def peer_secret_file(self) -> Path | None: ...
    @property
    def token_file(self) -> Path | None: ...


@dataclass(frozen=True, slots=True, repr=False)
class Secrets:
    """What one node knows; None where nothing is asked for."""

    peer: PeerSecret | None = None
    token: str | None = None

    @staticmethod
    def read(files: Files, source: str, *, outside_unit: bool = False) -> Secrets:
        """Read both files.

        Args:
            source: the configuration's name, for messages.
            outside_unit: do without credentials that systemd has for a unit only while it runs.

        Raises:
            ConfigError: one of them is not acceptable, or both are the same.
        """
        peer = token = None
        peer_file, token_file = (
            None if outside_unit and file is not None and is_absent_credential(file) else file
            for file in (files.peer_secret_file, files.token_file)
        )
        if peer_file is not None:
            peer = read_secret(peer_file, f"{source}: security.peer_secret_file")
        if token_file is not None:
            token = read_token(token_file, f"{source}: security.token_file")
        if token is not None and token.encode() == peer:
            raise ConfigError(
                f"{source}: security.token_file and security.peer_secret_file hold the same: the "
                "token travels and the peer secret must not, so make two"
            )
        return Secrets(None if peer is None else PeerSecret(peer), token)


class PeerSecret:
    """The peer secret, and the codes made with it."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def code(self, purpose: str, *parts: bytes) -> bytes:
        """32 bytes that only who knows the secret can make for this purpose and these parts."""
        named = (purpose.encode(), *parts)
        text = b"".join(len(part).to_bytes(8, "big") + part for part in named)
        return hmac.digest(self._secret, b"dengine 1" + text, "sha256")

    def reveal(self) -> bytes:
        """The secret itself, for the standard input of a subprocess and nothing else."""
        return self._secret

    def answer(
        self, challenges: Iterable[str], method: str, target: str, body: bytes
    ) -> Answer | None:
        """The proof for one request between nodes; None when no challenge asks for it.

        Args:
            challenges: the WWW-Authenticate headers of a 401.
            target: path and query, as they are sent.
        """
        for challenge in challenges:
            if found := _CHALLENGE.fullmatch(challenge.strip()):
                digest = hashlib.sha256(body).hexdigest()
                return Answer.make(self, found[1], os.urandom(32).hex(), method, target, digest)
        return None


@dataclass(frozen=True, slots=True)
class Answer:
    """A node's proof for one request, in the Authorization header; it covers the body too."""

    nonce: str  # of who is asked
    own: str  # of who asks
    body: str  # SHA-256, so that it can be judged before the body has been read
    proof: str

    @staticmethod
    def make(
        secret: PeerSecret, nonce: str, own: str, method: str, target: str, body: str
    ) -> Answer:
        parts = (nonce, own, method, target, body)
        text = (part.encode("utf-8", "surrogateescape") for part in parts)
        return Answer(nonce, own, body, secret.code("request", *text).hex())

    @staticmethod
    def parse(header: str) -> Answer | None:
        """Inverse of `header`; None when it is something else."""
        found = _ANSWER.fullmatch(header)
        return None if found is None else Answer(*found.groups())

    @property
    def header(self) -> str:
        return (
            f'{SCHEME} nonce="{self.nonce}", own="{self.own}", '
            f'body="{self.body}", proof="{self.proof}"'
        )

    def is_of(self, secret: PeerSecret, method: str, target: str) -> bool:
        """Was it made by a node that knows `secret`, for this very request?"""
        right = Answer.make(secret, self.nonce, self.own, method, target, self.body)
        return hmac.compare_digest(right.proof, self.proof)

    def covers(self, body: bytes) -> bool:
        return hmac.compare_digest(hashlib.sha256(body).hexdigest(), self.body)

    def reply(self, secret: PeerSecret, status: int, body: bytes) -> str:
        """What proves to who asked that the answer comes from a node that knows the secret."""
        return secret.code("reply", self.proof.encode(), str(status).encode(), body).hex()

    def confirmed_by(self, given: str, secret: PeerSecret, status: int, body: bytes) -> bool:
        right = self.reply(secret, status, body)
        return hmac.compare_digest(right.encode(), given.encode("utf-8", "surrogateescape"))
