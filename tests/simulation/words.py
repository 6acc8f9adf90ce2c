"""Frames as a person reads them in a trace."""

from __future__ import annotations

from typing import Any

import msgspec

from dengine.node.wire import RaftFrame, decode
from dengine.raft.types import Entry, MemberId

SHORT = 60  # characters of any other value


def told(data: bytes) -> str:
    """One encoded frame, in a line."""
    frame = decode(data)
    if isinstance(frame, RaftFrame):
        return "; ".join(map(_struct, frame.messages))
    return _struct(frame)


def _struct(message: msgspec.Struct) -> str:
    fields = msgspec.structs.asdict(message)
    for known in ("sender", "to"):  # the line begins with them
        fields.pop(known, None)
    parts = [f"{name}={_value(value)}" for name, value in fields.items()]
    return f"{type(message).__name__}({', '.join(parts)})"


def _value(value: Any) -> str:
    if isinstance(value, MemberId):
        return f"node {value.id}"
    if isinstance(value, Entry):
        return f"{value.index}/{value.term} {value.kind.name}"
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return f"[{', '.join(map(_value, value))}]"
    text = repr(value)
    return text if len(text) <= SHORT else f"{text[:SHORT]}..."
