"""The command line on a host of the appliance: who may read what there, and what is gone when."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dengine.cli import remote
from tests.test_cli import N1


NOBODY = 65534


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
