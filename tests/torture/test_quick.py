"""A sample of each campaign, drawn anew only when the seed here changes; and the judge sees what is wrong.

Strategy: the campaigns as a whole take hours (`make torture`); these few hundred cases take seconds.
"""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qubes_restore_svc.errors import ExitStatus, HostFailed
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.report import Report
from tests.support.fixtures import REPOSITORY
from tests.support.restoring import restore

from .archives import CAMPAIGNS, chosen
from .judge import Case, judge
from .mutants import MUTANTS
from .runner import run_numbers
from .sample import tight_sample
from .systems import SYSTEM_CAMPAIGNS, call_cases, run_system_case, signal_cases

SEED = 10


@pytest.mark.parametrize(("campaign", "sample"), [("bits", 120), ("cuts", 60), ("games", 120)])
def test_a_damaged_archive_costs_what_was_hit_and_the_report_is_true(campaign: str, sample: int) -> None:
    numbers = chosen(len(CAMPAIGNS[campaign]()), 0, None, sample, SEED)
    outcome = run_numbers(campaign, numbers)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert {"0", "3"} & set(outcome.statuses) and outcome.statuses.total() == sample


@pytest.mark.skipif(
    shutil.which("strace") is None
    or subprocess.run(["strace", "-e", "trace=none", "true"], capture_output=True).returncode != 0,
    reason="strace is not installed, or cannot trace here",
)
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
@pytest.mark.parametrize("words", ["ENOSPC at pwrite64 1 of the broker", "EIO at fsync 1 of the broker"])
def test_a_system_call_that_fails_is_named_and_leaves_nothing(words: str) -> None:
    (case,) = [case for case in call_cases() if str(case) == words]
    status, faults = run_system_case(case)
    assert status in ("1", "3") and not faults


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_a_signal_at_some_moment_leaves_nothing() -> None:
    (case, *_) = [case for case in signal_cases() if case.whom == "group" and case.delay > 0.8]
    _, faults = run_system_case(case)
    assert not faults


def test_the_case_of_a_number_is_always_the_same() -> None:
    for make in CAMPAIGNS.values():
        assert make().case(77) == make().case(77)
    assert [len(make()) for make in SYSTEM_CAMPAIGNS.values()] == [len(call_cases()), 700]
    assert chosen(100, 10, 20, None, 1) == list(range(10, 20))
    assert chosen(100, 0, None, 5, 1) == chosen(100, 0, None, 5, 1)


def _lose_an_image(report: Report, target: Path) -> None:
    (target / "work/private.img").write_bytes(b"other")


def _lose_the_firewall(report: Report, target: Path) -> None:
    record = target / "work/qube.json"
    record.write_text(record.read_text().replace('"firewall": []', '"firewall": null'))


def _leave_something(report: Report, target: Path) -> None:
    (target / ".vault.partial").mkdir()


def _lose_a_qube(report: Report, target: Path) -> None:
    shutil.rmtree(target / "vault")


def _call_it_failed(report: Report, target: Path) -> None:
    report.qubes[0].outcome = "failed"


def _blame_the_host(report: Report, target: Path) -> None:
    report.error = ErrorInfo.of(HostFailed("it broke")).without_place()


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        (_lose_an_image, "other images"),
        (_lose_the_firewall, "firewall None"),
        (_leave_something, ".vault.partial is there"),
        (_lose_a_qube, "vault was restored and is not there"),
        (_call_it_failed, "work was lost"),
        (_blame_the_host, "host-failed"),
    ],
)
def test_the_judge_sees_each_kind_of_lie(
    lie: Callable[[Report, Path], None], told: str, tmp_path: Path
) -> None:
    sample = tight_sample()
    case = Case("nothing damaged", sample.archive, sample=sample)
    (tmp_path / "archive").write_bytes(case.archive)
    report = restore(tmp_path / "archive", tmp_path / "target")
    assert report.status == ExitStatus.COMPLETE and not judge(case, report, tmp_path / "target")
    lie(report, tmp_path / "target")
    assert told in "\n".join(judge(case, report, tmp_path / "target"))


def test_every_line_that_is_to_be_broken_is_there_once(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "qubes_restore_svc", tmp_path / "qubes_restore_svc")
    for mutant in MUTANTS:
        text = mutant.apply(tmp_path)
        (tmp_path / "qubes_restore_svc" / mutant.file).write_text(text)
        assert all((REPOSITORY / word).exists() for word in mutant.tests.split() if word.startswith("tests/"))
    assert len(MUTANTS) >= 60
