"""The frame around a command: safe standard streams, signals, and an exit status for every kind of end.

Strategy: a command is a function that returns its status or raises. What it raises is said here, in one way
for all commands, and only here the process ends.
"""

import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Never

from qubes_restore_svc.cli.interruption import Interruption
from qubes_restore_svc.cli.terminal import print_result, say, say_wrapped
from qubes_restore_svc.errors import Cancelled, ExitStatus, RestoreError, unforeseen
from qubes_restore_svc.hardening import prepare_process


def carry_out(program: str, work: Callable[[Interruption], int]) -> Never:
    """Do `work` and exit with its status. `program` is what its messages begin with."""
    prepare_process()
    interruption = Interruption()
    interruption.install()
    status = _status(program, work, interruption)
    interruption.finish()
    # What the help or the version could not be written for shows only now.
    if print_result(program, "", end="") is False and status == ExitStatus.COMPLETE:
        status = ExitStatus.NOTHING
    sys.exit(status)


def last_resort(program: str, error: Exception, words: Sequence[str]) -> int:
    """Say what was not provided for, in a line; with -v also where it came from. The exit status."""
    # Where there is no event loop to be had, Python complains of what could not even begin.
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda _: None
    if {"-v", "--verbose"} & set(words):
        say("".join(traceback.format_tb(error.__traceback__)).rstrip())
    say_wrapped(f"{program}: {unforeseen(error)}")
    return ExitStatus.NOTHING


def _status(program: str, work: Callable[[Interruption], int], interruption: Interruption) -> int:
    try:
        return work(interruption)
    except RestoreError as error:
        say_wrapped("cancelled" if isinstance(error, Cancelled) else f"{program}: {error}")
        return error.exit_status
    except SystemExit as end:  # argparse: help, version, a mistake in the arguments
        return end.code if isinstance(end.code, int) else ExitStatus.USAGE
    except Exception as error:  # noqa: BLE001 - the last one that can say it in words
        return last_resort(program, error, sys.argv[1:])
