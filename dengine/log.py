"""What a node says on stdout: whole announced lines, and log lines with time, level and node.

One thread writes them. A terminal stopped with Ctrl-S or a stuck pipe therefore delays lines, and
never the event loop; when too many wait, the newest are dropped and counted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
from io import TextIOWrapper

STDOUT = 1
MAX_WAITING_LINES = 10_000
CLOSE_TIMEOUT_S = 1.0

_announcements = logging.getLogger("dengine.announce")


def announce(line: str) -> None:
    """Say one of the lines that operators and playbooks wait for, whatever the log level.

    As text it is the whole line without a prefix; as JSON it is the `message`.
    """
    _announcements.info(line)


class StdoutLog(logging.Handler):
    """The process's log for the time of a `with` block.

    Args:
        level: "debug", "info", "warning" or "error".
        style: "text" or "json".
        node_id: named in every line that is not announced.
    """

    def __init__(self, level: str, style: str, node_id: int) -> None:
        super().__init__()
        self._level = level.upper()
        self._as_json = style == "json"
        self._node_id = node_id
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_WAITING_LINES)
        self._dropped = 0
        self._writer = threading.Thread(target=self._write, name="log", daemon=True)

    def __enter__(self) -> StdoutLog:
        root = logging.getLogger()
        root.setLevel(self._level)
        root.addHandler(self)
        _announcements.setLevel(logging.INFO)
        self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._writer.join(CLOSE_TIMEOUT_S)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self._line(record))
        except queue.Full:
            self._dropped += 1
        except Exception:
            self.handleError(record)

    def _line(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        announced = record.name == _announcements.name
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        utc = f"{moment}.{int(record.msecs):03d}Z"
        if self._as_json:
            fields = {
                "time": utc,
                "level": record.levelname.lower(),
                "node": self._node_id,
                "logger": record.name,
                "message": message,
            }
            if trace:
                fields["exception"] = trace
            return json.dumps(fields, ensure_ascii=False)
        # A message may quote what a stranger sent: it must not be able to fake further lines.
        message = message.replace("\r", "\\r").replace("\n", "\\n")
        if announced:
            return message
        line = f"{utc} {record.levelname:7} [Node {self._node_id}] {message}"
        return f"{line}\n{trace}" if trace else line

    def _write(self) -> None:
        """The thread: a reader that went away leaves the node without a voice, and running."""
        with contextlib.suppress(OSError):
            while (line := self._lines.get()) is not None:
                _print(line)
                if self._dropped:
                    dropped, self._dropped = self._dropped, 0
                    _print(self._line(_warning(f"{dropped} log lines dropped: stdout was stuck")))


def _print(line: str) -> None:
    """Straight to the file descriptor: a stuck write must not hold a lock that exit needs."""
    data = f"{line}\n".encode(errors="backslashreplace")
    while data:
        data = data[os.write(STDOUT, data) :]


def _warning(message: str) -> logging.LogRecord:
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, None, None)


def use_utf8() -> None:
    """UTF-8 and whole lines at once, also under LC_ALL=C and into a pipe."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
