"""What only a client can tell, beside the errors of `dengine.errors` that nodes send."""

from __future__ import annotations

from dengine.errors import DengineError


class ClientClosed(DengineError):
    """The client was closed before or during the call. `outcome` says what became of that."""

    name = "client_closed"


class LeaseLost(DengineError):
    """The lease has ended, or may have: it could not be renewed in time. Its keys are gone."""

    name = "lease_lost"


class LockLost(LeaseLost):
    """The lock, or the leadership, may belong to somebody else by now."""

    name = "lock_lost"
