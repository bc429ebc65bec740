"""What the shape of a backup costs: the same data among holes, in many chunks, in many qubes.

Strategy: key derivations cost nothing here. `sparse` is one qube with 50 MiB of data in an image of 1 GiB,
and with the same data in one of 100 GiB: the ratio says what holes cost. `shapes` is one backup in three
shapes, and the ratio is that of the cost per byte to the first one, which has few large chunks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

from tests.support.plans import ImagePlan, QubePlan, sample_image

from . import sides
from .bench import Bench, Section, median
from .compare import alternate
from .samples import MIB, QUBES, Sample, make_special, plans, scaled
from .tables import Table, mib, ratio, seconds

#: log2 of N; with 2000 chunks, derivations that are merely cheap would be most of the work.
_LOG_N = 2
_DATA_MIB = 50
_SPARSE_GIB = (1, 100)
_CHUNKS = 2000
_QUBES = 50


def sparse(bench: Bench) -> Section:
    """One row for each size of the image and each mode."""
    data = sample_image(_DATA_MIB * MIB, 1, seed=1)
    samples = {
        f"{gib} GiB": make_special(
            bench.options.directory, f"sparse-{gib}", [QubePlan("large", volumes={"private": image})], _LOG_N
        )
        for gib in _SPARSE_GIB
        for image in [ImagePlan(gib << 30, _Spread(data, (gib << 30) // data.size))]
    }
    return _measured(bench, "sparse", f"Holes: {_DATA_MIB} MiB of data in an image", samples)


def shapes(bench: Bench) -> Section:
    """One row for each shape and each mode."""
    size = bench.options.size
    whole = sum(mib for _, mib, _ in QUBES)
    fill = sum(mib * fill for _, mib, fill in QUBES) / whole
    of_each = max(1, round(whole * size / 1024 / _QUBES))
    few = plans(scaled(size))
    many = plans({f"qube{number}": (of_each, fill) for number in range(_QUBES)})
    directory = bench.options.directory
    samples = {
        "large chunks": make_special(directory, f"{size}-large", few, _LOG_N),
        f"{_CHUNKS} chunks": make_special(directory, f"{size}-chunks", few, _LOG_N, size * MIB // _CHUNKS),
        f"{_QUBES} qubes": make_special(directory, f"{size}-qubes", many, _LOG_N),
    }
    return _measured(bench, "shapes", "Shapes of a backup", samples)


class _Spread(Sequence[tuple[int, bytes]]):
    """The extents of an image, `factor` times as far apart."""

    def __init__(self, image: ImagePlan, factor: int) -> None:
        self._image, self._factor = image, factor

    def __len__(self) -> int:
        return len(self._image.extents)

    def __getitem__(self, index: int) -> tuple[int, bytes]:  # type: ignore[override]  # no slices
        offset, data = self._image.extents[index]
        return offset * self._factor, data


def _measured(bench: Bench, name: str, title: str, samples: Mapping[str, Sample]) -> Section:
    """Verify and extract each; the ratios are to the first, for `shapes` by byte of archive."""
    options = bench.options
    modes = {"verify": sides.verify, "extract": sides.extract}
    runs = alternate(
        {
            f"{mode}, {label}": partial(modes[mode], sample, options.memory[0], options.directory)
            for mode in options.modes
            for label, sample in samples.items()
        },
        options.rounds,
    )
    rows, data = [], []
    for mode in options.modes:
        firsts: list[float] = []
        for label, sample in samples.items():
            found = [run.measured for run in runs[f"{mode}, {label}"]]
            per = sample.size if name == "shapes" else 1
            costs = [
                median(one.wall_s for one in found),
                median(one.own_cpu_s + one.others_cpu_s for one in found),
            ]
            firsts = firsts or [cost / per for cost in costs]
            times = [cost / per / first for cost, first in zip(costs, firsts, strict=True)]
            memory = [max(one.others_peak for one in found), max(one.own_peak for one in found)]
            written = [max(one.waited_written for one in found), max(one.others_written for one in found)]
            sizes = [mib(amount) for amount in (sample.size, *memory, *written)]
            wall, cpu = ([seconds(cost), ratio(time)] for cost, time in zip(costs, times, strict=True))
            rows.append([f"{mode}, {label}", *wall, *cpu, *sizes])
            data.append(
                {
                    "mode": mode,
                    "sample": label,
                    "archive_bytes": sample.size,
                    "wall_ratio": times[0],
                    "cpu_ratio": times[1],
                    "runs": [asdict(run) for run in found],
                }
            )
    columns = ["", "wall, s", "÷ first", "CPU, s", "÷ first"]
    amounts = ["archive", "worker, peak", "broker, peak", "broker wrote", "worker wrote"]
    by = " (÷ first: by byte of archive)" if name == "shapes" else ""
    setting = f"--memory {options.memory[0]}, medians of {options.rounds}; sizes in MiB"
    table = Table(f"{title}{by} ({setting})", [*columns, *amounts], rows)
    return Section(name, [table], {"rows": data})
