"""A command is measured from outside, with all that it starts."""

import os
import resource
import sys
from pathlib import Path

import pytest

from .processes import CommandFailed, busy_share, run

MIB = 1 << 20

WRITES = """
import sys
with open(sys.argv[1], "wb") as file:
    file.write(bytes(3 << 20))
"""

WORKS = """
import time
held = bytearray(80 << 20)
while time.thread_time() < 0.3:
    pass
print("done", flush=True)
time.sleep(60)
"""

#: A child that is gone before anybody could wait for it, but not before it could be looked at.
LEAVES_A_CHILD = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {WORKS!r}], stdout=subprocess.PIPE)
child.stdout.readline()
time.sleep(0.5)
os.kill(child.pid, 9)
"""


def python(program: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", program, *map(str, arguments)]


def test_what_a_command_writes_is_counted_for_itself(tmp_path: Path) -> None:
    measured = run(python(WRITES, tmp_path / "file"))
    assert 3 * MIB <= measured.waited_written < 4 * MIB
    assert measured.others_written == 0


def test_what_programs_of_a_script_write_and_compute_is_counted_for_the_script(tmp_path: Path) -> None:
    script = f'"$PYTHON" -c \'{WRITES}\' "$FILE"; "$PYTHON" -c \'\nfor _ in range(3000000): pass\n\''
    measured = run(["sh", "-c", script], {"PYTHON": sys.executable, "FILE": str(tmp_path / "file")})
    assert 3 * MIB <= measured.waited_written < 4 * MIB
    assert measured.waited_cpu_s > 2 * measured.own_cpu_s


def test_a_child_that_nobody_waits_for_is_counted_among_the_others() -> None:
    measured = run(python(LEAVES_A_CHILD))
    assert measured.others_peak > 80 * MIB > measured.own_peak > MIB
    assert measured.others_cpu_s >= 0.3 > measured.own_cpu_s


def test_the_memory_of_whoever_measures_is_not_counted() -> None:
    held = bytearray(b"x" * (100 * MIB))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > len(held)
    assert run(python("import time; time.sleep(0.1)")).own_peak < 100 * MIB


def test_a_command_that_fails_is_no_result() -> None:
    with pytest.raises(CommandFailed, match="status 3"):
        run(python("raise SystemExit(3)"))


def test_nothing_runs_on_when_the_measuring_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def interrupted(pid: int) -> int:
        started.append(pid)
        raise KeyboardInterrupt

    monkeypatch.setattr("os.pidfd_open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(python("import time; time.sleep(60)"))
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


@pytest.mark.parametrize(
    ("timeline", "expected"),
    [
        # Two cores, windows of 0.1 s: both busy in the first two of four.
        ([(0, 0), (0.1, 0.2), (0.2, 0.4), (0.3, 0.5), (0.4, 0.5)], 0.5),
        # Exactly 90 % is busy, a little less is not.
        ([(0, 0), (0.1, 0.1801)], 1.0),
        ([(0, 0), (0.1, 0.1799)], 0.0),
        # Looks that come more often are taken together: one half at full speed is not busy.
        ([(0, 0), (0.05, 0.1), (0.1, 0.12)], 0.0),
        ([(0, 0), (0.05, 0.08), (0.1, 0.19)], 1.0),
        # A look that came late makes a longer window, which weighs more.
        ([(0, 0), (0.3, 0.6), (0.4, 0.6)], 0.75),
        # The last window may be shorter.
        ([(0, 0), (0.1, 0), (0.15, 0.1)], 1 / 3),
        ([(0, 0)], 0.0),
    ],
)
def test_the_cores_are_busy_in_windows_that_use_nine_tenths_of_them(
    timeline: list[tuple[float, float]], expected: float
) -> None:
    assert busy_share(timeline, 2) == pytest.approx(expected)
