"""dengine: a Raft-replicated key-value engine. See ARCHITECTURE.md."""

__version__ = "0.1.0"
