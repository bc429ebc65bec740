"""`make fuzz`: every parser fed with what nobody would write.

    python -m tests.fuzz [TARGET ...] [--runs N] [--seconds N] [--plain]

With atheris (`pip install atheris`), coverage guides the inputs; each target has a process of its own, as
libFuzzer ends it. Without it, or with `--plain`, inputs are random mutations of the seeds. A table tells how
many executions there were. Status 1 if one of them found something; that is kept in build/fuzz.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.bench.tables import Table, as_text, seconds

from .mutator import inputs
from .targets import TARGETS, Target

#: Where findings are kept, and what atheris has learned.
_KEPT = Path("build/fuzz")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--runs", type=int, default=10_000, help="executions of each (default: 10000)")
    parser.add_argument("--seconds", type=int, default=60, help="at most as long for each (default: 60)")
    parser.add_argument("--plain", action="store_true", help="random mutations, even where atheris is")
    options = parser.parse_args(argv)
    plain = options.plain or importlib.util.find_spec("atheris") is None
    rows, found = [], 0
    for name in options.targets or TARGETS:
        began = time.monotonic()
        run = _plainly if plain else _in_a_child
        executions, faults = run(TARGETS[name], options.runs, options.seconds)
        for fault in faults:
            print(f"{name}: {fault}", flush=True)
        found += len(faults)
        took = time.monotonic() - began
        rows.append([name, f"{executions:,}", f"{executions / took:,.0f}", seconds(took), str(len(faults))])
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    columns = ["target", "executions", "per second", "seconds", "findings"]
    print(as_text(Table(f"Fuzzing, {'random mutations' if plain else 'atheris'}", columns, rows)))
    return 1 if found else 0


def _plainly(target: Target, runs: int, limit_s: int) -> tuple[int, list[str]]:
    """The executions, and what they found."""
    deadline, done = time.monotonic() + limit_s, 0
    for data in inputs(target.seeds(), target.words, 1):
        if done >= runs or (done % 256 == 0 and time.monotonic() > deadline):
            break
        done += 1
        try:
            target.run(data)
        except Exception:  # noqa: BLE001 - that is what is looked for
            return done, [f"{_keep(target.name, data)}\n{traceback.format_exc()}"]
    return done, []


def _in_a_child(target: Target, runs: int, limit_s: int) -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "tests.fuzz.guided", target.name, str(runs), str(limit_s), str(_KEPT)]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
    told = re.findall(r"^stat::number_of_executed_units:\s*(\d+)", ended.stderr, re.MULTILINE)
    executions = max(map(int, told), default=0)
    return executions, [] if ended.returncode == 0 else [ended.stderr[-4000:]]


def _keep(name: str, data: bytes) -> Path:
    _KEPT.mkdir(parents=True, exist_ok=True)
    path = _KEPT / f"{name}-{os.getpid()}"
    path.write_bytes(data)
    return path


if __name__ == "__main__":
    sys.exit(main())
