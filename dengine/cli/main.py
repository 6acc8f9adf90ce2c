"""The parser of `dengine`, and how every command ends: its exit code (docs/reference.md)."""

from __future__ import annotations

import argparse
import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dengine import __version__
from dengine.cli import arguments, commands, completion, coordination, snapshots, streams, txn
from dengine.cli.parsers import add_repair, add_snapshot_commands
from dengine.cli.remote import Remote, resolve_endpoints, resolve_token, without_token
from dengine.errors import (
    ConfigError,
    DengineError,
    FatalError,
    StorageIO,
    TryAgain,
    Unauthorized,
)
from dengine.log import use_utf8
from dengine.security import is_absent_credential

REQUEST_FAILED = 1
USAGE = 2
INTERRUPTED = 130  # as a shell reports Ctrl-C
DISK_FAILED = (errno.EIO, errno.ENOSPC, errno.EDQUOT)

ABOUT = """\
A Raft-replicated key-value engine: start one node, grow to three while clients write.

  dengine serve --config config/n1.toml     run a node
  dengine put greeting hello                write, through any node
  dengine get greeting                      read it back
  dengine members                           who belongs to the cluster, and who leads
"""
ENDPOINTS = """\
Endpoints: --endpoint (repeats), else DENGINE_ENDPOINTS, else the file in CONFIG_PATH, else
/etc/dengine/dengine.toml, else 127.0.0.1:9081; tried in order, and any node serves any request.
Token: --token-file, else DENGINE_TOKEN_FILE, else the token_file that the same file names.
Exit codes: 0 done, 1 the request failed, 2 usage, 78 configuration.
"""
SERVE_EPILOG = """\
examples:
  dengine serve --config config/n1.toml
  CONFIG_PATH=config/n1.toml DENGINE__LOG__LEVEL=debug dengine serve

SIGTERM or Ctrl-C hands leadership over, drains, syncs and exits 0. Other exit codes: 65 damaged
data (a person is needed), 70 a broken invariant, 74 the disk failed (a restart recovers), 75 try
again (port taken), 76 this directory may not take part, 78 configuration.
"""
# They change something, and print nothing before it is done.
DONE_WHEN_TOLD = (
    *(commands.put, commands.delete, txn.txn),
    *(commands.promote, commands.remove, commands.move, commands.transfer_leader),
)
CONSISTENCY = ("linearizable", "lease", "eventual")

Add = Callable[..., argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (None: the process's own) and return its exit code."""
    streams.prepare()
    use_utf8()
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
    except SystemExit as end:  # of the parser: --help, or words that it does not know
        code = int(end.code or 0)
    try:  # the parser does not say when nobody got its help
        sys.stdout.flush()
    except BrokenPipeError:
        streams.give_up(sys.stdout)
        return code or REQUEST_FAILED
    except streams.OutputFailed as error:
        streams.give_up(sys.stdout)
        return code or _fail(str(error), REQUEST_FAILED)
    return code


def _run(argv: Sequence[str]) -> int:
    parser = _parser()
    words, command = coordination.split_command(argv)
    args, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(coordination.unknown_arguments(argv, unknown))
    if command:
        args.command = command
    try:
        if not hasattr(args, "endpoint") or getattr(args, "data_dir", None) is not None:
            return int(args.run(args))
        try:
            endpoints = resolve_endpoints(args.endpoint, os.environ)
        except ValueError as error:
            return _fail(str(error), USAGE)
        token = resolve_token(args.token_file, os.environ)
        return _request(args, Remote(endpoints, args.timeout, token))
    except snapshots.FailedHere as failure:
        return _fail(failure.error.message, failure.error.exit_code)
    except FatalError as error:
        return _fail(error.message, error.exit_code)
    except DengineError as error:
        return _fail(error.message, REQUEST_FAILED)
    except ModuleNotFoundError as error:
        message = (
            f"{error.name} is not installed: pip install 'dengine[node]' has what a node needs"
        )
        return _fail(message, ConfigError.exit_code)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        streams.give_up(sys.stdout)
        return REQUEST_FAILED
    except streams.InputClosed as error:
        return _fail(str(error), USAGE)
    except streams.OutputFailed as error:
        streams.give_up(sys.stdout)
        done = "; what was asked for was carried out" if args.run in DONE_WHEN_TOLD else ""
        return _fail(f"{error}{done}", REQUEST_FAILED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", REQUEST_FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED


def _request(args: argparse.Namespace, remote: Remote) -> int:
    """Run a client command. What ends a node, damaged data say, is a failed request out here."""
    try:
        return int(args.run(args, remote))
    except DengineError as error:
        message = error.message
        if isinstance(error, Unauthorized) and remote.token is None:
            message += without_token(os.environ)
        return _fail(f"{message} ({error.name}, outcome {error.outcome})", REQUEST_FAILED)


def _fail(message: str, exit_code: int) -> int:
    try:
        print(f"dengine: {message}", file=sys.stderr)
    except OSError:  # the exit code is all that is left to tell it
        streams.give_up(sys.stderr)
    return exit_code


def _parser() -> argparse.ArgumentParser:
    """All commands; each sets `run` to the function that executes it."""
    parser = argparse.ArgumentParser(
        prog="dengine", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"dengine {__version__}")
    subcommands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    client = arguments.client(5.0, "for each request and its repetitions")

    def add(name: str, about: str, epilog: str, *, parent: bool = True) -> argparse.ArgumentParser:
        return subcommands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=f"examples:\n{epilog}\n{ENDPOINTS}" if parent else epilog,
            parents=[client] if parent else [],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    _add_node_commands(functools.partial(add, parent=False))
    _add_key_commands(add)
    _add_list(add)
    coordination.add_commands(add, subcommands, ENDPOINTS)
    _add_cluster_commands(add)
    add_snapshot_commands(subcommands, ENDPOINTS)
    add_repair(functools.partial(add, parent=False))
    _add_bench(add)
    completion.add_command(functools.partial(add, parent=False), parser)
    return parser


def _add_node_commands(add: Add) -> None:
    serve = add("serve", "run a node in the foreground", SERVE_EPILOG)
    serve.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file (default: CONFIG_PATH)"
    )
    serve.set_defaults(run=_serve)
    check = add(
        "check-config",
        "say whether a configuration file is right; touches nothing",
        "examples:\n  dengine check-config config/n1.toml\n",
    )
    check.add_argument("config", type=Path, nargs="?", metavar="FILE")
    check.set_defaults(run=_check_config)


def _add_key_commands(add: Add) -> None:
    get = add("get", "write the value of a key to standard output", "  dengine get greeting\n")
    get.add_argument("key")
    get.add_argument("--consistency", choices=CONSISTENCY, help="default: the node's")
    get.add_argument("--json", action="store_true", help="with key and revision, as JSON")
    get.set_defaults(run=commands.get)

    put = add(
        "put",
        "store a value under a key",
        "  dengine put greeting hello\n"
        "  tar c notes | dengine put backup -\n"
        "  dengine put logo --file logo.png\n"
        "  dengine put leader-of-jobs me --if-none-match    only if nobody else did\n"
        "  dengine put session/7 anna --ttl 60\n",
    )
    put.add_argument("key")
    value = put.add_mutually_exclusive_group(required=True)
    value.add_argument("value", nargs="?", help='"-" reads standard input')
    value.add_argument("--file", type=Path, help="read the value from this file")
    put.add_argument(
        "--if-match",
        type=arguments.revision,
        metavar="REV",
        help='only if the key is at this revision ("*")',
    )
    put.add_argument("--if-none-match", action="store_true", help="only if there is no such key")
    end = put.add_mutually_exclusive_group()
    end.add_argument("--ttl", type=arguments.ttl, metavar="S", help="it expires after S seconds")
    end.add_argument("--lease", metavar="ID", help="it ends with this lease")
    arguments.add_idempotency_key(put)
    put.set_defaults(run=commands.put)

    delete = add(
        "delete",
        "delete a key, or a range of keys",
        "  dengine delete greeting\n  dengine delete --prefix session/\n",
    )
    chosen = delete.add_mutually_exclusive_group(required=True)
    chosen.add_argument("key", nargs="?")
    chosen.add_argument("--prefix", help="delete every key that begins with this")
    chosen.add_argument("--start", help="delete every key from here (up to before --end)")
    delete.add_argument("--end", help="first key that stays")
    delete.add_argument("--all", action="store_true", help="allow the empty prefix")
    delete.add_argument(
        "--if-match",
        type=arguments.revision,
        metavar="REV",
        help='only if the key is at this revision ("*")',
    )
    arguments.add_idempotency_key(delete)
    delete.set_defaults(run=commands.delete)

    transaction = add("txn", "compare, then change several keys as one", txn.EXAMPLES)
    transaction.add_argument("--json", action="store_true", help="print the answer as JSON")
    arguments.add_idempotency_key(transaction)
    transaction.set_defaults(run=txn.txn)


def _add_list(add: Add) -> None:
    listing = add(
        "list",
        "list keys in order",
        "  dengine list service/\n  dengine list --start a --end n --keys-only\n",
    )
    listing.add_argument("prefix", nargs="?", help="only keys that begin with this")
    listing.add_argument("--start", help="first key")
    listing.add_argument("--end", help="first key after the last")
    listing.add_argument("--limit", type=arguments.positive, metavar="N", help="at most this many")
    listing.add_argument("--keys-only", action="store_true")
    listing.add_argument("--count", action="store_true", help="only how many")
    listing.add_argument("--consistency", choices=CONSISTENCY, help="default: the node's")
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(run=commands.list_keys)


def _add_cluster_commands(add: Add) -> None:
    status = add(
        "status",
        "one line for each endpoint: role, term, leader, progress",
        "  dengine status --endpoint 10.0.0.1:9081 --endpoint 10.0.0.2:9081\n",
    )
    status.set_defaults(run=commands.status)
    members = add(
        "members", "the membership, and what it can survive", "  dengine members --json\n"
    )
    members.set_defaults(run=commands.members)
    settings = add(
        "settings",
        "show or change the replicated settings",
        "  dengine settings\n  dengine settings promotion=odd\n",
    )
    settings.add_argument("changes", nargs="*", type=arguments.change, metavar="NAME=VALUE")
    settings.set_defaults(run=commands.settings)
    for reading in (status, members, settings):
        reading.add_argument("--json", action="store_true", help="for programs")

    promote = add("promote", "make learners voters, in one change", "  dengine promote 2 3\n")
    promote.add_argument("ids", type=arguments.positive, nargs="+", metavar="ID")
    promote.set_defaults(run=commands.promote)
    remove = add("remove", "remove a node for good; its id never returns", "  dengine remove 3\n")
    remove.add_argument("id", type=arguments.positive, metavar="ID")
    remove.set_defaults(run=commands.remove)
    move = add("move", "give a node a new address", "  dengine move 2 192.168.1.21:9081\n")
    move.add_argument("id", type=arguments.positive, metavar="ID")
    move.add_argument("address", metavar="ADDRESS")
    move.set_defaults(run=commands.move)
    transfer = add("transfer-leader", "let another voter lead", "  dengine transfer-leader 2\n")
    transfer.add_argument("id", type=arguments.positive, metavar="ID")
    transfer.set_defaults(run=commands.transfer_leader)


def _add_bench(add: Add) -> None:
    bench = add(
        "bench",
        "measure a running cluster: requests per second, p50, p99",
        "  dengine bench put --connections 64 --seconds 10\n"
        "  dengine bench get --consistency lease --json\n"
        "It writes keys under a prefix of its own and deletes them afterwards.\n",
    )
    bench.add_argument("operation", choices=("put", "get"))
    bench.add_argument("--connections", type=arguments.positive, default=64, metavar="N")
    bench.add_argument("--seconds", type=arguments.seconds, default=10.0, metavar="S")
    bench.add_argument("--value-bytes", type=arguments.positive, default=256, metavar="N")
    bench.add_argument("--keys", type=arguments.bench_keys, default=1000, metavar="N")
    bench.add_argument("--consistency", choices=CONSISTENCY, help="of get")
    bench.add_argument("--json", action="store_true")
    bench.set_defaults(run=_bench)


# What follows needs more than the installed client alone, so it is imported when it is called.


def _serve(args: argparse.Namespace) -> int:
    try:
        from dengine.cli.serve import serve

        return serve(args.config)
    # Of this system, modules included: what the node itself meets, it says in its own words.
    except OSError as error:
        kind = StorageIO if error.errno in DISK_FAILED else TryAgain
        where = f"{error.filename}: " if error.filename else ""
        raise kind(f"the system refused: {where}{error.strerror or error}") from error


def _check_config(args: argparse.Namespace) -> int:
    from dengine import config

    loaded = config.load(args.config, os.environ, outside_unit=True)
    if loaded.own_entry.role is config.InitialRole.LEARNER:
        plan = "joins a cluster"
    else:
        roles = [member.role for member in loaded.cluster.initial_cluster]
        founders = len(roles) - roles.count(config.InitialRole.LEARNER)
        plan = f"founds a cluster of {founders}"
    print(f"{loaded.source}: ok (node {loaded.cluster.node_id} {plan})")
    for file in (loaded.security.peer_secret_file, loaded.security.token_file):
        if file is not None and is_absent_credential(file):
            print(f"{file} was not looked at: it is there only while its unit runs")
    return 0


def _bench(args: argparse.Namespace, remote: Remote) -> int:
    from dengine.cli.bench import bench

    return bench(args, remote)
