"""Standard streams that nobody reads, that are full, or that are not even there."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.fixtures import REPOSITORY

from .support import command, environment, running, wait_for

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


def test_the_status_is_that_of_the_work_when_the_reader_of_the_table_has_gone(
    backup: Path, passphrase: Path
) -> None:
    with running("verify", backup, "-p", passphrase) as run:
        assert run.process.stdout is not None and run.process.stderr is not None
        run.process.stdout.close()
        run.process.stderr.close()
        assert run.process.wait(30) == 0


@pytest.mark.parametrize(
    ("words", "status"), {"list": 1, "verify": 3, "extract": 3, "--help": 1, "--version": 1}.items()
)
def test_a_result_that_cannot_be_written_is_told_and_shows_in_the_status(
    words: str, status: int, backup: Path, passphrase: Path, tmp_path: Path
) -> None:
    rest = () if words.startswith("-") else (backup, "-p", passphrase)
    target = ("--to", tmp_path / "out") if words == "extract" else ()
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            command(words, *rest, *target),
            env=environment("x"),
            cwd=REPOSITORY,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ended.returncode == status
    line = "qubes-restore-svc: standard output cannot be written: No space left on device\n"
    assert ended.stderr.count(line) == 1
    for fault in ("Traceback", "Exception ignored", "mistake of the program"):
        assert fault not in ended.stderr


def test_a_reader_that_has_had_enough_of_a_list_is_no_failure(backup: Path, passphrase: Path) -> None:
    with running("list", backup, "-p", passphrase) as run:
        assert run.process.stdout is not None
        run.process.stdout.close()
        assert run.process.wait(30) == 0


def test_no_file_of_the_restore_takes_the_place_of_a_closed_standard_stream(
    backup: Path, passphrase: Path, tmp_path: Path
) -> None:
    """What somebody then writes to standard error would land in a disk image."""
    report, pipe = tmp_path / "report.json", tmp_path / "pipe"
    os.mkfifo(pipe)
    words = command("extract", pipe, "--to", tmp_path / "out", "-p", passphrase, "--report", report)
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words]
    with subprocess.Popen(closed, env=environment("x"), cwd=REPOSITORY) as process:
        with pipe.open("wb") as feed:
            feed.write(backup.read_bytes())
            wait_for((tmp_path / "out").exists)
            standard = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in (0, 1, 2)]
        assert process.wait(30) == 0
    assert standard == ["/dev/null"] * 3
    assert json.loads(report.read_text())["status"] == 0
    assert (tmp_path / "out" / "work" / "private.img").exists()
