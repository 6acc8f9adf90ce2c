"""Where a member is dialled: what the cluster committed, then what the own file says."""

from __future__ import annotations

from pathlib import Path

import pytest

from dengine.config import read
from dengine.node.addresses import AddressBook

FILE = """\
[cluster]
node_id = 1
listen_address = "0.0.0.0:9081"
initial_cluster = [
  {{ id = 1, address = "0.0.0.0:9081", role = 2, status = 2 }},
  {{ id = 2, address = "{}", role = 0, status = 2 }},
]
db_root_dir = "./db"
"""


@pytest.mark.parametrize(
    ("committed", "in_file", "dialled"),
    [
        ("10.0.0.2:9082", "10.0.0.2:9082", ["10.0.0.2:9082"]),
        # It moved, or everybody did while the cluster was down.
        ("10.0.0.2:9082", "10.0.0.9:9082", ["10.0.0.2:9082", "10.0.0.9:9082"]),
        # A wildcard is never dialled from another machine, and this one is on another machine.
        ("10.0.0.2:9082", "0.0.0.0:9082", ["10.0.0.2:9082"]),
        ("0.0.0.0:9082", "10.0.0.2:9082", ["10.0.0.2:9082"]),
        # All on one machine.
        ("0.0.0.0:9082", "0.0.0.0:9082", ["127.0.0.1:9082"]),
        ("0.0.0.0:9082", "0.0.0.0:9092", ["127.0.0.1:9082", "127.0.0.1:9092"]),
        ("0.0.0.0:9082", "127.0.0.1:9092", ["127.0.0.1:9082", "127.0.0.1:9092"]),
        ("127.0.0.1:9082", "127.0.0.1:9092", ["127.0.0.1:9082", "127.0.0.1:9092"]),
    ],
)
def test_whom_to_dial(tmp_path: Path, committed: str, in_file: str, dialled: list[str]) -> None:
    file = tmp_path / "n1.toml"
    file.write_text(FILE.format(in_file), encoding="utf-8")
    assert AddressBook(read(file, {})).dial(2, committed) == dialled
