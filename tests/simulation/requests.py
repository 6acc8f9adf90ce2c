"""Range deletes and transactions over a few keys, in every form that there is.

Whoever sends them says what a put is, and all else is drawn: comparisons of each kind, a branch for
either case, several operations on one key, ranges that hold nothing, some, or too much.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final, get_args

from dengine.kv.commands import (
    Compare,
    Delete,
    DeleteRange,
    ExpiringPut,
    Get,
    Operation,
    Put,
    Relation,
    Target,
    Txn,
)

RELATIONS: Final[tuple[Relation, ...]] = get_args(Relation)
TARGETS: Final[tuple[Target, ...]] = get_args(Target)
LIMITS: Final = (1, 2, 1000)  # of keys that a range delete within a transaction may find

Maker = Callable[[bytes], Put | ExpiringPut]


def transaction(
    rng: random.Random, keys: Sequence[bytes], put: Maker, compare: tuple[Compare, ...]
) -> Txn:
    """In either case it does something."""
    return Txn(compare, _branch(rng, keys, put), _branch(rng, keys, put))


def _branch(rng: random.Random, keys: Sequence[bytes], put: Maker) -> tuple[Operation, ...]:
    """Some only put, each key once, which the machine does all at once."""
    if rng.random() < 0.3:
        return tuple(put(key) for key in rng.sample(keys, rng.randint(1, min(3, len(keys)))))
    return tuple(_operation(rng, keys, put) for _ in range(rng.randint(1, 4)))


def _operation(rng: random.Random, keys: Sequence[bytes], put: Maker) -> Operation:
    key, dice = rng.choice(keys), rng.random()
    if dice < 0.4:
        return put(key)
    if dice < 0.65:
        return Get(key)
    if dice < 0.8:
        return Delete(key)
    return DeleteRange(*part_of(rng, keys), rng.choice(LIMITS))


def part_of(rng: random.Random, keys: Sequence[bytes]) -> tuple[bytes, bytes]:
    """From one of `keys` to another of its first letter, with that one or without it."""
    one = rng.choice(keys)
    first, last = sorted((one, rng.choice([key for key in keys if key[0] == one[0]])))
    return first, last + b"\0" if rng.random() < 0.7 else last


def comparison(rng: random.Random, key: bytes, revision: int, value: bytes) -> Compare:
    """Of `key`, with what is or was there, or with what is near it.

    Args:
        revision, value: that were seen there; 0 and b"" for nothing.
    """
    target = rng.choice(TARGETS)
    if target == "exists":
        return Compare(key, target, rng.choice(("=", "!=")), rng.random() < 0.5)
    near = {
        "mod_revision": revision + rng.choice((-1, 0, 0, 0, 1)),
        "version": rng.randint(0, 4),
        "value": value,
    }
    return Compare(key, target, rng.choice(RELATIONS), near[target])
