"""`qvm-backup-restore --mgmt-vm` as a process, on a terminal and in a pipe, with the worker in a thread."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.backup_writer import PASSPHRASE
from tests.support.fixtures import REPOSITORY
from tests.system.support import passphrase_file, small_backup

from .qvm_driver import BROKEN
from .terminal import Seen, on_terminal

MODULE = "tests.cli.qvm_driver"
WIDTH = 80
TYPED = f"{PASSPHRASE}\n"
QUESTION = "Do you want to proceed? [y/N] "


@pytest.fixture(scope="module")
def backup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backup") / "sample.qbackup"
    small_backup().write(path)
    return path


@dataclass
class Place:
    """Where a test restores to, and what is there afterwards."""

    directory: Path
    backup: Path
    name: str = "qubes"

    @property
    def target(self) -> Path:
        return self.directory / self.name

    @property
    def qubes(self) -> list[str]:
        return sorted(os.listdir(self.target)) if self.target.exists() else []

    @property
    def report(self) -> dict[str, object]:
        content: dict[str, object] = json.loads((self.directory / "report.json").read_text())
        return content

    def words(self, options: Sequence[str | Path]) -> list[str | Path]:
        report = self.directory / "report.json"
        return [self.target, "--mgmt-vm", self.backup, "--report", report, *options]

    def seen(self, *options: str | Path, types: str = TYPED, answers: str = "", width: int = WIDTH) -> Seen:
        """What a person sees."""
        words = self.words(options)
        return on_terminal(*words, types=types, answers=answers, width=width, module=MODULE)

    def piped(self, *options: str | Path, input: str = "") -> subprocess.CompletedProcess[str]:
        """What a script gets. Without a terminal of its own, nobody can be asked."""
        return subprocess.run(
            [sys.executable, "-m", MODULE, *self.words(options)],
            input=input,
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            start_new_session=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def place(tmp_path: Path, backup: Path) -> Place:
    (tmp_path / "reports").mkdir()
    return Place(tmp_path, backup)


def test_the_table_the_question_and_the_result_on_a_terminal(place: Place) -> None:
    seen = place.seen("work", "vault", answers="y\n")
    assert seen.status == 0
    assert max(map(len, seen.screen)) <= WIDTH
    screen = seen.screen
    assert screen[0].startswith("Passphrase of the backup:")
    assert screen[1:5] == [
        "The following qubes are in the backup:",
        "",
        "--------+------------+-----------+-----------+-------+",
        "   name |       type |  template |     netvm | label |",
    ]
    rows = [line for line in screen if "|" in line]
    assert rows[2] == "   work |      AppVM | fedora-41 | (default) |   red |"
    assert rows[1].endswith("| <-- not selected")
    assert screen.index(f"{QUESTION}y") > screen.index(rows[-1])
    assert screen.index("work: restored") > screen.index(f"{QUESTION}y")
    assert "2 of 2 qubes restored." in screen
    assert place.qubes == ["vault", "work"]
    assert place.report["status"] == 0


@pytest.mark.parametrize("answer", ["y\n", "Y\n", " yes \n", "YES\n"])
def test_yes(answer: str, place: Place) -> None:
    assert place.seen("vault", answers=answer).status == 0
    assert place.qubes == ["vault"]


@pytest.mark.parametrize("answer", ["n\n", "\n", "no\n", "yessir\n", "q\n", "\x04", "y\x04"])
def test_everything_else_is_no_and_creates_nothing(answer: str, place: Place) -> None:
    seen = place.seen(answers=answer)
    assert seen.status == 130
    assert seen.screen[-2:] == ["cancelled", ""]
    assert place.qubes == []
    assert place.report["status"] == 130
    assert "restored." not in seen.raw


def test_ctrl_c_at_the_question_needs_no_further_key(place: Place) -> None:
    seen = place.seen(answers="\x03")
    assert seen.status == 130
    assert seen.screen[-2:] == ["cancelled", ""]
    assert place.qubes == []


@pytest.mark.parametrize("width", [60, 80, 200])
def test_it_fits_the_terminal(width: int, place: Place) -> None:
    place.seen("vault", answers="y\n")
    seen = place.seen(types=TYPED, width=width)
    assert seen.status == 1
    assert max(map(len, seen.screen)) <= width
    assert "\x1b" not in seen.raw


def test_a_bar_is_not_drawn_over_the_question(place: Place) -> None:
    seen = place.seen("work", answers="y\n")
    asked = next(index for index, line in enumerate(seen.drawn) if line.startswith(QUESTION.strip()))
    table = next(index for index, line in enumerate(seen.drawn) if line.startswith("The following"))
    assert not any("%" in line for line in seen.drawn[table:asked])
    assert any("%" in line for line in seen.drawn[asked:])


def test_a_second_restore_is_refused_and_says_how_to_go_on(place: Place) -> None:
    secret = passphrase_file(place.directory)
    assert place.piped("-p", secret, "vault").returncode == 0
    done = place.piped("-p", secret)
    assert done.returncode == 1
    assert "vault |" in done.stdout and "<-- a qube of this name is there already!" in done.stdout
    assert "*** There are qubes of the same names here: vault ***" in done.stderr
    assert "--skip-conflicting" in done.stderr and "--rename-conflicting" in done.stderr
    assert "qubes restored" not in done.stderr
    assert place.qubes == ["vault"]
    error = place.report["error"]
    assert isinstance(error, dict) and error["kind"] == "qube-exists"
    done = place.piped("-p", secret, "--skip-conflicting", "-x", "debian")
    assert done.returncode == 0
    assert place.qubes == ["vault", "work"]
    done = place.piped("-p", secret, "--skip-conflicting", "vault", "work")
    assert (done.returncode, "nothing is left that could be restored" in done.stderr) == (1, True)


def test_verify_asks_nobody_and_creates_nothing(place: Place) -> None:
    seen = place.seen("--verify-only")
    assert seen.status == 0
    assert "These qubes will be verified. Nothing is created or changed." in seen.screen
    assert "4 of 4 qubes verified." in seen.screen
    assert "[y/N]" not in seen.raw
    assert place.qubes == []


def test_a_script_gets_everything_in_lines(place: Place) -> None:
    done = place.piped("-p", "-", "vault", input=f"{PASSPHRASE}\n")
    assert done.returncode == 0
    table, result = done.stdout.split("\n\nQUBE")
    assert table.startswith("The following qubes are in the backup:")
    assert result.splitlines()[1].split()[:5] == ["vault", "private", "512", "KiB", "restored"]
    assert "[y/N]" not in done.stdout + done.stderr


def test_the_passphrase_file_of_the_stock_backup_opens_its_backup(place: Place) -> None:
    """White space at the end of its line is no part of the passphrase that qvm-backup used."""
    assert place.piped("-p", passphrase_file(place.directory, f"{PASSPHRASE} \t"), "vault").returncode == 0


def test_a_quiet_script_gets_nothing(place: Place) -> None:
    done = place.piped("-p", passphrase_file(place.directory), "-q", "vault")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert place.qubes == ["vault"]


def test_where_nobody_can_answer_it_is_said_before_anything_is_asked_or_done(place: Place) -> None:
    done = place.piped()
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no terminal to ask on whether to proceed" in done.stderr
    assert "--yes" in done.stderr
    assert place.qubes == []
    assert place.report["status"] == 2


def test_a_worker_that_is_not_installed_is_found_out_before_the_passphrase(place: Place) -> None:
    place.name = BROKEN
    seen = place.seen()
    assert seen.status == 1
    assert "Passphrase" not in seen.raw
    assert "the template fedora-41 has no worker. Install it there." in " ".join(seen.screen)
    assert place.report["status"] == 1


def test_every_report_is_kept_and_where_that_fails_the_restore_is_none_the_worse(place: Place) -> None:
    secret = passphrase_file(place.directory)
    place.piped("-p", secret, "vault")
    (kept,) = (place.directory / "reports").iterdir()
    assert kept.name.startswith("restore-20") and kept.suffix == ".json"
    assert json.loads(kept.read_text()) == place.report
    kept.unlink()
    kept.parent.rmdir()
    done = place.piped("-p", secret, "work")
    assert done.returncode == 0
    assert "warning: the report cannot be kept in" in done.stderr


def test_a_report_that_was_asked_for_and_not_written_shows_in_the_status(place: Place) -> None:
    done = place.piped("-p", passphrase_file(place.directory), "vault", "--report", "/dev/full")
    assert done.returncode == 3
    assert "the report cannot be written: No space left on device" in done.stderr


def test_a_backup_in_another_qube_is_not_looked_for_here(place: Place) -> None:
    done = place.piped("-d", "sys-usb", "-p", passphrase_file(place.directory), "vault")
    assert done.returncode == 0
    place.backup = Path("/nowhere")
    done = place.piped("-p", passphrase_file(place.directory))
    assert (done.returncode, "/nowhere cannot be opened" in done.stderr) == (2, True)


def test_a_wrong_passphrase_and_an_unknown_name(place: Place) -> None:
    done = place.piped("-p", passphrase_file(place.directory, "wrong"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "Caps Lock" in done.stderr
    done = place.piped("-p", passphrase_file(place.directory), "nobody")
    assert done.returncode == 2
    assert "the backup holds no qube named 'nobody'" in done.stderr


def test_dom0s_home_comes_only_on_request(place: Place) -> None:
    secret = passphrase_file(place.directory)
    done = place.piped("-p", secret, "-x", "debian", "-x", "vault")
    assert "<-- only with --dom0-home" in done.stdout
    assert place.qubes == ["work"]
    done = place.piped("-p", secret, "--dom0-home", "vault")
    assert "NOTE: dom0's home comes as one archive file" in done.stderr
    assert place.qubes == ["dom0", "vault", "work"]


def test_a_reader_that_goes_away_does_no_harm(place: Place) -> None:
    words = " ".join(f"'{word}'" for word in place.words(["-p", passphrase_file(place.directory), "vault"]))
    done = subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", f"{sys.executable} -m {MODULE} {words} | head -1"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout == "The following qubes are in the backup:\n"
    assert "Traceback" not in done.stderr
