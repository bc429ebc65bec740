"""`qvm-backup-restore --mgmt-vm` in a GUI domain and in dom0, on the same system: same words, same end.

Strategy: both read the same backup in the GUI domain; what differs between two runs by nature (the name of
the worker's qube) is taken out, nothing else.
"""

import os
import re
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.terminal import on_terminal
from tests.emulation.dom0 import wait_until
from tests.emulation.remote_bench import (
    GUI,
    LONG_S,
    MEMORY,
    PASSPHRASE,
    START,
    TEMPLATE,
    VERIFY,
    RemoteBench,
    two_qubes,
)
from tests.emulation.snapshot import Snapshot
from tests.support.backup_writer import BackupWriter, ImagePlan, QubePlan, join_members


@pytest.fixture
def bench(bench: RemoteBench) -> RemoteBench:
    bench.grant(START, VERIFY)
    return bench


def in_dom0(bench: RemoteBench, *words: str) -> "subprocess.CompletedProcess[str]":
    process = bench.dom0.start(["--mgmt-vm", "-d", GUI, *words], PASSPHRASE)
    stdout, stderr = process.communicate(timeout=LONG_S)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def said(done: "subprocess.CompletedProcess[str]") -> tuple[int, str, str]:
    """Status and words, without the worker's name."""
    return done.returncode, _unnamed(done.stdout), _unnamed(done.stderr)


def _unnamed(text: str) -> str:
    without = re.sub(r"cancelling: .*?\n(?=cancelled\n)", "", text)  # said only where it takes a moment
    return re.sub(r"disp-restore-[0-9]+", "disp-restore-N", without)


def remove_new(bench: RemoteBench, before: Snapshot) -> set[str]:
    """Remove the qubes that have come; their names."""
    new = bench.new_qubes(before)
    bench.remove(*new)
    return new


def test_it_says_and_does_what_the_one_in_dom0_does(bench: RemoteBench, backup: str) -> None:
    before = bench.snapshot()
    there = in_dom0(bench, backup)
    assert remove_new(bench, before) == {"first", "second"}
    bench.check_as_before(before)
    here = bench.command(backup)
    assert here.returncode == 0, here.stderr
    assert said(here) == said(there)
    assert "first |" in here.stdout and "2 of 2 qubes" in here.stderr
    assert remove_new(bench, before) == {"first", "second"}
    bench.check_as_before(before)


def test_a_verification_reads_all_and_changes_nothing(bench: RemoteBench, backup: str) -> None:
    before = bench.snapshot()
    done = bench.command(backup, "--verify-only", "-v")
    assert done.returncode == 0, done.stderr
    assert "first |" in done.stdout and "2 of 2 qubes verified." in done.stderr
    bench.check_as_before(before)


def test_a_qube_whose_firewall_comes_late_stays_and_is_called_incomplete(
    bench: RemoteBench, tmp_path: Path
) -> None:
    image = {"private": ImagePlan(4096)}
    rules = '<firewall version="2"><rules/></firewall>'
    qubes = [QubePlan("first", volumes=image, firewall=rules), QubePlan("second", volumes=image)]
    members = list(BackupWriter([replace(qube, template=TEMPLATE) for qube in qubes], log_n=4).members())
    members.sort(key=lambda member: "firewall" in member.name)
    (tmp_path / "late").write_bytes(join_members(members))
    path = bench.put(tmp_path / "late")
    before = bench.snapshot()
    here = bench.command(path)
    assert here.returncode == 3 and "1 of 2 qubes restored" in here.stderr
    assert "first: incomplete: its firewall.xml stands behind" in here.stderr
    assert "a netvm now. Look at what it lacks, a firewall above all" in here.stderr
    rows = [line.split() for line in here.stdout.splitlines() if line.startswith("first ")]
    assert rows[-1] == ["first", "-", "-", "incomplete"]
    assert "rolled back" not in here.stdout
    assert remove_new(bench, before) == {"first", "second"}


@pytest.mark.parametrize(("answer", "status", "restored"), [("y\n", 0, {"first"}), ("n\n", 130, set())])
def test_on_a_terminal_it_asks_and_does_what_the_answer_says(
    bench: RemoteBench, backup: str, answer: str, status: int, restored: set[str]
) -> None:
    before = bench.snapshot()
    seen = on_terminal(
        "command", "--mgmt-vm", backup, "first",
        types=f"{PASSPHRASE}\n", answers=answer, module="tests.emulation.remote_programs",
        variables=bench.qubes.domain_environment(GUI),
    )  # fmt: skip
    assert seen.status == status, seen.raw
    assert any(line.startswith("Do you want to proceed? [y/N]") for line in seen.screen)
    assert ("first: restored" in seen.screen) is bool(restored)
    bench.wait_service_ended()
    assert remove_new(bench, before) == restored
    bench.check_as_before(before)


def test_without_a_terminal_it_needs_a_yes(bench: RemoteBench, backup: str) -> None:
    before = bench.snapshot()
    asked = bench.program("command", "--mgmt-vm", backup)
    assert b"there is no terminal to ask on" in asked.process.communicate(timeout=LONG_S)[1]
    assert asked.process.returncode == 2
    assert bench.journal == ""
    program = bench.program("command", "--mgmt-vm", "--yes", "-p", "-", backup, "second")
    program.say(PASSPHRASE)
    assert program.end() == 0
    assert remove_new(bench, before) == {"second"}
    bench.check_as_before(before)


def test_ctrl_c_in_the_middle_of_the_volumes_is_that_of_dom0_and_leaves_nothing(bench: RemoteBench) -> None:
    sample = two_qubes()
    ends = []
    for where in ("dom0", "gui"):
        held = bench.held(sample, sample.middle_of("vm10/private.img.003.enc"), from_pass=2)
        before = bench.snapshot()
        bench.qubes.qubesd.calls.clear()
        words = [held.location, "--memory", str(MEMORY)]
        process = (
            bench.dom0.start(["--mgmt-vm", "-d", GUI, *words], PASSPHRASE)
            if where == "dom0"
            else bench.start_command("-d", GUI, *words)
        )
        wait_until(
            lambda: bool(bench.qubes.qubesd.calls_of("internal.vm.volume.ImportBegin*", "first")),
            "the first volume",
        )
        held.wait()
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=LONG_S)
        ends.append((process.returncode, stdout, _unnamed(stderr)))
        bench.wait_service_ended()
        held.release()
        bench.check_as_before(before)
        held.remove()
    assert ends[0][0] == 130
    assert ends[1] == ends[0]
