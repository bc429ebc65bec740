"""What whoever starts the command may have set: limits, signals, a directory that is gone."""

import re
import shutil
import signal
from pathlib import Path

import pytest

from .support import AT_ONCE_S, passphrase_file, running, wait_for

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

VERIFIED = "4 of 4 qubes verified."


@pytest.mark.parametrize(
    ("settings", "status", "last_line"),
    [
        ("ulimit -c 0", 0, VERIFIED),  # the hard limit as well
        ("ulimit -f 0", 0, VERIFIED),
        ("ulimit -s 4000000", 0, VERIFIED),
        ("ulimit -n 12", 1, "Raise the limit (ulimit -n), and try again."),
        ("trap '' CHLD", 0, VERIFIED),
        ("trap '' INT TERM HUP PIPE CHLD", 0, VERIFIED),
        ("umask 777", 0, VERIFIED),
        ("unset HOME LANG LC_ALL TERM", 0, VERIFIED),
        ("cd $(mktemp -d) && rmdir $PWD", 0, VERIFIED),
    ],
)
def test_a_verification_works_or_says_in_one_line_what_it_lacks(
    settings: str, status: int, last_line: str, backup: Path, tmp_path: Path
) -> None:
    prefix = ["bash", "-c", f'{settings} && exec "$@"', "bash"]
    with running("verify", backup, "-p", passphrase_file(tmp_path), prefix=prefix) as run:
        outcome = run.outcome()
        assert run.processes() == []
    lines = outcome.errors.splitlines()
    assert outcome.status == status, outcome.errors
    assert last_line in lines[-1]
    assert not re.search("Traceback|Unknown child", outcome.errors)
    assert status == 0 or len(lines) == 1


def test_a_directory_that_is_gone_is_said_of_a_name_in_it(backup: Path, tmp_path: Path) -> None:
    prefix = ["bash", "-c", 'cd $(mktemp -d) && rmdir $PWD && exec "$@"', "bash"]
    arguments = ("extract", backup, "--to", "here", "-p", passphrase_file(tmp_path))
    with running(*arguments, prefix=prefix) as run:
        outcome = run.outcome()
    assert outcome.status == 2
    assert outcome.errors.splitlines()[-1].endswith(
        "argument --to: the current directory is gone (No such file or directory)"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_imports_is_answered(
    number: signal.Signals, backup: Path, tmp_path: Path
) -> None:
    with running("verify", backup, "-p", passphrase_file(tmp_path)) as run:
        mapped = Path(f"/proc/{run.process.pid}/maps")
        wait_for(lambda: "pydantic_core" in mapped.read_text())
        assert run.interrupt(number) < AT_ONCE_S
        outcome = run.outcome()
        assert (outcome.status, outcome.errors) == (130, "cancelled\n")
        assert run.processes() == []


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_pipe_that_ends_early_tells_of_the_program_that_writes_into_it(
    share: float, backup: Path, tmp_path: Path
) -> None:
    size = int(backup.stat().st_size * share)
    prefix = ["bash", "-c", f'(head -c {size} "$0"; exit 5) | "$@"', str(backup)]
    with running("verify", "-", "-p", passphrase_file(tmp_path), prefix=prefix) as run:
        outcome = run.outcome()
    assert outcome.status != 0
    told = " ".join((outcome.output + outcome.errors).split())
    assert "The program that writes into the pipe may have failed: look at what it said." in told
