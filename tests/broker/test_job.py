"""A whole job: it always comes back with a report, soon after a cancel, and leaves nothing."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from qubes_restore_svc import waiting as waiting_module
from qubes_restore_svc.broker import client, job
from qubes_restore_svc.broker.client import SessionOptions
from qubes_restore_svc.broker.interfaces import HostView
from qubes_restore_svc.broker.job import read_manifest, run_job
from qubes_restore_svc.broker.plan import Planned, make_plan
from qubes_restore_svc.errors import (
    ArchiveUnreadable,
    RestoreError,
    RestoreInProgress,
    UsageError,
    WorkerStalled,
)
from qubes_restore_svc.local.directory import DirectoryHost
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.restore_call import Choice, Plan
from tests.broker.fake_worker import (
    BACKUP_ID,
    DOM0,
    EMPTY,
    VAULT,
    WORK,
    CancelJob,
    Die,
    FakeLink,
    Hear,
    Json,
    Pause,
    Raw,
    Say,
    honest,
    manifest,
    renamed,
)
from tests.broker.jobs import PASSPHRASE, Outcome, Recorder, check_restored, listing, run
from tests.broker.planning import AllowAll
from tests.broker.troubled_host import TroubledHost

from ..support.descriptors import open_descriptors, until_closed

QUBES = (WORK, VAULT, EMPTY)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "restored"


# --- A cancel -------------------------------------------------------------------------------------


def is_cancelled(outcome: Outcome, target: Path) -> None:
    """Status and report say so, and what is there is what the report calls restored."""
    assert (outcome.status, outcome.error) == (130, "cancelled: it was cancelled")
    restored = [qube for qube in QUBES if outcome.outcomes.get(qube.name) == "restored"]
    if restored:
        check_restored(target, *restored)
    else:
        assert not target.exists()
    for report in outcome.report.qubes:
        if report.outcome != "restored":
            assert report.error is not None
            assert report.error.kind == "cancelled"


@pytest.mark.parametrize("again", [(), (1,), (1, 2, 3)], ids=["once", "twice", "and again"])
def test_a_cancel_at_any_moment_leaves_no_half_of_a_qube(tmp_path: Path, again: tuple[int, ...]) -> None:
    for moment in range(1, 100):
        target = tmp_path / str(moment)
        cancel_at = [moment, *(moment + later for later in again)]
        outcome = run(honest(QUBES), target, cancel_at=cancel_at, thorough=False)
        if outcome.status == 0:
            break
        is_cancelled(outcome, target)
    assert moment > 15  # it was cancelled everywhere, to the end
    check_restored(target, *QUBES)


@pytest.mark.parametrize(
    "call",
    [
        "begin vault",
        "create vault/root",
        "write vault/root 2",
        "finish vault/root",
        "commit vault",
        "commit empty",
    ],
)
def test_a_cancel_waits_for_the_host_and_not_longer(target: Path, call: str) -> None:
    """The thread that is in the host's call must be through before anything is removed."""

    def cancel(link: FakeLink) -> Callable[[], None]:
        def during_the_call() -> None:
            assert threading.current_thread() is not threading.main_thread()
            assert link.job is not None
            link.job.get_loop().call_soon_threadsafe(link.job.cancel)
            time.sleep(0.15)

        return during_the_call

    outcome = run(honest(QUBES), target, host=lambda link: TroubledHost(target, {call: cancel(link)}))
    is_cancelled(outcome, target)
    # What was being committed is there, because it was through; everything else is not.
    assert (target / call.split()[1]).exists() == call.startswith("commit")


#: The host's calls, and what a cancel does that comes while one of them takes its time: the call is told that
#: nobody wants the volume, or is left to itself, or waited for, while somebody else can speak to the person.
SLOW_CALLS = {
    "lock": "waits",
    "view": "leaves",
    "free_space": "leaves",
    "begin vault": "waits",
    "create vault/root": "waits",
    "write vault/root 2": "abandons",
    "finish vault/root": "abandons",
    "commit vault": "waits",
    "rollback vault": "waits",
}


@pytest.mark.parametrize(("call", "does"), SLOW_CALLS.items())
def test_a_cancel_comes_before_the_end_of_a_slow_call(target: Path, call: str, does: str) -> None:
    answered, abandoned, ended = threading.Event(), threading.Event(), threading.Event()
    in_time: list[bool] = []

    def slow(link: FakeLink) -> Callable[[], None]:
        def during_the_call() -> None:
            assert link.job is not None
            loop = link.job.get_loop()
            loop.call_soon_threadsafe(link.job.add_done_callback, lambda _: ended.set())
            loop.call_soon_threadsafe(link.job.cancel)
            loop.call_soon_threadsafe(loop.call_soon, answered.set)
            in_time.append(answered.wait(2))  # the event loop is free
            if does != "waits":
                in_time.append((abandoned if does == "abandons" else ended).wait(2))

        return during_the_call

    def host(link: FakeLink) -> TroubledHost:
        return TroubledHost(target, {call: slow(link), "abandon vault/root": abandoned.set})

    script = honest(QUBES)
    if call == "rollback vault":
        index = script.find("volume_done", "vm2", "root")
        error: Json = {"kind": "bad-image", "reason": "no"}
        place: Json = {"type": "volume_done", "key": "vm2", "volume": "root"}
        script = script.until(index - 1, Say({**place, "outcome": "failed", "error": error}), Pause(5))
    outcome = run(script, target, host=host)
    assert in_time == [True] * len(in_time) and in_time
    assert (outcome.status, outcome.error) == (130, "cancelled: it was cancelled")
    assert (target / "vault").exists() == (call == "commit vault")


@pytest.mark.parametrize(
    ("attempts", "cancelled", "patience_s", "status"),
    [(2, False, 5, 0), (1000, True, 5, 130), (1000, False, 0.02, 1)],
    ids=["it ends", "a cancel does not wait for it", "nobody waits for ever"],
)
def test_what_clears_up_after_a_killed_restore_is_waited_for(
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    attempts: int,
    cancelled: bool,
    patience_s: float,
    status: int,
) -> None:
    monkeypatch.setattr(waiting_module, "_PAUSE_S", 0.01)
    monkeypatch.setattr(waiting_module, "CLEARING_TIMEOUT_S", patience_s)
    left = [attempts]

    def host(link: FakeLink) -> TroubledHost:
        def still_held() -> None:
            left[0] -= 1
            if cancelled and left[0] == attempts - 5:
                assert link.job is not None
                link.job.get_loop().call_soon_threadsafe(link.job.cancel)
            if left[0] >= 0:
                clearing = RestoreInProgress("it is being cleared up")
                clearing.ends_soon = True
                raise clearing

        return TroubledHost(target, {"lock": still_held})

    outcome = run(honest(QUBES), target, host=host)
    assert outcome.status == status
    assert left[0] == -1 if status == 0 else left[0] > attempts - 20
    if status == 1:
        assert "it is being cleared up" in outcome.error


def test_a_cancel_while_the_worker_derives_keys(target: Path) -> None:
    outcome = run([Hear("open"), Pause(0.1), CancelJob()], target, heartbeat_s=0.02)
    is_cancelled(outcome, target)


def test_the_worker_is_told_of_a_cancel(target: Path) -> None:
    script = honest(QUBES)
    outcome = run(script.until(script.find("volume_done", "vm2"), CancelJob()), target)
    is_cancelled(outcome, target)
    assert isinstance(outcome.link.heard[-1], m.Cancel)


def test_a_cancel_during_a_verify() -> None:
    script = honest(QUBES, verify=True)
    outcome = run(script.until(script.find("volume_done", "vm2"), Pause(0.1), CancelJob()), None)
    assert outcome.status == 130
    assert outcome.outcomes == {"work": "verified", "vault": "failed", "empty": "failed"}


# --- Ends ------------------------------------------------------------------------------------------


def test_a_wrong_passphrase_is_told_and_nothing_is_left(target: Path) -> None:
    error = {"kind": "wrong-passphrase", "reason": "the passphrase does not open this backup"}
    outcome = run([Hear("open"), Say({"type": "failed", "error": error})], target)
    assert (outcome.status, outcome.error) == (1, f"wrong-passphrase: {error['reason']}")
    assert outcome.report.qubes == ()
    assert not target.exists()


EARLY_ENDS = ["archive-truncated", "bad-archive", "missing-volume", "archive-unreadable"]


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("kind", [*EARLY_ENDS, "authentication-failed"])
def test_the_source_is_asked_why_the_archive_breaks_off(target: Path, kind: str, fails: bool) -> None:
    """In the middle of a qube, and of one that has no volumes: the other one is there."""
    fault = ArchiveUnreadable("the file could not be read (Input/output error)", advice="Mend it.")
    error: Json = {"kind": kind, "reason": "it ends", "advice": "Look for a complete copy."}
    script = honest(QUBES)
    place: Json = {"type": "volume_done", "key": "vm2", "outcome": "failed", "error": error}
    rest: list[Json] = [
        {**place, "volume": "root"},
        {**place, "volume": "private"},
        {"type": "qube_settings", "key": "vm2", "error": error},
        {"type": "qube_settings", "key": "vm3", "error": error},
        {"type": "finished", "archive_bytes": 1},
    ]
    script = script.until(script.find("volume_ready", "vm2", "root"), *(Say(said) for said in rest))

    def host(link: FakeLink) -> TroubledHost:
        link.fault = fault if fails else None
        return TroubledHost(target, {})

    outcome = run(script, target, host=host)
    assert outcome.outcomes == {"work": "restored", "vault": "failed", "empty": "failed"}
    vault, empty = outcome.qube("vault"), outcome.qube("empty")
    for told in (vault.error, vault.volumes[0].error, empty.error):
        assert told is not None
        if fails and kind in EARLY_ENDS:
            assert (told.kind, told.advice) == ("archive-unreadable", "Mend it.")
            assert told.reason == "it ends; the file could not be read (Input/output error)"
        else:
            assert (told.kind, told.reason) == (kind, "it ends")


@pytest.mark.parametrize("timeout_s", [None, 60, 61])
def test_a_source_that_stalls_is_named_and_ends_the_job_if_it_was_asked_for(
    target: Path, timeout_s: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter(range(10_000))
    monkeypatch.setattr(client, "time", mock.Mock(monotonic=lambda: next(moments)))
    monkeypatch.setattr(client, "MAX_PROGRESS", 1000)
    script = honest(QUBES)
    waiting = Say({"type": "progress", "archive_bytes": 1, "received": 7, "waiting_for_source": True})
    script = script.before(script.find("volume_ready", "vm2", "root"), *[waiting] * 61)
    options = SessionOptions(PASSPHRASE, stall_timeout_s=timeout_s)
    outcome = run(script, target, options=options)
    if timeout_s == 60:
        assert outcome.error == "source-stalled: no data from sys-usb for 60 s"
        assert outcome.outcomes == {"work": "restored", "vault": "failed", "empty": "failed"}
    else:
        assert outcome.status == 0
        assert outcome.report.warnings == ("no data from sys-usb for 60 s",)


def test_a_source_that_failed_behind_the_last_file_is_a_warning(target: Path) -> None:
    def host(link: FakeLink) -> TroubledHost:
        link.fault = ArchiveUnreadable("the file could not be read (Input/output error)")
        return TroubledHost(target, {})

    outcome = run(honest(QUBES), target, host=host)
    assert outcome.status == 0
    (warning,) = outcome.report.warnings
    assert warning.startswith("the file could not be read (Input/output error), after the last file")


@pytest.mark.parametrize(
    "kind", ["authentication-failed", "archive-damaged", "bad-container", "missing-volume"]
)
def test_an_unreadable_place_of_the_source_is_told_as_the_reason_of_damage(target: Path, kind: str) -> None:
    gaps = "the file could not be read at byte 8192"
    error: Json = {"kind": kind, "reason": "it is damaged"}
    script = honest(QUBES)
    place: Json = {"type": "volume_done", "key": "vm2", "outcome": "failed", "error": error}
    script = script.until(
        script.find("volume_ready", "vm2", "root"),
        Say({**place, "volume": "root"}),
        Say({**place, "volume": "private"}),
        Say({"type": "qube_settings", "key": "vm2", "error": error}),
        Say({"type": "qube_settings", "key": "vm3", "error": {"kind": "no-space", "reason": "it is full"}}),
        Say({"type": "finished", "archive_bytes": 1}),
    )

    def host(link: FakeLink) -> TroubledHost:
        link.gaps = gaps
        return TroubledHost(target, {})

    outcome = run(script, target, host=host)
    told = {name: outcome.qube(name).error for name in ("vault", "empty")}
    assert {name: error and error.reason for name, error in told.items()} == {
        "vault": f"it is damaged; {gaps}",
        "empty": "it is full",
    }
    assert outcome.report.warnings == (gaps,)


def test_what_could_not_be_found_out_of_the_host_is_a_warning_once(target: Path) -> None:
    class Host(TroubledHost):
        def view(self) -> HostView:
            return replace(super().view(), remarks=("the policy cannot be read",) * 2)

    outcome = run(honest(QUBES), target, host=lambda link: Host(target, {}))
    assert (outcome.status, outcome.report.warnings) == (0, ("the policy cannot be read",))


def test_the_source_is_asked_as_well_when_the_backup_cannot_even_be_opened(target: Path) -> None:
    def host(link: FakeLink) -> TroubledHost:
        link.fault = ArchiveUnreadable("my.Backup in sys-usb ended with exit code 5", advice="Mend it.")
        return TroubledHost(target, {})

    error = {"kind": "archive-truncated", "reason": "it ends"}
    outcome = run([Hear("open"), Say({"type": "failed", "error": error})], target, host=host)
    assert outcome.error == "archive-unreadable: it ends; my.Backup in sys-usb ended with exit code 5"
    assert outcome.report.error is not None and outcome.report.error.advice == "Mend it."


def test_a_worker_that_dies_before_the_manifest(target: Path) -> None:
    outcome = run([Hear("open"), Die()], target)
    assert (outcome.status, outcome.error) == (1, "worker-lost: the worker was killed (SIGKILL)")
    assert not target.exists()


def test_a_worker_that_never_answers_is_ended(target: Path) -> None:
    outcome = run([Hear("open")], target, stall_s=0.2)
    assert (outcome.status, outcome.error[:14]) == (1, "worker-stalled")
    assert not target.exists()


async def test_nothing_begins_while_somebody_else_restores_there(target: Path) -> None:
    link = FakeLink(honest())
    with DirectoryHost(target).lock():
        choice, options = Choice(), SessionOptions(PASSPHRASE)
        report = await run_job(link, DirectoryHost(target), options, choice, Recorder())
    assert report.status == 1
    assert report.error is not None
    assert report.error.kind == "restore-in-progress"
    assert link.calls == []


def test_a_host_that_cannot_be_locked_or_asked_is_the_end(target: Path) -> None:
    def fail() -> None:
        raise RestoreError("no such host")

    for call in ("lock", "view", "free_space"):
        host = TroubledHost(target, {call: fail})
        outcome = run(honest(), target, host=lambda _: host)  # noqa: B023 - it is called at once
        assert (outcome.status, outcome.error) == (1, "error: no such host")
        assert not target.exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (SessionOptions("secret" * 1000), "passphrase"),
        (SessionOptions("secret\udc80"), "passphrase"),
        (SessionOptions(PASSPHRASE, jobs=5000), "jobs"),
        (SessionOptions(PASSPHRASE, memory=1 << 63), "memory"),
        (SessionOptions(PASSPHRASE, compression_filter="GZIP"), "compression-filter"),
    ],
)
def test_an_option_that_cannot_be_sent_is_a_usage_error_that_does_not_quote_it(
    target: Path, options: SessionOptions, word: str
) -> None:
    outcome = run(honest(), target, options=options)
    assert (outcome.status, outcome.error) == (2, f"usage: the {word} is outside of what is possible")
    assert "secret" not in outcome.report.model_dump_json()
    assert not target.exists()


# --- Selections -------------------------------------------------------------------------------------


def test_only_what_was_selected_is_asked_for(target: Path) -> None:
    outcome = run(honest(QUBES, taken=["vault"]), target, names=["vault", "empty"], exclude=["empty"])
    check_restored(target, VAULT)
    assert outcome.status == 0
    assert outcome.outcomes == {"work": "left out", "vault": "restored", "empty": "left out"}
    start = outcome.link.heard[1]
    assert isinstance(start, m.Start)
    assert (start.mode, start.keys) == ("restore", ("vm2",))


@pytest.mark.parametrize(
    ("names", "exclude", "reason"),
    [
        (["wrok"], [], "the backup holds no qube named 'wrok'"),
        ([], ["wrok"], "the backup holds no qube named 'wrok'"),
        (["work"], ["work"], "no qube is selected"),
    ],
)
def test_a_selection_of_nothing_is_a_usage_error(
    target: Path, names: list[str], exclude: list[str], reason: str
) -> None:
    outcome = run(honest(), target, names=names, exclude=exclude)
    assert (outcome.status, outcome.error) == (2, f"usage: {reason}")
    assert not target.exists()


def test_a_restore_of_everything_does_not_take_dom0s_home(target: Path) -> None:
    outcome = run(honest((WORK, DOM0), taken=["work"]), target)
    assert outcome.status == 0
    assert outcome.outcomes == {"work": "restored", "dom0": "left out"}
    assert outcome.qube("dom0").remark == "its home comes only if you name it"


def test_a_qube_that_could_not_be_listed_keeps_a_restore_from_being_complete(tmp_path: Path) -> None:
    lost = {"name": "lost", "error": {"kind": "bad-metadata", "reason": "its label is not known"}}
    said = Say(manifest(QUBES, refused=[lost]))
    outcome = run(honest(QUBES).with_steps(1, said), tmp_path / "all")
    assert outcome.status == 3
    assert outcome.outcomes["lost"] == "refused"
    assert outcome.report.qubes[-1].error is not None
    chosen = run(honest(QUBES, taken=["work"]).with_steps(1, said), tmp_path / "one", names=["work"])
    assert chosen.status == 0
    excluded = run(honest(QUBES).with_steps(1, said), tmp_path / "but", exclude=["lost"])
    assert excluded.status == 0
    verified = run(honest(QUBES, verify=True).with_steps(1, said), None)
    assert verified.status == 3
    only = run(honest(QUBES).with_steps(1, said), tmp_path / "only", names=["lost"])
    assert only.status == 1


def test_a_verify_writes_nothing_and_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    assert run(honest((*QUBES, DOM0), verify=True), None).status == 0
    assert listing(tmp_path) == before


# --- What the person hears -------------------------------------------------------------------------


def test_what_an_interrupted_restore_left_is_told(target: Path) -> None:
    (target / ".work.partial").mkdir(parents=True)
    (target / ".work.partial" / "private.img").touch()
    outcome = run(honest((EMPTY,)), target)
    assert outcome.observer.lines == [
        f"warning: .work.partial was removed from {target}: a restore that was interrupted had left it"
    ]
    assert list(outcome.report.warnings) == [
        line.removeprefix("warning: ") for line in outcome.observer.lines
    ]


def test_what_is_kept_is_told_too(target: Path) -> None:
    (target / ".vault.partial" / "letter").mkdir(parents=True)
    with DirectoryHost(target).lock() as remarks:
        assert remarks == (
            f".vault.partial in {target} looks like the rest of a restore, but cannot be removed safely",
        )
    assert (target / ".vault.partial" / "letter").exists()


def test_too_little_room_is_told_before_it_is_needed(target: Path) -> None:
    outcome = run(honest((renamed(WORK, backup_size=1 << 60),)), target)
    assert outcome.status == 0  # its holes may still make it fit
    free = DirectoryHost(target).free_space()
    assert free is not None
    assert len(outcome.report.warnings) == 1
    assert outcome.report.warnings[0].startswith("the qubes took 1048576.0 TiB")


def test_the_report_has_the_times_and_the_backup(target: Path) -> None:
    report = run(honest(QUBES), target).report
    assert (report.mode, report.status, report.backup_id) == ("restore", 0, BACKUP_ID)
    assert report.started < report.finished
    assert report.qubes[1].volumes[0].size == 50_000


# --- read_manifest ---------------------------------------------------------------------------------


async def test_a_list_reads_the_manifest_and_destroys_the_worker() -> None:
    before = open_descriptors()
    warning: Json = {"type": "log", "level": "warning", "text": "old"}
    info: Json = {"type": "log", "level": "info", "text": "fine"}
    link, observer = FakeLink(honest().before(1, Say(warning), Say(info))), Recorder()
    found = await read_manifest(link, SessionOptions(PASSPHRASE), observer)
    assert [qube.name for qube in found.qubes] == ["work", "vault"]
    assert observer.lines == ["warning: worker: old", "info: worker: fine"]
    assert link.left
    await until_closed(before)


@pytest.mark.parametrize(
    ("step", "error"),
    [(Raw(b"\0\0\0\0"), RestoreError), (Die(), RestoreError), (Pause(9), WorkerStalled)],
)
async def test_a_list_that_fails_destroys_the_worker(step: Raw, error: type[RestoreError]) -> None:
    link = FakeLink([Hear("open"), step])
    with pytest.raises(error):
        await read_manifest(link, SessionOptions(PASSPHRASE), Recorder(), stall_s=0.2)
    assert link.left
    with pytest.raises(UsageError):
        await read_manifest(FakeLink(honest()), SessionOptions(PASSPHRASE, jobs=0), Recorder())


async def test_a_plan_that_is_refused_says_so_of_every_qube_that_it_took(tmp_path: Path) -> None:
    async def refuse(plan: Plan) -> None:
        raise UsageError("not like this")

    link = FakeLink(honest((WORK, VAULT)))
    host = TroubledHost(tmp_path / "restored", {})
    options = SessionOptions(PASSPHRASE)
    report = await run_job(link, host, options, Choice(), Recorder(), confirm=refuse)
    assert report.error is not None and report.error.reason == "not like this"
    reasons = {qube.name: qube.error and qube.error.reason for qube in report.qubes}
    assert reasons == {"work": "not like this", "vault": "not like this"}
    assert not [call for call in host.calls if call.startswith("begin")]


class Choosing:
    """Confirms the plan after asking for others."""

    def __init__(self, *others: Choice) -> None:
        self.others = list(others)
        self.taken: list[list[str]] = []

    async def __call__(self, plan: Plan) -> Choice | None:
        self.taken.append([qube.name for qube in plan.taken])
        return self.others.pop(0) if self.others else None


async def test_another_plan_is_made_for_whoever_wants_one(target: Path) -> None:
    link = FakeLink(honest((WORK, VAULT, EMPTY), taken=["vault"]))
    choosing = Choosing(Choice(names=("work",)), Choice(exclude=("work", "empty")))
    host, options, observer = TroubledHost(target, {}), SessionOptions(PASSPHRASE), Recorder()
    report = await run_job(link, host, options, Choice(), observer, confirm=choosing)
    assert choosing.taken == [["work", "vault", "empty"], ["work"], ["vault"]]
    outcomes = {qube.name: qube.outcome for qube in report.qubes}
    assert outcomes == {"work": "left out", "vault": "restored", "empty": "left out"}
    check_restored(target, VAULT)
    assert [call for call in host.calls if call.startswith("view")] == ["view"] * 3


async def test_what_settings_may_come_back_is_not_chosen_anew(target: Path) -> None:
    link = FakeLink(honest((WORK,)))
    allowed = AllowAll()
    seen: list[object] = []

    def planned(manifest: m.Manifest, choice: Choice, view: HostView | None, **more: Any) -> Planned:
        seen.append(more["allow"])
        return make_plan(manifest, choice, view, **more)

    with mock.patch.object(job, "make_plan", planned):
        await run_job(
            link,
            TroubledHost(target, {}),
            SessionOptions(PASSPHRASE),
            Choice(),
            Recorder(),
            allow=allowed,
            confirm=Choosing(Choice(names=("work",))),
        )
    assert seen == [allowed, allowed]


async def test_too_little_room_is_told_once_for_all_plans(target: Path) -> None:
    link = FakeLink(honest((renamed(WORK, backup_size=1 << 60),)))
    options, observer = SessionOptions(PASSPHRASE), Recorder()
    choosing = Choosing(Choice(), Choice())
    report = await run_job(link, TroubledHost(target, {}), options, Choice(), observer, confirm=choosing)
    assert len(report.warnings) == len(observer.lines) == 1


async def test_another_choice_that_cannot_be_ends_the_job(target: Path) -> None:
    link = FakeLink(honest((WORK,)))
    choosing = Choosing(Choice(names=("wrok",)))
    options = SessionOptions(PASSPHRASE)
    report = await run_job(link, TroubledHost(target, {}), options, Choice(), Recorder(), confirm=choosing)
    assert report.status == 2
    assert not target.exists()
