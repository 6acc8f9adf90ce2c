"""The command line on a host of the appliance: who may read what there, and what is gone when."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dengine.cli import remote
from tests.test_cli import N1, Answer, Serving, dengine, refusal, serving

__all__ = ["serving"]  # a fixture

NOBODY = 65534
CREDENTIAL = "/run/credentials/no-such-unit.service/token"  # systemd has it only while a unit runs


def test_check_config_does_without_the_credentials_of_a_stopped_unit(tmp_path: Path) -> None:
    """It says which it has not seen; a file of any other place must be there."""
    (tmp_path / "n1.toml").write_text(N1.format(port=9081))
    done = dengine(
        "check-config", "n1.toml", cwd=tmp_path, DENGINE__SECURITY__TOKEN_FILE=CREDENTIAL
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert f"{CREDENTIAL} was not looked at" in done.stdout.decode()
    done = dengine("check-config", "n1.toml", cwd=tmp_path, DENGINE__SECURITY__TOKEN_FILE="token")
    assert done.returncode == 78


def test_a_client_goes_on_without_the_credential_of_a_stopped_unit(
    serving: Serving, tmp_path: Path
) -> None:
    """While this host's node is down root can ask others; who wants a token is named one."""
    server = serving(Answer(body=b"v"))
    config = tmp_path / "n1.toml"
    config.write_text(
        f'{N1.format(port=server.server_address[1])}[security]\ntoken_file = "{CREDENTIAL}"\n'
    )
    done = dengine("get", "k", CONFIG_PATH=str(config))
    assert (done.returncode, done.stdout) == (0, b"v"), done
    assert "Authorization" not in server.asked[0].headers
    server.script = lambda _: refusal("unauthorized", 401, retryable=False, outcome="none")
    done = dengine("get", "k", CONFIG_PATH=str(config))
    assert done.returncode == 1
    assert f"{CREDENTIAL} is there only while its unit runs" in done.stderr.decode()
    assert b"--token-file" in done.stderr


def test_a_configuration_of_this_host_that_a_user_may_not_read_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/etc/dengine is closed to ordinary users, who name endpoints and a token themselves."""
    closed = tmp_path / "closed"
    closed.mkdir()
    file = closed / "dengine.toml"
    file.write_text(N1.format(port=9999))
    monkeypatch.setattr(remote, "SYSTEM_CONFIG", file)
    assert remote.resolve_endpoints((), {}) == ["127.0.0.1:9999"]
    closed.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        assert remote.resolve_endpoints((), {}) == [remote.DEFAULT_ENDPOINT]
        assert remote.resolve_token(None, {}) is None
    finally:
        if root:
            os.seteuid(0)
        closed.chmod(0o700)
