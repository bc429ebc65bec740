"""What all scenarios share: the options, the backup, the costs of its stages, and where results go.

Strategy: `Bench` makes what is asked for when it is asked for, and once: a scenario that runs alone finds the
same as one that runs after others. What a scenario has found is a `Section`: tables for people, and plain
values for `results.json`, in which the sections of earlier runs stay until they are measured again.
"""

import json
import platform
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from qubes_restore_svc.kdf.engine import best_engine
from qubes_restore_svc.system_memory import memory_room

from .processes import cores
from .samples import MIB, Sample, existing, make_sample
from .stages import StageCosts, measure_stages
from .tables import Table, as_text


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for. Sizes in MiB; `memory` are the budgets, the first is that of single runs.

    `stock` is a checkout of the stock client, `before` one of this project, with its virtual environment.
    """

    directory: Path
    size: int = 1024
    log_n: int | None = None
    cheap_log_n: int = 12
    backup: Path | None = None
    writer: str = "auto"
    rounds: int = 3
    memory: Sequence[int] = (6000, 3000, 1500, 700)
    modes: Sequence[str] = ("extract", "verify")
    manual: bool = True
    sizes: Sequence[int] = (100, 400, 1000, 2000, 4000)
    derivation_log_n: Sequence[int] = (19, 20)
    stock: Path | None = None
    before: Path | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """What a scenario has found; `data` is what JSON can hold."""

    name: str
    tables: Sequence[Table]
    data: Mapping[str, object]


@dataclass
class Bench:
    """Options, and what is made of them on demand."""

    options: Options

    @cached_property
    def sample(self) -> Sample:
        """The backup whose derivations cost what they cost on a Qubes system, in the page cache."""
        options = self.options
        if options.backup is not None:
            sample = existing(options.backup)
        else:
            sample = make_sample(options.directory, options.size, options.log_n, options.writer)
        sample.read_once()
        return sample

    @cached_property
    def costs(self) -> StageCosts:
        """What the stages of a restore of `sample` cost."""
        say("measuring the stages …")
        return measure_stages(self.sample, self.options.directory)

    def cheap_sample(self, size: int, writer: str) -> Sample:
        """A backup of `size` MiB whose derivations cost next to nothing, in the page cache."""
        sample = make_sample(self.options.directory, size, self.options.cheap_log_n, writer)
        sample.read_once()
        return sample

    def keep(self, section: Section) -> None:
        """Print a section's tables, and put its data into `results.json`."""
        for table in section.tables:
            print(as_text(table), flush=True)
        path = self.options.directory / "results.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        measured = {"machine": machine(), "measured": datetime.now(UTC).isoformat(timespec="seconds")}
        results[section.name] = {**measured, **section.data}
        path.write_text(json.dumps(results, indent=1) + "\n")


def machine() -> dict[str, object]:
    """What the figures depend on."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "available_mib": memory_room().available // MIB,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "engine": best_engine().name,
    }


def say(text: str) -> None:
    """Tell on standard error what is going on; standard output is for the tables."""
    print(text, file=sys.stderr, flush=True)


def median(values: Iterable[float]) -> float:
    """The median of the rounds."""
    return statistics.median(values)


def _processor(path: Path = Path("/proc/cpuinfo")) -> str:
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
