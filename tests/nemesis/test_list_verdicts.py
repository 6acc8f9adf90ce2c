"""The judges of lists find what they are for, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.linearizability.checker import FOREVER, Operation
from tests.nemesis.histories import contradictions
from tests.nemesis.list_verdicts import lists_whole
from tests.nemesis.lists import NO_LIST, ListTxn, Version
from tests.nemesis.verdicts import eventual_reads
from tests.nemesis.workload import Eventual, Records

ENDS = {"l/0": "a b d", "l/1": "x y"}


def append(
    called: float,
    appended: dict[str, str],
    base: dict[str, Version],
    found: dict[str, Version] | None = None,
    **more: Any,
) -> ListTxn:
    """One that was answered; without `found` it succeeded, and all at revision 10 * `called`."""
    unknown = ListTxn(0, called, list(appended), appended, base)
    done = {key: (int(called) * 10, unknown.put(key)) for key in appended}
    shown = done if found is None else found
    answer = {"returned": called + 1, "succeeded": found is None, "found": shown}
    return replace(unknown, **{**answer, **more})


def look(called: float, found: dict[str, Version]) -> ListTxn:
    return ListTxn(1, called, list(found), {}, {}, called + 1, True, found)


NO_ANSWER = {"returned": FOREVER, "succeeded": None, "found": {}}
REFUSED = {"succeeded": False, "found": {}}


def sound_lists() -> Records:
    """Appends to one list and to two at once: done, too late, refused, and two of unknown outcome,
    of which one happened. Looks at one list and at two."""
    records = Records()
    one, both = (10, ("a",)), {"l/0": (30, ("a", "b")), "l/1": (30, ("x",))}
    records.lists = [
        append(1, {"l/0": "a"}, {"l/0": NO_LIST}),
        append(2, {"l/0": "late"}, {"l/0": NO_LIST}, {"l/0": one}),
        append(2.5, {"l/0": "never"}, {"l/0": one}, **REFUSED),
        append(3, {"l/0": "b", "l/1": "x"}, {"l/0": one, "l/1": NO_LIST}),
        look(5, both),
        append(7, {"l/0": "c"}, {"l/0": both["l/0"]}, **NO_ANSWER),
        append(8, {"l/0": "d", "l/1": "y"}, both, **NO_ANSWER),
        look(9, both),
        look(12, {"l/0": (85, ("a", "b", "d")), "l/1": (85, ("x", "y"))}),
    ]
    for txn in records.lists:
        for key, op in txn.operations():
            records.history.setdefault(key, []).append(op)
    records.history["l/0"].append(Operation(2, 14, 15, "read", None, (85, "a b d")))
    records.eventual = [
        Eventual(1, 1, 20, 21, 30, "l/0", 30, "a b"),
        Eventual(2, 1, 20, 21, 85, "l/1", 85, "x y"),
    ]
    return records


def test_lists_that_only_grow_are_passed() -> None:
    """By the judge of lists, and key by key by those of registers."""
    records = sound_lists()
    assert lists_whole(records, ENDS) == []
    assert contradictions(records) == eventual_reads(records) == []


def test_an_append_that_nobody_heard_of_may_have_happened_or_not() -> None:
    """Also when the final lists are the first to show it, but then all of it."""
    records = sound_lists()
    base = {"l/0": (85, ("a", "b", "d")), "l/1": (85, ("x", "y"))}
    records.lists.append(append(30, {"l/0": "e", "l/1": "z"}, base, **NO_ANSWER))
    assert lists_whole(records, ENDS) == []
    assert lists_whole(records, {"l/0": "a b d e", "l/1": "x y z"}) == []
    assert "torn" in lists_whole(records, {"l/0": "a b d e", "l/1": "x y"})[0]


def lost_append(records: Records, ends: dict[str, str]) -> None:
    base = {"l/1": (85, ("x", "y"))}
    records.lists.append(append(16, {"l/1": "z"}, base))


def lost_list(records: Records, ends: dict[str, str]) -> None:
    records.lists.append(append(16, {"l/2": "z"}, {"l/2": NO_LIST}))


def append_in_the_middle(records: Records, ends: dict[str, str]) -> None:
    ends["l/0"] = "a c b d"


def appended_twice(records: Records, ends: dict[str, str]) -> None:
    ends["l/1"] = "x y x"


def appended_by_nobody(records: Records, ends: dict[str, str]) -> None:
    ends["l/1"] = "x y z"


def to_the_wrong_list(records: Records, ends: dict[str, str]) -> None:
    ends["l/1"] = "x y c"


def refused_and_appended(records: Records, ends: dict[str, str]) -> None:
    ends["l/0"] = "a b d never"


def late_and_appended(records: Records, ends: dict[str, str]) -> None:
    ends["l/0"] = "a b d late"


def refused_and_seen_once(records: Records, ends: dict[str, str]) -> None:
    records.eventual.append(Eventual(1, 1, 22, 23, 40, "l/0", 40, "a b never"))


def late_for_no_reason(records: Records, ends: dict[str, str]) -> None:
    base = {"l/1": (85, ("x", "y"))}
    records.lists.append(append(16, {"l/1": "z"}, base, base))


def shown_something_else(records: Records, ends: dict[str, str]) -> None:
    here = {"l/0": (30, ("a", "b")), "l/1": (30, ())}
    records.lists[3] = replace(records.lists[3], found=here)


def two_revisions_for_one(records: Records, ends: dict[str, str]) -> None:
    here = {"l/0": (30, ("a", "b")), "l/1": (31, ("x",))}
    records.lists[3] = replace(records.lists[3], found=here)


def torn_at_a_look(records: Records, ends: dict[str, str]) -> None:
    here = {"l/0": (85, ("a", "b", "d")), "l/1": (30, ("x",))}
    records.lists.append(look(8.5, here))


def torn_between_two_looks(records: Records, ends: dict[str, str]) -> None:
    records.history["l/0"].append(Operation(3, 8.1, 8.2, "read", None, (85, "a b d")))
    records.history["l/1"].append(Operation(3, 8.3, 8.4, "read", None, (30, "x")))


def torn_in_the_end(records: Records, ends: dict[str, str]) -> None:
    base = {"l/2": NO_LIST, "l/3": NO_LIST}
    records.lists.append(append(16, {"l/2": "p", "l/3": "q"}, base, **NO_ANSWER))
    ends["l/2"] = "p"


def stale_look(records: Records, ends: dict[str, str]) -> None:
    records.lists.append(look(4.5, {"l/0": (10, ("a",))}))


def stale_read_of_a_list(records: Records, ends: dict[str, str]) -> None:
    records.history["l/1"].append(Operation(3, 16, 17, "read", None, (30, "x")))


def no_list_any_more(records: Records, ends: dict[str, str]) -> None:
    records.history["l/1"].append(Operation(3, 16, 17, "read", None, (0, None)))


def another_past(records: Records, ends: dict[str, str]) -> None:
    records.eventual.append(Eventual(1, 1, 22, 23, 40, "l/0", 40, "a c"))


def one_revision_for_two(records: Records, ends: dict[str, str]) -> None:
    records.eventual.append(Eventual(1, 1, 22, 23, 85, "l/0", 85, "a b"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lost_append, "lost 'z', an acknowledged append"),
        (lost_list, "lost 'z', an acknowledged append"),
        (append_in_the_middle, "list l/0 was 'a b d' at revision 85 and 'a c b d' at the end"),
        (appended_twice, "has 'x' 2 times"),
        (appended_by_nobody, "has 'z', which nobody appended"),
        (to_the_wrong_list, "has 'c', which nobody appended to it"),
        (refused_and_appended, "has 'never', and its append was refused"),
        (late_and_appended, "has 'late', and its append was refused"),
        (refused_and_seen_once, "has 'never', and its append was refused"),
        (late_for_no_reason, "was refused, though nothing had changed"),
        (shown_something_else, "and was shown"),
        (two_revisions_for_one, "and was shown"),
        (torn_at_a_look, "of one transaction were torn"),
        (torn_between_two_looks, "of one transaction, had been seen at 8.200"),
        (torn_in_the_end, "of one transaction were torn"),
        (stale_look, "'a b' had been read by 4.000"),
        (stale_read_of_a_list, "'x y' had been read by 13.000"),
        (no_list_any_more, "list l/1 was '' for who asked at 16.000"),
        (another_past, "list l/0 was 'a b' at revision 30 and 'a c' at revision 40"),
        (one_revision_for_two, "'a b' at revision 85"),
    ],
)
def test_every_breach_of_a_list_is_found(
    spoil: Callable[[Records, dict[str, str]], None], said: str
) -> None:
    """Again one wrong answer, or one wrong list in the end, is enough."""
    records, ends = sound_lists(), dict(ENDS)
    spoil(records, ends)
    assert said in "\n".join(lists_whole(records, ends))
