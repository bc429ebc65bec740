"""Backups from small to large, with derivations that cost nothing: time per megabyte, and memory.

Strategy: one budget for all. What grows with the backup faster than the backup shows as a time per megabyte
that rises, and what is kept of it as memory that does. The project's own writer makes these backups unless
the options name another: only their size matters here, and the shared tool takes minutes for a gigabyte.
"""

from dataclasses import asdict

from . import sides
from .bench import Bench, Section, median, say
from .tables import Table, mib, ratio, seconds

_MB = 1_000_000


def linear(bench: Bench) -> Section:
    """One row a size."""
    options = bench.options
    writer = "own" if options.writer == "auto" else options.writer
    rows, data = [], []
    first_s = 0.0
    for size in options.sizes:
        sample = bench.cheap_sample(size, writer)
        runs = []
        for number in range(options.rounds):
            runs.append(sides.extract(sample, options.memory[0], options.directory))
            say(f"round {number + 1}, {size} MiB: {seconds(runs[-1].measured.wall_s)} s")
        wall_s = median(run.measured.wall_s for run in runs)
        cpu_s = median(run.measured.own_cpu_s + run.measured.others_cpu_s for run in runs)
        worker = max(run.measured.others_peak for run in runs)
        broker = max(run.measured.own_peak for run in runs)
        megabytes = sample.size / _MB
        first_s = first_s or wall_s / megabytes
        rows.append(
            [
                f"{megabytes:.0f} MB",
                seconds(wall_s),
                f"{wall_s / megabytes * 1000:.2f}",
                ratio(wall_s / megabytes / first_s),
                f"{cpu_s / megabytes * 1000:.2f}",
                mib(worker),
                mib(broker),
            ]
        )
        data.append({"archive_bytes": sample.size, "wall_s": wall_s, "runs": [asdict(run) for run in runs]})
    table = Table(
        f"Size (N = 2^{options.cheap_log_n}, --memory {options.memory[0]}, medians of {options.rounds})",
        [
            "archive",
            "wall, s",
            "ms per MB",
            "÷ first",
            "CPU ms per MB",
            "worker, peak MiB",
            "broker, peak MiB",
        ],
        rows,
    )
    return Section("linear", [table], {"sizes": data})
