"""`qvm-backup-restore`: with `--mgmt-vm` a restore of ours, without it the stock program.

Strategy: which of the two is decided before anything else is imported, so that the stock command is not
slowed down; a signal in the tenths of a second that importing takes ends the process as it does later.

A restore is ours only if `--mgmt-vm` says so, written out and where an option can stand. No option of the
stock command takes a word that begins with a hyphen for its value, so that a look at the words is enough.
With any other spelling, the stock program gets the words and refuses them. That is the safe way to end a
misunderstanding, because the stock program reads backups in dom0. Of the commands, only this module starts a
program, which replaces it.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Never

from qubes_restore_svc.cli.terminal import say_wrapped
from qubes_restore_svc.errors import RestoreError, UsageError
from qubes_restore_svc.hardening import answer_signals_while_starting, loading

STOCK_PROGRAM = Path("/usr/bin/qvm-backup-restore")

_OPTION = "--mgmt-vm"
#: Set for the stock program: a program that finds it was started by us.
_MARK = "QUBES_RESTORE_SVC_HANDED_OVER"


def main() -> Never:
    """Carry out the arguments of the process, or hand them over; exits."""
    answer_signals_while_starting()
    words = sys.argv[1:]
    try:
        if not is_isolated(words):
            hand_over(words)
        with loading("qvm-backup-restore"):
            from qubes_restore_svc.cli.qvm_restore import main as restore
    except RestoreError as error:
        say_wrapped(f"qvm-backup-restore: {error}")
        sys.exit(error.exit_status)
    restore(words)


def is_isolated(words: Sequence[str]) -> bool:
    """Do these arguments ask for a restore of ours?

    Raises UsageError for an option that stands where it is none: the stock program would take it for the
    name of a qube, or of the backup, and read the backup in dom0.
    """
    end = words.index("--") if "--" in words else len(words)
    if _OPTION in words[:end]:
        return True
    if _OPTION in words[end:]:
        raise UsageError(f"{_OPTION} stands after --, where it is no option", advice="Put it before the --.")
    return False


def hand_over(words: Sequence[str], program: Path = STOCK_PROGRAM) -> Never:
    """Become the stock program, with exactly these arguments. Raises RestoreError if that cannot be."""
    if _MARK in os.environ:
        raise RestoreError(
            f"{program} is not the stock program: it leads back to this one",
            advice="Reinstall the package qubes-core-admin-client.",
        )
    os.environ[_MARK] = "1"
    try:
        os.execv(program, [str(program), *words])
    except OSError as error:
        raise RestoreError(
            f"the stock program {program} cannot be started: {error.strerror}",
            advice=f"It comes with qubes-core-admin-client. To restore without it, add {_OPTION}.",
        ) from None


if __name__ == "__main__":
    main()
