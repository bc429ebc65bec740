"""What `list` costs: its time beside that of the derivations it needs, and how much of the archive it reads.

Strategy: the archive is dropped from memory before each run, so what is in memory afterwards was read for it,
by the kernel's own foresight as well. Where strace is there, one more run tells what the worker asked for.
The derivations are those of the first three containers, in memory that is fresh, as it is for `list`.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import monotonic

from qubes_restore_svc.kdf.engine import best_engine

from . import page_cache
from .anatomy import Container, dissect
from .bench import Bench, Section, median, say
from .compare import alternate
from .derivations import Job, derive_side_by_side, share_out
from .processes import cores, run
from .samples import MIB, Sample, make_special, plans
from .sides import Outcome, our_command
from .tables import Table, seconds

_AT_ONCE = 3
_READS = "read,readv,pread64,preadv,preadv2"
_CALL = re.compile(r"(?P<pid>\d+)\s+(?:\w+\(\d+<(?P<path>[^>]*)>|<\.\.\. \w+ resumed>)")
_RESULT = re.compile(r"\)\s+= (?P<count>\d+)$")


def listing(bench: Bench) -> Section:
    """One table."""
    sample, options = bench.sample, bench.options
    first = dissect(sample).containers[:_AT_ONCE]
    dearest = max(first, key=lambda container: container.head.parameters.work)
    one, three, listed, read = [], [], [], []
    small = make_special(options.directory, "small", plans({"work": (1, 0.5)}), 2)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        work = Path(folder)
        command = our_command("list", sample, options.memory[0], work)
        for number in range(options.rounds):
            one.append(_derive([dearest], options.memory[0] * MIB))
            three.append(_derive(first, options.memory[0] * MIB))
            page_cache.drop(sample.backup)
            listed.append(run(command).wall_s)
            read.append(page_cache.resident(sample.backup))
            say(f"round {number + 1}, list: {seconds(listed[-1])} s")
        asked = asked_for(command, sample, work)
        starts = alternate(_starts(options.before, small, work), 2 + options.rounds)
    start_s = {name: median(outcome.measured.wall_s for outcome in runs) for name, runs in starts.items()}
    costs = ", ".join(f"2^{container.head.parameters.log_n}" for container in first)
    table = Table(
        f"list ({sample.size:,} bytes of archive; the first containers have N = {costs};"
        f" --memory {options.memory[0]}, medians of {options.rounds})",
        ["", ""],
        [
            ["list, s", seconds(median(listed))],
            ["the dearest derivation alone, s", seconds(median(one))],
            [f"{len(first)} derivations at once, s", seconds(median(three))],
            ["bytes of the archive that came from the disk", f"{max(read):,}"],
            ["bytes that the worker asked for", "–" if asked is None else f"{asked:,}"],
            *([f"{name}, s", seconds(taken)] for name, taken in start_s.items()),
        ],
    )
    data = {
        "list_s": listed,
        "start_s": start_s,
        "one_derivation_s": one,
        "derivations_at_once_s": three,
        "bytes_from_disk": max(read),
        "bytes_asked_for": asked,
    }
    return Section("listing", [table], data)


def _starts(before: Path | None, sample: Sample, work: Path) -> dict[str, Callable[[], Outcome]]:
    """Lists of a backup that costs nothing, which leaves the start of the command and of its worker."""
    name = "list where derivations cost nothing"
    commands = {name: our_command("list", sample, 300, work)}
    if before is not None:
        commands[f"{name}, before"] = our_command("list", sample, 300, work, before)
    return {name: partial(_list, command) for name, command in commands.items()}


def _list(command: Sequence[str]) -> Outcome:
    return Outcome(run(command))


def asked_for(command: Sequence[str], sample: Sample, work: Path) -> int | None:
    """Bytes of the archive that processes of `command` got by reading; None where nobody can tell."""
    strace = shutil.which("strace")
    if strace is None:
        return None
    trace = work / "trace"
    tracing = [strace, "-f", "-y", "-e", f"trace={_READS}", "-o", str(trace)]
    done = subprocess.run([*tracing, *command], stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode or not trace.exists():
        return None
    with trace.open(errors="replace") as lines:
        return bytes_read(lines, sample.backup.resolve())


def bytes_read(trace: Iterable[str], path: Path) -> int:
    """Bytes that the calls in a trace (`strace -f -y`) have read from the file `path`."""
    total = 0
    begun: dict[str, str] = {}
    for line in trace:
        call = _CALL.match(line)
        if call is None:
            continue
        file = call["path"] if call["path"] is not None else begun.pop(call["pid"], "")
        if line.rstrip().endswith("<unfinished ...>"):
            begun[call["pid"]] = file
        elif file == str(path) and (result := _RESULT.search(line.rstrip())):
            total += int(result["count"])
    return total


def _derive(containers: Sequence[Container], memory: int) -> float:
    """Wall time of derivations at once, spread over the cores, in fresh memory."""
    engine = best_engine()
    jobs = [
        Job(
            container.request,
            share_out(
                engine, container.head.parameters, count=len(containers), room=memory, cores=cores()
            ).stride,
        )
        for container in containers
    ]
    parts = [part for number in range(cores()) if (part := jobs[number :: cores()])]
    start = monotonic()
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(lambda part: derive_side_by_side(engine, part, memory), parts))
    wall_s = monotonic() - start
    engine.trim()
    return wall_s
