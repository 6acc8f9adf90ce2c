"""Secrets in files, and the codes made with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dengine.errors import ConfigError
from dengine.security import Answer, PeerSecret, Secrets, read_secret, read_token

SECRET = b"0123456789abcdef0123456789abcdef"


def secret_file(path: Path, content: bytes = SECRET + b"\n", mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def refusal(path: Path) -> str:
    """The sentence for a file that is not acceptable; what the file holds is not in it."""
    with pytest.raises(ConfigError) as caught:
        read_token(path, "n1.toml: security.token_file")
    message = caught.value.message
    assert caught.value.exit_code == 78
    assert message.startswith("n1.toml: security.token_file: ")
    assert str(path) in message
    assert "\n" not in message
    assert SECRET[:8].decode() not in message
    return message


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_newline_at_the_end_does_not_count(tmp_path: Path, end: bytes) -> None:
    """What an editor, `echo` and a vault write mean the same."""
    assert read_secret(secret_file(tmp_path / "s", SECRET + end), "k") == SECRET


@pytest.mark.parametrize(
    ("content", "mode", "expected"),
    [
        (b"", 0o600, "is empty"),
        (b"\n\n", 0o600, "is empty"),
        (b"short\n", 0o600, "must hold 16 to 4096 bytes"),
        (b"x" * 4097, 0o600, "must hold 16 to 4096 bytes"),
        (SECRET, 0o640, "is open to other users (mode 0640): chmod 600"),
        (SECRET, 0o604, "is open to other users (mode 0604): chmod 600"),
        (SECRET + b"\nsecond line", 0o600, "one line of visible ASCII"),
        ("schlüssel-schlüssel".encode(), 0o600, "one line of visible ASCII"),
    ],
)
def test_a_file_that_is_no_good_is_named(
    tmp_path: Path, content: bytes, mode: int, expected: str
) -> None:
    """Whoever sets up a secret wrongly learns which file and what to do, and nothing leaks."""
    assert expected in refusal(secret_file(tmp_path / "token", content, mode))


def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path) -> None:
    """A pipe that nobody writes to does not hang the start of a node."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert "is not a plain file" in refusal(tmp_path / "pipe")
    assert "Is a directory" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "none")


def test_credentials_of_systemd_may_carry_an_access_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An access list shows as permissions of the group, though nobody else may read."""
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    monkeypatch.setattr("dengine.security.CREDENTIALS", f"{credentials}/")
    assert read_secret(secret_file(credentials / "s", mode=0o440), "k") == SECRET
    outside = secret_file(tmp_path / "s", mode=0o440)
    (credentials / "link").symlink_to(outside)
    with pytest.raises(ConfigError, match="open to other users"):
        read_secret(credentials / "link", "k")


class Files:
    """As the section [security]."""

    def __init__(self, peer: Path | None, token: Path | None) -> None:
        self.peer_secret_file, self.token_file = peer, token


def test_the_token_must_not_be_the_peer_secret(tmp_path: Path) -> None:
    """The one travels, so it cannot be the other."""
    one = secret_file(tmp_path / "one")
    two = secret_file(tmp_path / "two", SECRET)
    with pytest.raises(ConfigError, match="hold the same"):
        Secrets.read(Files(one, two), "n1.toml")
    assert Secrets.read(Files(None, two), "n1.toml").token == SECRET.decode()
    assert Secrets.read(Files(None, None), "n1.toml") == Secrets()


def test_secrets_do_not_show_in_what_is_printed(tmp_path: Path) -> None:
    """A traceback or a log line that holds one of these objects gives nothing away."""
    files = Files(secret_file(tmp_path / "a"), secret_file(tmp_path / "b", SECRET[::-1]))
    secrets = Secrets.read(files, "n1.toml")
    for text in (repr(secrets), repr(secrets.peer), f"{secrets}"):
        assert SECRET.decode() not in text
        assert SECRET[::-1].decode() not in text


def test_no_code_stands_for_another() -> None:
    """Purpose, parts and their limits all go into a code."""
    secret = PeerSecret(SECRET)
    codes = {
        secret.code("a"),
        secret.code("a", b""),
        secret.code("a", b"bc"),
        secret.code("ab", b"c"),
        secret.code("a", b"b", b"c"),
        PeerSecret(SECRET[::-1]).code("a", b"bc"),
    }
    assert len(codes) == 6


def test_an_answer_is_good_for_its_request_alone() -> None:
    """Neither another call, nor another body, nor another secret, nor a changed header."""
    secret, other = PeerSecret(SECRET), PeerSecret(SECRET[::-1])
    challenges = ["Bearer", 'Dengine-Peer nonce="' + "ab" * 40 + '"']
    made = secret.answer(challenges, "POST", "/v1/x", b"body")
    assert made is not None
    answer = Answer.parse(made.header)
    assert answer == made
    assert answer.is_of(secret, "POST", "/v1/x")
    assert not answer.is_of(other, "POST", "/v1/x")
    assert not answer.is_of(secret, "GET", "/v1/x")
    assert not answer.is_of(secret, "POST", "/v1/x?force")
    assert answer.covers(b"body")
    assert not answer.covers(b"another")
    reply = answer.reply(secret, 200, b"{}")
    assert answer.confirmed_by(reply, secret, 200, b"{}")
    assert not answer.confirmed_by(reply, secret, 409, b"{}")
    assert not answer.confirmed_by(reply, secret, 200, b"{ }")
    assert not answer.confirmed_by(answer.proof, secret, 200, b"{}")
    assert not answer.confirmed_by("ü", secret, 200, b"{}")
    assert secret.answer(["Bearer"], "POST", "/v1/x", b"") is None
    assert secret.answer([], "POST", "/v1/x", b"") is None
    assert SECRET.decode() not in made.header
