"""`qvm-backup-restore --mgmt-vm` in a qube: as in dom0, to the letter, and refused where dom0 says no."""

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.backup_writer import PASSPHRASE
from tests.support.fixtures import REPOSITORY
from tests.system.support import costly_backup, passphrase_file

from .domains import QUESTION, TYPED, Domain, without_times

# --- The same ------------------------------------------------------------------------------------


def as_in_dom0(qube: Domain, dom0: Domain, *options: str, report: Mapping[str, object] | None = None) -> int:
    """The same words, qubes and report, but for the fields in `report`; returns the status."""
    there, here = (domain.restored(*options) for domain in (dom0, qube))
    assert (here.returncode, here.stdout, here.stderr) == (there.returncode, there.stdout, there.stderr)
    assert qube.qubes == dom0.qubes
    assert qube.report == {**dom0.report, **(report or {})}
    return here.returncode


@pytest.fixture
def secret(tmp_path: Path) -> str:
    return str(passphrase_file(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        ["vault", "work"],
        ["-v", "-x", "debian"],
        ["-q", "vault"],
        ["--verify-only"],
        ["--verify-only", "-x", "dom0", "-q"],
        ["-x", "work", "-x", "vault", "-x", "debian"],
        ["-Z", "none", "vault"],
    ],
    ids=" ".join,
)
def test_what_is_said_written_and_left_is_that_of_dom0(
    options: list[str], qube: Domain, dom0: Domain, secret: str
) -> None:
    as_in_dom0(qube, dom0, "-p", secret, *options)


def test_what_does_not_fit_is_said_as_in_dom0(qube: Domain, dom0: Domain, secret: str) -> None:
    assert as_in_dom0(qube, dom0, "-p", secret, "vault") == 0
    for options, status in (([], 1), (["vault"], 1), (["-x", "debian"], 0)):
        conflicting = ["--skip-conflicting"] if options else []
        assert as_in_dom0(qube, dom0, "-p", secret, *conflicting, *options) == status


@pytest.mark.parametrize("options", [["nobody"], ["-x", "nobody"]], ids=" ".join)
def test_a_name_that_is_not_in_the_backup_is_refused_as_in_dom0(
    options: list[str], qube: Domain, dom0: Domain, secret: str
) -> None:
    # Who is refused is not told which backup it was.
    as_in_dom0(qube, dom0, "-p", secret, *options, report={"backup_id": None})


def test_a_wrong_passphrase_is_said_as_in_dom0(qube: Domain, dom0: Domain, tmp_path: Path) -> None:
    as_in_dom0(qube, dom0, "-p", str(passphrase_file(tmp_path, "wrong")))


@pytest.mark.parametrize("answers", ["y\n", "n\n", "\x03"])
def test_the_screen_is_that_of_dom0_after_every_answer(answers: str, qube: Domain, dom0: Domain) -> None:
    there, here = (domain.seen("vault", answers=answers) for domain in (dom0, qube))
    assert here.status == there.status == (0 if answers == "y\n" else 130)
    assert here.screen == there.screen
    assert any(line.startswith(QUESTION.strip()) for line in here.screen)
    assert qube.qubes == dom0.qubes == (["vault"] if answers == "y\n" else [])
    assert qube.report == dom0.report


# --- What is asked for ---------------------------------------------------------------------------


def test_the_narrowest_service_is_called(qube: Domain) -> None:
    secret = passphrase_file(qube.folder)
    qube.restored("-p", secret, "--verify-only", "vault")
    assert (qube.folder / "service").read_text() == "restore.Verify\n"
    qube.restored("-p", secret, "vault")
    assert (qube.folder / "service").read_text() == "restore.Start\n"


def test_a_file_is_named_from_wherever_this_qube_is(qube: Domain, backup: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(backup)
    done = qube.piped("link", "-p", passphrase_file(qube.folder), "--verify-only", "vault", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["/nowhere"], 2, "/nowhere cannot be opened: No such file"),
        (["/dev/null"], 2, "/dev/null is not a file. Copy the backup into one."),
        (["-"], 2, "a backup on standard input cannot be restored from here"),
        (["-d", "sys-usb", "\x1b[2J"], 2, "the location of the backup contains a control character"),
        (["-d", "no~name", "b"], 2, "is not the name of a qube"),
        (["-d", "sys-usb", "--location-is-service", "a b"], 2, "is not the name of a qrexec service"),
        (["--memory", "100000000", "BACKUP"], 2, "cannot be as it was asked for (memory: "),
        (["--pool", "a b", "BACKUP"], 2, "no storage pool can have this name"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_here(
    options: list[str], status: int, words: str, qube: Domain, backup: Path
) -> None:
    options = [str(backup) if word == "BACKUP" else word for word in options]
    done = qube.piped(*options, "-p", passphrase_file(qube.folder))
    assert (done.returncode, done.stdout) == (status, "")
    assert words in done.stderr and "Traceback" not in done.stderr and PASSPHRASE not in done.stderr
    assert not (qube.folder / "service").exists()


def test_a_name_that_json_cannot_carry_is_refused_here(qube: Domain, backup: Path, tmp_path: Path) -> None:
    strange = os.fsencode(tmp_path) + b"/\xff"
    os.link(backup, strange)
    done = qube.piped(os.fsdecode(strange), "-p", passphrase_file(qube.folder))
    assert (done.returncode, "cannot be told to dom0" in done.stderr) == (2, True)
    spaced = tmp_path / "backup "
    os.link(backup, spaced)
    done = qube.piped(spaced, "-p", passphrase_file(qube.folder))
    assert (done.returncode, "ends with a space" in done.stderr) == (2, True)


def test_what_only_dom0_knows_is_judged_there(qube: Domain) -> None:
    qube.configure("grants: {sys-gui: {pools: ['*']}}\n")
    done = qube.restored("-p", passphrase_file(qube.folder), "--pool", "nowhere", "vault")
    assert (done.returncode, "there is no storage pool 'nowhere'" in done.stderr) == (1, True)
    done = qube.restored("-p", passphrase_file(qube.folder), "--memory", "9000", "vault")
    assert (done.returncode, "grants" in done.stderr) == (1, True)


def test_a_file_of_dom0_is_asked_for_by_name_and_is_not_looked_for_here(qube: Domain) -> None:
    done = qube.piped("-d", "dom0", "/nowhere/b", "-p", passphrase_file(qube.folder), "vault")
    assert done.returncode == 1
    assert "grants.sys-gui.dom0_directories" in done.stderr.replace("\n  ", " ")


# --- Refused, lost, cancelled --------------------------------------------------------------------


def test_without_a_grant_the_person_is_told_the_line_that_is_missing(qube: Domain, backup: Path) -> None:
    (qube.folder / "refused").write_text("126")
    done = qube.restored("-p", passphrase_file(qube.folder), "--verify-only")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "qvm-backup-restore: dom0's policy does not let this qube call restore.Verify, or somebody there said"
        " no. To allow it, an administrator adds this line to /etc/qubes/policy.d/include/qubes-restore-svc"
        f" in dom0: restore.Verify * {socket.gethostname()} @adminvm allow target=dom0\n"
    )
    error = qube.report["error"]
    assert isinstance(error, dict) and error["kind"] == "not-granted"


@pytest.mark.parametrize(("code", "words"), [("127", "Install the package"), ("255", "broke off")])
def test_a_call_that_fails_otherwise(code: str, words: str, qube: Domain) -> None:
    (qube.folder / "refused").write_text(code)
    seen = qube.seen("vault")
    assert seen.status == 1
    assert words in " ".join(seen.screen)


def started(process: subprocess.Popen[str]) -> None:
    """Wait until the first volume has begun; go on reading, so that nobody waits for us."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("work/"):
            break
    threading.Thread(target=process.stderr.read).start()


@pytest.mark.parametrize(("place", "asked_by"), [("qube", "sys-gui"), ("dom0", None)])
def test_ctrl_c_during_the_restore_leaves_nothing_half_and_reports(
    place: str, asked_by: str | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    asking: Domain = request.getfixturevalue(place)
    costly = tmp_path / "costly"
    costly.write_bytes(costly_backup(16))
    words = asking.words(costly, "-v", "-p", passphrase_file(asking.folder), "vault", "work")
    with subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        start_new_session=True,
    ) as process:
        started(process)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert asking.qubes == ["vault"]
    assert asking.report["status"] == 130
    (kept,) = (asking.folder / "reports").iterdir()
    there, here = without_times(kept), asking.report
    assert (there.pop("asked_by"), here.pop("asked_by")) == (asked_by, None)
    assert {name: there[name] for name in here} == here  # it is dom0's own


def test_after_a_wrong_passphrase_a_qube_calls_anew_with_another_one(qube: Domain) -> None:
    seen = qube.seen("vault", types=["no\n", TYPED], answers="y\n")
    assert (seen.status, qube.qubes) == (0, ["vault"]), seen.screen
    assert seen.raw.count("Passphrase of the backup:") == 2
    secret = passphrase_file(qube.folder, f"{PASSPHRASE} ")
    assert qube.restored("work", "-p", secret).returncode == 0
