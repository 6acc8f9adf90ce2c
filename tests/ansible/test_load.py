"""The clients beside the playbooks know whether a node had read what it did not answer."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.ansible.load import Clients, Link, Unread, Writer

REFUSAL = b"HTTP/1.1 503 Unavailable\r\nContent-Length: 4\r\nConnection: close\r\n\r\nwait"
SUCCESS = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def endpoint_of(listener: socket.socket) -> str:
    return "{}:{}".format(*listener.getsockname())


@contextlib.contextmanager
def node(listener: socket.socket, serve: Callable[[socket.socket], None]) -> Iterator[Link]:
    """A connection whose other end `serve` has, and closes when it is done."""

    def work() -> None:
        connection, _ = listener.accept()
        with connection:
            serve(connection)

    worker = threading.Thread(target=work)
    worker.start()
    link = Link(endpoint_of(listener), "token")
    try:
        yield link
    finally:
        link.close()
        worker.join(10)
        assert not worker.is_alive()


def reads_and_ends(connection: socket.socket) -> None:
    connection.recv(65536)


def reads_and_begins(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(SUCCESS[:20])


def does_not_read(connection: socket.socket) -> None:
    connection.recv(1, socket.MSG_PEEK)  # the request has come


@pytest.mark.parametrize("serve", [reads_and_ends, reads_and_begins])
def test_a_request_that_was_read_is_cut(
    listener: socket.socket, serve: Callable[[socket.socket], None]
) -> None:
    with node(listener, serve) as link, pytest.raises(ConnectionResetError):
        link.put("key", "value")


def test_a_request_that_nobody_read_is_not(listener: socket.socket) -> None:
    with node(listener, does_not_read) as link, pytest.raises(Unread):
        link.put("key", "value")


def closed_by_the_node(listener: socket.socket) -> Link:
    link = Link(endpoint_of(listener), "token")
    connection, _ = listener.accept()
    connection.close()
    return link


def test_a_connection_that_was_closed_between_two_requests(listener: socket.socket) -> None:
    with contextlib.closing(closed_by_the_node(listener)) as link, pytest.raises(Unread):
        link.put("key", "value")


def test_a_connection_that_is_closed_while_the_request_is_on_its_way(
    listener: socket.socket,
) -> None:
    """The end is there when the request is sent, after the look whether it is."""
    with contextlib.closing(closed_by_the_node(listener)) as link, pytest.raises(Unread):
        link._first(b"PUT /v1/kv/key HTTP/1.1\r\n\r\n")


def test_a_writer_counts_why_it_tried_again(listener: socket.socket, tmp_path: Path) -> None:
    """In turn: refused, closed unread, cut, 503; then a node takes the write. None of it is a
    failure of a patient writer, and each is one of the first reason for one that is not."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        gone = endpoint_of(other)
    here = endpoint_of(listener)

    def says(answer: bytes) -> Callable[[socket.socket], None]:
        def serve(connection: socket.socket) -> None:
            connection.recv(65536)
            connection.sendall(answer)

        return serve

    steps = [does_not_read, reads_and_ends, says(REFUSAL), says(SUCCESS)]

    def work() -> None:
        for serve in steps:
            connection, _ = listener.accept()
            with connection:
                serve(connection)

    worker = threading.Thread(target=work)
    worker.start()
    clients = Clients([], tmp_path / "secrets.json")
    clients.ready += [gone, here]
    patient = Writer(clients, "w", 1, patience_s=30)
    patient._write("key", "value", "")
    worker.join(10)
    for link in patient._links.values():
        link.close()
    assert patient.failures == []
    assert patient.acknowledged == {"key": "value"}
    assert patient.retries == {
        (gone, "refused"): 4,
        (here, "closed"): 1,
        (here, "cut"): 1,
        (here, "503"): 1,
    }
    strict = Writer(clients, "s", 1)
    strict._write("key", "value", "")
    assert len(strict.failures) == 1
    assert strict.retries == {}
    clients.stopping.set()
