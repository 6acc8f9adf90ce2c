"""Prometheus metrics of one node. Gauges are read when somebody scrapes; only histograms cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dengine.node.snapshots import Snapshots
from dengine.raft.raft import Raft

ROLES = ("follower", "candidate", "leader", "learner")
FSYNC_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)
REQUEST_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class NodeMetrics:
    """The registry behind `/metrics` and what the node counts itself."""

    def __init__(
        self, status: Callable[[], dict[str, Any]], raft: Raft, snapshots: Snapshots
    ) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_StatusCollector(status, raft, snapshots))
        self.log_write_seconds = Histogram(
            "dengine_log_fsync_seconds",
            "Durable log writes",
            buckets=FSYNC_BUCKETS_S,
            registry=self.registry,
        )
        self.entries_written = Counter(
            "dengine_log_entries_written", "Entries made durable", registry=self.registry
        )
        self._requests = Histogram(
            "dengine_request_seconds",
            "HTTP requests",
            ["route"],
            buckets=REQUEST_BUCKETS_S,
            registry=self.registry,
        )
        self._by_route: dict[str, Histogram] = {}

    def observe_request(self, route: str, seconds: float) -> None:
        child = self._by_route.get(route)
        if child is None:
            child = self._by_route[route] = self._requests.labels(route)
        child.observe(seconds)


class _StatusCollector(Collector):
    """Turns the node's status into gauges at the moment of the scrape."""

    def __init__(
        self, status: Callable[[], dict[str, Any]], raft: Raft, snapshots: Snapshots
    ) -> None:
        self._status = status
        self._raft = raft
        self._snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        for name, key, text in (
            ("dengine_term", "term", "Current term"),
            ("dengine_commit_index", "commit_index", "Newest committed entry"),
            ("dengine_applied_index", "last_applied", "Newest applied entry"),
            ("dengine_last_index", "last_index", "Newest entry of the log"),
            ("dengine_first_index", "first_index", "Oldest entry of the log"),
            ("dengine_revision", "revision", "Revision of the state"),
            ("dengine_compact_revision", "compact_revision", "Newest that the history has not"),
            ("dengine_leases", "leases", "Leases there are"),
            ("dengine_watchers", "watchers", "Watches of keys that are open here"),
            ("dengine_pending_writes", "pending_writes", "Writes that wait for their answer"),
            ("dengine_uptime_seconds", "uptime_s", "Since the start of the process"),
        ):
            yield GaugeMetricFamily(name, text, value=status[key])
        role = GaugeMetricFamily("dengine_role", "1 for the role of this node", labels=["role"])
        for name in ROLES:
            role.add_metric([name], float(name == status["role"]))
        yield role
        yield GaugeMetricFamily(
            "dengine_voters", "Voters of the committed membership", value=len(status["voters"])
        )
        yield CounterMetricFamily(
            "dengine_proposals", "Commands queued here for the log", value=status["proposals"]
        )
        yield from self._peers()
        yield from self._snapshot_metrics()

    def _snapshot_metrics(self) -> Iterator[Metric]:
        snapshots = self._snapshots
        newest = snapshots.files.refs[-1:]
        for name, value, text in (
            ("dengine_snapshots", len(snapshots.files.refs), "Verified snapshots on this node"),
            (
                "dengine_snapshot_index",
                newest[0].index if newest else 0,
                "Last entry in the newest one",
            ),
            ("dengine_snapshot_bytes", newest[0].size_bytes if newest else 0, "Size of it"),
            ("dengine_snapshot_running", int(bool(snapshots.job)), "1 while the writer works"),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        yield CounterMetricFamily("dengine_snapshots_taken", "Taken here", value=snapshots.taken)
        yield CounterMetricFamily(
            "dengine_snapshot_failures", "Jobs that failed here", value=snapshots.failures
        )
        sent = GaugeMetricFamily(
            "dengine_snapshot_sent_bytes", "Of a snapshot under way to a member", labels=["peer"]
        )
        for receiver, transfer in snapshots.files.transfers.items():
            sent.add_metric([str(receiver)], transfer.sent)
        yield sent

    def _peers(self) -> Iterator[Metric]:
        """Leader only: how far each member is."""
        raft = self._raft
        match = GaugeMetricFamily("dengine_peer_match_index", "Durable there", labels=["peer"])
        lag = GaugeMetricFamily("dengine_peer_lag_entries", "Missing there", labels=["peer"])
        for member, progress in raft.progress.items():
            if member != raft.me:
                match.add_metric([str(member.id)], progress.match_index)
                behind = max(0, raft.log.commit_index - progress.match_index)
                lag.add_metric([str(member.id)], behind)
        yield match
        yield lag
