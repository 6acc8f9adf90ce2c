"""Server-sent events, from bytes as they arrive: a message counts when its blank line is there."""

from __future__ import annotations

from dataclasses import dataclass

MAX_MESSAGE_BYTES = 64 << 20  # a revision of a whole transaction, with previous values in base64


@dataclass(frozen=True, slots=True)
class Message:
    event: str
    data: bytes


class Parser:
    """`feed` returns the messages that are complete. The rest waits for more, and is lost with it:
    a stream that is cut in a message has not delivered that message.
    """

    def __init__(self) -> None:
        self._rest = bytearray()  # of a line whose end is still to come
        self._event = ""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[Message]:
        """Raises ValueError for a message of more than MAX_MESSAGE_BYTES."""
        found: list[Message] = []
        self._rest += chunk
        if b"\n" in chunk:
            *lines, rest = bytes(self._rest).split(b"\n")
            self._rest = bytearray(rest)
            for line in lines:
                message = self._line(line.removesuffix(b"\r"))
                if message is not None:
                    found.append(message)
        if self._size + len(self._rest) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of more than {MAX_MESSAGE_BYTES} bytes")
        return found

    def _line(self, line: bytes) -> Message | None:
        if not line:
            event, data = self._event, self._data
            self._event, self._data, self._size = "", [], 0
            return Message(event or "message", b"\n".join(data)) if data else None
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif name == b"data":
            self._data.append(value)
            self._size += len(value)
        return None  # comments begin with a colon; what else there may be says nothing to us
