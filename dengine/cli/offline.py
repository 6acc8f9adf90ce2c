"""What works on files and on the directory of a stopped node: verify, restore, save, repair."""

from __future__ import annotations

import json
import os
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from dengine import config
from dengine.cli.commands import print_json, print_table
from dengine.cli.progress import ProgressBar, format_bytes
from dengine.cli.snapshots import require_new
from dengine.errors import ConfigError, Conflict, NotFound, StorageIO
from dengine.raft.membership import Member, Membership
from dengine.raft.types import MemberId
from dengine.storage.directory import DataDirectory
from dengine.storage.recovery import open_stores
from dengine.storage.repair import Survey, not_needed, repairing
from dengine.storage.restore import CHUNK_BYTES, Founded, give_to, restore
from dengine.storage.snapshot_file import SnapshotInfo, read_header
from dengine.storage.snapshots import take, unpack

APPLY_BYTES = 8 * 1024 * 1024
NEXT = """\

Start it with a configuration like this:

  [cluster]
  node_id = {node_id}
  listen_address = {address}
  initial_cluster = [ {{ id = {node_id}, address = {address}, role = 2, status = 2 }} ]
  db_root_dir = {root}

Every other node joins with an EMPTY data directory and role = 3 in its own entry. Directories of
the old cluster are refused: move them away first.
"""


def verify_snapshot(args: Namespace) -> int:
    """Check every part of a file, and the state in it, and say what is inside."""
    read_header(args.file)  # before anything is made
    with ProgressBar("verify") as bar, _scratch(args.file) as scratch:
        info = unpack(args.file, Path(scratch) / "state", bar.update)
    described = _described(info)
    if args.json:
        print_json(described)
        return 0
    members = described.pop("members")
    described["size_bytes"] = f"{info.size_bytes} ({format_bytes(info.size_bytes)})"
    print_table(
        ("SNAPSHOT", "sound"), [(name.replace("_", " "), str(v)) for name, v in described.items()]
    )
    print()
    names = ("id", "address", "zone", "role", "status")
    print_table(
        [name.upper() for name in names], [[m[name] or "-" for name in names] for m in members]
    )
    return 0


def restore_snapshot(args: Namespace) -> int:
    """Make the data directory of a new cluster from a file."""
    with ProgressBar("restore") as bar:
        founded = restore(args.file, args.data_dir, args.node_id, args.address, bar.update)
    print(f"{founded.path}: cluster {founded.membership.cluster_id}, node {args.node_id} alone")
    _print_founded(founded, args.data_dir, args.node_id, args.address)
    return 0


def save_stopped(args: Namespace) -> int:
    """A snapshot of a stopped node: everything its directory has, log included."""
    file: Path = args.file
    require_new(file)
    path = args.data_dir / str(args.node_id)
    if not (path / "identity.json").exists():
        raise NotFound(f"{path} is not the data directory of a node")
    directory = DataDirectory.open(args.data_dir, args.node_id)
    try:
        state = _brought_up_to_date(directory)
        with ProgressBar("snapshot") as bar:
            info = take(
                state,
                file.absolute().parent,
                node_id=args.node_id,
                chunk_bytes=CHUNK_BYTES,
                progress=bar.update,
                name=file.name,
            )
        directory.mark_clean()
    finally:
        directory.close()
        give_to(directory.path, args.data_dir)  # also what an attempt has made that failed
    header = info.header
    size = format_bytes(info.size_bytes)
    print(f"{file}: everything up to entry {header.index} of term {header.term}, {size}")
    print(f"sha256 {info.sha256}")
    return 0


def _brought_up_to_date(directory: DataDirectory) -> Path:
    """Apply what is committed; the closed, synced state.

    All that a sole voter has in its log is committed, whatever its hard state says.
    """
    identity = directory.identity
    log, state = open_stores(directory)
    try:
        hard_state, memberships = log.load()
        me = MemberId(identity.node_id, identity.incarnation)
        committed = hard_state.commit_index
        if memberships and memberships[-1][1].is_sole_voter(me):
            committed = log.last_index()
        if state.applied.index < log.first_index() - 1:
            raise Conflict(
                f"{directory.path} has lost its state, and its log begins at entry "
                f"{log.first_index()}: start the node, and it gets a snapshot from the others"
            )
        while state.applied.index < min(committed, log.last_index()):
            first = state.applied.index + 1
            state.apply(log.entries(first, min(first + 1000, committed + 1), APPLY_BYTES))
        if not state.applied.index:
            raise Conflict(f"{directory.path} holds nothing yet: no entry was ever committed")
        state.sync()
    finally:
        state.close()
        log.close()
    return state.path


def repair(args: Namespace) -> int:
    """Say what a damaged directory, or one without its majority, still has; or go on with it."""
    address = None
    if args.config is not None:
        # Not `load`: it wants the secrets, and the credentials of a stopped unit are gone.
        loaded = config.read(args.config, os.environ)
        root, node_id = loaded.cluster.db_root_dir, loaded.cluster.node_id
        address = loaded.cluster.advertise_address or loaded.own_entry.address
    else:
        root, node_id = args.data_dir, args.node_id
    with ProgressBar("repair") as bar, repairing(root, node_id, bar.update) as attempt:
        bar.clear()
        survey = attempt.survey
        if not survey.is_needed:
            raise not_needed(survey)
        _print_survey(survey)
        if not args.accept_data_loss:
            print(
                "\nNothing was changed. If all of this is acceptable, run it again with "
                "--accept-data-loss."
            )
            return 1
        address = address or (survey.member.address if survey.member is not None else None)
        if address is None:
            raise ConfigError("the address of this node is not known here: use --config FILE")
        founded, aside = attempt.carry_out(address, bar.update)
    print(f"\n{founded.path}: cluster {founded.membership.cluster_id}, node {node_id} alone")
    print(f"The old directory is kept in {aside}: remove it when nobody needs it any more.")
    _print_founded(founded, root, node_id, address)
    return 0


def _print_survey(survey: Survey) -> None:
    kept, last = survey.kept.index, survey.last_index
    if last is None:
        lost = f"everything after entry {kept}: how much that was cannot be read any more"
    elif last > kept:
        lost = f"entries {kept + 1} to {last} of this node's log"
    else:
        lost = "nothing of this node's log"
    rows = [
        ("cluster", survey.cluster_id or "-"),
        ("damaged", "; ".join(survey.damage) or "nothing"),
        ("kept", f"everything up to entry {kept}, revision {survey.revision}"),
        ("from", f"{survey.source} and the log after it"),
        ("lost", lost),
    ]
    rows += [
        ("left out", f"node {m.id.id} at {m.address}, and whatever only it had")
        for m in survey.others
    ]
    print_table((f"NODE {survey.node_id}", str(survey.path)), rows)
    if survey.others:
        print(
            f"\nIf a majority of the {len(survey.others) + 1} voters can still be started, start "
            "it instead: it loses nothing, and a damaged node is brought up to date by the others."
        )


def _print_founded(founded: Founded, root: Path, node_id: int, address: str) -> None:
    print(
        f"It begins after entry {founded.applied.index} at revision {founded.revision}, "
        "above all that the old one can have used: watchers begin anew."
    )
    print(
        NEXT.format(
            node_id=node_id,
            address=json.dumps(address),
            root=json.dumps(str(root), ensure_ascii=False),
        ),
        end="",
    )


def _scratch(file: Path) -> tempfile.TemporaryDirectory[str]:
    """Where the state is unpacked for a moment: TMPDIR, else beside the file, else /tmp."""
    beside = file.absolute().parent
    chosen = None if os.environ.get("TMPDIR") or not os.access(beside, os.W_OK) else beside
    try:
        return tempfile.TemporaryDirectory(prefix=".dengine-verify-", dir=chosen)
    except OSError as error:
        raise StorageIO(f"cannot make a temporary directory: {error.strerror}") from error


def _described(info: SnapshotInfo) -> dict[str, Any]:
    header = info.header
    membership = header.membership
    return {
        "file": str(info.path),
        "cluster_id": header.cluster_id,
        "node_id": header.node_id,
        "index": header.index,
        "term": header.term,
        "revision": header.revision,
        "records": header.records,
        "taken_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(header.taken_at_s)),
        "size_bytes": info.size_bytes,
        "data_bytes": info.data_bytes,
        "sha256": info.sha256,
        "state_hash": header.state_hash.hex(),
        "members": [_member(membership, member) for member in membership.members],
    }


def _member(membership: Membership, member: Member) -> dict[str, Any]:
    return {
        "id": member.id.id,
        "incarnation": f"{member.id.incarnation:016x}",
        "address": member.address,
        "zone": member.zone,
        "role": "voter" if member.id in membership.all_voters else "learner",
        "status": member.status.name.lower(),
    }
