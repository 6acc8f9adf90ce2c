"""Something for a new cluster to hold: `python -m examples.ansible.seed ENDPOINT SECRETS [MB]`."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from examples.ansible.load import request

VALUE_BYTES = 50_000
AT_ONCE = 8


def seed(endpoint: str, token: str, megabytes: int) -> int:
    """Write that much under seed/, the same keys each time; returns how many they are."""
    count = megabytes * 1_000_000 // VALUE_BYTES

    def put(number: int) -> None:
        key = f"/v1/kv/seed/{number:06d}"
        status, body = request(endpoint, "PUT", key, token, os.urandom(VALUE_BYTES))
        if status != 200:
            sys.exit(f"{endpoint}: {status} {body.decode(errors='replace')}")

    with ThreadPoolExecutor(AT_ONCE) as hands:
        list(hands.map(put, range(count)))
    return count


if __name__ == "__main__":
    where, secrets, *more = sys.argv[1:]
    size = int(more[0]) if more else 20
    written = seed(where, json.loads(Path(secrets).read_text())["token"], size)
    print(f"{where}: {written} keys, {size} MB")
