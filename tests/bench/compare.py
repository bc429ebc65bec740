"""This project beside the manual recovery procedure, in one run, alternating.

Strategy: in every round each way to restore runs once, so that what the machine does besides falls on all
alike; medians over the rounds. The ratio says how many times as fast as the manual procedure; the limit is
the sum of what the stages cost on one core, divided by the cores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from . import sides
from .bench import Bench, Section, median, say
from .processes import BUSY_FROM, WINDOW_S, cores
from .samples import MIB
from .sides import Outcome
from .tables import Table, mib, percent, ratio, seconds


@dataclass(frozen=True, slots=True)
class Way:
    """One way to restore: `mode` is manual, stock, extract or verify; `memory` in MiB, of our own ways.

    `before` is that of another checkout.
    """

    mode: str
    memory: int = 0
    before: bool = False

    @property
    def label(self) -> str:
        """For the first column."""
        if not self.memory:
            return {"manual": "manual procedure", "stock": "stock restorer"}[self.mode]
        return f"{self.mode}, {self.memory} MiB{', before' if self.before else ''}"


def compare(bench: Bench) -> Section:
    """All budgets and modes that the options name."""
    sample, directory = bench.sample, bench.options.directory
    ways: dict[Way, Callable[[], Outcome]] = {}
    if bench.options.manual:
        ways[Way("manual")] = partial(sides.manual, sample, directory)
    if bench.options.stock is not None:
        ways[Way("stock")] = partial(sides.stock, sample, bench.options.stock, directory)
    for mode in bench.options.modes:
        side = {"extract": sides.extract, "verify": sides.verify}[mode]
        for memory in bench.options.memory:
            ways[Way(mode, memory)] = partial(side, sample, memory, directory)
            if bench.options.before is not None:
                ways[Way(mode, memory, before=True)] = partial(
                    side, sample, memory, directory, bench.options.before
                )
    outcomes = alternate({way.label: run for way, run in ways.items()}, bench.options.rounds)
    costs = bench.costs
    limits = {
        way: costs.limit_s(way.memory * MIB, cores(), verify_only=way.mode == "verify")
        for way in ways
        if way.memory
    }
    rows = [
        Row(way, outcomes[way.label], limits.get(way), costs.amounts.crossing - costs.amounts.data)
        for way in ways
    ]
    manual_s = rows[0].wall_s if bench.options.manual else None
    return Section("compare", tables(rows, manual_s, sample.size), {"rows": [r.data(manual_s) for r in rows]})


def alternate(ways: Mapping[str, Callable[[], Outcome]], rounds: int) -> dict[str, list[Outcome]]:
    """Run every way once a round."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, run in ways.items():
            outcome = run()
            outcomes[name].append(outcome)
            say(f"round {number + 1}, {name}: {seconds(outcome.measured.wall_s)} s")
    return outcomes


@dataclass(frozen=True, slots=True)
class Row:
    """The runs of one way; `limit_s` is its CPU-bound limit, `framing` the bytes around the data."""

    way: Way
    outcomes: Sequence[Outcome]
    limit_s: float | None
    framing: int

    @property
    def ours(self) -> bool:
        """With a worker and a broker."""
        return self.way.memory > 0

    @property
    def wall_s(self) -> float:
        """Median."""
        return median(outcome.measured.wall_s for outcome in self.outcomes)

    @property
    def broker_cpu_s(self) -> float:
        """Median; of the manual procedure, the CPU time of all its programs."""
        return median(
            outcome.measured.own_cpu_s if self.ours else outcome.measured.waited_cpu_s
            for outcome in self.outcomes
        )

    @property
    def worker_cpu_s(self) -> float:
        """Median."""
        return median(outcome.measured.others_cpu_s for outcome in self.outcomes) if self.ours else 0.0

    @property
    def busy(self) -> float:
        """Median share of the run in which all cores were busy."""
        return median(outcome.measured.busy for outcome in self.outcomes)

    @property
    def worker_peak(self) -> int:
        """The highest of all runs, bytes."""
        return max(outcome.measured.others_peak for outcome in self.outcomes)

    @property
    def broker_peak(self) -> int:
        """The highest of all runs, bytes."""
        return max(outcome.measured.own_peak for outcome in self.outcomes)

    @property
    def crossing(self) -> int | None:
        """Bytes of the volume streams; None where nothing is streamed, and of another checkout."""
        streamed = self.way.mode == "extract" and not self.way.before
        return self.outcomes[0].data + self.framing if streamed else None

    @property
    def written(self) -> int:
        """Bytes written to files by all processes, the most of all runs."""
        return max(
            outcome.measured.waited_written + (outcome.measured.others_written if self.ours else 0)
            for outcome in self.outcomes
        )

    def data(self, manual_s: float | None) -> dict[str, object]:
        """For JSON."""
        return {
            "mode": self.way.mode,
            "memory_mib": self.way.memory,
            "before": self.way.before,
            "wall_s": self.wall_s,
            "times_as_fast_as_manual": manual_s and manual_s / self.wall_s,
            "limit_s": self.limit_s,
            "times_the_limit": self.limit_s and self.wall_s / self.limit_s,
            "worker_cpu_s": self.worker_cpu_s,
            "broker_cpu_s": self.broker_cpu_s,
            "busy": self.busy,
            "crossing_bytes": self.crossing,
            "runs": [asdict(outcome) for outcome in self.outcomes],
        }


def tables(rows: Sequence[Row], manual_s: float | None, archive_size: int) -> list[Table]:
    """Time, then memory and bytes."""
    rounds = len(rows[0].outcomes)
    setting = f"{mib(archive_size)} MiB of archive, {cores()} cores, medians of {rounds}"
    time_rows = [
        [
            row.way.label,
            seconds(row.wall_s),
            ratio(manual_s and manual_s / row.wall_s),
            ratio(row.limit_s and row.wall_s / row.limit_s),
            seconds(row.worker_cpu_s) if row.ours else "–",
            seconds(row.broker_cpu_s) if row.ours else "–",
            seconds(row.worker_cpu_s + row.broker_cpu_s),
            percent(row.busy),
        ]
        for row in rows
    ]
    byte_rows = [
        [
            row.way.label,
            mib(row.worker_peak) if row.ours else "–",
            mib(row.broker_peak) if row.ours else "–",
            mib(row.crossing),
            mib(row.written),
            mib(max(outcome.measured.others_written for outcome in row.outcomes)) if row.ours else "–",
            mib(row.outcomes[0].on_disk) if row.way.mode != "verify" else "–",
        ]
        for row in rows
    ]
    return [
        Table(
            f"Time ({setting})",
            ["", "wall, s", "× manual", "÷ limit", "worker CPU, s", "broker CPU, s", "CPU, s", "all busy"],
            time_rows,
            [
                "× manual: how many times as fast as the manual procedure. ÷ limit: wall time divided by the"
                " CPU-bound limit.",
                f"all busy: share of the run in windows of {WINDOW_S * 1000:.0f} ms in which its processes"
                f" used at least {percent(BUSY_FROM)} of all cores.",
            ],
        ),
        Table(
            f"Memory and bytes ({setting}; MiB; the most of all runs)",
            ["", "worker, peak", "broker, peak", "crossing", "written", "by the worker", "on disk"],
            byte_rows,
            [
                "crossing: the streams of all volumes, framing included; the session's messages, a few KiB,"
                " are not.",
                "written: to files, by all processes of the run. on disk: what the result takes in the end.",
                "by the worker: a few KiB are the file system's own, such as times of access.",
            ],
        ),
    ]
