"""State and reason of a check, from what the command that verifies says in its report."""

import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from qubes_restore_svc.cli import qvm_arguments
from qubes_restore_svc.cli.process import Interruption
from qubes_restore_svc.errors import Cancelled, UsageError
from qubes_restore_svc.report_file import KeptReport, write_report
from qubes_restore_svc.watch.check import Verifier, check, too_old, verifier
from qubes_restore_svc.watch.documents import WatchReport
from qubes_restore_svc.watch.places import Place
from qubes_restore_svc.wire.report import QubeReport

from .reports import NOW, error, now_in_an_id, verification, whole

DAY = timedelta(days=1)


def checked(folder: Path, report: KeptReport | Exception | None, **settings: Any) -> WatchReport:
    """What a check finds if the command leaves this report, or raises, or leaves none."""
    (folder / "passphrase").write_text("secret")
    given: list[Sequence[str]] = []

    def run(words: Sequence[str]) -> int:
        given.append(words)
        if isinstance(report, Exception):
            raise report
        if report is not None:
            write_report(Path(words[words.index("--report") + 1]), report)
        return 1

    usual = {"command": "true", "passphrase_file": str(folder / "passphrase"), "options": ["-x", "a"]}
    place = Place.model_validate({**usual, **settings})
    found = check("nas", place, folder, Verifier(("verify",), run))
    if given:
        assert [*given[0][:5], given[0][6]] == [
            "verify",
            "-p",
            str(folder / "passphrase"),
            "-x",
            "a",
            given[0][6],
        ]
        assert given[0][-2] == "--"
    assert [path.name for path in folder.iterdir()] == ["passphrase"]  # nothing of it stays
    return found


@pytest.mark.parametrize(
    ("errors", "state", "reason"),
    [
        ([None, "authentication-failed"], "bad", "qube-1: it is authentication-failed"),
        (["skipped", "bad-image"], "bad", "qube-1: it is bad-image (and 1 more)"),
        (["resources-exhausted"], "not verified", "qube-0: it is resources-exhausted"),
        (["worker-lost"], "not verified", "qube-0: it is worker-lost"),
        (["archive-truncated"], "bad", "qube-0: it is archive-truncated"),
        (["empty-input"], "no backup", "it is empty-input"),
        (["a-later-kind"], "bad", "qube-0: it is a-later-kind"),
        ([None], "not verified", "the report does not say why"),
    ],
)
def test_only_what_is_wrong_with_the_backup_makes_it_bad(
    errors: list[str | None], state: str, reason: str, tmp_path: Path
) -> None:
    report = verification(*(None if kind is None else error(kind) for kind in errors))
    found = checked(tmp_path, report)
    assert (found.state, found.reason) == (state, reason)
    assert found.verification is not None


@pytest.mark.parametrize("kind", ["wrong-passphrase", "cancelled", "sandbox-unavailable", "budget-too-small"])
def test_what_ends_the_whole_run_is_not_the_backups_fault(kind: str, tmp_path: Path) -> None:
    found = checked(tmp_path, verification(status=1, ended_by=error(kind)))
    assert (found.state, found.reason) == ("not verified", f"it is {kind}")


def test_a_reason_that_several_qubes_have_is_told_once(tmp_path: Path) -> None:
    cancelled = error("cancelled")
    found = checked(tmp_path, verification(None, cancelled, cancelled, ended_by=cancelled))
    assert found.reason == "it is cancelled"
    damaged = verification(error("bad-image"), cancelled, ended_by=cancelled)
    assert checked(tmp_path, damaged).reason == "qube-0: it is bad-image (and 1 more)"


def test_qubes_that_are_left_out_are_counted(tmp_path: Path) -> None:
    report = whole(now_in_an_id())
    left_out = QubeReport(name="big", klass="AppVM", outcome="left out")
    found = checked(tmp_path, report.model_copy(update={"qubes": (*report.qubes, left_out)}))
    assert (found.state, found.reason) == ("good", "1 of 2 qubes verified, 1 left out")


@pytest.mark.parametrize(
    ("command", "how"),
    [("exit 3", "ended with exit code 3"), ("kill -9 $$", "was killed by signal 9 (SIGKILL)")],
)
def test_a_command_that_failed_makes_a_backup_neither_good_nor_bad(
    command: str, how: str, tmp_path: Path
) -> None:
    for report in (whole(now_in_an_id()), verification(error("archive-truncated"))):
        found = checked(tmp_path, report, command=command)
        assert (found.state, found.reason) == ("not verified", f"the command that brings the backup {how}")
    assert checked(tmp_path, whole(now_in_an_id()), command="kill -PIPE $$").state == "good"


def test_the_report_of_a_run_that_was_killed_is_not_taken(tmp_path: Path) -> None:
    write_report(tmp_path / f".nas-{os.getpid()}.json", whole(now_in_an_id()))
    assert checked(tmp_path, UsageError("why", advice="")).reason == "why"


def test_a_report_that_is_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "write_report", lambda path, _: path.write_text("{"))
    assert checked(tmp_path, whole(now_in_an_id())).state == "not verified"


def test_a_passphrase_that_others_can_read_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mode, warned in ((0o600, False), (0o640, True), (0o604, True)):
        (tmp_path / "passphrase").touch()
        (tmp_path / "passphrase").chmod(mode)
        checked(tmp_path, whole(now_in_an_id()))
        assert ("Warning: others than its owner can read" in capsys.readouterr().err) is warned


def test_a_command_that_broke_off_is_to_blame_for_what_is_missing(tmp_path: Path) -> None:
    report = verification(error("archive-truncated"))
    found = checked(tmp_path, report, command="exit 3")
    why = "the command that brings the backup ended with exit code 3"
    assert (found.state, found.reason) == ("not verified", why)
    report = verification(error("authentication-failed"))
    assert checked(tmp_path, report, command="exit 3").state == "bad"


def test_a_qubes_agent_does_not_tell_that_a_directory_has_no_backup(tmp_path: Path) -> None:
    report = verification(status=1, ended_by=error("archive-unreadable"))
    found = checked(tmp_path, report, command=None, directory="/media", qube="sys-usb")
    assert (found.state, found.backup) == ("not verified", "sys-usb: /media/qubes-*")
    assert found.reason == "it is archive-unreadable; or no file there is called qubes-*"


def test_dom0_and_other_qubes_are_for_the_command_with_a_disposable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(**settings: str) -> tuple[str, ...]:
        return verifier(Place.model_validate(settings), Interruption()).words

    monkeypatch.setattr(qvm_arguments, "QUBESD_SOCKET", tmp_path / "none")
    assert words(file="a") == ("verify",)
    assert words(file="a", qube="sys-usb") == ("--mgmt-vm", "--verify-only", "-d", "sys-usb")
    monkeypatch.setattr(qvm_arguments, "QUBESD_SOCKET", tmp_path)
    assert words(file="a") == ("--mgmt-vm", "--verify-only")
    monkeypatch.setattr(qvm_arguments, "QUBESD_SOCKET", tmp_path / "none")
    for name in [name for name in sys.modules if name.startswith("qubes_restore_svc.local")]:
        monkeypatch.delitem(sys.modules, name)  # as in a GUI domain, whose package does not have it
    monkeypatch.setattr("sys.meta_path", [_NotThere(), *sys.meta_path])
    assert words(file="a") == ("--mgmt-vm", "--verify-only")


class _NotThere:
    """Finds that `local` is not installed."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "qubes_restore_svc.local":
            raise ModuleNotFoundError(name=name)


def test_age_counts_from_the_id_in_the_clock_of_this_machine(tmp_path: Path) -> None:
    for days, state in ((7.9, "good"), (8.1, "too old"), (-2, "too old")):
        assert checked(tmp_path, whole(now_in_an_id(days))).state == state
    assert checked(tmp_path, whole(now_in_an_id(20)), max_age_days=21).state == "good"


def test_without_a_date_in_the_id_the_file_says_how_old_the_backup_is(tmp_path: Path) -> None:
    report = whole("0123456789abcdef")
    found = checked(tmp_path, report)
    assert (found.state, found.reason) == ("too old", "it is not known when it was made")
    found = checked(tmp_path, report, command=None, file=__file__)
    made = datetime.fromtimestamp(int(Path(__file__).stat().st_mtime), UTC)
    assert found.backup_time is not None and found.backup_time.replace(microsecond=0) == made


def test_a_bad_backup_is_bad_however_old_it_is(tmp_path: Path) -> None:
    report = verification(error("bad-image"), backup_id=now_in_an_id(100))
    assert checked(tmp_path, report).state == "bad"


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (UsageError("it cannot be opened", advice=""), "it cannot be opened"),
        (Cancelled("it was cancelled", advice=""), "it was cancelled"),
        (None, "there is no report of the verification, which ended with exit code 1"),
    ],
)
def test_a_verification_without_a_report_is_none(
    ending: Exception | None, reason: str, tmp_path: Path
) -> None:
    found = checked(tmp_path, ending)
    assert (found.state, found.reason, found.verification) == ("not verified", reason, None)


def test_the_passphrase_is_the_services_credential_if_no_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    report = whole(now_in_an_id())
    found = checked(tmp_path, report, passphrase_file=None)
    assert (found.state, found.reason.partition(".")[0]) == ("not verified", "there is no passphrase")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert checked(tmp_path, report, passphrase_file=None).state == "good"


def test_what_is_too_old_is_told_in_days() -> None:
    assert too_old(NOW - 8 * DAY, 8, NOW) == ""
    assert too_old(NOW - 8.5 * DAY, 8, NOW) == "it is 8 days old, and 8 are allowed"
    assert too_old(NOW + DAY, 8, NOW) == ""
    assert too_old(NOW + 2 * DAY, 8, NOW) == "it was made in the future, by its own date"
