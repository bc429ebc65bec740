"""The offer of a volume: taken once, by the call that names it."""

import socket

import pytest

from qubes_restore_svc.worker.fetches import Fetches


@pytest.fixture
def connection() -> socket.socket:
    return socket.socketpair()[0]


def test_the_call_that_names_the_volume_on_offer_gets_it(connection: socket.socket) -> None:
    fetches = Fetches()
    taker = fetches.offer("vm1", "private")
    assert fetches.take("vm1.private", connection)
    assert taker.result(0) is connection


def test_a_volume_is_given_out_once(connection: socket.socket) -> None:
    fetches = Fetches()
    fetches.offer("vm1", "private")
    fetches.take("vm1.private", connection)
    assert not fetches.take("vm1.private", connection)


@pytest.mark.parametrize("argument", ["", "vm1", "vm1.root", "vm2.private", "vm1.private ", "."])
def test_a_call_that_names_anything_else_is_refused(argument: str, connection: socket.socket) -> None:
    fetches = Fetches()
    assert not fetches.take(argument, connection)
    taker = fetches.offer("vm1", "private")
    assert not fetches.take(argument, connection)
    assert not taker.done()


def test_an_offer_that_is_cancelled_is_taken_by_nobody(connection: socket.socket) -> None:
    fetches = Fetches()
    taker = fetches.offer("vm1", "root")
    taker.cancel()
    assert not fetches.take("vm1.root", connection)
    following = fetches.offer("vm1", "private")
    assert fetches.take("vm1.private", connection)
    assert following.result(0) is connection
