"""A backup whose key derivations cost nothing, against `gzip -d | tar -x` alone on the same data.

Strategy: the streams are decrypted once beforehand, so the stock programs only unpack, while this project
verifies, decrypts, unpacks, hashes and passes over a boundary. It also waits until the data is on the disk,
which the stock programs do not: they run once as they are, and once followed by `sync` of the images.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from qubes_restore_svc.kdf.engine import best_engine

from . import sides
from .anatomy import derive_keys, dissect, opened
from .bench import Bench, Section, median, say
from .compare import alternate
from .samples import Sample
from .sides import Outcome
from .tables import Table, mib, percent, ratio, seconds

_STOCK = "gzip -d, tar -x"
_SYNCED = f"{_STOCK}, sync"
_OURS = "extract"


def cheap(bench: Bench) -> Section:
    """One table: the three ways, and what the broker costs beside the worker."""
    options = bench.options
    sample = bench.cheap_sample(options.size, options.writer)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        streams = Path(folder)
        say("decrypting for the stock programs …")
        decrypt(sample, streams)
        ways: dict[str, Callable[[], Outcome]] = {
            _STOCK: lambda: sides.unpack(sample, streams, options.directory, sync=False),
            _SYNCED: lambda: sides.unpack(sample, streams, options.directory, sync=True),
            _OURS: lambda: sides.extract(sample, options.memory[0], options.directory),
        }
        outcomes = alternate(ways, options.rounds)
    wall = {name: median(run.measured.wall_s for run in runs) for name, runs in outcomes.items()}
    ours = outcomes[_OURS]
    broker_s = median(run.measured.own_cpu_s for run in ours)
    worker_s = median(run.measured.others_cpu_s for run in ours)
    cpu = {name: median(run.measured.waited_cpu_s for run in runs) for name, runs in outcomes.items()}
    cpu[_OURS] = broker_s + worker_s
    table = Table(
        f"Cheap derivations, N = 2^{options.cheap_log_n} ({mib(sample.size)} MiB of archive,"
        f" medians of {options.rounds})",
        ["", "wall, s", "÷ stock", "÷ stock with sync", "CPU, s"],
        [
            [
                name,
                seconds(wall[name]),
                ratio(wall[name] / wall[_STOCK]),
                ratio(wall[name] / wall[_SYNCED]),
                seconds(cpu[name]),
            ]
            for name in ways
        ],
        [
            f"Of the CPU time of extract, the worker took {seconds(worker_s)} s and the broker"
            f" {seconds(broker_s)} s: {percent(broker_s / worker_s)} of the worker's."
        ],
    )
    data = {
        "wall_s": wall,
        "cpu_s": cpu,
        "worker_cpu_s": worker_s,
        "broker_cpu_s": broker_s,
        "broker_share_of_worker": broker_s / worker_s,
        "runs": {name: [asdict(run) for run in runs] for name, runs in outcomes.items()},
    }
    return Section("cheap", [table], data)


def decrypt(sample: Sample, directory: Path) -> None:
    """Write the compressed stream of every volume into `directory`, by number in archive order, `.gz`."""
    anatomy = dissect(sample)
    keys = derive_keys(best_engine(), anatomy.containers)
    for number, containers in enumerate(anatomy.images().values()):
        with (directory / f"{number:03d}.gz").open("wb") as stream:
            stream.writelines(opened(sample.backup, containers, keys))
