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


def test_a_volume_of_a_skipped_qube_is_taken_back_now_and_later(connection: socket.socket) -> None:
    fetches = Fetches()
    taker = fetches.offer("vm1", "root")
    fetches.withdraw("vm1")
    assert taker.result(0) is None
    assert not fetches.take("vm1.root", connection)
    assert fetches.offer("vm1", "private").result(0) is None
    assert not fetches.take("vm1.private", connection)


def test_skipping_one_qube_leaves_the_offer_of_another(connection: socket.socket) -> None:
    fetches = Fetches()
    taker = fetches.offer("vm1", "root")
    fetches.withdraw("vm2")
    assert fetches.take("vm1.root", connection)
    assert taker.result(0) is connection


def test_at_the_end_everything_is_taken_back_now_and_later(connection: socket.socket) -> None:
    fetches = Fetches()
    taker = fetches.offer("vm1", "root")
    fetches.withdraw()
    assert taker.result(0) is None
    assert fetches.offer("vm2", "root").result(0) is None
    assert not fetches.take("vm2.root", connection)
