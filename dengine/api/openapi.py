"""The OpenAPI 3.1 document, generated from the route table so that it cannot drift from it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import msgspec

from dengine import __version__, errors
from dengine.api.routes import Access, Body, Parameter, Route
from dengine.errors import DengineError
from dengine.security import SCHEME

_REF = "#/components/schemas/{name}"
COMMON_ERRORS = (400, 404, 405, 414, 429, 431, 500)

_TOKEN = {
    "type": "http",
    "scheme": "bearer",
    "description": "The content of security.token_file, where a node has one; else all is open.",
}
_PEER = {
    "type": "http",
    "scheme": SCHEME,
    "description": (
        "A node's answer to the challenge of a 401, made with the content of "
        "security.peer_secret_file; between nodes only."
    ),
}
# {} where no scheme is needed: a node without secrets asks nobody.
_SECURITY: dict[Access, list[dict[str, list[str]]]] = {
    "token": [{"token": []}, {}],
    "fetch": [{"token": []}, {"peer": []}, {}],
    "join": [{"peer": []}, {"token": []}, {}],
    "open": [],
}

_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error", "code", "message", "retryable", "outcome"],
    "properties": {
        "error": {"type": "string", "example": "invalid_request"},
        "code": {"type": "integer", "example": 4003},
        "message": {"type": "string", "example": "the key is empty: a key has 1 to 511 bytes"},
        "retryable": {"type": "boolean"},
        "outcome": {
            "enum": ["none", "unknown"],
            "description": "none: it did not and will not happen; unknown: it may have happened",
        },
        "leader": {
            "type": "object",
            "properties": {"id": {"type": "integer"}, "address": {"type": "string"}},
        },
        "current_revision": {
            "type": ["integer", "null"],
            "description": "of 412: the revision of the key, null where it does not exist",
        },
        "compact_revision": {
            "type": "integer",
            "description": "of 410: the newest revision that is not kept any more",
        },
        "full": {
            "enum": ["keys", "clients", "bytes"],
            "description": "of 429 for an Idempotency-Key: what there is no more room to remember",
        },
        "maximum": {"type": "integer", "description": "of 400: the most that a number may be"},
        "reasons": {
            "type": "array",
            "items": {"type": "string"},
            "description": "of 503: why this node is not ready",
        },
        "checks": {
            "type": "object",
            "additionalProperties": {"type": "boolean"},
            "description": "of 503, where asked for: whether each is in order",
        },
        "size_bytes": {"type": "integer", "description": "of 416: the size of the file"},
        "allow": {"type": "string", "description": "of 405: the methods that are possible"},
    },
}
# One of each status; where several errors share it, the likeliest.
_ERRORS: dict[int, DengineError] = {
    error.status: error
    for error in (
        errors.InvalidRequest("the key is empty: a key has 1 to 511 bytes"),
        errors.Unauthorized("this call needs the token of this cluster"),
        errors.NotFound("nothing is served under this path; GET /v1/openapi.json lists what is"),
        errors.MethodNotAllowed("POST is not possible here; use one of GET", allow="GET"),
        errors.Conflict("node 2 is no learner"),
        errors.Compacted("the history begins after revision 41", compact_revision=41),
        errors.LengthRequired("a body needs a Content-Length"),
        errors.PreconditionFailed(
            "the condition does not hold: the key is at 7", current_revision=7
        ),
        errors.TooLarge("the value has 1048577 bytes; at most 1048576 are allowed"),
        errors.UriTooLong("the request target is longer than 8192 bytes"),
        errors.UnsupportedMedia("the body must be application/json"),
        errors.RangeNotSatisfiable("the file has 4096 bytes", size_bytes=4096),
        errors.IdempotencyMismatch("another request came with this Idempotency-Key"),
        errors.RateLimited("10000 writes wait already: try again later"),
        errors.HeadersTooLarge("the header is larger than 8191 bytes"),
        errors.DengineError("unexpected error in this node", outcome="unknown"),
        errors.ClusterUnavailable("no leader is known: try again, or ask another node"),
        errors.RequestTimeout("no majority confirmed the write in time"),
        errors.DiskFull("less than 268435456 bytes are free: free some space"),
    )
}
# What these have for certain beside the rest.
_DETAILS = {405: "allow", 410: "compact_revision", 412: "current_revision"}
_ERROR_HEADERS = {
    401: ("WWW-Authenticate",),
    405: ("Allow",),
    429: ("Retry-After",),
    503: ("Retry-After",),
}


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """The whole document for `routes`, ready for JSON."""
    paths: dict[str, dict[str, Any]] = {}
    shapes: list[type] = []
    for route in routes:
        for body in (route.body, *route.replies.values()):
            if body is not None and body.shape is not None:
                shapes.append(body.shape)
        operations = paths.setdefault(route.path, {})
        operations[route.method.lower()] = _operation(route)
        if route.has_head:
            operations["head"] = _operation(route, "Head")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "dengine",
            "version": __version__,
            "description": "A Raft-replicated key-value engine. Any node takes any request.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR_SCHEMA, **_schemas(shapes)},
            "securitySchemes": {"token": _TOKEN, "peer": _PEER},
        },
    }


def _schemas(shapes: list[type]) -> dict[str, Any]:
    """What the decoder itself takes, and what replies have, by name."""
    _, schemas = msgspec.json.schema_components(shapes, ref_template=_REF)
    return schemas


def _operation(route: Route, prefix: str = "") -> dict[str, Any]:
    name = _identifier(route.summary)
    where = "" if "{" in route.path else "At" + _identifier(route.path.replace("/", " "))
    refusals = (*COMMON_ERRORS, *(() if route.access == "open" else (401,)), *route.errors)
    operation: dict[str, Any] = {
        "operationId": f"{prefix}{route.method.capitalize() if not prefix else ''}{name}{where}",
        "summary": route.summary,
        "parameters": [
            *map(_parameter, route.parameters),
            *([_TIMEOUT] if route.has_timeout else ()),
        ],
        "responses": {
            **{str(status): _reply(body) for status, body in route.replies.items()},
            **{str(status): _error(status) for status in refusals},
        },
        "security": _SECURITY[route.access],
    }
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": _content(route.body)}
    return operation


def _identifier(text: str) -> str:
    """Its words as one: generated clients make names of functions of that."""
    return "".join(part.capitalize() for part in re.findall(r"[A-Za-z0-9]+", text))


def _parameter(parameter: Parameter) -> dict[str, Any]:
    kinds = {bool: "boolean", int: "integer", str: "string"}
    schema: dict[str, Any] = {"type": kinds[type(parameter.example)]}
    if parameter.minimum is not None:
        schema["minimum"] = parameter.minimum
    if parameter.maximum is not None:
        schema["maximum"] = parameter.maximum
    if parameter.values:
        schema["enum"] = list(parameter.values)
    return {
        "name": parameter.name,
        "in": parameter.place,
        "required": parameter.required,
        "description": parameter.text,
        "schema": schema,
        "example": parameter.example,
    }


_TIMEOUT = _parameter(
    Parameter(
        "Dengine-Timeout-Ms",
        "how long it may take; default 5000",
        5000,
        place="header",
        minimum=100,
        maximum=60_000,
    )
)


def _content(body: Body) -> dict[str, Any]:
    if body.shape is not None:
        schema = {"$ref": _REF.format(name=body.shape.__name__)}
    elif body.media_type == "application/json":
        schema = _schema(body.example)
    else:
        schema = {"type": "string"}
    content = {body.media_type: {"schema": schema, "example": body.example}}
    return content if body.otherwise is None else content | _content(body.otherwise)


def _schema(example: Any) -> dict[str, Any]:
    """What `example` is one of. Null is no example of anything: such bodies have a shape."""
    kinds: dict[type, str] = {
        **{bool: "boolean", int: "integer", float: "number", str: "string"},
        **{list: "array", dict: "object"},
    }
    schema: dict[str, Any] = {"type": kinds[type(example)]}
    if isinstance(example, list):
        schema["items"] = _schema(example[0])
    elif isinstance(example, dict):
        schema["properties"] = {name: _schema(part) for name, part in example.items()}
        schema["required"] = list(example)
    return schema


def _reply(body: Body) -> dict[str, Any]:
    reply: dict[str, Any] = {"description": body.text}
    if body.example is not None:
        reply["content"] = _content(body)
    headers = body.headers + (body.otherwise.headers if body.otherwise else ())
    if headers:
        reply["headers"] = {name: {"schema": {"type": "string"}} for name in headers}
    return reply


def _error(status: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"$ref": "#/components/schemas/Error"}
    if status in _DETAILS:
        schema = {"allOf": [schema, {"type": "object", "required": [_DETAILS[status]]}]}
    headers = {name: {"schema": {"type": "string"}} for name in _ERROR_HEADERS.get(status, ())}
    return {
        "description": HTTPStatus(status).phrase,
        **({"headers": headers} if headers else {}),
        "content": {"application/json": {"schema": schema, "example": _ERRORS[status].to_dict()}},
    }
