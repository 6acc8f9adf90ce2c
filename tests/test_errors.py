"""The table of errors: what each failure is called and what a caller may do."""

from __future__ import annotations

import pytest

from dengine import errors
from dengine.errors import DengineError, FatalError, from_dict

# class: name, code, status, retryable, outcome
TABLE = {
    "DengineError": ("internal", 500, 500, False, "none"),
    "InvalidRequest": ("invalid_request", 4003, 400, False, "none"),
    "Unauthorized": ("unauthorized", 401, 401, False, "none"),
    "Forbidden": ("forbidden", 403, 403, False, "none"),
    "KeyNotFound": ("key_not_found", 3005, 404, False, "none"),
    "NotFound": ("not_found", 404, 404, False, "none"),
    "MethodNotAllowed": ("method_not_allowed", 405, 405, False, "none"),
    "JoinError": ("join_error", 1004, 409, False, "none"),
    "Conflict": ("conflict", 409, 409, False, "none"),
    "StaleRequest": ("stale_request", 409, 409, False, "unknown"),
    "Compacted": ("compacted", 410, 410, False, "none"),
    "LengthRequired": ("length_required", 411, 411, False, "none"),
    "PreconditionFailed": ("precondition_failed", 412, 412, False, "none"),
    "TooLarge": ("too_large", 413, 413, False, "none"),
    "UriTooLong": ("uri_too_long", 414, 414, False, "none"),
    "UnsupportedMedia": ("unsupported_media", 415, 415, False, "none"),
    "RangeNotSatisfiable": ("range_not_satisfiable", 416, 416, False, "none"),
    "IdempotencyMismatch": ("idempotency_mismatch", 422, 422, False, "none"),
    "RateLimited": ("rate_limited", 4004, 429, True, "none"),
    "WatchOverflow": ("watch_overflow", 5001, 429, True, "none"),
    "HeadersTooLarge": ("headers_too_large", 431, 431, False, "none"),
    "NotLeader": ("not_leader", 4001, 503, True, "none"),
    "LeaderChanged": ("leader_changed", 1003, 503, True, "none"),
    "ClusterUnavailable": ("cluster_unavailable", 4005, 503, True, "none"),
    "ProposeFailed": ("propose_failed", 4006, 503, True, "none"),
    "RequestTimeout": ("timeout", 1001, 504, True, "unknown"),
    "DiskFull": ("disk_full", 3001, 507, True, "none"),
    "FatalError": ("internal", 500, 500, False, "none"),
    "DataCorruption": ("data_corruption", 3002, 500, False, "none"),
    "InvariantBroken": ("internal", 500, 500, False, "none"),
    "StorageIO": ("storage_io", 3003, 500, False, "none"),
    "TryAgain": ("internal", 500, 500, False, "none"),
    "IdentityError": ("internal", 500, 500, False, "none"),
    "ConfigError": ("internal", 500, 500, False, "none"),
}
EXIT_CODES = {
    "FatalError": 70,
    "DataCorruption": 65,
    "InvariantBroken": 70,
    "StorageIO": 74,
    "TryAgain": 75,
    "IdentityError": 76,
    "ConfigError": 78,
}
CLASSES = {
    name: item
    for name, item in vars(errors).items()
    if isinstance(item, type) and issubclass(item, DengineError)
}


def test_the_table_is_whole() -> None:
    """An error that is added gets its line here, and its exit code when it ends the process."""
    assert set(CLASSES) == set(TABLE)
    fatal = {name: c.exit_code for name, c in CLASSES.items() if issubclass(c, FatalError)}
    assert fatal == EXIT_CODES


@pytest.mark.parametrize("cls", TABLE)
def test_what_a_caller_is_told(cls: str) -> None:
    name, code, status, retryable, outcome = TABLE[cls]
    error = CLASSES[cls]("what is wrong")
    assert error.status == status
    assert error.to_dict() == {
        "error": name,
        "code": code,
        "message": "what is wrong",
        "retryable": retryable,
        "outcome": outcome,
    }


@pytest.mark.parametrize("cls", TABLE)
def test_what_a_forwarded_error_still_says(cls: str) -> None:
    """From the leader through a follower: everything but the class of those without a name."""
    leader = {"id": 2, "address": "h:1"}
    error = CLASSES[cls]("why", outcome="unknown", leader=leader, current_revision=7)
    arrived = from_dict(error.to_dict())
    assert arrived.to_dict() == error.to_dict()
    assert arrived.status == error.status
    assert arrived.details == {"current_revision": 7}
