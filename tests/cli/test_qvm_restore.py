"""`qvm-backup-restore --mgmt-vm` as a process, on a terminal and in a pipe, with the worker in a thread."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.dom0_service.parts import NO_WORKER
from tests.support.backup_writer import PASSPHRASE
from tests.support.fixtures import REPOSITORY
from tests.system.support import costly_backup, passphrase_file, small_backup

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

    @property
    def qubes(self) -> list[str]:
        target = self.directory / "restored"
        return sorted(os.listdir(target)) if target.exists() else []

    @property
    def report(self) -> dict[str, object]:
        content: dict[str, object] = json.loads((self.directory / "report.json").read_text())
        return content

    def words(self, options: Sequence[str | Path]) -> list[str | Path]:
        report = self.directory / "report.json"
        return [self.directory, "--mgmt-vm", self.backup, "--report", report, *options]

    def seen(
        self, *options: str | Path, types: str = TYPED, answers: str | Sequence[str] = "", width: int = WIDTH
    ) -> Seen:
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
    configure(tmp_path)
    return Place(tmp_path, backup)


def configure(folder: Path, more: str = "") -> None:
    config = folder / "config.yaml"
    config.write_text(f"report: {{directory: {folder / 'reports'}}}\n{more}")
    config.chmod(0o644)


def test_the_table_the_question_and_the_result_on_a_terminal(place: Place) -> None:
    seen = place.seen("work", "vault", answers="y\n")
    assert seen.status == 0
    assert max(map(len, seen.screen)) <= WIDTH
    screen = seen.screen
    assert screen[0].startswith("Passphrase of the backup:")
    assert screen[1:5] == [
        "The following qubes are in the backup:",
        "",
        "-------+-------+-----------+-----------+-------+",
        "  name |  type |  template |     netvm | label |",
    ]
    rows = [line for line in screen if "|" in line]
    assert rows[1:] == [
        "  work | AppVM | fedora-41 | (default) |   red |",
        " vault | AppVM | fedora-41 | (default) |   red |",
    ]
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
    assert "Move it away, or restore to another directory." in done.stderr
    assert "qubes restored" not in done.stderr
    assert place.qubes == ["vault"]
    error = place.report["error"]
    assert isinstance(error, dict) and error["kind"] == "qube-exists"
    done = place.piped("-p", secret, "--skip-conflicting", "-x", "debian")
    assert done.returncode == 0
    assert place.qubes == ["vault", "work"]
    done = place.piped("-p", secret, "--skip-conflicting", "vault", "work")
    assert (done.returncode, "nothing is left that could be restored" in done.stderr) == (1, True)


def test_a_name_that_is_taken_is_asked_about_and_the_new_plan_shown(place: Place) -> None:
    assert place.seen("vault", answers="y\n").status == 0
    seen = place.seen("vault", answers=["work\n", "safe\n", "y\n"])
    assert seen.status == 0, seen.screen
    said = " ".join(seen.screen)
    assert "*** There are qubes of the same names here: vault ***" in said
    assert "it cannot be called 'work': the backup has another qube of this name" in said
    assert "will be renamed to 'safe'" in said
    assert place.qubes == ["safe", "vault"]
    seen = place.seen("vault", answers=["\n"])
    assert (seen.status, place.qubes) == (1, ["safe", "vault"])


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
    (place.directory / NO_WORKER).touch()
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
    assert without_times(json.loads(kept.read_text())) == without_times(place.report)
    kept.unlink()
    kept.parent.rmdir()
    done = place.piped("-p", secret, "work")
    assert done.returncode == 0
    assert "warning: the report cannot be kept in" in done.stderr


def without_times(report: dict[str, object]) -> dict[str, object]:
    assert report.pop("started") and report.pop("finished")  # a message tells them to the second
    return report


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


def test_a_plan_beyond_the_limits_is_shown_and_refused_before_the_question(place: Place) -> None:
    configure(place.directory, "limits: {qubes: 1}\n")
    seen = place.seen()
    assert seen.status == 2
    assert "3 qubes are to be restored, and the configuration allows 1" in " ".join(seen.screen)
    assert "   name |       type |  template |     netvm | label |" in seen.screen
    assert "[y/N]" not in seen.raw
    assert (place.qubes, place.report["status"]) == ([], 2)
    assert place.seen("vault", answers="y\n").status == 0


def test_a_backup_on_standard_input_is_handed_over(place: Place) -> None:
    words = [str(word) for word in place.words(["-p", passphrase_file(place.directory), "vault"])]
    words[words.index(str(place.backup))] = "-"
    with place.backup.open("rb") as backup:
        for stdin, feed in ((backup, None), (subprocess.PIPE, place.backup.read_bytes())):
            done = subprocess.run(
                [sys.executable, "-m", MODULE, *words, "--verify-only"],
                stdin=stdin if feed is None else None, input=feed, capture_output=True, cwd=REPOSITORY,
                timeout=60, check=False,
            )  # fmt: skip
            assert (done.returncode, b"1 of 1 qube verified." in done.stderr) == (0, True), done.stderr


@pytest.mark.parametrize(("typed", "words"), [("\x03", "cancelled"), ("\n", "the passphrase is empty")])
def test_without_a_passphrase_nothing_begins(typed: str, words: str, place: Place) -> None:
    seen = place.seen(types=typed)
    assert seen.status == (130 if words == "cancelled" else 2)
    assert seen.raw.count("\n") <= 3 and words in seen.screen[-2]
    assert place.report["status"] == seen.status
    assert (place.qubes, list((place.directory / "reports").iterdir())) == ([], [])


def test_a_service_that_is_killed_is_told_of_and_its_report_is_not_awaited(place: Place) -> None:
    costly = place.directory / "costly"
    costly.write_bytes(costly_backup())
    place.backup = costly
    words = place.words(["-p", passphrase_file(place.directory), "-v"])
    command = [sys.executable, "-m", MODULE, *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("work/"):
                break
        (service,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(service), signal.SIGKILL)
        said = " ".join(process.stderr.read().split())
    assert process.returncode == 3
    assert "qvm-backup-restore: dom0's restore service was killed by signal 9 (SIGKILL)" in said
    # What was under way is cleared by the next restore, or, on a Qubes system, by the service's guard.
    assert [name for name in place.qubes if not name.startswith(".")] == ["vault"]
    assert place.report["status"] == 3


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
    assert "1 only with --dom0-home: dom0\n" in done.stdout
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
