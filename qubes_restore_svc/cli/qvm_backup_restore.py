"""`qvm-backup-restore`: with `--mgmt-vm` a restore of ours, without it the stock program.

Strategy: which of the two is decided before anything else is imported, so that the stock command is not
slowed down; a signal in the tenths of a second that importing takes ends the process as it does later.
"""

import sys
from typing import Never

from qubes_restore_svc.cli.stock import hand_over, is_isolated
from qubes_restore_svc.cli.terminal import say_wrapped
from qubes_restore_svc.errors import RestoreError
from qubes_restore_svc.hardening import answer_signals_while_starting, loading


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


if __name__ == "__main__":
    main()
