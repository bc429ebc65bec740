"""`make bench`: what a restore costs, beside the stock programs.

    python -m tests.bench [SCENARIO ...] [options]

Scenarios, all of them if none is named:

    compare      this project and the manual recovery procedure, alternating: time, memory, bytes
    cheap        a backup whose derivations cost nothing, against gzip -d | tar -x alone
    format3      a backup of format 3, against openssl dgst, openssl enc -d | gzip -d | tar -x
    linear       backups from small to large: time per megabyte, memory
    sparse       an image of 100 GiB with 50 MiB of data, against one of 1 GiB with the same data
    shapes       the same backup in few chunks, in 2000, and in 50 qubes
    cores        one to eight cores, as many as there are, against what the model says of them
    derivations  derivations per second and core, beside OpenSSL's
    stages       the cost of each stage on one core, and the CPU-bound limit
    listing      what `list` costs, and how much of the archive it reads
    model        what bounds a backup of 200 GB on other machines, reckoned from the stages

Tables go to standard output and all figures to results.json. Every result is compared with the originals, bit
for bit, before its time counts.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from . import sides
from .bench import Bench, Options, Section, say
from .cheap import cheap
from .compare import compare
from .engines import engines
from .format_3 import format_3
from .linear import linear
from .listing import listing
from .model import cores, model
from .shapes import shapes, sparse
from .stage_table import stage_table

#: In the order in which they run: those that others build upon first.
SCENARIOS: dict[str, Callable[[Bench], Section]] = {
    "derivations": engines,
    "stages": stage_table,
    "compare": compare,
    "cheap": cheap,
    "format3": format_3,
    "linear": linear,
    "sparse": sparse,
    "shapes": shapes,
    "cores": cores,
    "listing": listing,
    "model": model,
}

#: What `--quick` has instead of the defaults: seconds, and figures that mean nothing.
_QUICK = Options(
    Path(),
    size=8,
    log_n=10,
    cheap_log_n=10,
    writer="own",
    rounds=1,
    memory=(300,),
    sizes=(2, 4),
    derivation_log_n=(10, 11),
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    names, options = parse(argv)
    options.directory.mkdir(parents=True, exist_ok=True)
    if options.manual and "compare" in names and (missing := sides.missing_programs()):
        say(f"without the manual procedure: {', '.join(missing)} is missing here")
        options = dataclasses.replace(options, manual=False)
    bench = Bench(options)
    for name in names:
        bench.keep(SCENARIOS[name](bench))


def parse(argv: Sequence[str] | None) -> tuple[list[str], Options]:
    """Names of the scenarios, in the order in which they run, and the options."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO")
    parser.add_argument("--backup", type=Path, help="this backup, with its JSON beside it, not a sample")
    parser.add_argument("--size", type=int, help="MiB of archive of the sample (default: 1024)")
    parser.add_argument("--log-n", type=int, help="log2 of N in the sample (default: as scrypt chooses)")
    parser.add_argument("--cheap-log-n", type=int, help="the same for cheap and linear (default: 12)")
    parser.add_argument("--writer", choices=["auto", "shared", "own"], help="what writes the samples")
    parser.add_argument("--rounds", type=int, help="runs of each (default: 3)")
    parser.add_argument("--memory", type=_numbers, help="budgets in MiB (default: 6000,3000,1500,700)")
    parser.add_argument("--modes", type=_words, help="of compare (default: extract,verify)")
    parser.add_argument("--sizes", type=_numbers, help="MiB of linear (default: 100,400,1000,2000,4000)")
    parser.add_argument("--derivation-log-n", type=_numbers, help="log2 of N of derivations (default: 19,20)")
    parser.add_argument("--no-manual", action="store_true", help="leave out the slow side of compare")
    parser.add_argument(
        "--stock",
        type=Path,
        metavar="DIR",
        help="compare also runs the stock restorer of"
        " this checkout of qubes-core-admin-client; it needs lxml",
    )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="DIR",
        help="compare and listing also run this other"
        " checkout of the project, after `make .venv/.installed` there",
    )
    parser.add_argument("--quick", action="store_true", help="tiny samples; to see that it works")
    parser.add_argument("--directory", type=Path, default=Path("build/bench"), help="where all files go")
    given = vars(parser.parse_args(argv))
    chosen = given.pop("scenarios")
    defaults = _QUICK if given.pop("quick") else Options(Path())
    manual = not given.pop("no_manual")
    if unheard := [name for name in chosen if name not in SCENARIOS]:
        parser.error(f"{', '.join(unheard)}: no such scenario; there are {', '.join(SCENARIOS)}")
    changes = {name: value for name, value in given.items() if value is not None}
    unknown = set(changes.get("modes", ())) - {"extract", "verify"}
    if unknown:
        parser.error(f"--modes: {', '.join(sorted(unknown))}: extract and verify are known")
    for name, needed in (("stock", "qubesadmin/backup/restore.py"), ("before", ".venv/bin/python")):
        if name in changes and not (changes[name] / needed).exists():
            parser.error(f"--{name}: there is no {needed} in {changes[name]}")
    if changes.get("rounds", 1) < 1:
        parser.error("--rounds: at least 1")
    names = [name for name in SCENARIOS if not chosen or name in chosen]
    return names, dataclasses.replace(defaults, manual=manual, **changes)


def _numbers(text: str) -> list[int]:
    numbers = [int(word) for word in text.split(",")]
    if min(numbers) < 1:
        raise ValueError
    return numbers


def _words(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    main()
