"""This project against the documented manual recovery, in one run, alternating.

    python -m tests.bench.manual_recovery [--backup FILE --expect FILE.json] [--runs N] [--memory MIB]

The manual procedure is that of the Qubes documentation for format 4, with the stock programs: take the outer
archive apart with tar, open each chunk with `scrypt dec -f -P`, and send all through `gzip -d | tar -x`. Both
sides end with the disk images on the same disk; both results are compared with the originals before a time
counts. Without --backup, a sample is written whose chunks cost what they cost on a Qubes system.

Prints a line a run, then the medians of wall and CPU time, the worker's and the broker's peak memory, and
the ratio of the medians of wall time.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.backup_writer import BackupWriter
from tests.support.compare import differences
from tests.support.plans import sample_qube

MIB = 1 << 20
#: log2 N of the sample's containers in turn: what the scrypt program chose on one machine in one run.
SAMPLE_COSTS = (19, 20, 20, 21)

_RECOVER = """
set -euo pipefail
cd "$TARGET"
tar -i -xf "$BACKUP"
id=$(sed -n 's/^backup-id=//p' backup-header)
for directory in vm*/; do
    for first in "$directory"*.img.000.enc; do
        file=${first%.000.enc}
        find "$directory" -name "${file##*/}.*.enc" | sort -V | while read -r chunk; do
            echo "$id!${chunk%.enc}!$PASSPHRASE" | scrypt dec -f -P "$chunk"
        done | gzip -d | tar -xf -
        find "$directory" -name '*.enc' -path "$file.*" -delete
    done
done
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One run: seconds of wall and CPU time; peak memory in bytes of worker and broker, 0 if not measured."""

    wall_s: float
    cpu_s: float
    worker: int = 0
    broker: int = 0


def measured(
    command: list[str], environment: dict[str, str], watch: Callable[[int], None] | None = None
) -> Run:
    """Run a command to its end. `watch` gets its process id first."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    if watch is not None:
        watch(process.pid)
    if process.wait():
        raise SystemExit(f"{command[0]} failed with status {process.returncode}")
    wall_s = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def manual(backup: Path, passphrase: str, target: Path) -> Run:
    """The documented procedure; qube directories get the names of the archive (vm10)."""
    environment = {
        **os.environ,
        "BACKUP": str(backup.resolve()),
        "TARGET": str(target),
        "PASSPHRASE": passphrase,
    }
    return measured(["bash", "-c", _RECOVER], environment)


def ours(backup: Path, passphrase_file: Path, target: Path, memory: int | None) -> Run:
    """`qubes-restore-svc extract`, with the peak memory of its two processes."""
    command = [sys.executable, "-m", "qubes_restore_svc", "extract", "-q", str(backup)]
    command += ["-p", str(passphrase_file), "--to", str(target)]
    if memory is not None:
        command += ["--memory", str(memory // MIB)]
    peaks = {"worker": 0, "broker": 0}
    worker_cpu_s: dict[int, float] = {}
    done = threading.Event()

    def sample(broker: int) -> None:
        while not done.wait(0.05):
            peaks["broker"] = max(peaks["broker"], _peak_memory(broker))
            for pid in _descendants(broker):
                peaks["worker"] = max(peaks["worker"], _peak_memory(pid))
                worker_cpu_s[pid] = max(worker_cpu_s.get(pid, 0.0), _cpu_s(pid))

    run = measured(
        command,
        dict(os.environ),
        lambda pid: threading.Thread(target=sample, args=(pid,), daemon=True).start(),
    )
    done.set()
    # The worker is killed with its namespace, and nobody inherits its CPU time.
    cpu_s = run.cpu_s + sum(worker_cpu_s.values())
    return Run(run.wall_s, cpu_s, peaks["worker"], peaks["broker"])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backup", type=Path, help="a backup of format 4, compressed with gzip")
    parser.add_argument("--expect", type=Path, help="its JSON (default: the backup's name with .json added)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side (default: %(default)s)")
    parser.add_argument("--memory", type=int, help="the worker's budget, MiB (default: what is free)")
    parser.add_argument("--size", type=int, default=1024, help="MiB of volumes in the sample")
    parser.add_argument("--directory", type=Path, default=Path("build/bench"), help="where all files go")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    backup = options.backup or _sample(options.directory, options.size)
    expected = options.expect or backup.with_name(backup.name + ".json")
    passphrase = json.loads(expected.read_text())["passphrase"]
    memory = None if options.memory is None else options.memory * MIB
    results: dict[str, list[Run]] = {"manual": [], "ours": []}
    with tempfile.TemporaryDirectory(dir=options.directory) as work:
        passphrase_file = Path(work) / "passphrase"
        passphrase_file.write_text(passphrase + "\n")
        for number in range(options.runs):
            for name in ("manual", "ours"):
                target = Path(work).resolve() / "target"
                if name == "manual":
                    target.mkdir()
                    run = manual(backup, passphrase, target)
                else:
                    run = ours(backup, passphrase_file, target, memory)
                _check(expected, target, by_name=name == "ours")
                shutil.rmtree(target)
                results[name].append(run)
                print(
                    f"run {number + 1}, {name:6}: {run.wall_s:7.1f} s wall, {run.cpu_s:7.1f} s CPU"
                    f", worker {run.worker // MIB} MiB, broker {run.broker // MIB} MiB",
                    flush=True,
                )
    wall = {name: statistics.median(run.wall_s for run in runs) for name, runs in results.items()}
    cpu = {name: statistics.median(run.cpu_s for run in runs) for name, runs in results.items()}
    for name in results:
        print(f"median, {name:6}: {wall[name]:7.1f} s wall, {cpu[name]:7.1f} s CPU")
    print(
        f"{wall['manual'] / wall['ours']:.2f} times as fast as the manual procedure ({os.cpu_count()} cores)"
    )


def _sample(directory: Path, size_mib: int) -> Path:
    """A backup whose derivations cost what they cost on a Qubes system; written once."""
    backup = directory / f"sample-{size_mib}.qbackup"
    if not backup.exists():
        print(f"writing {backup} …", flush=True)
        writer = BackupWriter(
            [sample_qube("work", size_mib * MIB, 0.9)], log_n=SAMPLE_COSTS, chunk_size=100 * MIB, jobs=2
        )
        writer.write(backup)
        backup.with_name(backup.name + ".json").write_text(json.dumps(writer.expectation()))
    return backup


def _check(expected: Path, target: Path, *, by_name: bool) -> None:
    """The result of a run is what went into the backup, or the run does not count."""
    if not by_name:
        names = list(
            dict.fromkeys(name.split("/")[0] for name in json.loads(expected.read_text())["volumes"])
        )
        directories = sorted(target.glob("vm*/"), key=lambda path: int(path.name.removeprefix("vm")))
        for directory, name in zip(directories, names, strict=True):
            directory.rename(target / name)
    problems = differences(expected, target)
    if problems:
        raise SystemExit("\n".join(problems))


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = list(children.get(pid, []))
    for child in found:
        found += children.get(child, [])
    return found


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_memory(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
