"""Where the time of a 200 GB backup goes, and what bounds it, reckoned from what was measured.

Strategy: three things can bound a restore, and the slowest one does. All cores together do all the work. One
thread of the worker takes the chunks, one after the other, through what follows their decryption, but for the
hashing. The disks read the archive and write the data. The machine is this one's core, as many times as is
said; what the cores take from each other (memory bandwidth, clock) is not in it.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from . import sides
from .bench import Bench, Section, median, say
from .samples import MIB
from .stages import ONE_THREAD, StageCosts
from .tables import Table, ratio, seconds

CHUNKS = 2000
CHUNK_SIZE = 100 * MIB
DISK_BYTES_PER_S = 500_000_000
CORES = (2, 4, 8)
MEMORY_GIB = (4, 8, 16)
MEASURED_CORES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds that each of the three would take alone, and what the derivations are of the first."""

    derivations_s: float
    all_cores_s: float
    one_thread_s: float
    disk_s: float

    @property
    def wall_s(self) -> float:
        """What the slowest takes."""
        return max(self.all_cores_s, self.one_thread_s, self.disk_s)

    @property
    def bound(self) -> str:
        """Which it is."""
        if self.wall_s == self.disk_s:
            return "disk"
        if self.wall_s == self.one_thread_s:
            return "unpacking in one thread"
        if self.derivations_s * 2 > self.all_cores_s:
            return "derivations"
        return "all cores"


def model(bench: Bench) -> Section:
    """One row for each number of cores and each budget."""
    costs = bench.costs
    estimates = {(cores, gib): estimate(costs, cores, gib << 30) for cores in CORES for gib in MEMORY_GIB}
    table = Table(
        f"A backup of {CHUNKS} chunks of {CHUNK_SIZE // MIB} MiB, with costs and data as in the sample",
        ["cores", "budget", "derivations", "all CPU work", "one thread", "disk", "time", "bound by"],
        [
            [
                str(cores),
                f"{gib} GiB",
                minutes(found.derivations_s),
                minutes(found.all_cores_s),
                minutes(found.one_thread_s),
                minutes(found.disk_s),
                minutes(found.wall_s),
                found.bound,
            ]
            for (cores, gib), found in estimates.items()
        ],
        [
            "Minutes; derivations and all CPU work (which has them in it) divided by the cores.",
            "one thread: what the worker does with one chunk after the other"
            f" ({', '.join(ONE_THREAD)}). disk: the larger of archive and data"
            f" at {DISK_BYTES_PER_S // 1_000_000} MB/s, each on a disk of its own.",
            *(_reckoned(costs)),
        ],
    )
    data: Mapping[str, object] = {
        "rows": [
            {
                "cores": cores,
                "memory_gib": gib,
                "derivations_s": found.derivations_s,
                "all_cores_s": found.all_cores_s,
                "one_thread_s": found.one_thread_s,
                "disk_s": found.disk_s,
                "wall_s": found.wall_s,
                "bound": found.bound,
            }
            for (cores, gib), found in estimates.items()
        ]
    }
    return Section("model", [table], data)


def cores(bench: Bench) -> Section:
    """One row for each number of cores: what an extract takes on so many, and what the model says."""
    costs, options, sample = bench.costs, bench.options, bench.sample
    there = sorted(os.sched_getaffinity(0))
    measured: dict[int, float] = {}
    for count in [number for number in MEASURED_CORES if number <= len(there)]:
        with on_cores(set(there[:count])):
            runs = [
                sides.extract(sample, options.memory[0], options.directory).measured.wall_s
                for _ in range(options.rounds)
            ]
        measured[count] = median(runs)
        say(f"cores: {count}, {seconds(measured[count])} s")
    said = {
        count: estimate(costs, count, options.memory[0] * MIB, costs.amounts.archive, None)
        for count in MEASURED_CORES
    }
    beyond = {count: wall_s / said[count].wall_s for count, wall_s in measured.items()}
    last = beyond[max(beyond)]
    table = Table(
        f"Cores (extract, --memory {options.memory[0]}, medians of {options.rounds})",
        ["cores", "measured, s", "model, s", "measured ÷ model", "expected, s", "bound by"],
        [
            [
                str(count),
                seconds(measured[count]) if count in measured else "–",
                seconds(found.wall_s),
                ratio(beyond.get(count)),
                seconds(found.wall_s * last),
                found.bound,
            ]
            for count, found in said.items()
        ],
        ["expected: the model, times what the measured time was of it on the most cores that are here."],
    )
    rows = [
        {"cores": count, "measured_s": measured.get(count), "model_s": found.wall_s, "bound": found.bound}
        for count, found in said.items()
    ]
    return Section("cores", [table], {"rows": rows})


@contextmanager
def on_cores(chosen: set[int]) -> Iterator[None]:
    """Let this thread, and what it starts meanwhile, run on these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, chosen)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def estimate(
    costs: StageCosts,
    cores: int,
    memory: int,
    archive: int = CHUNKS * CHUNK_SIZE,
    chunks: int | None = CHUNKS,
) -> Estimate:
    """The model, for a machine of `cores` cores and a budget of `memory` bytes; `chunks`: None for those of
    the sample."""
    factor = archive / costs.amounts.archive
    derivations = costs.derivation_s(memory, cores, chunks)
    others = sum(costs.seconds.values()) * factor
    return Estimate(
        derivations_s=derivations / cores,
        all_cores_s=(derivations + others) / cores,
        one_thread_s=sum(costs.seconds[stage] for stage in ONE_THREAD) * factor,
        disk_s=max(archive, costs.amounts.data * factor) / DISK_BYTES_PER_S,
    )


def minutes(value_s: float) -> str:
    """Seconds as minutes."""
    return f"{value_s / 60:.1f}"


def _reckoned(costs: StageCosts) -> list[str]:
    if not any(cost.reckoned for cost in costs.derivations.known.values()):
        return []
    return ["Some derivations did not fit into memory here; theirs are twice those of half their N."]
