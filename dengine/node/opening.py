"""Taking hold of the data directory, or saying why this node cannot have it."""

from __future__ import annotations

import errno

from dengine.config import Config
from dengine.errors import ConfigError, IdentityError, StorageIO
from dengine.storage.directory import DataDirectory

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
        raise IdentityError(
            f"node {identity.node_id} was removed from cluster {identity.cluster_id} "
            f"({identity.removed}): {directory.path} cannot be used again; start a new "
            "node with a new node_id and an empty directory"
        )
    return directory
