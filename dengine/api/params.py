"""From the raw request to keys, options and bodies; everything malformed is a 400 in words.

Nothing here goes through a URL object: a key is whatever bytes the client sent, percent-decoded
exactly once, so `//`, `..`, `+`, `%00` and bytes that are not UTF-8 all survive.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from hashlib import blake2b
from typing import TYPE_CHECKING, TypeVar, cast
from urllib.parse import unquote_to_bytes

import msgspec
from multidict import istr

from dengine.errors import (
    InvalidRequest,
    LengthRequired,
    RateLimited,
    TooLarge,
    UnsupportedMedia,
)
from dengine.kv.commands import TTL_S_MAX, Condition
from dengine.node.writes import OnceKey, parse_once

if TYPE_CHECKING:
    from dengine.api.protocol import Request

DEFAULT_TIMEOUT_S = 5.0
MAX_JSON_BYTES = 65_536
BODY_WINDOW_S = 10.0
BODY_WINDOW_BYTES = 10_240  # 1 KiB/s over a window of 10 s

CONTENT_LENGTH = istr("Content-Length")
CONTENT_ENCODING = istr("Content-Encoding")
CONTENT_TYPE = istr("Content-Type")
EXPECT = istr("Expect")
IDEMPOTENCY_KEY = istr("Idempotency-Key")
IF_MATCH = istr("If-Match")
IF_NONE_MATCH = istr("If-None-Match")
TIMEOUT_MS = istr("Dengine-Timeout-Ms")
TRANSFER_ENCODING = istr("Transfer-Encoding")

_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_ENTITY_TAG = re.compile(r'\s*(W/)?"([\x21\x23-\x7e\x80-\uffff]*)"\s*(?:,|$)')
_DECIMAL = re.compile(r"[0-9]{1,19}")
_REVISION = re.compile(r"[1-9][0-9]{0,18}")  # as an ETag has it: another text is another tag
_NEVER_MATCHES = (0,)  # revisions start at 1

T = TypeVar("T")


def unescape(raw: str, what: str) -> bytes:
    """Percent-decode `raw` exactly once; `+` stays `+`.

    Raises:
        InvalidRequest: a `%` without two hexadecimal digits.
    """
    if "%" not in raw:
        return raw.encode("utf-8", "surrogateescape")
    if _BROKEN_ESCAPE.search(raw):
        raise InvalidRequest(
            f"{what} contains a % that is not followed by two hexadecimal digits; "
            "a literal percent sign is %25"
        )
    return unquote_to_bytes(raw.encode("utf-8", "surrogateescape"))


def parse_query(raw: str | None, allowed: frozenset[str]) -> dict[str, bytes]:
    """The query parameters of a request, each at most once, values as bytes.

    Raises:
        InvalidRequest: an unknown or repeated name, or broken percent-encoding.
    """
    found: dict[str, bytes] = {}
    for pair in (raw or "").split("&"):
        if not pair:
            continue
        raw_name, _, raw_value = pair.partition("=")
        name = unescape(raw_name, "the query").decode("utf-8", "backslashreplace")
        if name not in allowed:
            raise InvalidRequest(_unknown_parameter(name, allowed))
        if name in found:
            raise InvalidRequest(f"query parameter {name} is given twice")
        found[name] = unescape(raw_value, f"query parameter {name}")
    return found


def _unknown_parameter(name: str, allowed: frozenset[str]) -> str:
    known = ", ".join(sorted(allowed)) or "none"
    return f"unknown query parameter {name[:64]!r}; known here: {known}"


def flag(query: dict[str, bytes], name: str) -> bool:
    """A yes-or-no parameter: `name`, `name=true` and `name=1` are yes."""
    text = query.get(name)
    if text is None or text in (b"false", b"0"):
        return False
    if text in (b"", b"true", b"1"):
        return True
    raise InvalidRequest(f"query parameter {name} must be true or false")


def integer(query: dict[str, bytes], name: str, default: int, low: int, high: int) -> int:
    """A whole number between `low` and `high`, both included."""
    raw = query.get(name)
    if raw is None:
        return default
    text = raw.decode("ascii", "replace")
    if not _DECIMAL.fullmatch(text) or not low <= int(text) <= high:
        raise InvalidRequest(
            f"query parameter {name} must be an integer from {low} to {high}", maximum=high
        )
    return int(text)


def unbase64(text: bytes, what: str) -> bytes:
    """Decode base64 of either alphabet, with or without padding."""
    try:
        padded = text.translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        return base64.b64decode(padded + b"=" * (-len(padded) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"{what} is not valid base64") from None


def timeout_s(request: Request) -> float:
    """How long this request may take once it is complete, from Dengine-Timeout-Ms."""
    text = request.message.headers.get(TIMEOUT_MS)
    if text is None:
        return DEFAULT_TIMEOUT_S
    if not _DECIMAL.fullmatch(text) or not 100 <= int(text) <= 60_000:
        raise InvalidRequest("header Dengine-Timeout-Ms must be an integer from 100 to 60000")
    return int(text) / 1000


def entity_tags(request: Request, name: istr) -> tuple[tuple[bool, str], ...] | None:
    """The tags of an If-Match or If-None-Match header as (weak, text); () stands for `*`.

    None when the header is absent.

    Raises:
        InvalidRequest: the header is not a list of quoted tags.
    """
    headers = request.message.headers
    if name not in headers:
        return None
    text = ", ".join(headers.getall(name))
    if text.strip() == "*":
        return ()
    tags, position = [], 0
    while position < len(text):
        match = _ENTITY_TAG.match(text, position)
        if match is None:
            raise InvalidRequest(f'header {name} must be * or a list of quoted tags like "42"')
        tags.append((match[1] is not None, match[2]))
        position = match.end()
    if not tags:
        raise InvalidRequest(f"header {name} is empty")
    return tuple(tags)


def write_condition(request: Request) -> Condition | None:
    """The condition of a write, None when it has none.

    A tag that can never be a revision (weak, or not written as one is) makes a condition that never
    holds.
    """
    headers = request.message.headers
    if IF_MATCH not in headers and IF_NONE_MATCH not in headers:
        return None
    tags = entity_tags(request, IF_MATCH)
    absent = entity_tags(request, IF_NONE_MATCH)
    if absent:
        raise InvalidRequest("header If-None-Match of a write must be *")
    revisions = None
    if tags is not None:
        strong = tuple(int(t) for weak, t in tags if not weak and _REVISION.fullmatch(t))
        revisions = strong or (_NEVER_MATCHES if tags else ())
    return Condition(if_match=revisions, if_none_match=absent is not None)


def expiry(query: dict[str, bytes]) -> tuple[int, str] | None:
    """The TTL in seconds or the lease (0 or "" is the other) of a put; None: it stays."""
    if "ttl" not in query and "lease" not in query:
        return None
    if "ttl" in query and "lease" in query:
        raise InvalidRequest("a value has a TTL or a lease: give ttl or lease, not both")
    if "ttl" in query:
        return integer(query, "ttl", 1, 1, TTL_S_MAX), ""
    lease = query["lease"].decode("utf-8", "replace")
    if not lease:
        raise InvalidRequest("query parameter lease is empty: it is the id of a lease")
    return 0, lease


def origin_form(target: str) -> str:
    """Path and query of a request target: the absolute form, http://host/path, is what proxies
    send (RFC 9112 3.2.2)."""
    return target if target.startswith("/") else "/" + target.partition("://")[2].partition("/")[2]


def once_key(request: Request, body: bytes) -> OnceKey | None:
    """The Idempotency-Key of a write, with what tells this request from another one:
    method, path and query as they came, conditions, and the body.
    """
    headers = request.message.headers
    if IDEMPOTENCY_KEY not in headers:
        return None
    texts = headers.getall(IDEMPOTENCY_KEY)
    if len(texts) > 1:
        raise InvalidRequest("header Idempotency-Key is given twice")
    parts = [request.message.method, origin_form(request.message.path)]
    for name in (IF_MATCH, IF_NONE_MATCH):
        parts.append(", ".join(headers.getall(name, ())))
    digest = blake2b("\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=16)
    digest.update(b"\0" + body)
    return parse_once(texts[0].strip(), digest.digest())


def announces_body(request: Request) -> bool:
    """A request without either of these headers has no body (RFC 9112 6.3)."""
    headers = request.message.headers
    return CONTENT_LENGTH in headers or TRANSFER_ENCODING in headers


class BodyReader:
    """Reads request bodies: a size, a pace, and a bound on what is half-read (docs/reference.md).

    Args:
        pending_bytes: how much may be announced by all bodies under way together.
    """

    def __init__(self, pending_bytes: int) -> None:
        self._pending_bytes = pending_bytes
        self._announced = 0

    def ready(self, request: Request, limit: int) -> bytes | None:
        """The whole body when it has already arrived, which is the rule; None when it has not.

        Raises:
            LengthRequired: neither an empty body nor a Content-Length was announced.
            TooLarge: the body is larger than `limit` bytes.
            UnsupportedMedia: the body is encoded.
        """
        message = request.message
        headers = message.headers
        if CONTENT_ENCODING in headers:
            raise UnsupportedMedia("Content-Encoding is not supported: send the body as it is")
        if CONTENT_LENGTH not in headers:
            raise LengthRequired("send the body with a Content-Length (0 for an empty one)")
        if EXPECT in headers or not request.payload.is_eof():
            return None
        body = request.payload.read_nowait()
        if len(body) > limit:
            raise TooLarge(f"the body has {len(body)} bytes; at most {limit} are allowed")
        return body

    async def read(self, request: Request, limit: int) -> bytes:
        """The whole body; the caller's deadline starts when this returns.

        Raises: as `ready`, and
            InvalidRequest: the body came slower than 1 KiB/s or stopped for 10 s.
            RateLimited: too much of other bodies is under way.
            ConnectionError: the client has gone.
        """
        body = self.ready(request, limit)
        if body is not None:
            return body
        size = int(request.message.headers[CONTENT_LENGTH])
        if size > limit:
            raise TooLarge(f"the body has {size} bytes; at most {limit} are allowed")
        if self._announced + size > self._pending_bytes:
            raise RateLimited("too many request bodies are under way: try again")
        self._continue(request)
        self._announced += size
        try:
            return await _collect(request)
        finally:
            self._announced -= size

    def _continue(self, request: Request) -> None:
        message = request.message
        expect = message.headers.get(EXPECT)
        if expect is None:
            return
        if expect.lower() != "100-continue":
            raise InvalidRequest("header Expect may only be 100-continue")
        if message.version.minor == 0:
            return  # such a client would take that for the answer (RFC 9110 15.2)
        transport = request.protocol.transport
        if transport is not None and not request.payload.is_eof():
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def _collect(request: Request) -> bytes:
    """Read to the end, giving every 10 KiB at most 10 s."""
    payload, parts, window = request.payload, [], 0
    deadline = asyncio.timeout(BODY_WINDOW_S)
    try:
        async with deadline:
            while not payload.at_eof():
                part = await payload.readany()
                parts.append(part)
                window += len(part)
                if window >= BODY_WINDOW_BYTES:
                    window = 0
                    deadline.reschedule(asyncio.get_running_loop().time() + BODY_WINDOW_S)
    except TimeoutError:
        raise InvalidRequest(
            "the body came slower than 1 KiB/s: the connection is closed"
        ) from None
    return b"".join(parts)


def decode_json(body: bytes, request: Request, shape: type[T]) -> T:
    """`body` as the msgspec struct `shape`; unknown fields and wrong types are named.

    Raises:
        UnsupportedMedia: the Content-Type is not application/json.
        InvalidRequest: the body is not such an object.
    """
    content_type = request.message.headers.get(CONTENT_TYPE, "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMedia("this call takes JSON: send Content-Type: application/json")
    try:
        return msgspec.json.decode(body, type=shape)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        known = ""
        if "unknown field" in str(error):
            fields = msgspec.structs.fields(cast(type[msgspec.Struct], shape))
            known = f"; known here: {', '.join(field.name for field in fields)}"
        raise InvalidRequest(f"the JSON body is not acceptable: {error}{known}") from None
