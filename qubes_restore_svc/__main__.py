"""`qubes-restore-svc`, and `python -m qubes_restore_svc`: the way in, before anything else is imported.

Strategy: importing takes a few tenths of a second. A signal in that time must end the process as it does
later, without a traceback through the imports. The command sets its own handlers once it is there.
"""

from qubes_restore_svc.hardening import answer_signals_while_starting, loading


def main() -> None:
    """Import the command and carry it out; exits."""
    answer_signals_while_starting()
    with loading("qubes-restore-svc"):
        from qubes_restore_svc.local.command import main as command

    command()


if __name__ == "__main__":
    main()
