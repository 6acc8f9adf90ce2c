"""How every response begins, in bytes that are made ahead: its status line and its Date."""

from __future__ import annotations

import time
from email.utils import formatdate
from http import HTTPStatus

STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}

_date_second = 0
_date_line = b""


def date_line() -> bytes:
    """The Date header, made once per second."""
    global _date_second, _date_line
    now = int(time.time())
    if now != _date_second:
        _date_second = now
        _date_line = b"Date: %s\r\n" % formatdate(now, usegmt=True).encode()
    return _date_line
