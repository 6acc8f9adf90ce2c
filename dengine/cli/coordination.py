"""`dengine watch`, `lease`, `lock` and `elect`: what programs on several machines do together."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from dengine.cli import arguments
from dengine.cli.commands import item_bytes, print_json, print_table, printable, write_key
from dengine.cli.remote import Remote
from dengine.client.encoding import lease_target
from dengine.errors import DengineError, NotFound

USAGE = 2
RENEWALS = 3  # in each TTL
WATCH_EXAMPLES = """\
  dengine watch config/color
  dengine watch --prefix service/ --prev
  dengine watch --prefix service/ --from-revision 17 --json | jq .events

It prints each change as it happens, and goes on by itself on another node when its own fails, until
it is interrupted. With --json: one object per revision and line.
"""
LEASE_EPILOG = """\
  LEASE=$(dengine lease grant 30)
  dengine put service/web/1 10.0.0.7:80 --lease $LEASE
  dengine lease keepalive $LEASE            renews it until it is interrupted
  dengine lease show $LEASE
  dengine lease revoke $LEASE               ends it now, and its keys with it
"""
LOCK_EXAMPLES = """\
  dengine lock nightly -- ./report.sh
  dengine lock nightly --wait 60 --ttl 30 -- sh -c 'echo token $DENGINE_LOCK_TOKEN'

Who waits is served in order. DENGINE_LOCK_TOKEN grows from one holder to the next: a storage that
refuses lower ones is safe from holders that were stopped and do not know it. When the lock is lost,
because the cluster was out of reach for too long, COMMAND and everything that it started are ended,
in its process group or not: SIGTERM, and SIGKILL half a second later, or sooner with a --ttl below
10: a twentieth of it. What changed to another user is ended only if this process may; else named.
That is the work of this process. Where it is killed itself, by SIGKILL, COMMAND is killed too, but
nothing that COMMAND has started, which goes on without the lock until it looks at its token; nor
COMMAND itself where it is set-user-ID, as sudo is. After a normal end of COMMAND, what it leaves
running goes on, too, without the lock.
SIGTERM, SIGHUP and SIGINT are passed on to COMMAND, or ignored by both where they were before, as
under nohup; but in the foreground of a terminal SIGINT is taken for Ctrl-C, which COMMAND has heard
itself: to end it from a script, send SIGTERM, not SIGINT.
Exit code: that of COMMAND, 128 + N when signal N ended it, 127 when there is no such command, 126
when it is not executable, 1 when the lock was lost or could not be had.
"""
ELECT_EXAMPLES = """\
  dengine elect scheduler $(hostname)                       leads until it is interrupted
  dengine elect scheduler $(hostname) -- ./scheduler        leads while the command runs
  dengine elect scheduler --observe                         prints who leads, and who follows

VALUE is what others learn of the leader. COMMAND is run as by `dengine lock`.
"""
Add = Callable[..., argparse.ArgumentParser]
Subcommands = Any  # argparse keeps the name of its type private


def split_command(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """`argv`, and apart from it what follows `--` where that is a command to run."""
    words = list(argv)
    if words[:1] not in (["lock"], ["elect"]) or "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def unknown_arguments(argv: Sequence[str], unknown: Sequence[str]) -> str:
    """What to say of the words `unknown` of `argv`: often they are a command, without its `--`."""
    problem = f"unrecognized arguments: {' '.join(unknown)}"
    if argv[0] in ("lock", "elect") and "--" not in argv:
        problem += f" (a command to run follows --: dengine {argv[0]} ... -- COMMAND)"
    return problem


def add_commands(add: Add, subcommands: Subcommands, endpoints: str) -> None:
    """`add` makes the parser of a command; `endpoints` ends the help of those below `lease`."""
    watching = add("watch", "print changes as they happen", WATCH_EXAMPLES)
    chosen = watching.add_mutually_exclusive_group(required=True)
    chosen.add_argument("key", nargs="?")
    chosen.add_argument("--prefix", help="every key that begins with this")
    watching.add_argument(
        "--from-revision", type=arguments.positive, metavar="REV", help="also past changes, from"
    )
    watching.add_argument("--prev", action="store_true", help="with the value before")
    watching.add_argument("--json", action="store_true", help="one object per line, for programs")
    watching.set_defaults(run=_watch)
    _add_lease(subcommands, endpoints)

    lock = add("lock", "run a command while holding a lock", LOCK_EXAMPLES)
    lock.usage = "%(prog)s [options] NAME -- COMMAND [ARGUMENT ...]"
    lock.add_argument("name", type=arguments.lock_name)
    _add_holding(lock)
    lock.set_defaults(run=_lock, command=[])

    elect = add("elect", "lead, alone among all that want to", ELECT_EXAMPLES)
    elect.usage = "%(prog)s [options] NAME VALUE [-- COMMAND ...] | NAME --observe"
    elect.add_argument("name", type=arguments.lock_name)
    elect.add_argument("value", nargs="?", help="what others learn of the leader")
    elect.add_argument("--observe", action="store_true", help="only print who leads")
    elect.add_argument("--json", action="store_true", help="with --observe: one object per line")
    _add_holding(elect)
    elect.set_defaults(run=_elect, command=[])


def _add_holding(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ttl",
        type=arguments.ttl,
        default=10,
        metavar="S",
        help="seconds after which a dead holder is replaced (default 10)",
    )
    command.add_argument(
        "--wait", type=arguments.seconds, metavar="S", help="at most (default: as long as it takes)"
    )


def _add_lease(subcommands: Subcommands, endpoints: str) -> None:
    about = "grant, renew, show and end leases, which keys can be attached to"
    group = subcommands.add_parser(
        "lease",
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=LEASE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    ).add_subparsers(metavar="COMMAND", required=True, title="commands")
    client = arguments.client(5.0, "for each request and its repetitions")

    def add(name: str, about: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = group.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=f"examples:\n{LEASE_EPILOG}\n{endpoints}",
            parents=[client],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        return parser

    granting = add("grant", "a new lease; prints its id")
    granting.add_argument("ttl", type=arguments.ttl, metavar="SECONDS")
    arguments.add_idempotency_key(granting)
    granting.set_defaults(run=_grant)
    renewing = add("keepalive", "renew a lease again and again")
    renewing.add_argument("--once", action="store_true", help="once, and no more")
    renewing.set_defaults(run=_keepalive)
    showing = add("show", "how long a lease still lasts, and its keys")
    showing.set_defaults(run=_show)
    ending = add("revoke", "end a lease, and delete its keys")
    arguments.add_idempotency_key(ending)
    ending.set_defaults(run=_revoke)
    for named in (renewing, showing, ending):
        named.add_argument("id", metavar="ID")
    for reading in (granting, showing):
        reading.add_argument("--json", action="store_true", help="for programs")


# --- leases ---------------------------------------------------------------------------------------


def _grant(args: argparse.Namespace, remote: Remote) -> int:
    reply = remote.json("POST", "/v1/leases", {"ttl": args.ttl}, key=write_key(args))
    if args.json:
        print_json(reply)
    else:
        print(reply["id"])
    return 0


def _keepalive(args: argparse.Namespace, remote: Remote) -> int:
    """Renew until interrupted, at the node that answered last. Failures that may pass are tried
    again while the lease lasts.
    """
    where = _target(args.id)
    holds_until = time.monotonic()
    limit_s = remote.timeout_s  # before it is known how long the lease lasts
    while True:
        asked = time.monotonic()
        try:
            answer = remote.within(limit_s).call("POST", f"{where}/keepalive", kind="renewal")
        except NotFound:
            raise NotFound(f"lease {args.id} has ended") from None
        except DengineError as error:
            if args.once or not error.retryable or time.monotonic() >= holds_until:
                raise
            time.sleep(0.2)
            limit_s = _limit_s(remote, holds_until)
            continue
        remote = remote.beginning_with(answer.endpoint)
        ttl_s = float(answer.json()["ttl"])
        holds_until = asked + ttl_s
        print(f"lease {args.id} lasts {ttl_s:g} s", flush=True)
        if args.once:
            return 0
        time.sleep(ttl_s / RENEWALS)
        limit_s = _limit_s(remote, holds_until)


def _limit_s(remote: Remote, holds_until: float) -> float:
    """For one renewal: as for any call, but not longer than the lease lasts."""
    return min(remote.timeout_s, max(holds_until - time.monotonic(), 0.1))


def _show(args: argparse.Namespace, remote: Remote) -> int:
    reply = remote.json("GET", _target(args.id))
    if args.json:
        print_json(reply)
        return 0
    keys = [{"key": key} if isinstance(key, str) else key for key in reply.get("keys") or ()]
    rows = [(name, reply[name]) for name in ("id", "ttl", "remaining") if name in reply]
    print_table(("LEASE", ""), [*rows, *(("key", printable(item_bytes(k, "key"))) for k in keys)])
    return 0


def _revoke(args: argparse.Namespace, remote: Remote) -> int:
    reply = remote.json("DELETE", _target(args.id), key=write_key(args))
    rest = "; it held so many keys that some are left, which go by themselves"
    print(f"lease {args.id} is ended{rest if reply.get('going') else ''}")
    return 0


def _target(id: str) -> str:
    try:
        return lease_target(id)
    except ValueError as error:
        raise NotFound(str(error)) from None


# --- what needs the client library, and with it an event loop ------------------------------------


def _watch(args: argparse.Namespace, remote: Remote) -> int:
    from dengine.cli.holding import watch

    return watch(args, remote)


def _lock(args: argparse.Namespace, remote: Remote) -> int:
    if not args.command:
        print("dengine: COMMAND is missing: dengine lock NAME -- COMMAND", file=sys.stderr)
        return USAGE

    from dengine.cli.holding import run_holding

    def take(client: Any) -> Any:
        return client.lock(os.fsencode(args.name), ttl_s=args.ttl, timeout_s=args.wait)

    remote = _within_wait(args, remote)
    return run_holding(remote, f"lock {args.name!r}", args.command, args.ttl, take)


def _within_wait(args: argparse.Namespace, remote: Remote) -> Remote:
    """`remote` whose requests take no longer than the waiting may: what fails is known by then."""
    return remote if args.wait is None else remote.within(min(args.wait, remote.timeout_s))


def _elect(args: argparse.Namespace, remote: Remote) -> int:
    from dengine.cli.holding import observe, run_holding

    if args.observe:
        if args.value is not None or args.command:
            print("dengine: --observe takes neither VALUE nor COMMAND", file=sys.stderr)
            return USAGE
        return observe(args, remote)
    if args.json:
        print("dengine: --json goes with --observe", file=sys.stderr)
        return USAGE
    if args.value is None:
        print("dengine: VALUE is missing: what others learn of the leader", file=sys.stderr)
        return USAGE

    def take(client: Any) -> Any:
        election = client.election(os.fsencode(args.name))
        return election.campaign(os.fsencode(args.value), ttl_s=args.ttl, timeout_s=args.wait)

    remote = _within_wait(args, remote)
    return run_holding(remote, f"leadership of {args.name!r}", args.command, args.ttl, take)
