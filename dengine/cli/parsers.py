"""The parsers of `dengine snapshot` and `dengine repair`, which explain themselves at length."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from dengine.cli import arguments, snapshots
from dengine.cli.remote import Remote

USAGE = 2
SNAPSHOT_EPILOG = """\
  dengine snapshot save backup.dsnap        from any node, while the cluster works
  dengine snapshot verify backup.dsnap      is it sound, and what is in it?
  dengine snapshot restore backup.dsnap --data-dir db --node-id 1 --address 10.0.0.1:9081

Each command explains itself: dengine snapshot save --help
"""
SNAPSHOT_S = 600.0
TAKE_EXAMPLES = """\
  dengine snapshot take
  dengine snapshot take --endpoint 10.0.0.2:9081 --json
"""
SAVE_EXAMPLES = """\
  dengine snapshot save backup.dsnap
  dengine snapshot save backup.dsnap --endpoint 10.0.0.3:9081
  dengine snapshot save backup.dsnap --data-dir /var/lib/dengine --node-id 1   (a stopped node)

Any node will do. Until it is complete and checked, the file is called FILE.partial; after a cut
the transfer goes on by itself, and after an interruption the same command goes on from there if
it is run within an hour and the node still has that snapshot. An existing FILE is never replaced.
Only its owner may read it.
"""
VERIFY_EXAMPLES = """\
  dengine snapshot verify backup.dsnap
  TMPDIR=/var/tmp dengine snapshot verify backup.dsnap --json

The state in it is unpacked for a moment, in TMPDIR or else beside FILE, and checked record by
record against its hash.
"""
RESTORE_EXAMPLES = """\
  dengine snapshot restore backup.dsnap --data-dir /var/lib/dengine --node-id 1 \\
      --address 10.0.0.1:9081

It makes DIR/N, which must be missing or empty, the directory of the first node of a NEW cluster:
all keys and settings as they were, this node as the only voter, and the revision 1,000,000 higher,
so that no watcher travels back in time. Members of the old cluster are refused; every other node
joins with an empty directory and role = 3.
"""
REPAIR_EPILOG = """\
examples:
  dengine repair --config /etc/dengine/dengine.toml
  dengine repair --config /etc/dengine/dengine.toml --accept-data-loss
  dengine repair --data-dir /var/lib/dengine --node-id 1

Two cases have no other way out: the log of a single node is damaged, or the majority of a cluster's
data directories is lost. Stop the node first. Without --accept-data-loss it says what would be kept
and what would be lost, changes nothing and exits 1. With it, this node becomes the only voter of a
NEW cluster, with everything that can still be read; the old directory is kept beside it. All other
nodes must join again, with empty directories and role = 3.
Exit codes: 0 done, 1 nothing done, 2 usage, 65 nothing can be kept, 74 the disk failed, 75 a node
runs in this directory, 76 another node's directory, 78 configuration.
"""
FILE_CODES = """\
Exit codes: 0 done, 1 refused, 2 usage, 65 the file is damaged, foreign or of a newer format, 74 it
cannot be read or written, 75 the directory is in use. A failure leaves everything as it was.
"""
SAVE_CODES = """\
Also 65 what arrived, or what the directory holds, is damaged, 74 the disk of this machine refused;
with --data-dir 75 a node runs in that directory, 76 it is another node's.
"""

Add = Callable[..., argparse.ArgumentParser]


def add_snapshot_commands(
    subcommands: argparse._SubParsersAction[argparse.ArgumentParser], endpoints: str
) -> None:
    """`endpoints` says at the end of a help how a node is found."""
    about = "back a cluster up, look into a backup, and begin anew from one"
    group = subcommands.add_parser(
        "snapshot",
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=SNAPSHOT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    ).add_subparsers(metavar="COMMAND", required=True, title="commands")
    client = arguments.client(SNAPSHOT_S, "for the snapshot to be taken")

    def add(
        name: str, about: str, epilog: str, *, parent: bool, codes: str = ""
    ) -> argparse.ArgumentParser:
        return group.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=f"examples:\n{epilog}\n{endpoints if parent else FILE_CODES}{codes}",
            parents=[client] if parent else [],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    taking = add("take", "have one node take a snapshot now", TAKE_EXAMPLES, parent=True)
    taking.set_defaults(run=snapshots.take)
    listing = add(
        "list", "the snapshots that a node keeps", "  dengine snapshot list\n", parent=True
    )
    listing.set_defaults(run=snapshots.list_all)
    saving = add(
        "save",
        "take a snapshot and save it in a file here",
        SAVE_EXAMPLES,
        parent=True,
        codes=SAVE_CODES,
    )
    saving.add_argument("file", type=Path, metavar="FILE", help="must not exist yet")
    _directory(saving, required=False)
    saving.set_defaults(run=_snapshot_save)
    verifying = add(
        "verify", "check all of a file and say what is in it", VERIFY_EXAMPLES, parent=False
    )
    verifying.add_argument("file", type=Path, metavar="FILE")
    verifying.set_defaults(run=_snapshot_verify)
    for reading in (taking, listing, verifying):
        reading.add_argument("--json", action="store_true", help="for programs")
    restoring = add("restore", "begin a NEW cluster from a file", RESTORE_EXAMPLES, parent=False)
    restoring.add_argument("file", type=Path, metavar="FILE")
    _directory(restoring, required=True)
    restoring.add_argument(
        "--address",
        required=True,
        metavar="HOST:PORT",
        help="of the new node",
    )
    restoring.set_defaults(run=_snapshot_restore)


def _directory(command: argparse.ArgumentParser, *, required: bool) -> None:
    command.add_argument(
        "--data-dir", type=Path, required=required, metavar="DIR", help="db_root_dir of the node"
    )
    command.add_argument("--node-id", type=arguments.node_id, required=required, metavar="N")


def add_repair(add: Add) -> None:
    """`add` makes the parser of a command that needs no endpoint."""
    repair = add(
        "repair",
        "go on with what is left, where data is lost for good",
        REPAIR_EPILOG,
    )
    repair.add_argument("--config", type=Path, metavar="FILE", help="of the node to repair")
    _directory(repair, required=False)
    repair.add_argument(
        "--accept-data-loss",
        action="store_true",
        help="do it; without this, only say what would be kept and lost",
    )
    repair.set_defaults(run=_repair)


# What follows needs more than the installed client alone, so it is imported when it is called.


def _snapshot_save(args: argparse.Namespace, remote: Remote | None = None) -> int:
    if (args.data_dir is None) != (args.node_id is None):
        return _usage("--data-dir and --node-id go together")
    if remote is not None:
        return snapshots.save(args, remote)
    if args.endpoint:
        return _usage("--endpoint names a running node, --data-dir a stopped one: not both")
    from dengine.cli import offline

    return offline.save_stopped(args)


def _snapshot_verify(args: argparse.Namespace) -> int:
    from dengine.cli import offline

    return offline.verify_snapshot(args)


def _snapshot_restore(args: argparse.Namespace) -> int:
    from dengine.cli import offline
    from dengine.config import parse_address

    try:
        parse_address(args.address)
    except ValueError as error:
        return _usage(f"--address: {args.address!r} {error}")
    return offline.restore_snapshot(args)


def _repair(args: argparse.Namespace) -> int:
    named = (args.data_dir is not None) + (args.node_id is not None)
    if named not in (0, 2) or (named == 2) == (args.config is not None):
        return _usage("name the node with --config, or with --data-dir and --node-id")
    from dengine.cli import offline

    return offline.repair(args)


def _usage(message: str) -> int:
    print(f"dengine: {message}", file=sys.stderr)
    return USAGE
