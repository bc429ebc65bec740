"""The command on a terminal, wide, narrow and dumb, and the report as a file."""

import asyncio
import os
import shutil
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qubes_restore_svc.cli import process as process_module
from qubes_restore_svc.cli.process import Interruption, carry_out
from qubes_restore_svc.cli.report_output import check_report_path
from qubes_restore_svc.errors import Cancelled, ExitStatus, UsageError
from qubes_restore_svc.report_file import write_report
from qubes_restore_svc.wire.report import Report
from tests.cli.terminal import on_terminal, rendered
from tests.support.backup_writer import PASSPHRASE
from tests.support.reports import kept_report, read_report
from tests.system.support import command, small_backup

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

NARROW, WIDE = 80, 120


@pytest.fixture(scope="module")
def backup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backup") / "sample.qbackup"
    small_backup().write(path)
    return path


# --- On a terminal -----------------------------------------------------------------------------------


@needs_bubblewrap
def test_verify_on_a_narrow_terminal(backup: Path) -> None:
    seen = on_terminal("verify", backup, "work", types=f"{PASSPHRASE}\n", width=NARROW)
    assert seen.status == 0
    assert PASSPHRASE not in seen.raw
    assert max(map(len, seen.screen)) <= NARROW
    prompt, qube, head, kind, row, digest, rest, end, nothing = seen.screen
    assert prompt.startswith("Passphrase of the backup:")
    assert qube == "work: verified"
    assert head.split() == ["QUBE", "VOLUME", "SIZE", "RESULT"]
    assert row.split() == ["work", "private", "1.0", "MiB", "verified"]
    assert kind == "  DIGEST (fsverity digest FILE)"
    assert len(digest) == 2 + 64
    assert rest == "left out (not selected): dom0, vault, debian"
    assert end == "1 of 1 qube verified."
    assert nothing == ""


@needs_bubblewrap
def test_verify_on_a_wide_terminal(backup: Path) -> None:
    seen = on_terminal("verify", backup, "-x", "dom0", types=f"{PASSPHRASE}\n", width=WIDE)
    assert seen.status == 0
    rows = [line for line in seen.screen if line.startswith(("work ", "vault ", "debian "))]
    assert [len(row.split()[-1]) for row in rows] == [64, 64, 64, 64]


@needs_bubblewrap
def test_the_bar_says_what_it_does_and_is_gone_in_the_end(backup: Path) -> None:
    seen = on_terminal("verify", backup, types=f"{PASSPHRASE}\n", width=NARROW)
    bars = [line for line in seen.drawn if "%" in line]
    assert "opening the backup" in bars[0]
    assert any("work/private" in bar for bar in bars)
    assert max(map(len, bars)) < NARROW
    assert not any("%" in line for line in seen.screen)


@needs_bubblewrap
@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"TERM": "dumb", "NO_COLOR": "1"}])
def test_a_dumb_terminal_gets_lines(variables: dict[str, str], backup: Path) -> None:
    seen = on_terminal("verify", backup, types=f"{PASSPHRASE}\n", width=NARROW, variables=variables)
    assert seen.status == 0
    assert not any("%" in line for line in seen.drawn)
    assert "\r" not in seen.raw.replace("\r\n", "\n")
    assert "work: verified" in seen.screen


@needs_bubblewrap
def test_nothing_on_a_terminal_is_coloured_or_moves_the_cursor(backup: Path, tmp_path: Path) -> None:
    arguments = ("extract", backup, "--to", tmp_path / "out", "-v")
    seen = on_terminal(*arguments, types=f"{PASSPHRASE}\n", width=NARROW)
    assert seen.status == 0
    assert "\x1b" not in seen.raw


@needs_bubblewrap
def test_the_terminal_is_asked_for_the_passphrase_of_a_backup_from_a_pipe(
    backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command("list", "-")
    piped = ["/bin/sh", "-c", f'exec "$@" < {backup}', "sh", *words]
    monkeypatch.setattr("tests.cli.terminal.command", lambda *_: piped)
    seen = on_terminal(types=f"{PASSPHRASE}\n")
    assert seen.status == 0
    assert any(line.startswith("vault") for line in seen.screen)


def test_a_wrong_passphrase_is_answered_in_words_that_fit(backup: Path) -> None:
    seen = on_terminal("verify", backup, "--no-sandbox", types=["wrong\n"] * 3, width=50)
    assert seen.status == 1
    assert max(map(len, seen.screen)) <= 50
    assert " ".join(" ".join(seen.screen).split()).endswith("Caps Lock, and try again.")


@needs_bubblewrap
def test_after_an_extract_it_is_said_where_the_images_are_and_how_to_look_into_them(
    backup: Path, tmp_path: Path
) -> None:
    target = tmp_path / "my qubes"
    seen = on_terminal("extract", backup, "--to", target, "work", "debian", types=f"{PASSPHRASE}\n")
    assert seen.status == 0
    assert seen.screen[seen.screen.index("2 of 2 qubes restored.") + 1 :] == [
        f"They are in {target}, a directory each.",
        "To see the files of a qube, in /mnt/home:",
        f"  sudo mount -o loop,ro,noload,nosuid,nodev '{target}/work/private.img' /mnt",
        "To see the system of a template (losetup prints the N; the file system is the third partition):",
        f"  sudo losetup --find --show --read-only --partscan '{target}/debian/root.img'",
        "  sudo mount -o ro,noload,nosuid,nodev /dev/loopNp3 /mnt",
        "",
    ]
    assert (target / "work" / "private.img").is_file() and (target / "debian" / "root.img").is_file()


def test_the_picture_of_a_line() -> None:
    assert rendered("abc\rx") == "xbc"
    assert rendered("abc\r   \r") == ""


# --- The report as a file ---------------------------------------------------------------------------


@pytest.fixture
def report() -> Report:
    made = Report.begun("verify", datetime.now(UTC).replace(microsecond=0))
    made.close(None, made.started)
    return made


@pytest.fixture
def archive_fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "backup"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_an_old_report_is_replaced_also_through_a_link(
    report: Report, archive_fd: int, tmp_path: Path
) -> None:
    path, link = tmp_path / "report.json", tmp_path / "link"
    path.write_text("old")
    link.symlink_to(path)
    for name in (path, link):
        check_report_path(name, archive_fd)
        write_report(name, report)
    assert kept_report(path) == report
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["backup", "link", "report.json"]


def test_what_is_no_file_is_written_to_and_never_replaced(
    report: Report, archive_fd: int, tmp_path: Path
) -> None:
    device = Path("/dev/null")
    check_report_path(device, archive_fd)
    write_report(device, report)
    assert stat.S_ISCHR(device.stat().st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_report_path(pipe, archive_fd)
    write_report(pipe, report)
    assert read_report(os.read(reader, 65536).decode()) == report
    os.close(reader)
    assert pipe.is_fifo()


def test_where_no_report_can_be_written(archive_fd: int, tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "hard-link").hardlink_to(tmp_path / "backup")
    for name in (".", "missing/report", "dangling", "backup", "hard-link", "backup/report"):
        with pytest.raises(UsageError, match="the report cannot be written to"):
            check_report_path(tmp_path / name, archive_fd)


def test_a_report_replaces_neither_the_passphrase_file_nor_the_directory(
    archive_fd: int, tmp_path: Path
) -> None:
    secret, target = tmp_path / "passphrase", tmp_path / "qubes"
    secret.write_text("secret")
    check_report_path(tmp_path / "report", archive_fd, str(secret), target)
    check_report_path(tmp_path / "report", archive_fd, str(tmp_path / "missing"), target)
    for path in (secret, target):
        with pytest.raises(UsageError, match="the report cannot be written to"):
            check_report_path(path, archive_fd, str(secret), target)
    assert secret.read_text() == "secret"


def test_a_report_to_a_pipe_that_nobody_reads_is_an_error_and_no_wait(report: Report, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="No such device"):
        write_report(pipe, report)


@needs_bubblewrap
def test_a_report_that_was_asked_for_and_not_written_shows_in_the_status(
    backup: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "passphrase"
    secret.write_text(PASSPHRASE)
    done = subprocess.run(
        [*command("verify", backup, "-p", secret, "work", "--report", "/dev/full")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitStatus.PARTLY, done
    assert "the report cannot be written: No space left on device" in done.stderr
    assert "1 of 1 qube verified" in done.stderr


def test_a_report_that_fails_half_way_leaves_the_old_one(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "report.json"
    path.write_text("old")
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError):
        write_report(path, report)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


# --- Signals -----------------------------------------------------------------------------------------


@pytest.fixture
def interruption() -> Iterator[Interruption]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    made = Interruption()
    made.install()
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


def test_before_the_job_a_signal_raises(interruption: Interruption) -> None:
    with pytest.raises(Cancelled):
        os.kill(os.getpid(), signal.SIGTERM)


def test_during_the_job_it_cancels_once_and_after_it_nothing_happens_until_resumed(
    interruption: Interruption,
) -> None:
    cancelled: list[str] = []

    async def job() -> str:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            cancelled.append("once")
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.05)
        return "done"

    assert interruption.run(job()) == "done"
    assert cancelled == ["once"]
    os.kill(os.getpid(), signal.SIGINT)
    interruption.resume()
    with pytest.raises(Cancelled):
        os.kill(os.getpid(), signal.SIGINT)
    interruption.finish()
    os.kill(os.getpid(), signal.SIGINT)


def test_a_cancelled_job_that_still_clears_up_says_so_once(
    interruption: Interruption, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "ANSWER_S", 0.01)
    said: list[str] = []
    told = asyncio.Event()

    async def job() -> str:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.wait_for(told.wait(), 10)
            await asyncio.sleep(0.03)
        return "done"

    def still_ending() -> None:
        said.append("still clearing up")
        told.set()

    assert interruption.run(job(), still_ending) == "done"
    assert said == ["still clearing up"]


def test_a_signal_that_is_held_off_does_nothing_and_counts_again_later(interruption: Interruption) -> None:
    interruption.hold()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), number)
    interruption.resume()
    with pytest.raises(Cancelled):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_job_that_does_not_come_back_is_cancelled(interruption: Interruption) -> None:
    async def job() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(10)

    with pytest.raises(Cancelled):
        interruption.run(job())


# --- What nobody provided for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("can't start new thread"),
            "program: no more processes or threads can be started on this machine. Close other programs, or"
            " raise the limit (ulimit -u, ulimit -v, TasksMax= of a service), and try again.\n",
        ),
        (MemoryError(), "program: there is no memory left on this machine."),
        (KeyError("secret"), "program: something failed that must not fail (KeyError, test_command.py line "),
    ],
)
@pytest.mark.parametrize("words", [[], ["-v"]])
def test_the_last_resort_is_one_line_and_a_status(
    error: Exception,
    line: str,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    interruption: Interruption,
) -> None:
    def fail(_: Interruption) -> int:
        raise error

    monkeypatch.setattr(sys, "argv", ["program", *words])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # as it is, afterwards
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        carry_out("program", fail)
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said[said.index("program: ") :].startswith(line)
    assert said.count("\n") == 1 or words
    assert ("in fail" in said) == bool(words)
    assert "secret" not in said
