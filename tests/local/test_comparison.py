"""A backup against a directory of images: what is found of each volume, and that nothing is written."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qubes_restore_svc.errors import ExitStatus, HostFailed, RestoreInProgress
from qubes_restore_svc.local.comparison import ComparedDirectory
from qubes_restore_svc.local.directory import DirectoryHost
from qubes_restore_svc.wire.report import VolumeReport
from tests.broker.fake_worker import DOM0, EMPTY, VAULT, WORK, Say, honest
from tests.broker.jobs import Outcome, listing, run
from tests.local.sample_qubes import new_qube, settings
from tests.support.backup_writer import join_members
from tests.support.damage import sample_backup
from tests.support.descriptors import open_descriptors
from tests.support.fixtures import REPOSITORY
from tests.support.reports import kept_report
from tests.system.support import command, environment, passphrase_file

QUBES = (WORK, VAULT)
SAME, DIFFERENT, PARTLY = ExitStatus.COMPLETE, ExitStatus.DIFFERENT, ExitStatus.PARTLY


@pytest.fixture
def extracted(target: Path) -> Path:
    """A directory with `work` (private) and `vault` (root, private)."""
    assert run(honest(QUBES), target).status == 0
    return target


def compared(directory: Path, *, names: Sequence[str] = (), script: Sequence[Any] | None = None) -> Outcome:
    """Compare with it, and see that nothing was written."""
    before = listing(directory)
    outcome = run(script or honest(QUBES, taken=names or None), directory, names=names, compare=True)
    assert listing(directory) == before
    return outcome


def volume(outcome: Outcome, name: str) -> VolumeReport:
    qube, _, volume = name.partition("/")
    return next(one for one in outcome.qube(qube).volumes if one.name == volume)


def change(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def in_place_of(path: Path, make: Callable[[Path], object]) -> None:
    """Something else has the name of what was there."""
    path.rename(path.parent.parent / "moved") if path.is_dir() else path.unlink()
    make(path)


def link_to(original: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(path.parent.parent / original)


def test_what_was_extracted_is_the_same(extracted: Path) -> None:
    outcome = compared(extracted)
    assert outcome.status == SAME
    assert outcome.outcomes == {"work": "same", "vault": "same"}
    assert [volume(outcome, name).outcome for name in ("work/private", "vault/root")] == ["same", "same"]
    assert outcome.observer.finished == ["work: same", "vault: same"]
    assert not [line for line in outcome.observer.lines if "warning" in line]
    assert outcome.report.mode == "compare"


Damage = Callable[[Path], object]

#: What is done to the directory, then: the exit status, what is said of `vault/root`, and of `vault`.
DAMAGES: dict[str, tuple[Damage, ExitStatus, str, str]] = {
    "one byte": (lambda there: change(there / "vault/root.img", 600, b"x"), DIFFERENT, "differs", "differs"),
    "longer": (lambda there: os.truncate(there / "vault/root.img", 60_000), DIFFERENT, "differs", "differs"),
    "shorter": (lambda there: os.truncate(there / "vault/root.img", 40_000), DIFFERENT, "differs", "differs"),
    "no image": (lambda there: (there / "vault/root.img").unlink(), DIFFERENT, "missing", "missing"),
    "no images": (lambda there: list(map(Path.unlink, (there / "vault").glob("*.img"))),
                  DIFFERENT, "missing", "missing"),
    "no qube": (lambda there: shutil.rmtree(there / "vault"), DIFFERENT, "missing", "missing"),
    "a file for the qube": (lambda there: in_place_of(there / "vault", Path.touch),
                            DIFFERENT, "missing", "missing"),
    "a link to the image": (lambda there: in_place_of(there / "vault/root.img", link_to("work/private.img")),
                            PARTLY, "failed", "failed"),
    "a directory for the image": (lambda there: in_place_of(there / "vault/root.img", Path.mkdir),
                                  PARTLY, "failed", "failed"),
    "a pipe for the image": (lambda there: in_place_of(there / "vault/root.img", os.mkfifo),
                             PARTLY, "failed", "failed"),
    "a link to the qube": (lambda there: in_place_of(there / "vault", link_to("restored/work")),
                           PARTLY, "failed", "failed"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_the_same_is_told_and_the_rest_is_compared(extracted: Path, damage: str) -> None:
    do, status, volume_outcome, qube_outcome = DAMAGES[damage]
    do(extracted)
    # A worker is not asked for what is not here.
    is_gone = damage in ("no qube", "a file for the qube")
    outcome = compared(extracted, script=honest(QUBES, taken=["work"]) if is_gone else None)
    assert outcome.status == status
    assert outcome.outcomes == {"work": "same", "vault": qube_outcome}
    root, private = volume(outcome, "vault/root"), volume(outcome, "vault/private")
    others = {"no images": "missing", "no qube": "missing", "a file for the qube": "missing"}
    others["a link to the qube"] = "skipped"
    assert (root.outcome, private.outcome) == (volume_outcome, others.get(damage, "same"))
    assert (root.difference is not None) == (volume_outcome == "differs")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("a link to the image", "root.img is a symbolic link, which is not followed, and no file"),
        ("a directory for the image", "root.img is a directory, and no file"),
        ("a pipe for the image", "root.img is a device, a pipe or a socket, and no file"),
    ],
)
def test_what_is_no_image_is_not_opened_and_named(extracted: Path, damage: str, reason: str) -> None:
    DAMAGES[damage][0](extracted)
    error = volume(compared(extracted), "vault/root").error
    assert error is not None and error.reason == reason
    assert error.advice == ""


def test_a_link_in_place_of_the_qube_is_not_followed(extracted: Path) -> None:
    DAMAGES["a link to the qube"][0](extracted)
    error = compared(extracted).qube("vault").error
    assert error is not None and error.reason.endswith(
        "is a symbolic link, which is not followed, and no directory"
    )


def test_an_image_that_may_not_be_read_fails_and_the_others_do_not(
    extracted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def denied(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if path == "root.img":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", denied)
    outcome = compared(extracted)
    assert outcome.status == PARTLY
    error = outcome.qube("vault").error
    assert error is not None and error.reason == "opening root.img failed: Permission denied"
    assert volume(outcome, "vault/private").outcome == "same"


def test_what_is_here_and_not_in_the_backup_is_said_and_is_no_difference(extracted: Path) -> None:
    (extracted / "other").mkdir()
    (extracted / "other" / "private.img").touch()
    (extracted / "vault" / "home.tar").touch()
    (extracted / "notes").mkdir()
    (extracted / "no qube").mkdir()
    (extracted / "no qube" / "private.img").touch()
    outcome = compared(extracted)
    assert outcome.status == SAME
    assert outcome.report.warnings == ("not in the backup: other",)
    assert outcome.qube("vault").warnings == ("home.tar is here, and not in the backup",)
    # Who asks for one qube does not ask what else there is.
    assert compared(extracted, names=["work"]).report.warnings == ()


def test_a_qube_that_is_missing_is_not_read(extracted: Path) -> None:
    shutil.rmtree(extracted / "vault")
    outcome = compared(extracted, script=honest(QUBES, taken=["work"]))
    assert outcome.outcomes == {"work": "same", "vault": "missing"}
    shutil.rmtree(extracted / "work")
    script = honest(QUBES)
    outcome = compared(extracted, script=script.until(script.find("hear start")))
    assert (outcome.status, outcome.outcomes) == (DIFFERENT, {"work": "missing", "vault": "missing"})


def test_a_qube_without_volumes_is_the_same_if_it_is_here(target: Path) -> None:
    assert run(honest([EMPTY]), target).status == 0
    assert compared(target, script=honest([EMPTY])).outcomes == {"empty": "same"}


def test_a_home_is_compared_where_one_was_extracted(target: Path) -> None:
    assert run(honest([WORK, DOM0], taken=["work"]), target).status == 0
    assert compared(target, script=honest([WORK, DOM0], taken=["work"])).outcomes["dom0"] == "left out"
    assert run(honest([DOM0]), target, names=["dom0"]).status == 0
    script = honest([WORK, DOM0])
    assert compared(target, script=script).outcomes == {"work": "same", "dom0": "same"}
    change(target / "dom0/home.tar", 0, b"x")
    outcome = compared(target, script=script)
    assert outcome.outcomes == {"work": "same", "dom0": "differs"}
    difference = volume(outcome, "dom0/home").difference
    assert difference is not None and difference.different_bytes == 3000


def test_a_backup_that_is_damaged_is_no_difference(extracted: Path) -> None:
    error = {"kind": "authentication-failed", "reason": "its MAC does not match"}
    script = honest(QUBES).changed(
        "volume_done",
        "vm2",
        "private",
        outcome="failed",
        error=error,
        fsverity=...,
        image_size=0,
        data_bytes=0,
    )
    outcome = compared(extracted, script=script)
    assert outcome.status == PARTLY
    assert outcome.outcomes == {"work": "same", "vault": "failed"}


def test_a_qube_that_the_worker_takes_back_has_failed_even_if_it_differs(extracted: Path) -> None:
    change(extracted / "work/private.img", 0, b"x")
    script = honest(QUBES)
    back = Say(
        {"type": "qube_incomplete", "key": "vm1", "error": {"kind": "bad-archive", "reason": "more of it"}}
    )
    outcome = compared(extracted, script=script.before(script.find("finished"), back))
    assert outcome.status == PARTLY
    assert outcome.outcomes == {"work": "failed", "vault": "same"}
    error = outcome.qube("work").error
    assert error is not None and "still there" not in error.advice


def test_no_restore_writes_to_it_meanwhile_and_others_may_compare(extracted: Path) -> None:
    other = ComparedDirectory(extracted)
    with ComparedDirectory(extracted).lock(), other.lock(), pytest.raises(RestoreInProgress):
        DirectoryHost(extracted).lock().__enter__()
    with DirectoryHost(extracted).lock(), pytest.raises(RestoreInProgress, match="a restore writes to"):
        ComparedDirectory(extracted).lock().__enter__()


def test_what_was_begun_and_never_ended_is_closed_with_the_directory(extracted: Path) -> None:
    before = open_descriptors()
    host = ComparedDirectory(extracted)
    with host.lock():
        sink = host.begin(new_qube()).create_volume("private", 1 << 20)
        assert sink.finish(1 << 20) is not None
        host.begin(new_qube()).create_volume("private", 1 << 20)
        assert len(open_descriptors() - before) > 2
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("put", "reason"),
    [
        (lambda path: path.symlink_to("../vault/private.img"), "opening private.img failed: Too many levels"),
        (os.mkfifo, "private.img is a device, a pipe or a socket, and no file"),
    ],
    ids=["link", "pipe"],
)
def test_what_takes_the_place_of_an_image_at_the_last_moment_is_not_read(
    extracted: Path, monkeypatch: pytest.MonkeyPatch, put: Callable[[Path], None], reason: str
) -> None:
    stat, path = os.stat, extracted / "work" / "private.img"

    def exchange(name: Any, **options: Any) -> os.stat_result:
        found = stat(name, **options)
        if name == "private.img":
            path.unlink()
            put(path)
        return found

    host = ComparedDirectory(extracted)
    with host.lock():
        qube = host.begin(new_qube())
        before = open_descriptors()
        monkeypatch.setattr(os, "stat", exchange)
        found = qube.create_volume("private", 1 << 20).finish(1 << 20)
        monkeypatch.undo()
        assert open_descriptors() == before
    assert found is not None and found.error is not None and found.error.reason.startswith(reason)


@pytest.mark.parametrize("written", [False, True])
def test_an_image_that_somebody_writes_to_meanwhile_is_told(extracted: Path, written: bool) -> None:
    host = ComparedDirectory(extracted)
    with host.lock():
        before = open_descriptors()
        qube = host.begin(new_qube())
        sink = qube.create_volume("private", 1 << 20)
        if written:
            os.utime(extracted / "work" / "private.img", ns=(1, 1))
        sink.finish(1 << 20)
        remarks = ["private.img was written to while it was compared"] if written else []
        assert list(qube.commit(settings(), None)) == remarks
        assert open_descriptors() == before


def test_a_qube_into_which_nobody_lets_us_look_is_here(
    extracted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.stat

    def denied(name: Any, **options: Any) -> os.stat_result:
        if str(name).startswith("work/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return stat(name, **options)

    monkeypatch.setattr(os, "stat", denied)
    host = ComparedDirectory(extracted)
    with host.lock():
        assert host.view().names == {"work", "vault"}


def test_what_is_no_directory_is_not_compared_with(extracted: Path) -> None:
    host = ComparedDirectory(extracted / "work" / "private.img")
    with pytest.raises(HostFailed, match=r"opening .*private\.img failed: Not a directory"), host.lock():
        pass


# --- The command ---------------------------------------------------------------------------------


BACKUP = sample_backup()


def in_a_shell(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = command(*arguments, "-p", passphrase_file(folder))
    return subprocess.run(
        words, env={**environment("x"), "PYTHONPATH": str(REPOSITORY)}, cwd=folder, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_the_command_shows_what_differs_and_where(tmp_path: Path) -> None:
    (tmp_path / "backup").write_bytes(join_members(BACKUP.members()))
    assert in_a_shell(tmp_path, "extract", "backup", "--to", "there").returncode == 0
    asked = ("compare", "backup", "--with", "there")
    same = in_a_shell(tmp_path, *asked)
    assert (same.returncode, same.stdout.count(" same ")) == (0, 4)
    assert same.stderr.endswith("4 of 4 qubes the same as in the backup.\n")

    change(tmp_path / "there/work/private.img", 5000, b"x")
    os.truncate(tmp_path / "there/vault/private.img", 1 << 20)
    shutil.rmtree(tmp_path / "there/custom-template")
    different = in_a_shell(tmp_path, *asked, "--report", "report.json")
    assert different.returncode == 4
    rows = {tuple(line.split()[:2]): line for line in different.stdout.splitlines()}
    assert "  differs in 4.0 KiB  " in rows["work", "private"]
    assert "  differs in size " in rows["vault", "private"]
    assert rows["custom-template", "root"].split() == ["custom-template", "root", "-", "missing"]
    assert different.stderr.splitlines()[-4:] == [
        "missing here: custom-template",
        "work/private: 4.0 KiB differ: 4096 bytes at 4096",
        "vault/private: it has 1048576 bytes here, and 524288 in the backup",
        "1 of 4 qubes the same as in the backup, 2 differ, 1 is missing.",
    ]
    told = kept_report(tmp_path / "report.json")
    assert (told.mode, told.status) == ("compare", 4)
    assert [qube.outcome for qube in told.qubes] == ["differs", "differs", "same", "missing"]

    assert in_a_shell(tmp_path, *asked, "-q").stderr == ""


@pytest.mark.parametrize("there", ["nothing", "file"])
def test_without_a_directory_nobody_is_asked_for_a_passphrase(tmp_path: Path, there: str) -> None:
    (tmp_path / "file").touch()
    done = in_a_shell(tmp_path, "compare", "/dev/null", "--with", there, "--report", "report.json")
    assert done.returncode == ExitStatus.USAGE
    assert f"{there} cannot be read: " in done.stderr
    assert kept_report(tmp_path / "report.json").mode == "compare"
