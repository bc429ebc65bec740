"""`qvm-backup-restore --mgmt-vm` as a process, on a terminal and in a pipe, with the worker in a thread."""

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from tests.dom0_service.parts import NO_WORKER
from tests.support.backup_writer import PASSPHRASE
from tests.support.fixtures import REPOSITORY
from tests.system.support import costly_backup, passphrase_file

from .domains import QUESTION, TYPED, WIDTH, Domain, without_times


def test_the_table_the_question_and_the_result_on_a_terminal(dom0: Domain) -> None:
    seen = dom0.seen("work", "vault", answers="y\n")
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
    assert dom0.qubes == ["vault", "work"]
    assert dom0.report["status"] == 0


# Every other answer is in test_question.py.


def test_yes(dom0: Domain) -> None:
    assert dom0.seen("vault", answers=" Yes \n").status == 0
    assert dom0.qubes == ["vault"]


@pytest.mark.parametrize("answer", ["\n", "y\x04"])
def test_everything_else_is_no_and_creates_nothing(answer: str, dom0: Domain) -> None:
    seen = dom0.seen(answers=answer)
    assert seen.status == 130
    assert seen.screen[-2:] == ["cancelled", ""]
    assert dom0.qubes == []
    assert dom0.report["status"] == 130
    assert "restored." not in seen.raw


def test_ctrl_c_at_the_question_needs_no_further_key(dom0: Domain) -> None:
    seen = dom0.seen(answers="\x03")
    assert seen.status == 130
    assert seen.screen[-2:] == ["cancelled", ""]
    assert dom0.qubes == []


def test_it_fits_the_terminal(dom0: Domain) -> None:
    dom0.seen("vault", answers="y\n")
    for width in (60, 80, 200):
        seen = dom0.seen(types=TYPED, width=width)
        assert seen.status == 1
        assert max(map(len, seen.screen)) <= width
        assert "\x1b" not in seen.raw


def test_a_bar_is_not_drawn_over_the_question(dom0: Domain) -> None:
    seen = dom0.seen("work", answers="y\n")
    asked = next(index for index, line in enumerate(seen.drawn) if line.startswith(QUESTION.strip()))
    table = next(index for index, line in enumerate(seen.drawn) if line.startswith("The following"))
    assert not any("%" in line for line in seen.drawn[table:asked])
    assert any("%" in line for line in seen.drawn[asked:])


def test_a_second_restore_is_refused_and_says_how_to_go_on(dom0: Domain) -> None:
    secret = passphrase_file(dom0.folder)
    assert dom0.restored("-p", secret, "vault").returncode == 0
    done = dom0.restored("-p", secret)
    assert done.returncode == 1
    assert "vault |" in done.stdout and "<-- a qube of this name is there already: an earlier" in done.stdout
    assert "*** There are qubes of the same names here: vault ***" in done.stderr
    assert "Move it away, or restore to another directory." in done.stderr
    assert "qubes restored" not in done.stderr
    assert dom0.qubes == ["vault"]
    error = dom0.report["error"]
    assert isinstance(error, dict) and error["kind"] == "qube-exists"
    done = dom0.restored("-p", secret, "--skip-conflicting", "-x", "debian")
    assert done.returncode == 0
    assert dom0.qubes == ["vault", "work"]
    done = dom0.restored("-p", secret, "--skip-conflicting", "vault", "work")
    assert (done.returncode, "nothing is left that could be restored" in done.stderr) == (1, True)


def test_a_name_that_is_taken_is_asked_about_and_the_new_plan_shown(dom0: Domain) -> None:
    assert dom0.seen("vault", answers="y\n").status == 0
    seen = dom0.seen("vault", answers=["work\n", "safe\n", "y\n"])
    assert seen.status == 0, seen.screen
    said = " ".join(seen.screen)
    assert "*** There are qubes of the same names here: vault ***" in said
    assert "it cannot be called 'work': the backup has another qube of this name" in said
    assert "will be renamed to 'safe'" in said
    assert dom0.qubes == ["safe", "vault"]
    seen = dom0.seen("vault", answers=["\n"])
    assert (seen.status, dom0.qubes) == (1, ["safe", "vault"])


def test_verify_asks_nobody_and_creates_nothing(dom0: Domain) -> None:
    seen = dom0.seen("--verify-only")
    assert seen.status == 0
    assert "These qubes will be verified. Nothing is created or changed." in seen.screen
    assert "4 of 4 qubes verified." in seen.screen
    assert "[y/N]" not in seen.raw
    assert dom0.qubes == []


def test_a_script_gets_everything_in_lines(dom0: Domain) -> None:
    done = dom0.restored("-p", "-", "vault", input=f"{PASSPHRASE}\n")
    assert done.returncode == 0
    table, result = done.stdout.split("\n\nQUBE")
    assert table.startswith("The following qubes are in the backup:")
    assert result.splitlines()[1].split()[:5] == ["vault", "private", "512", "KiB", "restored"]
    assert "[y/N]" not in done.stdout + done.stderr


def test_the_passphrase_file_of_the_stock_backup_opens_its_backup(dom0: Domain) -> None:
    """White space at the end of its line is no part of the passphrase that qvm-backup used."""
    done = dom0.restored("-p", passphrase_file(dom0.folder, f"{PASSPHRASE} \t"), "vault")
    assert (done.returncode, dom0.qubes) == (0, ["vault"]), done.stderr
    assert "It is tried without the white space at its end." in done.stderr


def test_ctrl_c_where_the_passphrase_is_asked_for_again_ends_the_restore(dom0: Domain) -> None:
    seen = dom0.seen("vault", types=["no\n", "\x03"])
    assert (seen.status, dom0.qubes) == (130, [])
    assert "cancelled" in seen.screen


def test_after_a_wrong_passphrase_another_one_is_asked_for_three_times(dom0: Domain) -> None:
    seen = dom0.seen("vault", types=["no\n", "nor\n", TYPED], answers="y\n")
    assert (seen.status, dom0.qubes) == (0, ["vault"]), seen.screen
    assert seen.raw.count("Passphrase of the backup:") == 3
    seen = dom0.seen("work", types=["no\n", "nor\n", "never\n", TYPED])
    assert (seen.status, dom0.qubes) == (1, ["vault"])
    assert seen.raw.count("Passphrase of the backup:") == 3
    assert "does not open with this passphrase. Check the" in " ".join(seen.screen)
    assert dom0.report["status"] == 1


def test_a_quiet_script_gets_nothing(dom0: Domain) -> None:
    done = dom0.restored("-p", passphrase_file(dom0.folder), "-q", "vault")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert dom0.qubes == ["vault"]


def test_where_nobody_can_answer_it_is_said_before_anything_is_asked_or_done(dom0: Domain) -> None:
    done = dom0.restored()
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no terminal to ask on whether to proceed" in done.stderr
    assert "--yes" in done.stderr
    assert dom0.qubes == []
    assert dom0.report["status"] == 2


def test_a_worker_that_is_not_installed_is_found_out_before_the_passphrase(dom0: Domain) -> None:
    (dom0.folder / NO_WORKER).touch()
    seen = dom0.seen()
    assert seen.status == 1
    assert "Passphrase" not in seen.raw
    assert "the template fedora-41 has no worker. Install it there." in " ".join(seen.screen)
    assert dom0.report["status"] == 1


def test_every_report_is_kept_and_where_that_fails_the_restore_is_none_the_worse(dom0: Domain) -> None:
    secret = passphrase_file(dom0.folder)
    dom0.restored("-p", secret, "vault")
    (kept,) = (dom0.folder / "reports").iterdir()
    assert kept.name.startswith("restore-20") and kept.suffix == ".json"
    assert without_times(kept) == dom0.report
    kept.unlink()
    kept.parent.rmdir()
    done = dom0.restored("-p", secret, "work")
    assert done.returncode == 0
    assert "warning: the report cannot be kept in" in done.stderr


def test_a_report_that_was_asked_for_and_not_written_shows_in_the_status(dom0: Domain) -> None:
    done = dom0.restored("-p", passphrase_file(dom0.folder), "vault", "--report", "/dev/full")
    assert done.returncode == 3
    assert "the report cannot be written: No space left on device" in done.stderr


def test_a_backup_in_another_qube_is_not_looked_for_here(dom0: Domain) -> None:
    done = dom0.restored("-d", "sys-usb", "-p", passphrase_file(dom0.folder), "vault")
    assert done.returncode == 0
    done = dom0.piped("/nowhere", "-p", passphrase_file(dom0.folder))
    assert (done.returncode, "/nowhere cannot be opened" in done.stderr) == (2, True)


def test_a_plan_beyond_the_limits_is_shown_and_refused_before_the_question(dom0: Domain) -> None:
    dom0.configure("limits: {qubes: 1}\n")
    seen = dom0.seen()
    assert seen.status == 2
    assert "3 qubes are to be restored, and the configuration allows 1" in " ".join(seen.screen)
    assert "   name |       type |  template |     netvm | label |" in seen.screen
    assert "[y/N]" not in seen.raw
    assert (dom0.qubes, dom0.report["status"]) == ([], 2)
    assert dom0.seen("vault", answers="y\n").status == 0


def test_a_backup_on_standard_input_is_handed_over(dom0: Domain) -> None:
    words = dom0.words("-", "-p", passphrase_file(dom0.folder), "vault", "--verify-only")
    with dom0.backup.open("rb") as backup:
        for stdin, feed in ((backup, None), (subprocess.PIPE, dom0.backup.read_bytes())):
            done = subprocess.run(
                words, stdin=stdin if feed is None else None, input=feed, capture_output=True, cwd=REPOSITORY,
                timeout=60, check=False,
            )  # fmt: skip
            assert (done.returncode, b"1 of 1 qube verified." in done.stderr) == (0, True), done.stderr


@pytest.mark.parametrize(("typed", "words"), [("\x03", "cancelled"), ("\n", "the passphrase is empty")])
def test_without_a_passphrase_nothing_begins(typed: str, words: str, dom0: Domain) -> None:
    seen = dom0.seen(types=typed)
    assert seen.status == (130 if words == "cancelled" else 2)
    assert seen.raw.count("\n") <= 3 and words in seen.screen[-2]
    assert dom0.report["status"] == seen.status
    assert (dom0.qubes, list((dom0.folder / "reports").iterdir())) == ([], [])


def test_a_service_that_is_killed_is_told_of_and_its_report_is_not_awaited(dom0: Domain) -> None:
    costly = dom0.folder / "costly"
    costly.write_bytes(costly_backup())
    command = dom0.words(costly, "-p", passphrase_file(dom0.folder), "-v")
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
    assert [name for name in dom0.qubes if not name.startswith(".")] == ["vault"]
    assert dom0.report["status"] == 3


def test_a_wrong_passphrase_and_an_unknown_name(dom0: Domain) -> None:
    done = dom0.restored("-p", passphrase_file(dom0.folder, "wrong"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "Caps Lock" in done.stderr
    done = dom0.restored("-p", passphrase_file(dom0.folder), "nobody")
    assert done.returncode == 2
    assert "the backup holds no qube named 'nobody'" in done.stderr


def test_dom0s_home_comes_only_on_request(dom0: Domain) -> None:
    secret = passphrase_file(dom0.folder)
    done = dom0.restored("-p", secret, "-x", "debian", "-x", "vault")
    assert "1 only with --dom0-home: dom0\n" in done.stdout
    assert dom0.qubes == ["work"]
    done = dom0.restored("-p", secret, "--dom0-home", "vault")
    assert "NOTE: dom0's home comes as one archive file" in done.stderr
    assert dom0.qubes == ["dom0", "vault", "work"]


def test_a_reader_that_goes_away_does_no_harm(dom0: Domain) -> None:
    words = shlex.join(dom0.words(dom0.backup, "-p", passphrase_file(dom0.folder), "vault"))
    done = subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", f"{words} | head -1"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout == "The following qubes are in the backup:\n"
    assert "Traceback" not in done.stderr
