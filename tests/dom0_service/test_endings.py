"""However a call ends, nothing is left of it; and whoever comes meanwhile is told who is there."""

import asyncio
import os
import re

import pytest

from qubes_restore_svc.dom0_service import conversation
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.report import RestoreProgress
from tests.support.descriptors import open_descriptors, until_closed

from .parts import CALLER, STORAGE
from .support import PATIENCE_S, Bed, open_message
from .test_hostile_client import lead_to

PHASES = [c.CallPhase.IDLE, c.CallPhase.PLANNING, c.CallPhase.PLANNED, c.CallPhase.RUNNING]


async def until_noticed(bed: Bed) -> None:
    """Until dom0 knows that the client wants no more."""
    async with asyncio.timeout(PATIENCE_S):
        while not bed.ended:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("phase", PHASES)
async def test_a_client_that_dies_leaves_nothing(bed: Bed, phase: c.CallPhase) -> None:
    before = open_descriptors()
    async with bed.call() as client:
        await lead_to(phase, bed, client)
        client.hang_up()
        if phase is not c.CallPhase.IDLE:
            await until_noticed(bed)
        bed.parts.check.set()
        bed.parts.begin.set()
    assert bed.delivered is False
    assert bed.restored == []
    await until_closed(before)
    assert bed.notes[-1] in ("ended: refused (cancelled)", "ended: status 130 (cancelled)")


@pytest.mark.parametrize("phase", PHASES)
async def test_a_client_that_closes_its_call_may_still_hear_what_came_of_it(
    bed: Bed, phase: c.CallPhase
) -> None:
    async with bed.call() as client:
        await lead_to(phase, bed, client)
        client.stop_speaking()
        if phase is c.CallPhase.RUNNING:
            await until_noticed(bed)
            bed.parts.begin.set()
            report = await client.report()
            assert (report.status, report.error and report.error.reason) == (130, "the call was closed")
        else:
            assert (await client.refused()).error.reason == "the call was closed"
    assert bed.delivered is True
    assert bed.restored == []


async def test_half_a_message_and_the_end_is_the_end(bed: Bed) -> None:
    async with bed.call() as client:
        client.raw(b"\0\0\1\0{")
        client.stop_speaking()
        assert (await client.refused()).error.kind == "cancelled"
    assert bed.parts.made == []


@pytest.mark.parametrize("phase", PHASES)
async def test_a_signal_cancels(bed: Bed, phase: c.CallPhase) -> None:
    async with bed.call() as client:
        await lead_to(phase, bed, client)
        await asyncio.sleep(0)
        bed.cancel()
        bed.cancel()
        bed.parts.begin.set()
        if phase is c.CallPhase.RUNNING:
            report = await client.report()
            assert (report.status, report.error and report.error.reason) == (130, "dom0 ended it")
        else:
            assert (await client.refused()).error.reason == "dom0 ended it"
    assert bed.restored == []


async def test_a_restore_goes_on_for_a_client_that_does_not_read(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "LAST_WORD_TIMEOUT_S", 0.2)
    async with bed.call(small_buffers=True) as client:
        await lead_to(c.CallPhase.RUNNING, bed, client)
        for _ in range(2000):  # more than the sockets hold
            bed.observer.log("info", "x" * 1000)
            bed.observer.progress(RestoreProgress(archive_bytes=1))
        bed.parts.begin.set()
        async with asyncio.timeout(PATIENCE_S):
            while bed.notes[-1:] != ["ended: status 0"]:
                await asyncio.sleep(0.001)
    assert bed.delivered is False
    assert bed.restored == ["debian", "vault", "work"]


async def test_a_call_in_which_nobody_says_anything_ends(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "OPEN_TIMEOUT_S", 0.05)
    async with bed.call() as client:
        client.raw(b"\0")
        error = (await client.refused()).error
    assert (error.kind, error.reason) == ("cancelled", "nobody said which backup to open for 0 seconds")


async def test_a_plan_that_nobody_answers_ends_the_call(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "PLAN_TIMEOUT_S", 0.05)
    async with bed.call() as client:
        client.say(open_message(bed.backup))
        await client.plan()
        assert (await client.refused()).error.kind == "cancelled"
    assert bed.restored == []


async def test_in_dom0_a_person_may_take_his_time(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "PLAN_TIMEOUT_S", 0)
    async with bed.call(caller="dom0") as client:
        client.say(open_message(bed.backup, location={"text": str(bed.backup)}))
        await client.plan()
        await asyncio.sleep(0.05)
        client.say({"type": "confirm", "plan": 1})
        assert (await client.report()).status == 0


async def test_asking_for_plan_after_plan_does_not_hold_the_lock(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "PLAN_TIMEOUT_S", 0.3)
    async with bed.call() as client:
        client.say(open_message(bed.backup))
        for _ in range(40):
            message = await client.hear()
            if isinstance(message, c.Refused):
                break
            if isinstance(message, c.Plan):
                await asyncio.sleep(0.02)
                client.say({"type": "choose", "choice": {}})
        assert isinstance(message, c.Refused)
    assert message.error.reason == "nobody confirmed a plan for 0 seconds"


@pytest.mark.parametrize(
    ("first", "second", "doing"),
    [
        ("restore", "restore", "restoring"),
        ("restore", "verify", "restoring"),
        ("restore", "list", "restoring"),
        ("verify", "restore", "verifying"),
        ("verify", "verify", "verifying"),
    ],
)
async def test_of_two_at_once_the_second_is_told_who_and_since_when(
    bed: Bed, first: str, second: str, doing: str
) -> None:
    bed.configure(f"grants: {{{STORAGE}: {{storage: [{CALLER}]}}}}")
    async with bed.call(shared=True) as client:
        client.say(open_message(bed.backup, first))
        await client.plan()
        async with bed.call(caller=STORAGE, shared=True) as other:
            other.say(open_message(bed.backup, second))
            error = (await other.refused()).error
        assert error.kind == "restore-in-progress"
        assert re.fullmatch(
            rf"{CALLER} has been {doing} since \d\d:\d\d on [-0-9]{{10}} \(process {os.getpid()} of .*\)",
            error.reason,
        )
        client.say({"type": "confirm", "plan": 1})
        assert (await client.report()).status == 0
    bed.check_nothing_is_left()


async def test_after_a_call_another_one_can_be_made_at_once(bed: Bed) -> None:
    for _ in range(2):
        async with bed.call() as client:
            client.say(open_message(bed.backup, "verify", choice={"names": ["vault"]}))
            await client.plan()
            client.say({"type": "confirm", "plan": 1})
            assert (await client.report()).status == 0
