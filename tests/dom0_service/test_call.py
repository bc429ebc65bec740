"""A call that goes as it should: what is asked for, what is told, and what comes of it."""

import os

import pytest

from qubes_restore_svc.broker.client import SourceClock
from qubes_restore_svc.qubes.backup_source import Dom0File
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.messages import Log
from qubes_restore_svc.wire.qrexec_call import LIST, START, VERIFY
from qubes_restore_svc.wire.restore_call import QubePath, QubeService

from .parts import CALLER, POOL, STORAGE
from .support import Bed, open_message


async def test_a_restore_from_the_caller_itself(bed: Bed) -> None:
    async with bed.call() as client:
        client.say(open_message(bed.backup))
        plan = await client.plan()
        assert (plan.number, plan.mode, plan.archive_size) == (1, "restore", None)
        decisions = {qube.name: qube.decision for qube in plan.qubes}
        assert decisions == {"work": "take", "vault": "take", "debian": "take", "dom0": "leave-out"}
        client.say({"type": "confirm", "plan": 1})
        report = await client.report()
    assert (report.status, report.mode) == (0, "restore")
    assert {qube.name for qube in report.qubes if qube.succeeded} == {"work", "vault", "debian"}
    assert bed.restored == ["debian", "vault", "work"]
    assert bed.delivered is True
    assert bed.parts.made[0][0] == QubePath(CALLER, str(bed.backup))
    assert [kept["asked_by"] for kept in bed.reports] == [CALLER]
    kinds = [type(message) for message in client.heard]
    assert kinds.count(c.QubeFinished) == 3
    assert kinds.index(c.Plan) < kinds.index(c.VolumeStarted) < kinds.index(c.QubeFinished)


async def test_what_cannot_be_kept_is_told_to_the_client_and_in_dom0(bed: Bed) -> None:
    (bed.folder / "reports").rmdir()
    bed.configure(f"log: {{file: {bed.folder}}}")
    async with bed.call() as client:
        client.say(open_message(bed.backup, "verify"))
        await client.plan()
        client.say({"type": "confirm", "plan": 1})
        assert (await client.report()).status == 0
        (bed.folder / "reports").mkdir()
    told = [message.text for message in client.heard if isinstance(message, Log)]
    for text in ("the report cannot be kept in", "the log cannot be written to"):
        assert [line for line in told if text in line], told
        assert [line for line in bed.notes if text in line], bed.notes


async def test_what_is_restored_for_somebody_is_kept_and_noted_for_somebody(bed: Bed) -> None:
    bed.configure(f"log: {{file: {bed.folder / 'log'}}}")
    async with bed.call() as client:
        client.say(open_message(bed.backup, choice={"names": ["vault"]}))
        await client.plan()
        client.say({"type": "confirm", "plan": 1})
        await client.report()
    assert [report["status"] for report in bed.reports] == [0]
    assert "restore: begun for sys-gui" in (bed.folder / "log").read_text()
    assert bed.notes == ["restore of a backup in sys-gui", "ended: status 0"]
    assert bed.parts.made[0][2] == CALLER


@pytest.mark.parametrize("service", [START, VERIFY])
async def test_a_verification(bed: Bed, service: str) -> None:
    async with bed.call(service) as client:
        client.say(open_message(bed.backup, "verify"))
        plan = await client.plan()
        assert [qube.name for qube in plan.taken] == ["dom0", "work", "vault", "debian"]
        client.say({"type": "confirm", "plan": 1})
        report = await client.report()
    assert (report.status, report.mode) == (0, "verify")
    assert all(qube.outcome == "verified" for qube in report.qubes)
    assert not bed.parts.target.exists()


@pytest.mark.parametrize("service", [START, VERIFY, LIST])
async def test_a_list_ends_with_the_plan(bed: Bed, service: str) -> None:
    async with bed.call(service) as client:
        client.say(open_message(bed.backup, "list"))
        plan = await client.plan()
        await client.end()
    assert (plan.mode, plan.number) == ("list", 1)
    assert [qube.name for qube in plan.qubes] == ["dom0", "work", "vault", "debian"]
    assert bed.delivered is True
    assert bed.notes[-1] == "ended: listed"
    assert bed.reports == []


async def test_another_choice_makes_another_plan(bed: Bed) -> None:
    async with bed.call() as client:
        client.say(open_message(bed.backup, choice={"names": ["work"]}))
        assert [qube.name for qube in (await client.plan()).taken] == ["work"]
        client.say({"type": "choose", "choice": {"exclude": ["work", "debian"]}})
        second = await client.plan()
        assert (second.number, [qube.name for qube in second.taken]) == (2, ["vault"])
        client.say({"type": "choose", "choice": {"names": ["debian"]}})
        third = await client.plan()
        assert (third.number, [qube.name for qube in third.taken]) == (3, ["debian"])
        client.say({"type": "confirm", "plan": 3})
        report = await client.report()
    assert {qube.name: qube.outcome for qube in report.qubes} == {
        "work": "left out",
        "vault": "left out",
        "debian": "restored",
        "dom0": "left out",
    }
    assert bed.restored == ["debian"]


async def test_a_choice_of_what_is_not_there_ends_the_call(bed: Bed) -> None:
    async with bed.call() as client:
        client.say(open_message(bed.backup))
        await client.plan()
        client.say({"type": "choose", "choice": {"names": ["wrok"]}})
        refused = await client.refused()
    assert (refused.error.kind, refused.error.reason) == ("usage", "the backup holds no qube named 'wrok'")
    assert bed.restored == []


@pytest.mark.parametrize("mode", ["restore", "verify", "list"])
async def test_a_wrong_passphrase(bed: Bed, mode: str) -> None:
    async with bed.call() as client:
        client.say(open_message(bed.backup, mode, passphrase="nonsense"))
        refused = await client.refused()
    assert refused.error.kind == "wrong-passphrase"
    assert not bed.parts.target.exists()
    assert "nonsense" not in " ".join(bed.notes) + str(bed.reports) + str(client.heard)


async def test_a_plan_beyond_the_limits_is_told_early_and_can_be_mended(bed: Bed) -> None:
    bed.configure("limits: {qubes: 1}")
    async with bed.call() as client:
        client.say(open_message(bed.backup))
        excess = (await client.plan()).excess
        assert excess is not None
        assert excess.reason == "3 qubes are to be restored, and the configuration allows 1"
        client.say({"type": "choose", "choice": {"names": ["vault"]}})
        assert (await client.plan()).excess is None
        client.say({"type": "confirm", "plan": 2})
        assert (await client.report()).status == 0
    assert bed.restored == ["vault"]


@pytest.mark.parametrize("mode", ["verify", "compare"])
async def test_what_restores_nothing_is_not_limited(bed: Bed, mode: str) -> None:
    bed.configure("limits: {qubes: 1}")
    async with bed.call(caller="dom0") as client:
        client.say(open_message(bed.backup, mode))
        plan = await client.plan()
        assert (plan.mode, plan.excess) == (mode, None)
        client.say({"type": "cancel"})
        assert (await client.refused()).error.kind == "cancelled"


async def test_a_plan_beyond_the_limits_is_not_carried_out(bed: Bed) -> None:
    bed.configure("limits: {qubes: 1}")
    async with bed.call() as client:
        client.say(open_message(bed.backup))
        await client.plan()
        client.say({"type": "confirm", "plan": 1})
        refused = await client.refused()
    assert (refused.error.kind, refused.error.reason) == (
        "usage",
        "3 qubes are to be restored, and the configuration allows 1",
    )
    assert bed.restored == []
    async with bed.call() as client:
        client.say(open_message(bed.backup, "verify"))
        await client.plan()
        client.say({"type": "confirm", "plan": 1})
        assert (await client.report()).status == 0


@pytest.mark.parametrize("mode", ["list", "verify", "restore"])
async def test_a_stalled_backup_ends_the_call_after_the_configured_time(
    mode: str, bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    bed.configure("limits: {stall_timeout: 90}")
    monkeypatch.setattr(SourceClock, "heard", lambda clock, progress, now: setattr(clock, "stalled_s", 90))
    os.mkfifo(bed.folder / "silent")
    with open(bed.folder / "silent", "r+b", buffering=0):
        async with bed.call() as client:
            client.say(open_message(bed.folder / "silent", mode, stall_timeout=600))
            refused = await client.refused()
    assert refused.error.kind == "source-stalled"


async def test_a_cancel_before_and_after_the_confirmation(bed: Bed) -> None:
    async with bed.call() as client:
        client.say(open_message(bed.backup))
        await client.plan()
        client.say({"type": "cancel"})
        assert (await client.refused()).error.kind == "cancelled"
    bed.parts.begin.clear()
    async with bed.call() as client:
        client.say(open_message(bed.backup))
        await client.plan()
        client.say({"type": "confirm", "plan": 1})
        await client.started()
        client.say({"type": "cancel"})
        bed.parts.begin.set()
        report = await client.report()
    assert (report.status, report.error and report.error.kind) == (130, "cancelled")
    assert bed.restored == []
    assert bed.notes[-1] == "ended: status 130 (cancelled)"


async def test_what_is_wished_for_and_granted_is_passed_on(bed: Bed) -> None:
    bed.configure(
        f"grants: {{{CALLER}: {{storage: [{STORAGE}], services: ['my.*'], pools: ['*'], templates: [mine],"
        f" max_memory: 9000, max_vcpus: 8, dom0_directories: [{bed.backup.parent}]}}}}"
    )
    wishes = {"worker": {"template": "mine", "memory": 9000, "vcpus": 8}, "choice": {"pool": POOL}}
    locations = [
        ({"qube": STORAGE, "text": str(bed.backup)}, QubePath(STORAGE, str(bed.backup))),
        ({"qube": STORAGE, "text": "my.Backup+x", "service": True}, QubeService(STORAGE, "my.Backup+x")),
        ({"qube": "dom0", "text": str(bed.backup)}, None),
    ]
    for location, expected in locations:
        async with bed.call(START) as client:
            client.say(open_message(bed.backup, "list", location=location, ignore_size_limit=True, **wishes))
            if isinstance(expected, QubeService):  # there is none here
                assert (await client.refused()).error.kind == "archive-unreadable"
            else:
                plan = await client.plan()
                assert plan.archive_size == (None if expected else bed.backup.stat().st_size)
        found, request, _ = bed.parts.made[-1]
        assert found == expected or (expected is None and isinstance(found, Dom0File))
        assert request.worker == c.WorkerWishes(template="mine", memory=9000, vcpus=8)
        assert (request.choice.pool, request.ignore_size_limit) == (POOL, True)


async def test_dom0_itself_may_do_everything(bed: Bed) -> None:
    bed.configure("grants: {default: {verify_only: true}}")
    async with bed.call(caller="dom0") as client:
        client.say(open_message(bed.backup, choice={"names": ["dom0", "vault"]}, worker={"memory": 100000}))
        plan = await client.plan()
        assert plan.archive_size == bed.backup.stat().st_size
        assert [qube.name for qube in plan.taken] == ["dom0", "vault"]
        client.say({"type": "confirm", "plan": 1})
        assert (await client.report()).status == 0
    assert bed.restored == ["dom0", "vault"]
    assert [kept["asked_by"] for kept in bed.reports] == [None]


async def test_a_mistake_in_the_configuration_is_logged_in_dom0_and_not_told_the_caller(bed: Bed) -> None:
    bed.configure("limits: {qubes: secret}")
    async with bed.call() as client:
        client.say(open_message(bed.backup))
        refused = await client.refused()
    assert refused.error.kind == "bad-configuration"
    assert "secret" not in refused.error.reason + refused.error.advice
    assert "line 2, limits.qubes" in bed.notes[0]
    async with bed.call(caller="dom0") as client:
        client.say(open_message(bed.backup))
        assert "line 2, limits.qubes" in (await client.refused()).error.reason


async def test_dom0_that_names_a_service_and_no_qube_is_refused(bed: Bed) -> None:
    async with bed.call(caller="dom0") as client:
        client.say(open_message(bed.backup, location={"text": "my.Backup", "service": True}))
        error = (await client.refused()).error
    assert (error.kind, error.reason) == ("usage", "dom0 has no service that brings a backup")
    assert bed.parts.made == []
