"""A backup of format 3, which costs no key derivation, against the programs that Qubes R3.2 used."""

from collections.abc import Callable
from dataclasses import asdict

from . import sides
from .bench import Bench, Section, median
from .compare import alternate
from .samples import make_format_3_sample
from .sides import Outcome
from .tables import Table, mib, ratio, seconds

_STOCK = "tar, openssl dgst, openssl enc -d, gzip -d, tar -x"
_OURS = "extract"


def format_3(bench: Bench) -> Section:
    """One table: both ways."""
    options = bench.options
    sample = make_format_3_sample(options.directory, options.size)
    sample.read_once()
    ways: dict[str, Callable[[], Outcome]] = {
        _STOCK: lambda: sides.manual_format_3(sample, options.directory),
        _OURS: lambda: sides.extract(sample, options.memory[0], options.directory),
    }
    outcomes = alternate(ways, options.rounds)
    wall = {name: median(run.measured.wall_s for run in runs) for name, runs in outcomes.items()}
    table = Table(
        f"Format 3 ({mib(sample.size)} MiB of archive, medians of {options.rounds})",
        ["", "wall, s", "÷ stock"],
        [[name, seconds(wall[name]), ratio(wall[name] / wall[_STOCK])] for name in ways],
        [],
    )
    runs = {name: [asdict(run) for run in found] for name, found in outcomes.items()}
    return Section("format3", [table], {"wall_s": wall, "runs": runs})
