"""Taking hold of the data directory, or why this node cannot have it; what it says of time."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from dengine.config import Config
from dengine.errors import ConfigError, IdentityError, StorageIO
from dengine.kv.commands import batch_clock_ms
from dengine.raft.raft import RaftConfig
from dengine.raft.types import EntryKind, LogId, MemberId
from dengine.storage.directory import DataDirectory
from dengine.storage.log_store import LogStore
from dengine.storage.recovery import open_stores
from dengine.storage.state_store import StateStore

# No restart helps against these, unlike against a disk that fails or is full.
MISPLACED = (
    errno.EACCES,
    errno.EEXIST,
    errno.EINVAL,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EROFS,
)


@contextmanager
def opening(config: Config) -> Iterator[tuple[DataDirectory, LogStore, StateStore]]:
    """Directory, log and state; they are closed again if the block raises, for an app that embeds
    the node goes on. Raises as `open_directory` and `open_stores`.
    """
    directory = open_directory(config)
    with ExitStack() as opened:
        opened.callback(directory.close)
        log, state = open_stores(directory)
        opened.callback(log.close)
        opened.callback(state.close)
        yield directory, log, state
        opened.pop_all()


def open_directory(config: Config) -> DataDirectory:
    """Lock the directory that `config` names; make it where there is none.

    Raises:
        ConfigError: nothing can be kept under that path.
        IdentityError: it belongs to another node, or the cluster removed this one.
        FatalError: locked by another process, damaged, ...
    """
    cluster = config.cluster
    try:
        directory = DataDirectory.open(cluster.db_root_dir, cluster.node_id)
    except StorageIO as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in MISPLACED:
            raise ConfigError(f"{config.source}: cluster.db_root_dir: {error.message}") from error
        raise
    identity = directory.identity
    if identity.removed:
        directory.close()
        raise IdentityError(
            f"node {identity.node_id} was removed from cluster {identity.cluster_id} "
            f"({identity.removed}): {directory.path} cannot be used again; start a new "
            "node with a new node_id and an empty directory"
        )
    halted = directory.halted
    if halted is not None:
        directory.close()
        raise halted
    return directory


def last_clock(log: LogStore, state: StateStore) -> tuple[LogId, int]:
    """The last entry in this directory that carries a log time, and this time: in its log or else
    in the state. The time is 0 where there is none.

    Such an entry may not be applied yet, nor committed; a leader that began behind it would let
    time stand still until it had caught up.
    """
    for index in range(log.last_index(), max(state.applied.index, log.first_index() - 1), -1):
        (entry,) = log.entries(index, index + 1, 1)
        clock_ms = batch_clock_ms(entry.data) if entry.kind is EntryKind.NORMAL else None
        if clock_ms is not None:
            return entry.log_id, clock_ms
    return state.applied, state.clock_ms


def raft_config(config: Config, directory: DataDirectory, me: MemberId) -> RaftConfig:
    """This node's timing, and how long it waits for others to speak up where nobody else votes.

    Before this start it may have promised leaders more than it does now: leases rest on that.
    Raises StorageIO.
    """
    election = config.election
    promised_ms = max(directory.identity.stickiness_ms, election.timeout_ms_min)
    directory.set_stickiness(promised_ms)
    return RaftConfig(
        me=me,
        timeout_ms_min=election.timeout_ms_min,
        timeout_ms_max=election.timeout_ms_max,
        heartbeat_ms=election.heartbeat_ms,
        lease_ms=config.read.lease_ms,
        start_stickiness_ms=promised_ms,
        # At each start: nothing on a disk can tell that it is not a copy of another time.
        sole_voter_wait_ms=config.cluster.founding_wait_ms,
    )
