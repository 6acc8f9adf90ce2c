"""What a packet filter says about one port, from `nft --json list ruleset`. Pure functions.

Only a hint: rules look at more than ports. Elsewhere the way itself is measured.
"""

from __future__ import annotations

PASSES = ("accept", "jump", "goto")
STOPS = ("drop", "reject")
PORT_OF = ("tcp", "th")


def judge(ruleset, port):
    """Returns (closed, opened, unread).

    closed: is there something at the input that stops what no rule lets in?
    opened: does a rule let TCP `port` in, or anything that comes from certain addresses?
    unread: does a rule let something in that only the program which made it can read?
    """
    found = ruleset["nftables"]
    entrances = [c for c in _all(found, "chain") if c.get("hook") == "input"]
    sets = {_in(s, s["name"]): s.get("elem", []) for s in _all(found, "set") + _all(found, "map")}
    rules = _all(found, "rule")
    inputs = {_in(c, c["name"]) for c in entrances}
    closed = any(c.get("policy") == "drop" for c in entrances) or any(
        _in(r, r["chain"]) in inputs and _stops_all(r["expr"]) for r in rules
    )
    rules = [r for r in rules if _in(r, r["chain"]) in _reached(rules, inputs)]
    opened = any(
        _lets_in(r["expr"], port, lambda name, r=r: sets.get(_in(r, name), [])) for r in rules
    )
    unread = any(_passes(r["expr"]) and any("xt" in step for step in r["expr"]) for r in rules)
    return closed, opened, unread


def _all(found, kind):
    return [entry[kind] for entry in found if kind in entry]


def _in(entry, name):
    """A name of the table that `entry` is in."""
    return entry["family"], entry["table"], name


def _reached(rules, inputs):
    """The chains that a packet may come through on its way in."""
    reached, more = set(), set(inputs)
    while more:
        reached |= more
        more = {
            _in(rule, target)
            for rule in rules
            if _in(rule, rule["chain"]) in reached
            for target in _targets(rule["expr"])
        } - reached
    return reached


def _targets(value):
    """The chains that are named anywhere in the steps of a rule."""
    if isinstance(value, list):
        return [target for part in value for target in _targets(part)]
    if not isinstance(value, dict):
        return []
    here = [value[kind]["target"] for kind in ("jump", "goto") if kind in value]
    return here + [target for part in value.values() for target in _targets(part)]


def _stops_all(steps):
    """A rule that stops what comes to it, whatever it is: the end of a chain."""
    return any(kind in step for step in steps for kind in STOPS) and not any(
        kind in step for step in steps for kind in ("match", "xt", "limit")
    )


def _lets_in(steps, port, named):
    """Does this rule let in TCP `port`, or all ports of certain addresses?"""
    by_port = by_address = False
    for step in steps:
        if "vmap" in step and _is_port(step["vmap"]["key"]):
            verdicts = _elements(step["vmap"]["data"], named)
            if any(_holds(value, port) and _passes([verdict]) for value, verdict in verdicts):
                return True
        match = step.get("match")
        if not match:
            continue
        left = match["left"]
        if left == {"ct": {"key": "state"}} and "new" not in match["right"]:
            return False  # what is there already, and nobody who comes anew
        parts = left["concat"] if isinstance(left, dict) and "concat" in left else [left]
        by_address = by_address or any(_field(part) == "saddr" for part in parts)
        place = next((i for i, part in enumerate(parts) if _field(part) == "dport"), None)
        if place is None:
            continue
        inside = any(
            _holds(value["concat"][place] if len(parts) > 1 else value, port)
            for value in map(_plain, _elements(match["right"], named))
            if len(parts) == 1 or (isinstance(value, dict) and "concat" in value)
        )
        if not _is_port(parts[place]) or inside == (match["op"] == "!="):
            return False
        by_port = True
    return (by_port or by_address) and _passes(steps)


def _passes(steps):
    return any(kind in step for step in steps for kind in PASSES)


def _field(part):
    payload = part.get("payload") if isinstance(part, dict) else None
    return payload.get("field") if isinstance(payload, dict) else None


def _is_port(part):
    return _field(part) == "dport" and part["payload"].get("protocol") in PORT_OF


def _elements(right, named):
    """What a match compares with, one by one: a value, a set, or the name of a set."""
    if isinstance(right, str) and right.startswith("@"):
        return named(right[1:])
    if isinstance(right, dict) and "set" in right:
        return right["set"] if isinstance(right["set"], list) else [right["set"]]
    return right if isinstance(right, list) else [right]


def _plain(value):
    """An element without its counter or timeout."""
    return value["elem"]["val"] if isinstance(value, dict) and "elem" in value else value


def _holds(value, port):
    value = _plain(value)
    if isinstance(value, dict) and "range" in value:
        low, high = value["range"]
        return low <= port <= high
    return value == port
