"""dengine: a Raft-replicated key-value engine. See ARCHITECTURE.md."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dengine.engine import Engine

__all__ = ["Engine", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`dengine.Engine` loads a node, which who needs only the client may not even have."""
    if name == "Engine":
        from dengine.engine import Engine

        return Engine
    raise AttributeError(f"module 'dengine' has no attribute {name!r}")
