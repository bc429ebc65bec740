"""What a thread of the worker makes of an exception that ends its work.

Strategy: a thread that dies without a word leaves the others waiting for ever. So each of them catches
everything at its outermost place, and here it becomes an error that can be sent: errors of the archive are
that already, what has run out has its own words, and everything else is a mistake of this program, which is
named by its type only. Its text might quote what is secret, or what the archive says.
"""

import sys
import traceback

from qubes_restore_svc.errors import BudgetTooSmall, RestoreError, exhausted


def as_restore_error(error: BaseException) -> RestoreError:
    """The error to report for `error`; for a mistake of this program, where it happened goes to stderr.

    It is always a new one, fit to be kept: the traceback of the old one holds all frames that it came
    through, and with them the chunk in which it was found.
    """
    if isinstance(error, RestoreError):
        return type(error)(
            error.reason, qube=error.qube, volume=error.volume, chunk=error.chunk, advice=error.advice
        )
    if isinstance(error, MemoryError):
        return BudgetTooSmall(
            "the system has less memory than the worker was told it may use",
            advice="Close other programs, or give --memory MIB with a smaller number.",
        )
    found = exhausted(error, "in the worker")
    if found is not None:
        return found
    traceback.print_tb(error.__traceback__)
    print(type(error).__name__, file=sys.stderr, flush=True)  # noqa: T201 - the worker's log
    return RestoreError(
        f"the worker failed ({type(error).__name__})",
        advice="This is a mistake of the program; please report it.",
    )
