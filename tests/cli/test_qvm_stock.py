"""Whose restore it is, and the hand-over to the stock program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qubes_restore_svc.cli import qvm_backup_restore
from qubes_restore_svc.cli.qvm_backup_restore import is_isolated
from qubes_restore_svc.errors import UsageError
from tests.support.fixtures import REPOSITORY

HANDING_OVER = """
import sys
from pathlib import Path
from qubes_restore_svc.cli.qvm_backup_restore import hand_over
hand_over(sys.argv[2:], Path(sys.argv[1]))
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def handed_over(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HANDING_OVER, program, *words],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    "line",
    [
        "--mgmt-vm b",
        "b --mgmt-vm",
        "b work -p pw --mgmt-vm",
        "--mgmt-vm",
        "--mgmt-vm --help",
        "--mgmt-vm -- b",
    ],
)
def test_a_restore_is_ours_if_the_option_says_so(line: str) -> None:
    assert is_isolated(line.split())


@pytest.mark.parametrize(
    "line",
    ["", "b", "--help", "--version", "b --paranoid-mode", "b -- work", "b --exclude=--mgmt-vm", "mgmt-vm",
     "--mgmt-v b", "--mgmt b", "--mgmt-vm= b", "--mgmt-vm=yes b", "--mgmt-template x b"],
)  # fmt: skip
def test_everything_else_is_the_stock_programs_which_refuses_what_it_does_not_know(line: str) -> None:
    assert not is_isolated(line.split())


def test_behind_two_hyphens_it_is_no_option_and_no_reason_to_read_a_backup_in_dom0() -> None:
    for line in ("b -- --mgmt-vm", "-- b --mgmt-vm", "-x -- --mgmt-vm"):
        with pytest.raises(UsageError, match="stands after --"):
            is_isolated(line.split())


def test_the_stock_program_gets_the_arguments_byte_for_byte_and_its_status_is_ours(tmp_path: Path) -> None:
    program = script(
        tmp_path / "stock",
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([list(map(repr, map(os.fsencode, sys.argv))), os.getpid()]))\nsys.exit(7)\n",
    )
    words = ["", "-x", "two words", "--", "$HOME", "é", os.fsdecode(b"\xff\xfe"), "--skip-broken"]
    process = subprocess.Popen(
        [sys.executable, "-c", HANDING_OVER, str(program), *words], stdout=subprocess.PIPE, env=ENVIRONMENT
    )
    said, _ = process.communicate(timeout=30)
    got, number = json.loads(said)
    assert got == [repr(os.fsencode(word)) for word in (str(program), *words)]
    assert number == process.pid
    assert process.returncode == 7


def test_a_stock_program_that_is_not_there_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    said = handed_over(tmp_path / "nowhere", "b").stderr
    assert "nowhere cannot be started: No such file or directory" in said
    said = handed_over(tmp_path, "b").stderr
    assert "cannot be started: Permission denied" in said


@pytest.mark.parametrize("way", ["exec ", ""])
def test_a_program_that_leads_back_to_us_is_called_once(way: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    again = f'{sys.executable} -c \'{HANDING_OVER}\' "$0" "$@"'
    program = script(tmp_path / "stock", f"#!/bin/sh\necho called >> {log}\n{way}{again}\n")
    done = handed_over(program, "b")
    assert done.returncode != 0
    assert "is not the stock program: it leads back to this one" in done.stderr
    assert log.read_text() == "called\n"


def test_the_entry_hands_over_what_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Handed(Exception):
        pass

    def hand_over(words: list[str]) -> None:
        raise Handed(*words)

    monkeypatch.setattr(qvm_backup_restore, "hand_over", hand_over)
    monkeypatch.setattr(sys, "argv", ["x", "--help", "b"])
    with pytest.raises(Handed) as handed:
        qvm_backup_restore.main()
    assert handed.value.args == ("--help", "b")


def entry(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qubes_restore_svc.cli.qvm_backup_restore", *words],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=30,
        check=False,
    )


def test_the_entry_refuses_a_misplaced_option_with_2() -> None:
    done = entry("backup", "--", "--mgmt-vm")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "qvm-backup-restore: --mgmt-vm stands after --, where it is no option. Put it before the --.\n"
    )


def test_our_help_needs_no_qubes_system() -> None:
    done = entry("--mgmt-vm", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: qvm-backup-restore --mgmt-vm")


def test_the_installed_program_is_the_entry() -> None:
    launcher = REPOSITORY / "bin" / "qvm-backup-restore"
    assert os.access(launcher, os.X_OK)
    assert launcher.read_text().splitlines()[0] == "#!/usr/bin/python3 -I"
    done = subprocess.run(
        [sys.executable, "-I", launcher, "--mgmt-vm", "--version"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("qvm-backup-restore --mgmt-vm")


def test_the_stock_command_is_not_slowed_down_by_our_imports() -> None:
    code = "import sys, qubes_restore_svc.cli.qvm_backup_restore as m; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=30, check=True
    )
    loaded = set(done.stdout.split())
    assert "qubes_restore_svc.cli.qvm_backup_restore" in loaded
    assert not loaded & {"pydantic", "argparse", "asyncio", "qubesadmin", "tqdm"}
