"""The sequential objects that histories are checked against."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from tests.linearizability.checker import FOREVER, IMPOSSIBLE, Model, Operation


class _Anything:
    def __repr__(self) -> str:
        return "anything"


ANYTHING: Final = _Anything()


def _register_step(state: Any, op: Operation) -> Any:
    """read -> value; write(value); cas((old, new)) -> bool. An unknown result is None."""
    if op.name == "read":
        return op.result if state is ANYTHING or state == op.result else IMPOSSIBLE
    if op.name == "write":
        return op.argument
    old, new = op.argument
    if op.returned == FOREVER:
        return new if state == old else state
    if op.result:
        return new if state is ANYTHING or state == old else IMPOSSIBLE
    return IMPOSSIBLE if state is not ANYTHING and state == old else state


REGISTER: Final = Model(None, ANYTHING, _register_step)


class Version(NamedTuple):
    """A value and its mod_revision; `exact` False: that revision or a later one, not seen yet."""

    revision: int
    value: Any
    exact: bool = True

    def may_be(self, revision: int) -> bool:
        return revision == self.revision if self.exact else revision >= self.revision


def _versioned_step(state: Any, op: Operation) -> Any:
    """read -> (revision, value); write(value) -> revision; delete -> revision or None, when there
    was nothing; cas((old revision, value)) -> revision, or the current revision as ("is", r).
    A key that does not exist has the value None; a deletion leaves the lowest revision that can
    follow.
    """
    if state is ANYTHING:
        state = Version(0, ANYTHING, False)
    if op.name == "read":
        revision, value = op.result
        if state.value is not ANYTHING and state.value != value:
            return IMPOSSIBLE
        if value is None:
            return Version(state.revision, None, False)
        return Version(revision, value) if state.may_be(revision) else IMPOSSIBLE
    if op.name == "cas":
        return _versioned_cas(state, op)
    value = None if op.name == "delete" else op.argument
    if op.returned == FOREVER:
        return Version(state.revision + 1, value, False)
    if op.result is None:  # a deletion of nothing
        return state if state.value is None or state.value is ANYTHING else IMPOSSIBLE
    if op.name == "delete" and state.value is None:  # it says that there was something
        return IMPOSSIBLE
    return Version(op.result, value) if op.result > state.revision else IMPOSSIBLE


def _versioned_cas(state: Version, op: Operation) -> Any:
    expected, value = op.argument
    here = expected if expected is not None else 0
    matches = (
        state.value is None if expected is None else state.value is not None and state.may_be(here)
    )
    if op.returned == FOREVER:
        return Version(max(state.revision, here) + 1, value, False) if matches else state
    if isinstance(op.result, tuple):  # ("is", revision of what was there instead)
        found = op.result[1]
        if found is None:
            nothing = state.value is None or state.value is ANYTHING
            return state if nothing and expected is not None else IMPOSSIBLE
        fits = state.value is not None and state.may_be(found) and found != expected
        return Version(found, state.value) if fits else IMPOSSIBLE
    fits = (matches or state.value is ANYTHING) and op.result > max(state.revision, here)
    return Version(op.result, value) if fits else IMPOSSIBLE


VERSIONED: Final = Model(Version(0, None, False), ANYTHING, _versioned_step)
