"""What inventory, hosts and cluster say, put together; no judgement yet. Pure."""

from __future__ import annotations

from typing import Any


class Survey:
    """The nodes of the inventory with what was observed of each.

    Attributes:
        view: the newest view of the cluster that any node gave, or {}.
        unreachable: why the controller could not look at a host, by host.
    """

    def __init__(
        self,
        nodes: list[dict[str, Any]],
        facts: dict[str, dict[str, Any]],
        infos: dict[str, dict[str, Any]],
    ) -> None:
        self.nodes = nodes
        self.facts = facts
        self.infos = infos
        self.unreachable = {
            n["host"]: facts[n["host"]]["unreachable"]
            for n in nodes
            if facts[n["host"]].get("unreachable")
        }
        views = [i["cluster"] for i in infos.values() if i.get("cluster")]
        self.view: dict[str, Any] = max(
            views, key=lambda v: (v["term"], v["commit_index"]), default={}
        )
        self.members: list[dict[str, Any]] = self.view.get("members", [])
        self.voters = self._ids("active")
        self.readers = self._ids("read_only")
        self.learners = sorted({m["id"] for m in self.members} - {*self.voters})

    def _ids(self, status: str) -> list[int]:
        return sorted({m["id"] for m in self.members if m["status"] == status})

    @property
    def leader(self) -> int | None:
        found: int | None = (self.view.get("leader") or {}).get("id")
        return found

    def identity(self, host: str) -> dict[str, Any]:
        found: dict[str, Any] = self.facts[host].get("identity") or {}
        return found

    def belongs(self, host: str) -> str:
        """Id of the cluster whose data lie on `host`, or ""."""
        return str(self.identity(host).get("cluster_id") or "")

    def halted(self, host: str) -> str:
        """Why the node on `host` refuses to start, as "EXIT_CODE reason", or ""."""
        return str(self.facts[host].get("halted") or "")

    def process(self, host: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.facts[host].get("process")
        return found

    def said(self, node: dict[str, Any]) -> dict[str, Any]:
        """What the node itself answered."""
        found: dict[str, Any] = self.infos[node["host"]]["nodes"].get(node["endpoint"], {})
        return found
