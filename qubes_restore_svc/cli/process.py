"""The frame around a command: safe standard streams, signals, and an exit status for every kind of end.

Strategy: a command is a function that returns its status or raises. What it raises is said here, in one way
for all commands, and only here the process ends.
"""

import sys
from collections.abc import Callable
from typing import Never

from qubes_restore_svc.broker.report import CANCELLED, NOTHING, USAGE
from qubes_restore_svc.cli.interruption import Interruption
from qubes_restore_svc.cli.terminal import say, say_wrapped
from qubes_restore_svc.errors import Cancelled, RestoreError, UsageError
from qubes_restore_svc.hardening import prepare_process


def carry_out(program: str, work: Callable[[Interruption], int]) -> Never:
    """Do `work` and exit with its status. `program` is what its messages begin with."""
    prepare_process()
    interruption = Interruption()
    interruption.install()
    status = _status(program, work, interruption)
    interruption.finish()
    sys.exit(status)


def _status(program: str, work: Callable[[Interruption], int], interruption: Interruption) -> int:
    try:
        return work(interruption)
    except UsageError as error:
        say_wrapped(f"{program}: {error}")
        return USAGE
    except Cancelled:
        say("cancelled")
        return CANCELLED
    except RestoreError as error:
        say_wrapped(f"{program}: {error}")
        return NOTHING
