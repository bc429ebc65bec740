"""A restore on an emulated Qubes that was killed, and the next one with `--resume`."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from qubes_restore_svc.qubes.locks import read_holder
from qubes_restore_svc.qubes.proof import FEATURE
from tests.emulation.dom0 import Dom0, LocationKind, wait_until
from tests.emulation.test_restore import IMAGE, plan, write
from tests.support.backup_writer import PASSPHRASE, BackupWriter, ImagePlan, QubePlan

DEBIAN = "debian-12-xfce"
ALL = ("first", "second", "third")
#: Keys of the header and of qubes.xml, and of the one chunk of each qube.
BEGINNING, EACH = 2, 1


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    return write(tmp_path / "backup", *(plan(name, template=DEBIAN) for name in ALL))


#: A sign in the Admin API's calls that the restore has come so far, and what is finished then.
#: Ten moments of a run on any machine are in tests/system/test_resume.py.
MOMENTS: dict[str, tuple[str, str, int]] = {
    "the first volume is written": ("internal.vm.volume.ImportBegin*", "first", 0),
    "the first qube is proven": (f"admin.vm.feature.Set+{FEATURE}", "first", 0),
    "the second qube is made": ("admin.vm.Create.AppVM*", "second", 1),
    "the third qube is to be started": ("admin.vm.tag.Remove+backup-restore-in-progress", "third", 3),
}


def killed(dom0: Dom0, words: list[str], method: str, dest: str) -> None:
    """Start a restore, and kill it with its service when it has made this call; its guards clear up."""
    process = dom0.start(["--mgmt-vm", "--memory", "1500", *words], PASSPHRASE)
    if method.startswith("admin.vm.Create"):
        wait_until(lambda: dest in ("*", *dom0.qubes.qubesd.names()), dest)
        dest = "*"
    while not dom0.qubes.qubesd.calls_of(method, dest):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    holder = read_holder(dom0.folder / "worker.lock")
    if holder is not None:
        os.kill(holder.pid, signal.SIGKILL)
    process.kill()
    process.communicate()
    wait_until(lambda: not dom0.locks(), "the guards")


def assert_all_there(dom0: Dom0) -> None:
    for name in ALL:
        assert dom0.sha256(f"{name}/private") == (IMAGE.size, IMAGE.sha256())
        assert not dom0.qubes.qubesd.tags(name) & {"backup-restore-in-progress", "restore-svc-unfinished"}


def derivations(dom0: Dom0) -> int:
    report = json.loads((dom0.folder / "report.json").read_text())
    assert isinstance(report["derivations"], int)
    return report["derivations"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_after_a_kill_only_what_is_missing_is_done(dom0: Dom0, backup: Path, moment: str) -> None:
    method, dest, least = MOMENTS[moment]
    words = dom0.location(backup, "dom0")
    killed(dom0, words, method, dest)
    there = tuple(name for name in ALL if name in dom0.qubes.qubesd.names())
    # What the guards leave is finished. The restore may have come a step further than the sign.
    assert there == ALL[: len(there)] and least <= len(there) <= least + 1
    dom0.restore([*words, "--resume"], PASSPHRASE)
    assert dom0.outcomes() == {name: "already restored" if name in there else "restored" for name in ALL}
    assert derivations(dom0) == BEGINNING + EACH * (len(ALL) - len(there))
    assert_all_there(dom0)


@pytest.mark.parametrize("kind", ["dom0", "service"])
def test_of_what_is_finished_nothing_is_fetched_or_written(
    dom0: Dom0, backup: Path, kind: LocationKind
) -> None:
    words = dom0.location(backup, kind)
    dom0.restore([*words, "first"], PASSPHRASE)
    calls = len(dom0.qubes.qubesd.calls_of("*", "first"))
    done = dom0.restore([*words, "--resume"], PASSPHRASE)
    assert "1 already restored: first" in done.stdout
    assert done.stderr.endswith("3 of 3 qubes restored, 1 of them by an earlier run (and not read again).\n")
    new = [call.method for call in dom0.qubes.qubesd.calls_of("*", "first")[calls:]]
    assert new and not [one for one in new if re.search(r"Set|Remove|Import|Create", one)], new
    assert_all_there(dom0)
    # And when nothing is missing any more.
    done = dom0.restore([*words, "--resume"], PASSPHRASE)
    assert done.stderr.endswith("3 of 3 qubes restored, 3 of them by an earlier run (and not read again).\n")
    assert derivations(dom0) == BEGINNING


def test_qubes_with_other_names_are_known_by_their_names_in_the_backup(dom0: Dom0, tmp_path: Path) -> None:
    dom0.qubes.add("TemplateVM", "mine", label="black", netvm=None)
    backup = write(
        tmp_path / "backup",
        plan("mine", "TemplateVM"),
        plan("work", template="mine", netvm=""),
        plan("mail", template="mine", netvm=""),
    )
    words = dom0.location(backup, "dom0")
    dom0.restore([*words, "--name", "mine=own", "--name", "work=job", "mine", "work"], PASSPHRASE)
    done = dom0.restore([*words, "--resume"], PASSPHRASE)
    assert dom0.outcomes() == {"own": "already restored", "job": "already restored", "mail": "restored"}
    assert "2 already restored: mine as own, work as job" in done.stdout
    # What refers to one of them finds the one that was restored, and not the qube that has its name here.
    assert str(dom0.qubes.app().domains["mail"].template) == "own"


def test_a_person_who_wants_another_name_gets_another_qube(dom0: Dom0, backup: Path) -> None:
    words = dom0.location(backup, "dom0")
    dom0.restore([*words, "first"], PASSPHRASE)
    dom0.restore([*words, "--resume", "--name", "first=copy", "first"], PASSPHRASE)
    assert dom0.outcomes() == {"copy": "restored"}


def _with_another_name(dom0: Dom0) -> None:
    features = dom0.qubes.app().domains["first"].features
    features[FEATURE] = features[FEATURE].replace('"name":"first"', '"name":"other"')


def _without_the_tag(dom0: Dom0) -> None:
    tags = dom0.qubes.app().domains["first"].tags
    tags.discard(next(tag for tag in map(str, tags) if tag.startswith("restored-from-backup-")))


@pytest.mark.parametrize("change", [_with_another_name, _without_the_tag])
def test_what_is_not_proven_is_in_the_way_as_any_qube(dom0: Dom0, backup: Path, change: object) -> None:
    words = dom0.location(backup, "dom0")
    dom0.restore([*words, "first"], PASSPHRASE)
    assert callable(change)
    change(dom0)
    done = dom0.restore([*words, "--resume", "--skip-conflicting"], PASSPHRASE)
    assert dom0.outcomes() == {"second": "restored", "third": "restored"}
    assert "1 there already: first" in done.stdout


def test_a_qube_of_another_backup_is_in_the_way_as_any_qube(dom0: Dom0, backup: Path, tmp_path: Path) -> None:
    dom0.restore([*dom0.location(backup, "dom0"), "first"], PASSPHRASE)
    other = tmp_path / "other"
    qube = QubePlan("first", "AppVM", volumes={"private": ImagePlan(1 << 20, ())}, template=DEBIAN)
    BackupWriter([qube], backup_id="20260102T010203-1", log_n=4).write(other)
    done = dom0.restore([*dom0.location(other, "dom0"), "--resume"], PASSPHRASE, 1)
    assert "There are qubes of the same names here: first" in done.stderr


def test_no_backup_brings_a_proof(dom0: Dom0, tmp_path: Path) -> None:
    lie = '{"backup_id":"20260101T010203-1234","name":"first"}'
    backup = write(tmp_path / "backup", plan("first", template=DEBIAN, features={FEATURE: lie}))
    dom0.restore(dom0.location(backup, "dom0"), PASSPHRASE)
    assert dom0.qubes.app().domains["first"].features[FEATURE] != lie


@pytest.mark.parametrize(
    ("tags", "outcome"),
    [
        (("backup-restore-in-progress", "restore-svc-unfinished"), "restored"),
        (("restore-svc-unfinished",), "already restored"),
    ],
)
def test_after_a_power_cut_the_last_tags_decide(
    dom0: Dom0, backup: Path, tags: tuple[str, ...], outcome: str
) -> None:
    """The power fails when the proof is set, and both tags, or one of them, are still there."""
    words = dom0.location(backup, "dom0")
    dom0.restore([*words, "first", "second"], PASSPHRASE)
    for tag in tags:
        dom0.qubes.app().domains["second"].tags.add(tag)
    dom0.restore([*words, "--resume"], PASSPHRASE)
    assert dom0.outcomes() == {"first": "already restored", "second": outcome, "third": "restored"}
    assert_all_there(dom0)


def test_when_the_pool_has_room_again_only_what_did_not_fit_is_done(dom0: Dom0, backup: Path) -> None:
    words = dom0.location(backup, "dom0")
    dom0.qubes.qubesd.fail("internal.vm.volume.ImportBegin*", message="No space left", dest="second")
    dom0.restore(words, PASSPHRASE, 3)
    assert dom0.outcomes() == {"first": "restored", "second": "failed", "third": "restored"}
    dom0.qubes.qubesd.mend()
    dom0.restore([*words, "--resume"], PASSPHRASE)
    assert dom0.outcomes() == {
        "first": "already restored",
        "second": "restored",
        "third": "already restored",
    }
    assert derivations(dom0) == BEGINNING + EACH
    assert_all_there(dom0)


def test_after_a_cancel_only_what_is_missing_is_done(dom0: Dom0, backup: Path) -> None:
    words = dom0.location(backup, "dom0")
    process = dom0.start(["--mgmt-vm", "--memory", "1500", *words], PASSPHRASE)
    wait_until(lambda: bool(dom0.qubes.qubesd.calls_of("internal.vm.volume.ImportBegin*", "second")), "it")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    there = [name for name in ALL if name in dom0.qubes.qubesd.names()]
    assert there and there == list(ALL[: len(there)])
    dom0.restore([*words, "--resume"], PASSPHRASE)
    assert derivations(dom0) == BEGINNING + EACH * (len(ALL) - len(there))
    assert_all_there(dom0)
