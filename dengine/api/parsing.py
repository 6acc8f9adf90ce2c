"""What aiohttp's parser refuses: the limits it is given, and its complaints in our words."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp.http_exceptions import BadHttpMethod, LineTooLong

from dengine.errors import (
    DengineError,
    HeadersTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    UriTooLong,
)

MAX_URI_BYTES = 8192
MAX_HEADER_BYTES = 8191  # one less, so that a LineTooLong tells which of the two was too long
MAX_HEADER_FIELDS = 64
ALL_METHODS = "GET, HEAD, PUT, POST, DELETE, OPTIONS"


def parser_error(error: BaseException | None, allowed: Callable[[str], str]) -> DengineError:
    """What the parser complained about.

    Args:
        allowed: the methods that a request target takes; it raises NotFound.
    """
    text = getattr(error, "message", "") or "the request could not be parsed"
    if isinstance(error, LineTooLong):
        if error.args[1] == MAX_URI_BYTES:
            return UriTooLong(f"the request target is longer than {MAX_URI_BYTES} bytes")
        return HeadersTooLarge(f"a header field is larger than {MAX_HEADER_BYTES} bytes")
    if text == "Too many headers received":
        return HeadersTooLarge(f"the header has more than {MAX_HEADER_FIELDS} fields")
    if "HTTPS traffic" in text:
        return InvalidRequest("this port speaks plain HTTP, and a TLS handshake came in")
    if isinstance(error, BadHttpMethod) and " HTTP/1." in text:
        try:  # the request line is quoted there
            allow = allowed(text.partition(" HTTP/1.")[0].rpartition(" ")[2])
        except NotFound:
            allow = ALL_METHODS
        return MethodNotAllowed(f"this method does not exist here; use one of {allow}", allow=allow)
    return InvalidRequest(f"not a valid HTTP/1.1 request: {text.splitlines()[0].rstrip(':')}")


def is_oversized(message: object) -> bool:
    """aiohttp bounds each field of a header; MAX_HEADER_BYTES is for their sum."""
    fields = getattr(message, "raw_headers", ())  # a parser error has none
    return sum(len(name) + len(value) + 4 for name, value in fields) > MAX_HEADER_BYTES
