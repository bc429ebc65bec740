"""`qubes-restore-svc`, and `python -m qubes_restore_svc`: the way in, before anything else is imported.

Strategy: importing takes a few tenths of a second, and a Ctrl-C in that time is to end the process quietly,
not with a traceback through the imports. The command sets its own handlers once it is there.
"""

import signal


def main() -> None:
    """Import the command and carry it out; exits."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from qubes_restore_svc.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
