"""`make torture`: restores of damaged archives, and restores on a system that fails them, all of them judged.

    python -m tests.torture [CAMPAIGN ...] [options]

Campaigns, all of them if none is named:

    bits     every bit of a small archive flipped
    cuts     the archive cut at every length
    games    chunks dropped, swapped, repeated, moved and changed, with each of the nine filters
    calls    a fault injected at an N-th system call of broker and worker
    signals  broker and worker ended by signals at random moments

Each restore has to answer four questions: is the status honest, is no wrong image there, is nothing left,
does the message name the cause. Status 1 if one of them did not. A case is the same in every run: the number
in front of a fault is what `--range` takes to see it again.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from tests.bench.tables import Table, as_text, seconds

from .archives import CAMPAIGNS, chosen
from .runner import Outcome, run_campaign
from .systems import SYSTEM_CAMPAIGNS, run_system_campaign


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its status."""
    options = _parse(argv)
    rows, faults = [], []
    for name in options.campaigns or [*CAMPAIGNS, *SYSTEM_CAMPAIGNS]:
        began = time.monotonic()
        numbers, outcome = _run(name, options)
        faults += outcome.faults
        statuses = ", ".join(f"{count} × {status}" for status, count in sorted(outcome.statuses.items()))
        took = seconds(time.monotonic() - began)
        rows.append([name, f"{len(numbers):,}", statuses, str(len(outcome.faults)), took])
    print(as_text(Table("Torture", ["campaign", "cases", "exit statuses", "faults", "seconds"], rows)))
    return 1 if faults else 0


def _run(name: str, options: argparse.Namespace) -> tuple[Sequence[int], Outcome]:
    campaign = CAMPAIGNS[name]() if name in CAMPAIGNS else SYSTEM_CAMPAIGNS[name]()
    first, last = options.range
    numbers = chosen(len(campaign), first, last, options.sample, options.seed)

    def tell(done: int, faults: Sequence[str]) -> None:
        for fault in faults:
            print(fault, flush=True)
        print(
            f"\r{name}: {done:,} of {len(numbers):,}",
            end="\n" if done == len(numbers) else "",
            file=sys.stderr,
        )

    if name in CAMPAIGNS:
        return numbers, run_campaign(name, numbers, options.processes, tell)
    return numbers, run_system_campaign(name, numbers, options.processes, tell)


def _range(text: str) -> tuple[int, int | None]:
    first, _, last = text.partition(":")
    return int(first or 0), int(last) if last else None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "campaigns", nargs="*", metavar="CAMPAIGN", choices=[*CAMPAIGNS, *SYSTEM_CAMPAIGNS, []]
    )
    parser.add_argument(
        "--range", type=_range, default=(0, None), metavar="FIRST:LAST", help="only these cases"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="only N of them")
    parser.add_argument("--seed", type=int, default=1, help="what the sample is drawn with (default: 1)")
    parser.add_argument("--processes", type=int, default=2, help="how many at a time (default: 2)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
