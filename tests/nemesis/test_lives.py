"""Every end of a process is explained by a fault of that moment, or it is a finding."""

from __future__ import annotations

import pytest

from tests.nemesis.lives import FOREVER, LENIENT_S, Book, closing

IO = 74


def begun(count: int = 1) -> Book:
    """A book with processes that began at 0, 10, ...; the last one runs."""
    book = Book(2)
    for number in range(count):
        book.begin(number * 10.0)
        if number < count - 1:
            book.may_end((0,), "SIGTERM", number * 10.0, life=book.running, asked=True)
            book.end(0, number * 10.0 + 5)
    return book


def test_a_process_that_runs_is_no_finding() -> None:
    assert begun(3).findings() == []


def test_an_end_that_nothing_explains_is_found() -> None:
    """The sentence names node, process, code and what it said last."""
    book = begun(2)
    book.end(75, 12.5, "a core task died")
    assert book.findings() == [
        "no fault explains that process 2 of node 2 ended with 75 after 2.5 s: a core task died"
    ]


def test_an_end_with_0_has_to_be_asked_for_too() -> None:
    book = begun()
    book.end(0, 3.0)
    assert "ended with 0" in book.findings()[0]


@pytest.mark.parametrize(
    ("ended", "code", "fine"),
    [
        (5.0, IO, True),
        (6.0 + LENIENT_S / 2, IO, True),
        (6.0 + 2 * LENIENT_S, IO, False),
        (3.5, IO, False),
        (5.0, 65, False),
        (5.0, -9, False),
    ],
)
def test_a_reason_explains_its_codes_in_its_time(ended: float, code: int, fine: bool) -> None:
    """Neither another code, nor the same before or after."""
    book = begun()
    reason = book.may_end((IO,), "its disk is full", 4.0)
    reason.until = 6.0
    book.end(code, ended)
    assert (book.findings() == []) is fine


def test_a_reason_may_ask_for_certain_words() -> None:
    book = begun()
    book.may_end((IO,), "no descriptors", 1.0, saying="Too many open files")
    book.end(IO, 2.0, "cannot write x: Too many open files")
    assert book.findings() == []
    book.begin(3.0)
    book.end(IO, 4.0, "cannot write x: Input/output error")
    assert "process 2 of node 2 ended with 74" in book.findings()[0]


def test_a_reason_for_one_process_does_not_explain_the_next() -> None:
    """strace watches one process: the one after it has no reason to end."""
    book = begun()
    book.may_end((IO,), "EIO under its log", 1.0, life=book.running)
    book.end(IO, 2.0)
    book.begin(3.0)
    assert book.findings() == []
    book.end(IO, 4.0)
    assert [finding for finding in book.findings() if "process 2" in finding]


def test_who_was_killed_and_ended_by_itself_before_is_found() -> None:
    """The kill does not cover it: the exit code says that it was not the kill."""
    book = begun()
    with closing(book.may_end((-9,), "kill -9", 1.0, life=book.running, asked=True), lambda: 1.1):
        life = book.end(75, 1.1)
    assert not book.asked(life)
    assert "ended with 75" in book.findings()[0]


def test_an_owed_end_that_does_not_come_is_found() -> None:
    """A node that goes on after a failed write is worse than one that ends."""
    book = begun()
    book.may_end((IO,), "EIO under its log", 1.0, life=book.running, owed_by=16.0)
    assert book.findings() == [
        "process 1 of node 2 has to end with 74 (EIO under its log), and goes on"
    ]


def test_an_owed_end_that_comes_late_is_found() -> None:
    book = begun()
    book.may_end((IO,), "EIO under its log", 1.0, life=book.running, owed_by=16.0)
    book.end(IO, 30.0)
    assert "too late" in book.findings()[0]


def test_an_owed_end_is_also_one_by_another_fault() -> None:
    """It was killed before it could do what it owed."""
    book = begun()
    book.may_end((IO,), "EIO under its log", 1.0, life=book.running, owed_by=16.0)
    book.may_end((-9,), "kill -9", 2.0, life=book.running, asked=True)
    book.end(-9, 2.1)
    assert book.findings() == []


def test_a_stop_that_was_asked_for_ends_with_0_or_is_found() -> None:
    book = begun()
    book.may_end((0,), "SIGTERM", 1.0, life=book.running, asked=True, owed_by=41.0)
    book.end(-15, 1.5)
    assert "ended with -15" in book.findings()[0]


def test_what_a_node_may_end_of_now() -> None:
    book = begun()
    reason = book.may_end((IO, 65), "flip in state", 4.0)
    book.may_end((0,), "SIGTERM", 4.0, life=book.running, asked=True)
    assert book.open_codes(3.0) == set()
    assert book.open_codes(5.0) == {IO, 65}
    reason.until = 6.0
    assert book.open_codes(6.0 + 2 * LENIENT_S) == set()
    assert reason.owed_by == FOREVER


def test_two_processes_of_a_node_never_run_at_once() -> None:
    with pytest.raises(AssertionError, match="already runs"):
        begun().begin(1.0)
