"""Ctrl-C, other signals and sudden deaths at any moment: back at once, nothing half done, nothing left.

Strategy: the backup comes through a pipe that the test stops filling at a chosen place, or holds chunks that
take seconds to derive, so that each moment is met exactly and not by luck.
"""

import contextlib
import os
import pty
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.support.compare import fsverity
from tests.support.fixtures import REPOSITORY

from .support import (
    AT_ONCE_S,
    CHUNK,
    Outcome,
    Run,
    command,
    costly_backup,
    environment,
    finished,
    offsets,
    passphrase_file,
    processes_with,
    running,
    small_backup,
    wait_for,
)

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
pytestmark = needs_bubblewrap


@cache
def small() -> tuple[bytes, dict[str, tuple[int, int]]]:
    return small_backup().to_bytes(), offsets(small_backup())


@cache
def costly() -> bytes:
    return costly_backup()


def half_of(member: str) -> int:
    begin, end = small()[1][member]
    return (begin + end) // 2


#: Moments, by how much of the archive has come, and by what the directory shows then.
MOMENTS: dict[str, tuple[Callable[[], int], str | None]] = {
    "nothing has come": (lambda: 0, None),
    "within the header's copy": (lambda: half_of("backup-header.hmac"), None),
    "within qubes.xml": (lambda: half_of("qubes.xml.000.enc"), None),
    "within the first volume": (lambda: half_of("vm10/private.img.003.enc"), ".work.partial"),
    "within the second qube": (lambda: half_of("vm11/private.img.001.enc"), "work"),
    "within the last file": (lambda: half_of("dom0-home/user.000.enc"), "vault"),
    "when all has come but the end": (lambda: len(small()[0]), "vault"),
}


def assert_only_finished_qubes(target: Path, outcome: Outcome) -> None:
    """Whatever stands in the directory is a qube that the report calls restored, to its last byte."""
    assert outcome.report is not None, outcome.errors
    qubes = outcome.report["qubes"]
    assert isinstance(qubes, list)
    restored = {qube["name"]: qube for qube in qubes if qube["outcome"] == "restored"}
    there = {path.name for path in target.iterdir()} if target.exists() else set()
    assert there == set(restored)
    for name, qube in restored.items():
        for volume in qube["volumes"]:
            assert fsverity(target / name / f"{volume['name']}.img") == volume["fsverity"]


def assert_cancelled(run: Run, took: float, target: Path) -> Outcome:
    outcome = run.outcome()
    assert outcome.status == 130, outcome.errors
    assert took < AT_ONCE_S
    assert not run.processes()
    assert outcome.errors.endswith("cancelled\n") or "cancelled\n" in outcome.errors
    assert "Traceback" not in outcome.errors
    assert outcome.report is not None and outcome.report["status"] == 130
    assert_only_finished_qubes(target, outcome)
    return outcome


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_while_the_archive_is_read(moment: str, tmp_path: Path) -> None:
    size, shown = MOMENTS[moment]
    target = tmp_path / "restored"
    arguments = ("extract", "-", "--to", target, "-p", passphrase_file(tmp_path))
    with running(*arguments, report=tmp_path / "report.json", feed=True) as run:
        run.feed(small()[0][: size()])
        run.worker()
        run.wait_taken()
        wait_for(lambda: shown is None or (target / shown).exists())
        outcome = assert_cancelled(run, run.interrupt(), target)
    if shown is not None and not shown.startswith("."):
        assert f"{shown}: restored" in outcome.errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_other_signals_that_end_a_program_do_the_same(number: signal.Signals, tmp_path: Path) -> None:
    target = tmp_path / "restored"
    arguments = ("extract", "-", "--to", target, "-p", passphrase_file(tmp_path))
    with running(*arguments, report=tmp_path / "report.json", feed=True) as run:
        run.feed(small()[0][: half_of("vm11/private.img.001.enc")])
        wait_for((target / "work").exists)
        assert_cancelled(run, run.interrupt(number), target)


@pytest.mark.parametrize("options", [(), ("--no-sandbox",)], ids=["sandbox", "plain"])
def test_ctrl_c_while_keys_are_derived(options: tuple[str, ...], tmp_path: Path) -> None:
    backup, target = tmp_path / "costly.qbackup", tmp_path / "restored"
    backup.write_bytes(costly())
    arguments = ("extract", backup, "--to", target, "-p", passphrase_file(tmp_path), "--memory", "600")
    with running(*arguments, *options, report=tmp_path / "report.json") as run:
        wait_for((target / "vault").exists)
        wait_for((target / ".work.partial").exists)
        outcome = assert_cancelled(run, run.interrupt(), target)
    assert "vault: restored" in outcome.errors


def test_ctrl_c_twice_is_as_good_as_once(tmp_path: Path) -> None:
    backup, target = tmp_path / "costly.qbackup", tmp_path / "restored"
    backup.write_bytes(costly())
    arguments = ("extract", backup, "--to", target, "-p", passphrase_file(tmp_path), "--memory", "600")
    with running(*arguments, report=tmp_path / "report.json") as run:
        wait_for((target / ".work.partial").exists)
        for _ in range(5):
            os.killpg(run.process.pid, signal.SIGINT)
            time.sleep(0.01)
        assert_cancelled(run, run.interrupt(), target)


def test_ctrl_c_while_a_qube_is_committed(tmp_path: Path) -> None:
    """The rename that gives the first qube its name takes a second: the signal comes in the middle of it."""
    slow_rename = "inject=renameat2:delay_enter=700000:when=1"
    prefix = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=renameat2", "-e", slow_rename]
    if shutil.which("strace") is None or subprocess.run([*prefix, "true"]).returncode:
        pytest.skip("strace, which slows the moment down, is missing or cannot trace here")
    target = tmp_path / "restored"
    arguments = ("extract", "-", "--to", target, "-p", passphrase_file(tmp_path))
    with running(*arguments, report=tmp_path / "report.json", feed=True, prefix=prefix) as run:
        run.feed(small()[0][: half_of("vm11/private.img.001.enc")])
        wait_for((target / ".work.partial" / "qube.json").exists)
        time.sleep(0.2)
        assert not (target / "work").exists()
        outcome = assert_cancelled(run, run.interrupt(), target)
    assert "work: restored" in outcome.errors


def test_ctrl_c_at_any_instant(tmp_path: Path) -> None:
    """Not by luck alone, but by luck too: from the start of the interpreter to the end of the run."""
    backup = tmp_path / "sample.qbackup"
    backup.write_bytes(small()[0])
    chance = random.Random(7)
    for attempt in range(6):
        target = tmp_path / f"restored-{attempt}"
        arguments = ("extract", backup, "--to", target, "-p", passphrase_file(tmp_path))
        with running(*arguments) as run:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(chance.uniform(0.02, 1.0))
            took = run.interrupt()
            outcome = run.outcome()
            assert took < AT_ONCE_S
            # Before the first line of ours, the interpreter ends itself with the signal.
            assert outcome.status in (130, -signal.SIGINT, 0), outcome.errors
            assert not run.processes()
        names = {path.name for path in target.iterdir()} if target.exists() else set()
        assert names <= {"work", "vault", "debian"}
        if outcome.status == 0:
            assert names == {"work", "vault", "debian"}


def test_ctrl_c_at_the_prompt_of_a_terminal(tmp_path: Path) -> None:
    backup, report = tmp_path / "sample.qbackup", tmp_path / "report.json"
    backup.write_bytes(small()[0])
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(REPOSITORY)
        words = command("verify", backup, "--report", report)
        os.execve(words[0], words, environment("prompt"))
    said = b""
    try:
        while b"Passphrase" not in said:
            said += os.read(terminal, 1024)
        os.write(terminal, b"half a passphr\x03")  # what Ctrl-C sends
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while piece := os.read(terminal, 1024):
                said += piece
        assert time.monotonic() - began < AT_ONCE_S
    finally:
        os.close(terminal)
        _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert said.replace(b"\r", b"").endswith(b"\ncancelled\n")
    assert b"half" not in said
    assert '"status": 130' in report.read_text()


def test_a_signal_that_is_ignored_from_the_start_stays_ignored(tmp_path: Path) -> None:
    arguments = ("verify", "-", "-p", passphrase_file(tmp_path))
    with running(*arguments, feed=True, prefix=["nohup"]) as run:
        run.feed(small()[0][:CHUNK])
        run.worker()
        os.killpg(run.process.pid, signal.SIGHUP)
        time.sleep(0.1)
        run.feed(small()[0][CHUNK:])
        run.end_of_backup()
        assert run.outcome().status == 0


# --- Sudden deaths -------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["worker", "bubblewrap"])
@pytest.mark.parametrize("moment", ["within qubes.xml", "within the first volume", "within the second qube"])
def test_a_killed_worker_ends_the_run_at_once_with_a_report(victim: str, moment: str, tmp_path: Path) -> None:
    size, shown = MOMENTS[moment]
    target = tmp_path / "restored"
    arguments = ("extract", "-", "--to", target, "-p", passphrase_file(tmp_path))
    with running(*arguments, report=tmp_path / "report.json", feed=True) as run:
        run.feed(small()[0][: size()])
        worker = run.worker()
        run.wait_taken()
        wait_for(lambda: shown is None or (target / shown).exists())
        began = time.monotonic()
        os.kill(worker if victim == "worker" else bubblewrap_of(run), signal.SIGKILL)
        assert run.seconds_until_over(began) < AT_ONCE_S
        assert not run.processes()
        outcome = run.outcome()
    assert outcome.status == (3 if shown == "work" else 1)
    assert (
        "the worker was killed (SIGKILL)" in outcome.errors or "the worker cannot be called" in outcome.errors
    )
    assert outcome.report is not None and outcome.report["status"] == outcome.status
    assert "'kind': 'worker-lost'" in str(outcome.report["error"])
    assert_only_finished_qubes(target, outcome)


def bubblewrap_of(run: Run) -> int:
    """The process of the sandbox that stands outside."""
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    [found] = [int(child) for child in children if int(child) in run.processes()]
    return found


def test_a_killed_broker_leaves_no_process_and_the_next_run_works_at_once(tmp_path: Path) -> None:
    backup, target = tmp_path / "costly.qbackup", tmp_path / "restored"
    backup.write_bytes(costly())
    options = ("--to", target, "-p", passphrase_file(tmp_path))
    with running("extract", backup, *options, "--memory", "600") as run:
        wait_for((target / ".work.partial").exists)
        wait_for((target / "vault").exists)
        run.process.kill()
        run.process.wait()
        began = time.monotonic()
        wait_for(lambda: not run.processes())
        assert time.monotonic() - began < AT_ONCE_S
    assert (target / ".work.partial").exists()
    backup.write_bytes(small()[0])
    outcome = finished("extract", backup, *options, "-x", "vault")
    assert outcome.status == 0, outcome.errors
    assert {path.name for path in target.iterdir()} == {"debian", "vault", "work"}


def test_verify_and_list_leave_no_process_either(tmp_path: Path) -> None:
    for arguments in (("verify", "-"), ("list", "-")):
        with running(*arguments, "-p", passphrase_file(tmp_path), feed=True) as run:
            run.feed(small()[0][: half_of("qubes.xml.000.enc")])
            run.worker()
            assert run.interrupt() < AT_ONCE_S
            assert run.outcome().status == 130
            assert not processes_with(run.mark)
