"""A qube is restored completely or not at all, whatever fails on this side, and the others go on."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from qubes_restore_svc.errors import HostFailed, NoSpace, RestoreError
from qubes_restore_svc.wire import messages as m
from tests.broker.fake_worker import (
    EMPTY,
    VAULT,
    WORK,
    BackupQube,
    CancelJob,
    Die,
    FakeLink,
    HangUp,
    Image,
    Json,
    Pause,
    Say,
    honest,
    renamed,
)
from tests.broker.jobs import Outcome, check_restored, run
from tests.broker.troubled_host import Trouble, TroubledHost

LATE = BackupQube("vm4", "late", {"private": Image(1000, ((0, b"L" * 1000),))})
QUBES = (WORK, VAULT, LATE, EMPTY)
#: More than the buffers between worker and broker hold.
LARGE = BackupQube(
    "vm2", "vault", {"root": Image(4 << 20, tuple((n << 20, b"x" * (1 << 20)) for n in range(4)))}
)

#: Every call to the host that makes the qube `vault`.
CALLS = [
    "begin vault",
    "create vault/root",
    "write vault/root 1",
    "write vault/root 2",
    "finish vault/root",
    "create vault/private",
    "write vault/private 1",
    "finish vault/private",
    "commit vault",
]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "restored"


def fails(error: type[RestoreError] = NoSpace) -> Callable[[], NoReturn]:
    def fail() -> NoReturn:
        raise error("no room left")

    return fail


def troubled(target: Path, trouble: Trouble) -> Callable[[FakeLink], TroubledHost]:
    return lambda link: TroubledHost(target, trouble)


def skipped(outcome: Outcome) -> list[str]:
    return [message.key for message in outcome.link.heard if isinstance(message, m.SkipQube)]


def test_an_honest_worker_and_a_sound_host_restore_everything(target: Path) -> None:
    outcome = run(honest(QUBES), target)
    assert (outcome.status, outcome.error) == (0, "")
    check_restored(target, *QUBES)
    assert outcome.observer.finished == [f"{qube.name}: restored" for qube in QUBES]
    assert outcome.observer.started == ["work/private", "vault/root", "vault/private", "late/private"]
    volume = outcome.qube("vault").volumes[0]
    done = honest(QUBES)[honest(QUBES).find("volume_done", "vm2", "root")]
    assert isinstance(done, Say)
    assert {**done.message, **volume.model_dump(exclude={"error", "sha256", "difference"})} == {
        **done.message,
        "name": "root",
        "size": 50_000,
    }
    assert skipped(outcome) == []


@pytest.mark.parametrize("call", CALLS)
def test_a_qube_that_fails_on_the_host_is_rolled_back_and_the_others_go_on(target: Path, call: str) -> None:
    outcome = run(honest(QUBES), target, host=troubled(target, {call: fails()}))
    check_restored(target, WORK, LATE, EMPTY)
    assert outcome.outcomes == {
        "work": "restored",
        "vault": "failed",
        "late": "restored",
        "empty": "restored",
    }
    assert (outcome.status, outcome.error) == (3, "")
    report = outcome.qube("vault")
    assert report.error is not None
    assert (report.error.kind, report.error.reason) == ("no-space", "no room left")
    assert "vault: failed" in outcome.observer.finished
    assert "vault: restored" not in outcome.observer.finished
    assert skipped(outcome) == ["vm2"]
    name = "vault/root" if call == "begin vault" else call.split()[1]
    failed = [volume.name for volume in report.volumes if f"vault/{volume.name}" == name]
    for volume in report.volumes:
        if volume.name in failed:
            assert volume.outcome == "failed"
            assert volume.error is not None
            assert volume.error.kind == "no-space"
        else:
            assert volume.outcome in ("ok", "skipped", "not reached")


def test_a_host_that_fails_in_the_middle_of_a_large_volume_stops_the_worker(target: Path) -> None:
    outcome = run(honest((WORK, LARGE, LATE)), target, host=troubled(target, {"write vault/root 2": fails()}))
    check_restored(target, WORK, LATE)
    assert outcome.status == 3
    assert outcome.qube("vault").volumes[0].outcome == "failed"


@pytest.mark.parametrize(
    "call", ["begin vault", "create vault/root", "write vault/root 1", "finish vault/root"]
)
def test_a_worker_that_does_not_care_about_a_skip_changes_nothing(target: Path, call: str) -> None:
    outcome = run(honest(QUBES), target, host=troubled(target, {call: fails()}), stubborn=True)
    check_restored(target, WORK, LATE, EMPTY)
    assert (outcome.status, outcome.error) == (3, "")
    assert outcome.qube("vault").outcome == "failed"
    assert [volume.outcome for volume in outcome.qube("vault").volumes] == ["failed", "skipped"]
    assert "restore.Volume+vm2.private" not in outcome.link.calls


def test_a_qube_that_fails_on_the_host_is_given_up_before_the_worker_has_answered(target: Path) -> None:
    """Which may take as long as reading over the rest of a large volume takes."""
    script = honest(QUBES)
    script = script.until(script.find("volume_done", "vm2", "root"), Pause(0.4), CancelJob())
    host = TroubledHost(target, {"write vault/root 1": fails()})
    outcome = run(script, target, host=lambda _: host, heartbeat_s=0.05)
    assert outcome.status == 130
    assert outcome.qube("vault").error is not None
    assert outcome.qube("vault").error.kind == "no-space"  # type: ignore[union-attr]  # it is not None
    assert "vault: failed" in outcome.observer.finished
    assert skipped(outcome) == ["vm2"]


def test_every_qube_may_fail_and_then_nothing_is_left_not_even_the_directory(target: Path) -> None:
    trouble = {f"commit {qube.name}": fails() for qube in QUBES}
    outcome = run(honest(QUBES), target, host=troubled(target, trouble))
    assert (outcome.status, outcome.error) == (1, "")
    assert set(outcome.outcomes.values()) == {"failed"}
    assert not target.exists()


@pytest.mark.parametrize("call", ["create vault/root", "write vault/root 1", "commit vault"])
def test_what_cannot_be_removed_is_told_and_the_others_go_on(target: Path, call: str) -> None:
    trouble = {call: fails(), "rollback vault": fails(HostFailed)}
    outcome = run(honest(QUBES), target, host=troubled(target, trouble))
    check_restored(target, WORK, LATE, EMPTY)  # the end of the lock has tried once more
    assert (outcome.status, outcome.error) == (3, "")
    assert outcome.qube("vault").warnings == ("what had been written could not be removed: no room left",)
    assert (
        "warning: vault: what had been written could not be removed: no room left" in outcome.observer.lines
    )


def test_what_cannot_be_removed_does_not_hide_why_the_session_ended(target: Path) -> None:
    script = honest(QUBES).changed("volume_done", "vm2", "root", image_size=1)
    outcome = run(script, target, host=troubled(target, {"rollback vault": fails(HostFailed)}))
    assert outcome.error.startswith("protocol-violation")
    check_restored(target, WORK)


def test_a_name_that_is_taken_meanwhile_is_not_overwritten(target: Path) -> None:
    taken = target / "vault"
    for call in ("begin vault", "commit vault"):
        outcome = run(honest((VAULT, LATE)), target, host=troubled(target, {call: lambda: taken.mkdir()}))
        assert outcome.outcomes == {"vault": "failed", "late": "restored"}
        assert outcome.qube("vault").error is not None
        assert outcome.qube("vault").error.kind == "qube-exists"  # type: ignore[union-attr]  # it is not None
        assert list(taken.iterdir()) == []
        for path in sorted(target.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def test_a_slow_host_is_not_taken_for_a_lying_worker(target: Path) -> None:
    """The worker has said that the volume is complete long before all of it is written."""
    trouble = {"write vault/root 1": lambda: time.sleep(0.4)}
    outcome = run(honest(QUBES), target, host=troubled(target, trouble), stall_s=0.1, heartbeat_s=0.03)
    assert (outcome.status, outcome.error) == (0, "")
    check_restored(target, *QUBES)


@pytest.mark.parametrize("mistake", [ZeroDivisionError, OSError])
@pytest.mark.parametrize("call", CALLS)
def test_a_mistake_of_ours_is_not_hidden_but_cleaned_up(
    target: Path, call: str, mistake: type[Exception]
) -> None:
    """It comes out as it is, and not only when the worker says its next word."""

    def make() -> NoReturn:
        raise mistake("oops")

    script = honest((VAULT,))
    if call.startswith("write"):
        script = script.until(script.find("volume_done", "vm2", call.split()[1].split("/")[1]))
    with pytest.raises(mistake, match="oops"):
        run(script, target, host=troubled(target, {call: make}), heartbeat_s=0.05)
    assert not target.exists()


# --- The worker fails -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["stream", "volume_done", "qube_settings", "finished"])
def test_a_worker_that_is_killed_leaves_what_was_finished_and_nothing_else(target: Path, place: str) -> None:
    script = honest(QUBES)
    at = script.find(place) if place == "finished" else script.find(place, "vm2")
    outcome = run(script.until(at, Die()), target)
    done = QUBES if place == "finished" else (WORK,)
    check_restored(target, *done)
    assert outcome.error == "worker-lost: the worker was killed (SIGKILL)"
    assert outcome.status == 3
    for qube in QUBES:
        report = outcome.qube(qube.name)
        assert report.outcome == ("restored" if qube in done else "failed")
        assert (report.error is None) == (qube in done)


@pytest.mark.parametrize("place", ["stream", "volume_done"])
def test_a_worker_that_is_killed_in_the_first_qube_leaves_nothing(target: Path, place: str) -> None:
    script = honest(QUBES)
    outcome = run(script.until(script.find(place), Die()), target)
    assert outcome.status == 1
    assert not target.exists()
    assert outcome.qube("work").volumes[0].outcome == ("failed" if place == "volume_done" else "not reached")


def test_a_worker_that_dies_in_the_middle_of_a_large_volume(target: Path) -> None:
    script = honest((LARGE,))
    step = LARGE.volumes["root"].stream[: 2 << 20]
    cut = script.streaming("vm2", "root", step)
    outcome = run(cut.until(cut.find("volume_done"), Die()), target)
    assert outcome.error.startswith("worker-lost")
    assert not target.exists()


def test_a_full_disk_stays_the_reason_when_the_worker_dies_meanwhile(target: Path) -> None:
    script = honest(QUBES)
    script = script.until(script.find("volume_done", "vm2", "root"), Pause(0.1), Die())
    outcome = run(script, target, host=troubled(target, {"write vault/root 1": fails()}))
    check_restored(target, WORK)
    assert outcome.error.startswith("worker-lost")
    vault = outcome.qube("vault")
    for error in (vault.error, vault.volumes[0].error):
        assert error is not None and error.kind == "no-space"
    late = outcome.qube("late").error
    assert late is not None and late.kind == "worker-lost"


def test_a_volume_that_fails_in_the_worker_costs_only_its_qube(target: Path) -> None:
    error: Json = {"kind": "bad-compression", "reason": "the stream ends early", "chunk": 7}
    script = honest(QUBES)
    at = script.find("volume_ready", "vm2", "root")
    failed = Say({"type": "volume_done", "key": "vm2", "volume": "root", "outcome": "failed", "error": error})
    rest = Say({**failed.message, "volume": "private", "outcome": "skipped"})
    settings = Say({"type": "qube_settings", "key": "vm2", "error": error})
    outcome = run(script.with_steps(at, failed, rest, settings, instead_of=7), target)
    check_restored(target, WORK, LATE, EMPTY)
    assert (outcome.status, outcome.error) == (3, "")
    report = outcome.qube("vault")
    assert report.error is not None
    assert (report.error.kind, report.error.chunk) == ("bad-compression", 7)
    assert [volume.outcome for volume in report.volumes] == ["failed", "skipped"]


def test_settings_that_cannot_be_had_cost_the_qube(target: Path) -> None:
    error = {"kind": "bad-metadata", "reason": "firewall.xml is malformed"}
    outcome = run(honest(QUBES).changed("qube_settings", "vm2", error=error), target)
    check_restored(target, WORK, LATE, EMPTY)
    assert outcome.status == 3


@pytest.mark.parametrize("verify", [False, True])
def test_a_qube_that_is_taken_back_is_called_incomplete_and_says_why(target: Path, verify: bool) -> None:
    error = {"kind": "bad-archive", "reason": "its firewall.xml stands behind the files of other qubes"}
    script = honest(QUBES, verify=verify)
    back = Say({"type": "qube_incomplete", "key": "vm1", "error": error})
    outcome = run(script.before(script.find("finished"), back), None if verify else target)
    word = "failed" if verify else "incomplete"
    assert outcome.outcomes["work"] == word
    assert set(outcome.outcomes.values()) == {word, "verified" if verify else "restored"}
    assert (outcome.status, outcome.error) == (3, "")
    report = outcome.qube("work").error
    assert report is not None and report.reason == error["reason"]
    assert ("It had been created by then and is still there" in report.advice) != verify
    assert outcome.observer.finished.count(f"work: {word}") == 1
    if not verify:
        check_restored(target, *QUBES)


def test_a_volume_that_nothing_promised_is_restored_and_reported(target: Path) -> None:
    promised = [{"name": "private", "size": 20_000}]
    outcome = run(honest((WORK, renamed(VAULT, volumes=promised))), target)
    assert (outcome.status, outcome.error) == (0, "")
    check_restored(target, WORK, VAULT)
    assert {volume.name: volume.outcome for volume in outcome.qube("vault").volumes} == {
        "private": "ok",
        "root": "ok",
    }


def test_a_hang_up_after_the_last_qube_is_not_a_complete_restore(target: Path) -> None:
    outcome = run([*honest(QUBES)[:-1], HangUp()], target)
    check_restored(target, *QUBES)
    assert (outcome.status, outcome.error) == (3, "worker-lost: the worker hung up")


# --- Verify ---------------------------------------------------------------------------------------


def test_a_verify_fetches_nothing_and_reports_what_the_worker_measured() -> None:
    outcome = run(honest(QUBES, verify=True), None)
    assert outcome.status == 0
    assert set(outcome.outcomes.values()) == {"verified"}
    assert outcome.link.calls == ["restore.Session+"]
    volume = outcome.qube("vault").volumes[1]
    assert (volume.outcome, volume.size, volume.data_bytes) == ("ok", 20_000, 20_000)
    start = outcome.link.heard[1]
    assert isinstance(start, m.Start)
    assert (start.mode, start.keys) == ("verify", ("vm1", "vm2", "vm4", "vm3"))


def test_a_verify_goes_on_with_the_other_volumes_of_a_qube_that_failed() -> None:
    error = {"kind": "missing-volume", "reason": "the archive does not hold it"}
    script = honest(QUBES, verify=True)
    place: Json = {"type": "volume_done", "key": "vm2", "volume": "root"}
    failed = Say({**place, "outcome": "failed", "error": error})
    outcome = run(script.with_steps(script.find("volume_done", "vm2", "root"), failed), None)
    assert outcome.status == 3
    report = outcome.qube("vault")
    assert (report.outcome, [volume.outcome for volume in report.volumes]) == ("failed", ["failed", "ok"])
    assert report.error is not None
    assert report.error.kind == "missing-volume"
    assert skipped(outcome) == []
