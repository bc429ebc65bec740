"""The asyncio client against a dom0 that does everything, in every order, and nothing."""

import asyncio
import logging

import pytest

from qubes_restore_svc.client import aio
from qubes_restore_svc.client.aio import RestoreCall, list_backup
from qubes_restore_svc.errors import (
    Cancelled,
    HostFailed,
    NotGranted,
    ProtocolViolation,
    RestoreError,
    UsageError,
    WrongPassphrase,
)
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.messages import Cancel, Log
from qubes_restore_svc.wire.models import MAX_FRAME, Message
from qubes_restore_svc.wire.report import QubeReport, Report, RestoreProgress
from tests.support.wire import frame, framed

from .fakes import (
    PASSPHRASE,
    PATIENCE_S,
    QUBE,
    RESULT,
    FakeTransport,
    Peer,
    Script,
    Watching,
    plan,
    refused,
    report,
    request,
)

STARTED = c.VolumeStarted(qube="work", volume="private", image_size=5)
FINISHED = c.QubeFinished(qube=RESULT)
PROGRESS = RestoreProgress(archive_bytes=1, percent=2)
LOG = Log(level="warning", text="mind the gap")


async def planned(peer: Peer, mode: c.Mode = "restore") -> None:
    await peer.hear(c.OpenBackup)
    await peer.say(plan(mode=mode))


async def running(peer: Peer) -> None:
    await planned(peer)
    await peer.hear(c.Confirm)
    await peer.say(STARTED)


async def cancelled_error(peer: Peer) -> None:
    await peer.hear(Cancel)
    await peer.say(report(status=130, error=Cancelled("it was cancelled")))


# --- As it should be -----------------------------------------------------------------------------


async def test_a_whole_restore_with_everything_that_happens_on_the_way() -> None:
    async def dom0(peer: Peer) -> None:
        assert peer.service == "restore.Start"
        opened = await peer.hear(c.OpenBackup)
        assert opened == request()
        await peer.say(LOG, plan())
        chosen = await peer.hear(c.Choose)
        assert isinstance(chosen, c.Choose) and chosen.choice.names == ("vault",)
        await peer.say(PROGRESS, plan(2))
        confirmed = await peer.hear(c.Confirm)
        assert isinstance(confirmed, c.Confirm) and confirmed.plan == 2
        await peer.say(STARTED, PROGRESS, FINISHED, report())
        await peer.hear_end()

    transport, watching = FakeTransport(dom0), Watching()
    async with RestoreCall(transport, request(), watching) as call:
        assert call.plan == plan()
        assert await call.choose(c.Choice(names=("vault",))) == plan(2) == call.plan
        assert await call.confirm() == report() == call.report
    await transport.check()
    assert watching.seen == [
        ("log", "warning", "mind the gap"),
        ("progress", 1, 2),
        ("volume", "work", "private", 5),
        ("progress", 1, 2),
        ("finished", "work", "restored"),
    ]


@pytest.mark.parametrize(
    ("mode", "service"),
    [("list", "restore.List"), ("verify", "restore.Verify"), ("restore", "restore.Start")],
)
async def test_the_narrowest_service_is_called(mode: c.Mode, service: str) -> None:
    async def dom0(peer: Peer) -> None:
        assert peer.service == service
        await planned(peer, mode)
        await peer.hear_end()

    transport = FakeTransport(dom0)
    async with RestoreCall(transport, request(mode)):
        pass
    await transport.check()


async def test_a_list_is_the_plan_whatever_mode_was_asked_for() -> None:
    async def dom0(peer: Peer) -> None:
        assert peer.service == "restore.List"
        await planned(peer, "list")

    transport = FakeTransport(dom0)
    assert await list_backup(transport, request("restore")) == plan(mode="list")
    await transport.check()


async def test_a_report_as_large_as_one_can_be_arrives_and_one_byte_a_time_does() -> None:
    text = "x" * 1000
    large = report().model_copy(update={"warnings": (text,) * 1024})

    async def dom0(peer: Peer) -> None:
        await running(peer)
        for byte in framed(LOG):
            await peer.say_bytes(bytes([byte]))
        await peer.say(large)

    async with RestoreCall(FakeTransport(dom0), request()) as call:
        assert await call.confirm() == large


# --- Refusals and ends ---------------------------------------------------------------------------


async def before_the_plan(peer: Peer) -> None:
    await peer.hear(c.OpenBackup)


async def after_the_plan(peer: Peer) -> None:
    await planned(peer)


async def after_another_choice(peer: Peer) -> None:
    await planned(peer)
    await peer.hear(c.Choose)


async def after_the_confirmation(peer: Peer) -> None:
    await planned(peer)
    await peer.hear(c.Confirm)


PHASES = pytest.mark.parametrize(
    "phase", [before_the_plan, after_the_plan, after_another_choice, after_the_confirmation]
)


async def go_through(transport: FakeTransport, phase: object, mode: c.Mode = "restore") -> Report:
    async with RestoreCall(transport, request(mode)) as call:
        if phase is after_another_choice:
            await call.choose(c.Choice())
        return await call.confirm()


@PHASES
async def test_a_refusal_is_an_error_of_its_kind_in_every_phase(phase: Script) -> None:
    async def dom0(peer: Peer) -> None:
        await phase(peer)
        await peer.say(refused(NotGranted("the qube work may not", advice="grants.work.pools")))

    transport = FakeTransport(dom0)
    with pytest.raises(NotGranted, match="the qube work may not") as caught:
        await go_through(transport, phase)
    assert caught.value.advice == "grants.work.pools"
    await transport.check()


@PHASES
async def test_a_report_that_comes_early_tells_why_in_every_phase(phase: Script) -> None:
    async def dom0(peer: Peer) -> None:
        await phase(peer)
        await peer.say(report(status=1, error=WrongPassphrase("no key fits")))

    transport = FakeTransport(dom0)
    if phase in (before_the_plan, after_another_choice):
        with pytest.raises(WrongPassphrase, match="no key fits"):
            await go_through(transport, phase)
    else:
        assert (await go_through(transport, phase)).status == 1
    await transport.check()


@PHASES
@pytest.mark.parametrize("why", [None, HostFailed("it broke")])
async def test_a_lost_connection_is_an_error_in_every_phase(phase: Script, why: RestoreError | None) -> None:
    transport = FakeTransport(phase, why)
    with pytest.raises(HostFailed, match="it broke" if why else "the call to dom0 ended without an answer"):
        await go_through(transport, phase)
    await transport.check()


@PHASES
@pytest.mark.parametrize(
    "nonsense",
    [
        b"\0\0\0\0",
        b"\xff\xff\xff\xff",
        (MAX_FRAME + 1).to_bytes(4, "big"),
        frame(b"[]"),
        frame(b"{}"),
        frame(b'{"type":"surprise"}'),
        frame(b'{"type":"progress","archive_bytes":-1,"image_bytes":0}'),
        frame(b'{"type":"confirm","plan":1}'),
        frame(b"\x1b[2J"),
        framed(report("verify")),
    ],
)
async def test_nonsense_is_a_violation_in_every_phase(phase: Script, nonsense: bytes) -> None:
    async def dom0(peer: Peer) -> None:
        await phase(peer)
        await peer.say_bytes(nonsense)
        await peer.hear_end() if phase is not after_the_plan else None

    transport = FakeTransport(dom0)
    with pytest.raises(ProtocolViolation, match="dom0 sent ") as caught:
        await go_through(transport, phase)
    assert "\x1b" not in str(caught.value)
    assert "update both" in caught.value.advice and "worker" not in caught.value.advice
    await transport.check()


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (before_the_plan, STARTED),
        (before_the_plan, FINISHED),
        (before_the_plan, plan(mode="verify")),
        (after_another_choice, plan(1)),
        (after_another_choice, plan(0)),
        (after_the_confirmation, plan(2)),
        (after_the_plan, plan(2)),
        (after_the_plan, FINISHED),
    ],
)
async def test_what_may_not_come_now_is_a_violation(phase: Script, message: Message) -> None:
    async def dom0(peer: Peer) -> None:
        await phase(peer)
        await peer.say(message)
        await asyncio.Event().wait()

    with pytest.raises(ProtocolViolation, match=r"dom0 sent '(plan|volume_started|qube_finished)'"):
        await go_through(FakeTransport(dom0), phase)


async def test_what_was_said_before_the_connection_broke_counts() -> None:
    async def dom0(peer: Peer) -> None:
        await planned(peer)
        await peer.say(report(status=130, error=Cancelled("nobody answered")))

    transport = FakeTransport(dom0)
    async with RestoreCall(transport, request()) as call:
        await call.wait_ended()
        assert (await call.confirm()).status == 130
        with pytest.raises(Cancelled, match="nobody answered"):
            await call.choose(c.Choice())


async def test_what_makes_no_sense_here_is_not_sent() -> None:
    async def dom0(peer: Peer) -> None:
        await running(peer)
        await peer.say(report())

    transport = FakeTransport(dom0)
    async with RestoreCall(transport, request()) as call:
        confirming = asyncio.create_task(call.confirm())
        await asyncio.sleep(0)
        with pytest.raises(UsageError, match="dom0 cannot be told 'choose' while the call is running"):
            await call.choose(c.Choice())
        assert await confirming == report()
        assert await call.confirm() == report()
    async with RestoreCall(FakeTransport(lambda peer: planned(peer, "list")), request("list")) as call:
        await call.wait_ended()
        with pytest.raises(HostFailed, match="dom0 has ended the call"):
            await call.confirm()


async def test_too_long_a_list_is_refused_before_anybody_is_called() -> None:
    names = tuple(f"{number:01000}" for number in range(2000))
    transport = FakeTransport(before_the_plan)
    with pytest.raises(UsageError, match="too much was asked for at once"):
        async with RestoreCall(transport, request(choice=c.Choice(names=names))):
            pass
    assert not hasattr(transport, "connection")


async def test_an_observer_that_fails_ends_the_call() -> None:
    class Failing(Watching):
        def qube_finished(self, report: QubeReport) -> None:
            raise ZeroDivisionError

    async def dom0(peer: Peer) -> None:
        await running(peer)
        await peer.say(FINISHED)
        await peer.hear_end()

    transport = FakeTransport(dom0)
    with pytest.raises(ZeroDivisionError):
        async with RestoreCall(transport, request(), Failing()) as call:
            await call.confirm()
    await transport.check()


# --- Cancelling ----------------------------------------------------------------------------------


async def test_a_cancel_before_the_plan_ends_the_opening() -> None:
    async def dom0(peer: Peer) -> None:
        await peer.hear(c.OpenBackup)
        opened.set()
        await peer.hear(Cancel)
        await peer.say(plan(), refused(Cancelled("it was cancelled")))

    opened = asyncio.Event()
    transport = FakeTransport(dom0)
    call = RestoreCall(transport, request())
    opening = asyncio.create_task(call.__aenter__())
    await opened.wait()
    await call.cancel()
    await call.cancel()
    with pytest.raises(Cancelled):
        await opening
    await transport.check()


async def test_a_cancel_before_anything_was_said_counts_as_soon_as_it_can() -> None:
    async def dom0(peer: Peer) -> None:
        await peer.hear(c.OpenBackup)
        await peer.hear(Cancel)
        await peer.say(refused(Cancelled("it was cancelled")))

    call = RestoreCall(FakeTransport(dom0), request())
    await call.cancel()
    with pytest.raises(Cancelled):
        async with call:
            pass


async def test_a_cancel_at_the_plan_lets_confirm_tell_what_came_of_it() -> None:
    async def dom0(peer: Peer) -> None:
        await planned(peer)
        await cancelled_error(peer)

    transport = FakeTransport(dom0)
    async with RestoreCall(transport, request()) as call:
        await call.cancel()
        assert (await call.confirm()).status == 130
        await call.cancel()
    await transport.check()


async def test_a_cancel_during_the_run_brings_the_report_of_the_cancelled_restore() -> None:
    async def dom0(peer: Peer) -> None:
        await running(peer)
        begun.set()
        await peer.hear(Cancel)
        await peer.say(PROGRESS, FINISHED, report(status=130, error=Cancelled("it was cancelled")))

    begun = asyncio.Event()
    transport = FakeTransport(dom0)
    async with RestoreCall(transport, request()) as call:
        confirming = asyncio.create_task(call.confirm())
        await begun.wait()
        await call.cancel()
        await call.cancel()
        assert (await confirming).status == 130
    await transport.check()


async def test_a_report_that_crosses_the_cancel_counts() -> None:
    async def dom0(peer: Peer) -> None:
        await running(peer)
        await peer.say(report())
        await peer.hear_end()

    class Cancelling(Watching):
        def volume_started(self, qube: str, volume: str, image_size: int) -> None:
            call.request_cancel()

    call = RestoreCall(FakeTransport(dom0), request(), Cancelling())
    async with call:
        assert await call.confirm() == report()


async def test_a_task_that_is_cancelled_cancels_and_waits_for_the_report() -> None:
    async def dom0(peer: Peer) -> None:
        await running(peer)
        begun.set()
        await peer.hear(Cancel)
        heard.set()
        await go_on.wait()
        await peer.say(report(status=130, error=Cancelled("it was cancelled")))

    begun, heard, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
    transport = FakeTransport(dom0)
    async with RestoreCall(transport, request()) as call:
        confirming = asyncio.create_task(call.confirm())
        await begun.wait()
        confirming.cancel()
        await heard.wait()
        confirming.cancel()  # impatience changes nothing
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await confirming
        assert call.report is not None and call.report.status == 130
    await transport.check()


async def test_a_patient_client_waits_until_all_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def dom0(peer: Peer) -> None:
        await running(peer)
        reached.set()
        await peer.hear(Cancel)
        await asyncio.sleep(0.05)
        await peer.say(report(status=130, error=Cancelled("it was cancelled")))

    monkeypatch.setattr(aio, "CANCEL_TIMEOUT_S", 0)
    reached = asyncio.Event()
    call = RestoreCall(FakeTransport(dom0), request(), patient=True)

    async def whole() -> None:
        async with call:
            await call.confirm()

    task = asyncio.create_task(whole())
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert call.report is not None and call.report.status == 130


@pytest.mark.parametrize("phase", ["planning", "planned", "running"])
async def test_a_dom0_that_does_not_answer_a_cancel_is_left(
    phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dom0(peer: Peer) -> None:
        await {"planning": before_the_plan, "planned": planned, "running": running}[phase](peer)
        reached.set()
        await peer.hear(Cancel)
        await peer.hear_end()

    monkeypatch.setattr(aio, "CANCEL_TIMEOUT_S", 0.01)
    monkeypatch.setattr(aio, "EARLY_CANCEL_TIMEOUT_S", 0.01)
    reached = asyncio.Event()
    transport = FakeTransport(dom0)
    call = RestoreCall(transport, request())

    async def whole() -> None:
        async with call:
            if phase == "planned":
                await call.cancel()
            await call.confirm()

    task = asyncio.create_task(whole())
    await reached.wait()
    if phase != "planned":
        await asyncio.sleep(0)
        await call.cancel()
    with pytest.raises(RestoreError) as caught:
        async with asyncio.timeout(PATIENCE_S):
            await task
    if phase == "running":
        assert isinstance(caught.value, HostFailed)
        assert caught.value.reason == "it was cancelled, and dom0 did not say what came of it"
    else:  # nothing can have come of what nobody has confirmed
        assert (type(caught.value), caught.value.reason) == (Cancelled, "it was cancelled")
    await transport.check()


async def test_a_choice_after_a_cancel_is_not_made_and_told_to_be_cancelled() -> None:
    async def dom0(peer: Peer) -> None:
        await planned(peer)
        await peer.hear(Cancel)
        await peer.say(refused(Cancelled("it was cancelled")))
        await peer.hear_end()

    transport = FakeTransport(dom0)
    async with RestoreCall(transport, request()) as call:
        await call.cancel()
        for _ in range(2):
            with pytest.raises(Cancelled, match="it was cancelled"):
                await call.choose(c.Choice())
    await transport.check()


@pytest.mark.parametrize("phase", [before_the_plan, after_another_choice])
async def test_a_task_that_is_cancelled_while_it_waits_for_a_plan_closes_the_call(phase: Script) -> None:
    async def dom0(peer: Peer) -> None:
        await phase(peer)
        reached.set()
        await peer.hear_end()

    reached = asyncio.Event()
    transport = FakeTransport(dom0)
    task = asyncio.create_task(go_through(transport, phase))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await transport.check()


async def test_leaving_closes_the_call_in_the_middle_and_whoever_waits_is_told() -> None:
    async def dom0(peer: Peer) -> None:
        await running(peer)
        begun.set()
        await peer.hear_end()

    begun = asyncio.Event()
    transport = FakeTransport(dom0)
    async with RestoreCall(transport, request()) as call:
        confirming = asyncio.create_task(call.confirm())
        await begun.wait()
    with pytest.raises(HostFailed, match="the call has been closed here"):
        await confirming
    await transport.check()


# --- What is not to be known ---------------------------------------------------------------------


async def test_the_passphrase_is_in_no_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    asyncio.get_running_loop().set_debug(True)

    async def dom0(peer: Peer) -> None:
        await peer.hear(c.OpenBackup)
        await peer.say_bytes(b"\0\0\0\0")

    call = RestoreCall(FakeTransport(dom0), request())
    with pytest.raises(ProtocolViolation) as caught:
        await call.__aenter__()
    said = [repr(caught.value), repr(call), repr(vars(call)), caplog.text, repr(request()), str(request())]
    assert not any(PASSPHRASE in text for text in said)
    assert QUBE.name in repr(plan())
