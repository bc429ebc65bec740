"""What is kept of every restore: reports, and the log."""

import os
import re
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qubes_restore_svc.qubes.dom0_restore import LogFile, LoggedObserver, file_report
from qubes_restore_svc.report_file import MAX_REPORT, write_report
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.names import MAX_QUBES
from qubes_restore_svc.wire.report import CUT, QubeReport, Report, RestoreProgress, RunMode
from tests.support.reports import kept_report
from tests.support.restoring import Recorder
from tests.wire.test_report import the_longest_report


def report(minute: int, mode: RunMode = "restore") -> Report:
    made = Report.begun(mode, datetime(2026, 11, 20, 20, minute, tzinfo=UTC))
    made.close(None, datetime(2026, 11, 20, 21, tzinfo=UTC))
    return made


def test_the_newest_reports_are_kept_and_nothing_else_is_touched(tmp_path: Path) -> None:
    strangers = ["notes.txt", "restore-20200101T000000Z-1.json.bak", "x-restore-20200101T000000Z-1.json"]
    for stranger in strangers:
        (tmp_path / stranger).touch()
    filed: list[tuple[int, RunMode]] = [
        (3, "restore"),
        (1, "compare"),
        (4, "verify"),
        (2, "restore"),
        (5, "compare"),
    ]
    for minute, mode in filed:
        file_report(tmp_path, 3, report(minute, mode), print)
    file_report(tmp_path, 3, report(3), print)
    kept = [
        f"{mode}-20261120T200{minute}00Z-{os.getpid()}.json"
        for mode, minute in (("compare", 5), ("restore", 3), ("verify", 4))
    ]
    assert sorted(os.listdir(tmp_path)) == sorted([*strangers, *kept])
    assert kept_report(tmp_path / kept[1]) == report(3)
    assert stat.S_IMODE((tmp_path / kept[0]).stat().st_mode) & 0o007 == 0


def test_a_directory_that_is_not_there_is_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    file_report(tmp_path / "nowhere", 2, report(1), warnings.append)
    assert [text.split(" in ")[0] for text in warnings] == ["the report cannot be kept"]


def test_the_log_has_what_was_said_and_the_observer_hears_it_too(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    heard = Recorder()
    display = LoggedObserver(heard, LogFile(path, print))
    display.log("info", "é it goes on")
    display.volume_started("work", "private", 10)
    display.progress(RestoreProgress(archive_bytes=1))
    error = ErrorInfo(kind="error", reason="no room", advice="")
    display.qube_finished(QubeReport(name="work", klass="AppVM", outcome="failed", error=error))
    first, *lines = path.read_text().splitlines()
    assert first == "before"
    assert all(
        re.match(rf"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d \[{os.getpid()}\] ", line) for line in lines
    )
    assert [line.split("] ", 1)[1] for line in lines] == [
        "info: é it goes on",
        "work/private: begun",
        "work: failed: no room",
    ]
    assert heard.lines == ["info: é it goes on"]


def test_the_group_can_read_what_is_kept_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)  # qrexec's
    try:
        file_report(tmp_path, 2, report(1), print)
        LogFile(tmp_path / "log", print).write("one")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in tmp_path.iterdir()} == {0o640}


def test_what_a_worker_makes_a_report_say_does_not_fill_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(path, the_longest_report())
    assert path.stat().st_size <= MAX_REPORT
    kept = kept_report(path)
    assert [qube.outcome for qube in kept.qubes] == ["failed"] * MAX_QUBES and kept.warnings[-1] == CUT


def test_a_log_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    for name in (".", "missing/log", "link", "pipe"):
        warnings: list[str] = []
        log = LogFile(tmp_path / name, warnings.append)
        log.write("one")
        log.write("two")
        assert [text.split(" to ")[0] for text in warnings] == ["the log cannot be written"]
    assert not (tmp_path / "elsewhere").exists()


def test_root_writes_no_report_where_another_user_leads_it(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files to another user")
    (tmp_path / "mine.json").write_text("precious")
    link = tmp_path / "link.json"
    link.symlink_to("mine.json")
    write_report(link, report(1))  # a link of one's own is followed
    (tmp_path / "mine.json").write_text("precious")
    os.chown(link, 4321, -1, follow_symlinks=False)
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 4321, -1)
    for path, reason in (
        (link, "a symbolic link of user 4321"),
        (home / "r.json", "home belongs to user 4321"),
    ):
        with pytest.raises(PermissionError, match=reason):
            write_report(path, report(1))
    assert (tmp_path / "mine.json").read_text() == "precious" and os.listdir(home) == []
