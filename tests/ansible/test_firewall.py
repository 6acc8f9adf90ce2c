"""What the rules of a host's packet filter say about the port of a node."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from ansible_collections.dengine.core.plugins.module_utils import checks, firewall

PORT = 9082
Step = dict[str, Any]
ACCEPT: Step = {"accept": None}
COUNTER: Step = {"counter": {"packets": 7, "bytes": 90825}}
REJECT: Step = {"reject": {"type": "icmpx", "expr": "port-unreachable"}}
SETS: list[Step] = [
    {"name": "ports", "type": "inet_service", "elem": [22, {"range": [9081, 9090]}]},
    {"name": "counted", "type": "inet_service", "elem": [{"elem": {"val": PORT, "comment": "x"}}]},
    {"name": "peers", "type": "ipv4_addr", "elem": ["10.0.0.1", "10.0.0.2"]},
    {
        "name": "pairs",
        "type": ["ipv4_addr", "inet_service"],
        "elem": [{"concat": ["10.0.0.1", PORT]}],
    },
]


def match(right: Any, field: str = "dport", protocol: str = "tcp", op: str = "==") -> Step:
    left = {"payload": {"protocol": protocol, "field": field}}
    return {"match": {"op": op, "left": left, "right": right}}


def ruleset(*rules: list[Step], policy: str = "drop", **others: list[Step]) -> dict[str, Any]:
    """What nft says of a chain `input` with these rules; `others` are chains of one rule each."""
    place = {"family": "inet", "table": "filter"}
    base = {**place, "name": "input", "type": "filter", "hook": "input", "policy": policy}
    entries: list[Step] = [{"metainfo": {"json_schema_version": 1}}, {"chain": base}]
    entries += [{"set": {**place, **found}} for found in SETS]
    entries += [{"chain": {**place, "name": name}} for name in others]
    chains = [("input", steps) for steps in rules] + list(others.items())
    entries += [{"rule": {**place, "chain": chain, "expr": steps}} for chain, steps in chains]
    return {"nftables": entries}


BY_ADDRESS_AND_PORT: Step = {
    "match": {
        "op": "==",
        "left": {
            "concat": [
                {"payload": {"protocol": "ip", "field": "saddr"}},
                {"payload": {"protocol": "tcp", "field": "dport"}},
            ]
        },
        "right": "@pairs",
    }
}
ESTABLISHED: Step = {
    "match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related"]}
}
LOOPBACK: Step = {"match": {"op": "==", "left": {"meta": {"key": "iif"}}, "right": "lo"}}


def by_port(*verdicts: list[Any]) -> Step:
    key = {"payload": {"protocol": "tcp", "field": "dport"}}
    return {"vmap": {"key": key, "data": {"set": list(verdicts)}}}


@pytest.mark.parametrize(
    "rule",
    [
        [match(PORT), ACCEPT],
        [match(PORT), COUNTER, ACCEPT],
        [match({"set": [22, PORT]}), ACCEPT],
        [match({"set": [22, {"range": [9000, 9100]}]}), ACCEPT],
        [match({"range": [9082, 9084]}), ACCEPT],
        [match("@ports"), ACCEPT],
        [match("@counted"), ACCEPT],
        [match(PORT, protocol="th"), ACCEPT],
        [match(22, op="!="), ACCEPT],
        [match("@peers", "saddr", "ip"), ACCEPT],
        [match({"prefix": {"addr": "10.0.0.0", "len": 8}}, "saddr", "ip"), match(PORT), ACCEPT],
        [BY_ADDRESS_AND_PORT, ACCEPT],
        [by_port([22, {"drop": None}], [PORT, ACCEPT])],
    ],
)
def test_a_rule_that_lets_the_port_in(rule: list[Step]) -> None:
    assert firewall.judge(ruleset(rule), PORT) == (True, True, False)
    other = firewall.judge(ruleset([{"jump": {"target": "other"}}], other=rule), PORT)
    assert other == (True, True, False)
    assert firewall.judge(ruleset(other=rule), PORT)[1] is False, "nothing comes through it"


@pytest.mark.parametrize(
    "rule",
    [
        [match(9081), ACCEPT],
        [match(90825), ACCEPT],
        [match({"set": [22, {"range": [8000, 9081]}]}), ACCEPT],
        [match(22), COUNTER, ACCEPT],
        [match(PORT), {"drop": None}],
        [match(PORT, protocol="udp"), ACCEPT],
        [match(PORT, "sport"), ACCEPT],
        [match("@peers", "saddr", "ip"), match(22), ACCEPT],
        [match("@no_such_set"), ACCEPT],
        [match(PORT, op="!="), ACCEPT],
        [ESTABLISHED, match("@peers", "saddr", "ip"), ACCEPT],
        [LOOPBACK, ACCEPT],
        [by_port([22, ACCEPT], [PORT, {"drop": None}])],
    ],
)
def test_a_rule_that_does_not_let_the_port_in(rule: list[Step]) -> None:
    assert firewall.judge(ruleset(rule), PORT) == (True, False, False)


def test_what_stops_the_rest() -> None:
    """A policy, or a rule at the end of the input; not one that looks at something."""
    assert not firewall.judge(ruleset(policy="accept"), PORT)[0]
    assert firewall.judge(ruleset([COUNTER, REJECT], policy="accept"), PORT)[0]
    assert firewall.judge(ruleset([{"drop": None}], policy="accept"), PORT)[0]
    assert not firewall.judge(ruleset([match(25), {"drop": None}], policy="accept"), PORT)[0]
    assert not firewall.judge(ruleset(other=[REJECT], policy="accept"), PORT)[0]


def test_the_row_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules that iptables made and nft cannot read are no reason to refuse."""
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(checks, "_which", lambda name: "/usr/sbin/nft")

    def status(found: dict[str, Any]) -> tuple[bool, str]:
        outcome = checks.firewall(
            {"listen_address": f"[::]:{PORT}"}, {}, lambda _: (0, json.dumps(found), "")
        )
        return outcome[0], outcome[1]

    assert status(ruleset()) == (False, "stops the rest, 9082 is not let in")
    assert status(ruleset([match("@ports"), ACCEPT])) == (True, "stops the rest, 9082 is let in")
    assert status(ruleset(policy="accept")) == (True, "lets everything in")
    assert status(ruleset([{"xt": None}, ACCEPT]))[0]
    assert not status(ruleset([{"xt": None}, COUNTER]))[0]
