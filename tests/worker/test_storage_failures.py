"""A storage VM that fails, lies or does not end: an error that a person can act on, and never a success."""

import asyncio
import contextlib
import socket

import pytest

from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.worker import storage_qube as storage_module

from ..support.backup_writer import PASSPHRASE
from . import stock_storage
from .caller import Caller
from .storage import LOCATION, FakeStorage
from .support import in_thread, join, wait_until
from .ways import ARCHIVE, MakeWay, Way, run

FAILURES = {
    "refused": ("archive-unreadable", "not allowed to fetch", "/etc/qubes/policy.d"),
    "fails 127": ("archive-unreadable", "does not have the service qubes.RestoreById", "qubes-core-agent"),
    "fails 1": (
        "archive-unreadable",
        "ended with exit code 1 (\ufffd[31mInvalid location ID\ufffd)",
        "try the command",
    ),
    "fails 2": ("archive-unreadable", "ended with exit code 2", "try the command there"),
    "fails 125": ("archive-unreadable", "the connection to the qube sys-usb broke off", "is running"),
    "fails 255": ("archive-unreadable", "the connection to the qube sys-usb broke off", "is running"),
    "fails 0": ("archive-unreadable", "ended with exit code 0", ""),
    "cut 20": ("archive-truncated", "ended with exit code 1", ""),
    "cut 1000": ("archive-truncated", "in the middle of 'qubes.xml.000.enc'", ""),
    "dies 1000": ("archive-unreadable", "broke off", "sys-usb"),
    "no-end": ("archive-truncated", "without its end mark", ""),
    "surplus": ("bad-archive", "more after the end", ""),
    "late-surplus": ("bad-archive", "more after the end", ""),
}


@pytest.mark.parametrize("behaviour", FAILURES)
async def test_a_storage_qube_that_fails_at_first_fails_the_session(
    behaviour: str, fetched: tuple[Way, FakeStorage]
) -> None:
    way, storage = fetched
    storage.behave(behaviour)
    kind, reason, advice = FAILURES[behaviour]
    outcome = await run(way)
    assert outcome.manifest is None and outcome.failed is not None
    assert outcome.failed.kind == kind
    assert reason in outcome.failed.reason and advice in outcome.failed.advice
    assert PASSPHRASE not in repr(outcome.failed)


@pytest.mark.parametrize("behaviour", FAILURES)
async def test_a_storage_qube_that_fails_later_fails_what_it_has_not_brought(
    behaviour: str, fetched: tuple[Way, FakeStorage]
) -> None:
    way, storage = fetched
    kind, reason, _ = FAILURES[behaviour]
    async with way.session() as (_, peer):
        peer.open(storage=LOCATION)
        await peer.expect(m.Manifest)
        storage.behave(behaviour)
        peer.say(m.Start(mode="verify", keys=("vm10",)))
        messages = await peer.rest()
        # At once, and not when the broker hangs up.
        await asyncio.to_thread(wait_until, lambda: not storage.processes(), "the end of the call")
    errors = [message.error for message in messages if isinstance(message, m.VolumeDone | m.QubeSettings)]
    assert isinstance(messages[-1], m.Finished)
    told = [error for error in errors if error is not None]
    assert told and all(error.kind == kind for error in told)
    if behaviour != "cut 1000":
        assert all(reason in error.reason for error in told)


async def test_a_qube_without_volumes_is_no_success_either_if_its_pass_failed(
    fetched: tuple[Way, FakeStorage],
) -> None:
    way, storage = fetched
    async with way.session() as (_, peer):
        peer.open(storage=LOCATION)
        await peer.expect(m.Manifest)
        storage.behave("refused")
        peer.say(m.Start(mode="restore", keys=("vm12",)))
        settings = await peer.expect(m.QubeSettings)
        assert settings.error is not None and settings.error.kind == "archive-unreadable"


async def test_a_program_that_is_missing_is_told_with_its_name(
    fetched: tuple[Way, FakeStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    way, _ = fetched
    monkeypatch.setenv("PATH", "/nonexistent")
    outcome = await run(way)
    assert outcome.failed is not None and outcome.failed.kind == "archive-unreadable"
    assert "qrexec-client-vm could not be started: No such file" in outcome.failed.reason


async def test_a_file_that_is_no_backup_is_told_as_one(make_way: MakeWay) -> None:
    for name in ("conversed", "fetched"):
        for content in (b"", b"not a backup " * 1000, bytes(1 << 20)):
            outcome = await run(make_way(name, content))
            assert outcome.failed is not None and outcome.failed.kind == "not-a-backup"


async def test_a_command_that_fails_with_nothing_to_show_is_not_taken_for_an_empty_file(
    make_way: MakeWay,
) -> None:
    way = make_way("fetched", b"")
    assert way.storage is not None
    way.storage.behave("ends 5")
    outcome = await run(way)
    assert outcome.failed is not None and outcome.failed.kind == "archive-unreadable"
    assert "ended with exit code 5" in outcome.failed.reason


@pytest.mark.parametrize(("code", "warned"), [(0, False), (141, False), (1, True), (23, True)])
async def test_a_command_that_fails_behind_its_last_file_costs_no_volume_but_is_told(
    code: int, warned: bool, fetched: tuple[Way, FakeStorage]
) -> None:
    way, storage = fetched
    storage.behave(f"ends {code}")
    outcome = await run(way)
    assert set(outcome.kinds.values()) == {"ok"}
    assert [f"exit code {code}" in text for text in outcome.warnings] == [True] * warned


@pytest.mark.parametrize("behaviour", ["deaf", "lingers"])
async def test_a_process_that_does_not_end_with_its_stream_is_ended(
    behaviour: str, fetched: tuple[Way, FakeStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "END_TIMEOUT_S", 0.2)
    way, storage = fetched
    storage.behave(behaviour)
    outcome = await run(way)
    if behaviour == "lingers":
        assert set(outcome.kinds.values()) == {"ok"}
    else:
        assert outcome.failed is not None and "broke off" in outcome.failed.reason


async def test_a_storage_service_that_hangs_up_at_once_is_told(make_way: MakeWay) -> None:
    async with Caller(None) as caller:
        peer = await caller.session()
        peer.open()
        caller.call(b"restore.Archive+qfile dom0\0").shutdown(socket.SHUT_RDWR)
        failed = await peer.expect(m.Failed)
        assert failed.error.kind == "archive-unreadable" and "without having sent" in failed.error.reason


async def test_a_stream_of_files_without_end_is_ended() -> None:
    async with Caller(None) as caller:
        peer = await caller.session()
        peer.open()
        connection = caller.call(b"restore.Archive+qfile dom0\0")
        connection.setblocking(True)

        def flood() -> None:
            entry = stock_storage.HEADER.pack(2, 0o40755, 0, 0, 0, 0, 0) + b"a\0"
            with contextlib.suppress(OSError):
                connection.sendall(stock_storage.HEADER.pack(15, 0o100644, 1 << 39, 0, 0, 0, 0))
                connection.sendall(b"backup-header\0\0" + entry * 1000)

        flooding = in_thread(flood)
        failed = await peer.expect(m.Failed)
        assert failed.error.kind in ("bad-archive", "bad-header")
        peer.writer.close()
        await caller.ended()
        await asyncio.to_thread(join, flooding)


async def test_a_command_that_fails_between_two_files_is_why_the_rest_is_missing(make_way: MakeWay) -> None:
    """Its stream ends in order then, and only its exit code says that this is not all."""
    way = make_way("fetched", ARCHIVE[: ARCHIVE.index(b"vm11/") // 512 * 512])
    assert way.storage is not None
    async with way.session() as (_, peer):
        peer.open(storage=LOCATION)
        await peer.expect(m.Manifest)
        way.storage.behave("ends 5")
        peer.say(m.Start(mode="verify", keys=("vm10", "vm11")))
        messages = await peer.rest()
    done = {message.key: message for message in messages if isinstance(message, m.VolumeDone)}
    assert done["vm10"].outcome == "ok"
    error = done["vm11"].error
    assert error is not None and error.kind == "archive-unreadable"
    assert "does not hold it" in error.reason and error.reason.endswith("ended with exit code 5")
    assert "try the command in that qube" in error.advice
