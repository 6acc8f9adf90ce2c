"""How a call becomes a request and bytes survive the way: addresses, targets, headers, JSON fields.

Little to load, for the command line uses it too.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from dengine.errors import InvalidRequest

DEFAULT_PORT = 9081
PAGE_ITEMS = 1000  # what a node gives at once, unless its limits.page is smaller

IDEMPOTENCY_KEY = re.compile("[!-~]{1,128}")
REVISION_MAX = 2**63 - 2  # the last that a watch can begin with
# JSON has a backslash before each of these, and six bytes for each of those.
_ESCAPED_IN_TWO = b'"\\\b\t\n\f\r'
_ESCAPED_IN_SIX = bytes(set(range(32)) - set(_ESCAPED_IN_TWO))

_ONE_ALPHABET = str.maketrans("-_", "+/")

Match = int | Sequence[int] | Literal["*"]  # the revisions of a conditional write


def parse_endpoint(text: str) -> str:
    """ "host:port" of "host:port" or "http://host:port/"; the default port is 9081.

    Raises:
        ValueError: `text` is neither.
    """
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"{text!r} is not an endpoint: write it like 192.168.1.10:9081")
    url = urlsplit(text if "//" in text else f"//{text}", scheme="http")
    try:
        host, port = url.hostname, url.port or DEFAULT_PORT
    except ValueError:
        host, port = None, 0
    if url.scheme != "http" or not host or url.path not in ("", "/") or url.query or url.username:
        raise ValueError(f"{text!r} is not an endpoint: write it like 192.168.1.10:9081")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def key_target(key: bytes, **query: str | None) -> str:
    """The request target of a single key; every byte of it survives the way."""
    fields = {name: value for name, value in query.items() if value is not None}
    if key in (b".", b".."):  # a proxy on the way would take these as steps in a path
        fields["key_base64"] = base64.b64encode(key).decode()
        return target("/v1/kv", **fields)
    return target(f"/v1/kv/{quote(key, safe='')}", **fields)


def target(path: str, **query: str | bytes | int | None) -> str:
    """`path` with the query fields that are not None; bytes are percent-encoded as they are."""
    fields = [
        f"{name}={quote(value if isinstance(value, bytes) else str(value), safe='')}"
        for name, value in query.items()
        if value is not None
    ]
    return f"{path}?{'&'.join(fields)}" if fields else path


def as_lease_id(id: str) -> str:
    """Raises ValueError for what cannot be the id of a lease."""
    if not id or not id.isascii() or not id.isprintable():
        raise ValueError(f"{id!r} is not the id of a lease")
    return id


def lease_target(id: str) -> str:
    """Raises as `as_lease_id`."""
    return f"/v1/leases/{quote(as_lease_id(id), safe='')}"


def as_idempotency_key(text: str) -> str:
    """Raises InvalidRequest for what no node would take, or no header could carry."""
    if not IDEMPOTENCY_KEY.fullmatch(text):
        raise InvalidRequest("an idempotency key has 1 to 128 visible ASCII characters")
    return text


def as_from_revision(revision: int | None) -> int | None:
    """The first revision that a watch wants.

    Raises:
        ValueError: there is none below 1.
        InvalidRequest: there never will be one that large.
    """
    if revision is None or 1 <= revision <= REVISION_MAX:
        return revision
    if revision < 1:
        raise ValueError(f"revisions begin at 1, not {revision}")
    raise InvalidRequest(f"from_revision is a number from 1 to {REVISION_MAX}")


def json_bytes(name: str, data: bytes) -> dict[str, str]:
    """Bytes as a field of JSON: a string, or base64 where they are no UTF-8."""
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return _base64_field(name, data)


def sent_bytes(name: str, data: bytes) -> dict[str, str]:
    """As `json_bytes`, and base64 too where a string with its escapes would be longer: nodes count
    the bytes of the JSON that a transaction comes in (limits.txn_bytes).
    """
    twos = len(data) - len(data.translate(None, _ESCAPED_IN_TWO))
    sixes = len(data) - len(data.translate(None, _ESCAPED_IN_SIX))
    if twos + 5 * sixes > len(data) // 3 + len("_base64"):
        return _base64_field(name, data)
    return json_bytes(name, data)


def _base64_field(name: str, data: bytes) -> dict[str, str]:
    return {f"{name}_base64": base64.b64encode(data).decode()}


def field_bytes(fields: Mapping[str, Any], name: str) -> bytes | None:
    """The reverse: the bytes of the field `name` of JSON, None where there is none.

    Raises:
        ValueError: what is there is neither a string nor base64, of either alphabet, with or
            without padding.
    """
    encoded = fields.get(f"{name}_base64")
    if isinstance(encoded, str):
        # As a node takes it (api/params.py), for a request is read here as well.
        digits = encoded.translate(_ONE_ALPHABET).rstrip("=")
        try:
            return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
        except ValueError:
            raise ValueError(f"{name}_base64 is not base64") from None
    text = fields.get(name)
    if text is None and encoded is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"{name} is not a string")
    return text.encode("utf-8", "surrogatepass")


def as_key(key: str | bytes) -> bytes:
    """The bytes of a key; text is UTF-8.

    Raises:
        TypeError: it is neither text nor bytes.
    """
    if isinstance(key, str):
        return key.encode()
    if isinstance(key, bytes | bytearray | memoryview):
        return bytes(key)
    raise TypeError(f"a key is str or bytes, not {type(key).__name__}")


def as_value(value: bytes) -> bytes:
    """`value`, which has to be bytes.

    Raises:
        TypeError: it is not: text has many encodings, and only its owner knows which.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise TypeError(f"a value is bytes, not {type(value).__name__}: encode text yourself")


def as_seconds(ttl_s: float, what: str) -> int:
    """`ttl_s` as nodes take it.

    Raises:
        ValueError: it is no whole number of seconds above 0.
    """
    # Infinity and what is no number are not whole either, and `int` takes neither.
    whole = ttl_s.is_integer() if isinstance(ttl_s, float) else isinstance(ttl_s, int)
    if isinstance(ttl_s, bool) or not whole:
        raise ValueError(f"{what} is a whole number of seconds, not {ttl_s!r}")
    if ttl_s < 1:
        raise ValueError(f"{what} is at least 1 second, not {ttl_s!r}")
    return int(ttl_s)


def matched(if_match: Match) -> tuple[int, ...]:
    """The revisions that may be there, () for any.

    Raises:
        InvalidRequest: it is no revision, nor some of them, nor "*". Text is none: of its
            characters each would be one.
    """
    revisions: tuple[int, ...] = ()
    if isinstance(if_match, str | bytes):
        fits = if_match == "*"
    else:
        revisions = (if_match,) if isinstance(if_match, int) else tuple(if_match)
        fits = bool(revisions) and all(type(revision) is int for revision in revisions)
    if not fits:
        raise InvalidRequest('if_match is a revision, or some of them, or "*"')
    return revisions


def conditions(if_match: Match | None, if_none_match: bool) -> dict[str, str]:
    """The headers of a conditional write. Raises InvalidRequest."""
    headers = {}
    if if_match is not None:
        revisions = matched(if_match)
        headers["If-Match"] = ", ".join(f'"{r}"' for r in revisions) or "*"
    if if_none_match:
        headers["If-None-Match"] = "*"
    return headers


def selection(
    prefix: str | bytes | None, start: str | bytes | None, end: str | bytes | None
) -> dict[str, bytes]:
    """The query fields that choose a range of keys.

    Raises:
        ValueError: they contradict each other.
    """
    if prefix is not None and (start is not None or end is not None):
        raise ValueError("give a prefix, or start and end")
    bounds = {"prefix": prefix, "start": start, "end": end}
    return {name: as_key(bound) for name, bound in bounds.items() if bound is not None}


class Paging:
    """Which page of a listing to ask for next, until its end or until `limit` items came.

    `limit` is that of the next page, None for as many as the node gives, and `after` where it
    begins. `over`: there is no next one.
    """

    def __init__(self, limit: int | None) -> None:
        self._left = limit
        self._most = PAGE_ITEMS
        self.after: str | None = None
        self.over = False

    @property
    def limit(self) -> int | None:
        return None if self._left is None else min(self._left, self._most)

    def took(self, items: int, after: str | None) -> None:
        """A page of `items` came, which the page `after` continues; None: it was the last."""
        self.after = after
        if self._left is not None:
            self._left -= items
        self.over = after is None or (self._left is not None and self._left <= 0)

    def take_less(self, refusal: InvalidRequest) -> bool:
        """Does the node only give fewer at once (its limits.page)? Then ask for so many."""
        maximum = refusal.details.get("maximum")
        if self.limit is None or not isinstance(maximum, int) or not 0 < maximum < self.limit:
            return False
        self._most = maximum
        return True
