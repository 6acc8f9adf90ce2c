"""The error tree: one place that says what each failure means for a caller.

Two questions decide what a caller may do after an error, so every class answers both:
`retryable` (may the same request succeed later?) and `outcome` ("none": it did not and will not
happen; "unknown": it may still happen). `name`, `code` and `status` are the HTTP contract; the
codes follow d-engine, and where d-engine has none the HTTP status serves as the code.

`FatalError` and its children end the process; their `exit_code` is the contract with systemd.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

Outcome = Literal["none", "unknown"]


class DengineError(Exception):
    """Base of everything dengine raises on purpose.

    Args:
        message: one sentence for a person: what is wrong, where, what to do.
        outcome: "none" or "unknown" (see the module docstring); None takes the class default.
        leader: `{"id": int, "address": str}` of the leader as far as known.
        details: further JSON fields of the reply, for example `current_revision`.
    """

    name: ClassVar[str] = "internal"
    code: ClassVar[int] = 500
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    default_outcome: ClassVar[Outcome] = "none"

    def __init__(
        self,
        message: str,
        *,
        outcome: Outcome | None = None,
        leader: dict[str, Any] | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.outcome: Outcome = outcome or self.default_outcome
        self.leader = leader
        self.details = details

    def to_dict(self) -> dict[str, Any]:
        """The JSON body (docs/reference.md); `details` follow the fixed fields."""
        body: dict[str, Any] = {
            "error": self.name,
            "code": self.code,
            "message": self.message,
            "retryable": self.retryable,
            "outcome": self.outcome,
        }
        if self.leader is not None:
            body["leader"] = self.leader
        body.update(self.details)
        return body


class InvalidRequest(DengineError):
    name, code, status = "invalid_request", 4003, 400


class Unauthorized(DengineError):
    name, code, status = "unauthorized", 401, 401


class Forbidden(DengineError):
    """Part of the contract, and raised by nothing in this release."""

    name, code, status = "forbidden", 403, 403


class KeyNotFound(DengineError):
    name, code, status = "key_not_found", 3005, 404


class NotFound(DengineError):
    name, code, status = "not_found", 404, 404


class MethodNotAllowed(DengineError):
    name, code, status = "method_not_allowed", 405, 405


class JoinError(DengineError):
    name, code, status = "join_error", 1004, 409


class Conflict(DengineError):
    name, code, status = "conflict", 409, 409


class StaleRequest(DengineError):
    """A result that is not known any more; whether there ever was one is not known either."""

    name, code, status = "stale_request", 409, 409
    default_outcome = "unknown"


class Compacted(DengineError):
    """History that is gone; `compact_revision` is the newest revision that is."""

    name, code, status = "compacted", 410, 410


class IdempotencyMismatch(DengineError):
    name, code, status = "idempotency_mismatch", 422, 422


class LengthRequired(DengineError):
    name, code, status = "length_required", 411, 411


class PreconditionFailed(DengineError):
    name, code, status = "precondition_failed", 412, 412


class TooLarge(DengineError):
    name, code, status = "too_large", 413, 413


class UriTooLong(DengineError):
    name, code, status = "uri_too_long", 414, 414


class UnsupportedMedia(DengineError):
    name, code, status = "unsupported_media", 415, 415


class RangeNotSatisfiable(DengineError):
    name, code, status = "range_not_satisfiable", 416, 416


class RateLimited(DengineError):
    name, code, status, retryable = "rate_limited", 4004, 429, True


class WatchOverflow(DengineError):
    name, code, status, retryable = "watch_overflow", 5001, 429, True


class HeadersTooLarge(DengineError):
    name, code, status = "headers_too_large", 431, 431


class NotLeader(DengineError):
    name, code, status, retryable = "not_leader", 4001, 503, True


class LeaderChanged(DengineError):
    name, code, status, retryable = "leader_changed", 1003, 503, True


class ClusterUnavailable(DengineError):
    name, code, status, retryable = "cluster_unavailable", 4005, 503, True


class ProposeFailed(DengineError):
    name, code, status, retryable = "propose_failed", 4006, 503, True


class RequestTimeout(DengineError):
    name, code, status, retryable = "timeout", 1001, 504, True
    default_outcome = "unknown"


class DiskFull(DengineError):
    name, code, status, retryable = "disk_full", 3001, 507, True


class FatalError(DengineError):
    """Ends the process with `exit_code` (docs/reference.md, exit codes)."""

    exit_code: ClassVar[int] = 70


class DataCorruption(FatalError):
    """Damaged data that this node cannot repair by itself."""

    name, code, status = "data_corruption", 3002, 500
    exit_code = 65


class InvariantBroken(FatalError):
    """An assertion of the protocol failed: stopping is the only safe act."""

    name = "internal"
    exit_code = 70


class StorageIO(FatalError):
    """The disk refused; a restart recovers from what is durable."""

    name, code, status = "storage_io", 3003, 500
    exit_code = 74


class TryAgain(FatalError):
    """The port is taken or a core task died: a later start may succeed."""

    exit_code = 75


class IdentityError(FatalError):
    """This directory may not take part in this cluster."""

    exit_code = 76


class ConfigError(FatalError):
    """The configuration is wrong; the message names file and key."""

    exit_code = 78


def _tree(root: type[DengineError]) -> dict[str, type[DengineError]]:
    found = {root.name: root}
    for child in root.__subclasses__():
        found = _tree(child) | found
    return found


def from_dict(body: dict[str, Any]) -> DengineError:
    """Rebuild an error that travelled as `to_dict()`, for example from the leader."""
    fields = dict(body)
    cls = _tree(DengineError).get(fields.pop("error", ""), DengineError)
    for derived in ("code", "retryable"):
        fields.pop(derived, None)
    message = fields.pop("message", "unknown error")
    error = cls(message, outcome=fields.pop("outcome", None), leader=fields.pop("leader", None))
    error.details = fields
    return error
