"""Restores of tortured archives, in one process for speed or in several.

Strategy: broker and worker run in threads of one process, which takes a fiftieth of a second a case.
What is left of them in a system shows in the campaigns with real processes. Several processes take ranges of
their own.
"""

import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

from tests.support.restoring import restore

from .archives import CAMPAIGNS
from .judge import Case, judge

#: Is told how many cases are done, and what was wrong with the last of them.
Tell = Callable[[int, Sequence[str]], None]

#: Cases that one process takes at a time.
_PORTION = 200
#: Seconds after which a restore, which takes a fiftieth of one, counts as one that hangs.
_PATIENCE_S = 30


@dataclass
class Outcome:
    """What came of some cases: how many ended in which status, and what was wrong, by case."""

    statuses: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, other: "Outcome") -> None:
        """Count those as well."""
        self.statuses += other.statuses
        self.faults += other.faults


def silent(done: int, faults: Sequence[str]) -> None:
    """For whoever wants to know only at the end."""


def run_case(case: Case, directory: Path) -> tuple[str, list[str]]:
    """Restore one archive; the status as text, and what was wrong."""
    backup, target = directory / "archive", directory / "target"
    backup.write_bytes(case.archive)
    before = signal.signal(signal.SIGALRM, _hung)
    signal.alarm(_PATIENCE_S)
    try:
        report = restore(backup, target)
        return str(report.status), judge(case, report, target)
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        return "raised", [f"it raised {type(error).__name__}: {error}"]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(target, ignore_errors=True)


def _hung(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"it did not end within {_PATIENCE_S} s")


def run_numbers(campaign: str, numbers: Sequence[int]) -> Outcome:
    """Restore the cases of these numbers, one after the other."""
    cases, outcome = CAMPAIGNS[campaign](), Outcome()
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="torture-", dir=parent) as directory:
        for number in numbers:
            case = cases.case(number)
            status, faults = run_case(case, Path(directory))
            outcome.statuses[status] += 1
            outcome.faults += [f"{campaign} {number} ({case.name}): {fault}" for fault in faults]
    return outcome


def run_campaign(campaign: str, numbers: Sequence[int], processes: int, tell: Tell = silent) -> Outcome:
    """Restore the cases of these numbers in several processes."""
    portions = [numbers[start : start + _PORTION] for start in range(0, len(numbers), _PORTION)]
    outcome = Outcome()
    with ProcessPoolExecutor(processes) as pool:
        done = 0
        for portion, result in zip(portions, pool.map(partial(run_numbers, campaign), portions), strict=True):
            outcome.add(result)
            done += len(portion)
            tell(done, result.faults)
    return outcome
