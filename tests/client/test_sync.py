"""The blocking client: the same, for programs without asyncio, and from any thread."""

import asyncio
import errno
import signal
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from qubes_restore_svc.client.sync import BlockingRestoreCall, list_backup_blocking
from qubes_restore_svc.errors import Cancelled, HostFailed, WrongPassphrase
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.messages import Cancel
from qubes_restore_svc.wire.report import RestoreProgress

from .fakes import PATIENCE_S, RESULT, Watching, plan, refused, report, request
from .programs import Step, fake_program, is_gone, open_descriptors, said

CANCELLED = report(status=130, error=Cancelled("it was cancelled"))
OPENED: tuple[Step, ...] = (("note", "started"), ("hear", "open"), said(plan()))
STARTED = said(c.VolumeStarted(qube="work", volume="private", image_size=5))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before, threads = open_descriptors(), set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - threads:
        assert thread.name != "restore call"
        thread.join(PATIENCE_S)  # asyncio's own, which has reaped a process and is about to end
        assert not thread.is_alive()
    assert open_descriptors() - before == set()


def test_a_whole_restore(tmp_path: Path) -> None:
    transport = fake_program(
        tmp_path,
        *OPENED,
        ("hear", "choose"),
        said(plan(2)),
        ("hear", "confirm"),
        STARTED,
        said(RestoreProgress(archive_bytes=1)),
        said(c.QubeFinished(qube=RESULT)),
        said(report()),
    )
    watching = Watching()
    with BlockingRestoreCall(transport, request(), watching) as call:
        assert call.plan == plan()
        assert call.choose(c.Choice(names=("vault",))) == plan(2) == call.plan
        assert call.report is None
        assert call.confirm() == report() == call.report
    assert [event[0] for event in watching.seen] == ["volume", "progress", "finished"]
    assert is_gone(tmp_path / "started")


def test_a_list(tmp_path: Path) -> None:
    transport = fake_program(tmp_path, ("words", "words"), ("hear", "open"), said(plan(mode="list")))
    assert list_backup_blocking(transport, request()).qubes == plan().qubes
    assert (tmp_path / "words").read_text() == '["restore.List"]'


def test_an_error_while_opening(tmp_path: Path) -> None:
    transport = fake_program(tmp_path, ("hear", "open"), said(refused(WrongPassphrase("no key fits"))))
    with pytest.raises(WrongPassphrase, match="no key fits"), BlockingRestoreCall(transport, request()):
        pass


def test_another_thread_cancels_while_this_one_waits(tmp_path: Path) -> None:
    class Seen(Watching):
        def volume_started(self, qube: str, volume: str, image_size: int) -> None:
            begun.set()

    def cancel() -> None:
        assert begun.wait(PATIENCE_S)
        call.cancel()
        call.cancel()

    begun = threading.Event()
    transport = fake_program(
        tmp_path, *OPENED, ("hear", "confirm"), STARTED, ("hear", "cancel"), said(CANCELLED)
    )
    with BlockingRestoreCall(transport, request(), Seen()) as call:
        other = threading.Thread(target=cancel)
        other.start()
        assert call.confirm() == CANCELLED
        other.join()


def test_the_observer_can_cancel(tmp_path: Path) -> None:
    class Cancelling(Watching):
        def volume_started(self, qube: str, volume: str, image_size: int) -> None:
            call.cancel()

    transport = fake_program(
        tmp_path, *OPENED, ("hear", "confirm"), STARTED, ("hear", "cancel"), said(CANCELLED)
    )
    with BlockingRestoreCall(transport, request(), Cancelling()) as call:
        assert call.confirm() == CANCELLED


def test_another_thread_cancels_while_this_one_opens(tmp_path: Path) -> None:
    class Hearing(Watching):
        def log(self, level: str, text: str) -> None:
            begun.set()

    begun = threading.Event()
    transport = fake_program(
        tmp_path,
        ("hear", "open"),
        ("say", {"type": "log", "level": "info", "text": "t"}),
        ("hear", "cancel"),
        said(refused(Cancelled("it was cancelled"))),
    )
    call = BlockingRestoreCall(transport, request(), Hearing())

    def cancel() -> None:
        assert begun.wait(PATIENCE_S)
        call.cancel()

    other = threading.Thread(target=cancel)
    other.start()
    with pytest.raises(Cancelled), call:
        pass
    other.join()


def test_a_cancel_before_and_after_does_no_harm(tmp_path: Path) -> None:
    transport = fake_program(
        tmp_path, ("hear", "open"), ("hear", "cancel"), said(refused(Cancelled("it was cancelled")))
    )
    call = BlockingRestoreCall(transport, request())
    call.cancel()
    with pytest.raises(Cancelled), call:
        pass
    call.cancel()
    assert Cancel().type == "cancel"


@pytest.mark.parametrize("interrupted", ["opening", "confirming"])
def test_ctrl_c_leaves_the_call_at_once(tmp_path: Path, interrupted: str) -> None:
    """As a KeyboardInterrupt does, which comes out of the waiting."""

    class Interrupting(Watching):
        def log(self, level: str, text: str) -> None:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    log: Step = ("say", {"type": "log", "level": "info", "text": "t"})
    steps = [log] if interrupted == "opening" else [said(plan()), ("hear", "confirm"), log]
    transport = fake_program(tmp_path, ("note", "started"), ("hear", "open"), *steps, ("hear end",))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # other tests leave another one
    try:
        with (
            pytest.raises(KeyboardInterrupt),
            BlockingRestoreCall(transport, request(), Interrupting()) as call,
        ):
            call.confirm()
    finally:
        signal.signal(signal.SIGINT, before)
    assert is_gone(tmp_path / "started")


def test_whoever_waits_is_told_when_another_thread_leaves(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    class Seen(Watching):
        def volume_started(self, qube: str, volume: str, image_size: int) -> None:
            begun.set()

    def wait() -> None:
        try:
            call.confirm()
        except HostFailed as error:
            caught.append(error)

    begun = threading.Event()
    transport = fake_program(tmp_path, *OPENED, ("hear", "confirm"), STARTED, ("hear end",))
    with BlockingRestoreCall(transport, request(), Seen()) as call:
        other = threading.Thread(target=wait)
        other.start()
        assert begun.wait(PATIENCE_S)
    other.join(PATIENCE_S)
    assert [str(error) for error in caught] == ["the call has been closed here"]


def test_a_call_for_which_nothing_can_be_opened_is_an_error_and_no_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_loop() -> asyncio.AbstractEventLoop:
        raise OSError(errno.EMFILE, "Too many open files")

    def enter() -> None:
        with pytest.raises(HostFailed, match="Too many open files"):
            BlockingRestoreCall(fake_program(tmp_path, *OPENED), request()).__enter__()
        told.set()

    told = threading.Event()
    monkeypatch.setattr(asyncio.events, "new_event_loop", no_loop)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # pytest's would wait for who waits
    threading.Thread(target=enter, daemon=True).start()
    assert told.wait(PATIENCE_S)


def test_whoever_asks_just_when_another_thread_leaves_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_over = asyncio.run_coroutine_threadsafe
    asked: list[threading.Thread] = []

    def late(work: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> "Future[Any]":
        if threading.current_thread() is asker:
            leaver = threading.Thread(target=call.__exit__, args=(None, None, None))
            leaver.start()
            leaver.join(1)  # it would be through, if it did not wait for us
            asked.append(leaver)
        return hand_over(work, loop)

    def ask() -> None:
        try:
            call.confirm()
        except HostFailed as error:
            caught.append(str(error))

    caught: list[str] = []
    asker = threading.Thread(target=ask, daemon=True)
    call = BlockingRestoreCall(fake_program(tmp_path, *OPENED, ("hear end",)), request())
    call.__enter__()
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", late)
    asker.start()
    asker.join(PATIENCE_S)
    assert not asker.is_alive()
    asked.pop().join(PATIENCE_S)
    assert caught == ["the call has been closed here"]
