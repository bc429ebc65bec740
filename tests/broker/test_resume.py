"""A run in which some qubes are here already: what the worker is told, what it may say, and the report."""

import json
from pathlib import Path

import pytest

from qubes_restore_svc.errors import ExitStatus
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.restore_call import Choice
from tests.broker.fake_worker import DOM0, EMPTY, VAULT, WORK, Json, Pause, Say, Script, honest, renamed
from tests.broker.jobs import Outcome, check_restored, run

QUBES = (WORK, VAULT)
RESUME = Choice(resume=True)
LATE: Json = {"kind": "bad-archive", "reason": "its firewall.xml stands behind the files of other qubes"}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where an earlier run has restored `work`."""
    directory = tmp_path / "restored"
    run(honest(QUBES, taken=["work"]), directory, names=["work"])
    return directory


def resumed(script: Script, target: Path) -> Outcome:
    return run(script, target, choice=RESUME)


def test_what_is_here_is_told_to_the_worker_and_not_asked_for(target: Path) -> None:
    before = (target / "work/qube.json").read_bytes()
    outcome = resumed(honest(QUBES, taken=["vault"]), target)
    start = next(message for message in outcome.link.heard if isinstance(message, m.Start))
    assert start.keys == ("vm2",)
    assert start.here == (m.QubeHere(key="vm1", volumes=("private",), firewall=False),)
    assert outcome.outcomes == {"work": "already restored", "vault": "restored"}
    assert outcome.observer.finished == ["work: already restored", "vault: restored"]
    assert outcome.status == ExitStatus.COMPLETE
    check_restored(target, *QUBES)
    assert (target / "work/qube.json").read_bytes() == before


def test_the_report_has_the_digests_of_what_is_here(target: Path) -> None:
    record = json.loads((target / "work/qube.json").read_text())
    (volume,) = resumed(honest(QUBES, taken=["vault"]), target).qube("work").volumes
    assert (volume.name, volume.outcome, volume.size) == ("private", "ok", 70_000)
    assert volume.fsverity == record["volumes"][0]["fsverity"]


def test_without_being_asked_nothing_is_taken_for_restored(target: Path) -> None:
    outcome = run(honest(QUBES, taken=["vault"]), target)
    assert outcome.outcomes == {"work": "refused", "vault": "restored"}
    assert outcome.status == ExitStatus.PARTLY
    error = outcome.qube("work").error
    assert error is not None and error.reason.endswith("(--skip-existing leaves it as it is)")


def test_when_all_is_here_the_archive_is_still_read_and_the_run_succeeds(target: Path) -> None:
    outcome = run(honest((WORK,), taken=[]), target, choice=RESUME)
    assert outcome.outcomes == {"work": "already restored"}
    assert (outcome.status, outcome.error) == (ExitStatus.COMPLETE, "")
    assert any(isinstance(message, m.Start) and not message.keys for message in outcome.link.heard)


def test_a_qube_that_is_here_and_lacks_something_is_incomplete_and_counts_no_more(target: Path) -> None:
    script = honest(QUBES, taken=["vault"])
    late = Say({"type": "qube_incomplete", "key": "vm1", "error": LATE})
    outcome = resumed(script.before(script.find("finished"), late), target)
    assert outcome.outcomes == {"work": "incomplete", "vault": "restored"}
    error = outcome.qube("work").error
    assert error is not None and "firewall.xml" in error.reason and "before you start it" in error.advice
    assert outcome.status == ExitStatus.PARTLY
    assert run(honest(QUBES, taken=[]), target, choice=RESUME).outcomes == {
        "work": "refused",
        "vault": "already restored",
    }


@pytest.mark.parametrize(
    "said",
    [
        {"type": "volume_ready", "key": "vm1", "volume": "private", "image_size": 70_000},
        {"type": "qube_settings", "key": "vm1"},
        {"type": "volume_done", "key": "vm1", "volume": "root", "outcome": "failed", "error": LATE},
    ],
    ids=lambda said: said["type"],
)
def test_a_worker_cannot_bring_what_is_here_already(said: Json, target: Path) -> None:
    before = (target / "work/private.img").read_bytes()
    script = honest(QUBES, taken=["vault"])
    outcome = resumed(script.before(script.find("finished"), Say(said), Pause(1)), target)
    assert outcome.error.startswith("protocol-violation")
    assert (target / "work/private.img").read_bytes() == before


def test_what_the_worker_warns_of_a_qube_that_is_here_stands_at_that_qube(target: Path) -> None:
    script = honest(QUBES, taken=["vault"])
    line = Say({"type": "log", "level": "warning", "text": "firewall.xml was ignored", "key": "vm1"})
    outcome = resumed(script.before(script.find("finished"), line), target)
    (warning,) = outcome.qube("work").warnings
    assert "firewall.xml was ignored" in warning
    assert any(text.startswith("warning: work: ") for text in outcome.observer.lines)


def test_a_qube_is_taken_back_once(target: Path) -> None:
    script = honest(QUBES, taken=["vault"])
    late = Say({"type": "qube_incomplete", "key": "vm1", "error": LATE})
    outcome = resumed(script.before(script.find("finished"), late, late, Pause(1)), target)
    assert outcome.error.startswith("protocol-violation: a qube taken back twice")


def test_a_qube_that_lacks_a_volume_which_the_backup_promises_does_not_count(target: Path) -> None:
    more = renamed(WORK, volumes=[{"name": "private", "size": 70_000}, {"name": "root", "size": 5}])
    outcome = resumed(honest((more, VAULT), taken=["vault"]), target)
    assert outcome.outcomes == {"work": "refused", "vault": "restored"}
    error = outcome.qube("work").error
    assert error is not None and "nothing proves that an earlier restore" in error.reason


def test_what_is_not_selected_is_left_out_although_it_is_here(target: Path) -> None:
    choice = Choice(resume=True, names=("vault",))
    outcome = run(honest(QUBES, taken=["vault"]), target, choice=choice)
    assert outcome.outcomes == {"work": "left out", "vault": "restored"}


def test_a_home_and_a_qube_without_volumes_are_known_again(target: Path) -> None:
    qubes = (WORK, EMPTY, DOM0)
    run(honest(qubes, taken=["empty", "dom0"]), target, names=["empty", "dom0"])
    outcome = run(honest(qubes, taken=[]), target, choice=Choice(resume=True, dom0_home=True))
    assert set(outcome.outcomes.values()) == {"already restored"}


def test_the_number_of_derivations_is_in_the_report(target: Path) -> None:
    script = honest(QUBES, taken=["vault"])
    index = script.find("finished")
    told = Say({"type": "finished", "archive_bytes": 1, "derivations": 7})
    assert resumed(script.with_steps(index, told), target).report.derivations == 7
