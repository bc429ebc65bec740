"""What the kernel tells of other processes."""

import os
import subprocess
import sys
from pathlib import Path

from . import proc

STATUS = "Name:\tpython3\nVmPeak:\t   90000 kB\nVmHWM:\t   12345 kB\nVmRSS:\t   12000 kB\n"
IO = "rchar: 5267788\nwchar: 5242974\nread_bytes: 114688\nwrite_bytes: 5246976\ncancelled_write_bytes: 4096\n"


def test_the_peak_is_that_of_resident_memory_in_bytes() -> None:
    assert proc.parse_peak_memory(STATUS) == 12345 * 1024


def test_a_process_that_has_ended_has_no_memory() -> None:
    assert proc.parse_peak_memory("Name:\tpython3\nState:\tZ (zombie)\n") == 0


def test_bytes_read_are_those_of_calls_and_bytes_written_those_for_a_disk() -> None:
    assert proc.parse_io(IO) == proc.Io(read=5267788, written=5246976)


def test_a_process_that_is_gone_counts_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    gone = process.pid
    assert (proc.cpu_s(gone), proc.peak_memory(gone), proc.io(gone)) == (0.0, 0, proc.Io())
    assert proc.descendants(gone) == []


def test_the_cpu_time_of_a_process_is_what_the_process_sees_itself() -> None:
    before = os.times()
    mine = proc.cpu_s(os.getpid())
    # os.times counts in hundredths of a second.
    assert before.user + before.system - 0.02 <= mine <= sum(os.times()[:2]) + 0.02


def test_descendants_are_found_at_any_depth(tmp_path: Path) -> None:
    inner = "import os, sys; os.write(1, str(os.getpid()).encode()); sys.stdin.read()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        grandchild = int(os.read(process.stdout.fileno(), 100))
        assert proc.descendants(process.pid) == [grandchild]
        assert grandchild in proc.descendants(os.getpid())
        process.communicate()
