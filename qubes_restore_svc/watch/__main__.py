"""`qubes-restore-watch`, and `python -m qubes_restore_svc.watch`: the way in, before anything is imported.

Strategy: as that of `qubes-restore-svc`.
"""

from qubes_restore_svc.hardening import answer_signals_while_starting, loading


def main() -> None:
    """Import the command and carry it out; exits."""
    answer_signals_while_starting()
    with loading("qubes-restore-watch"):
        from qubes_restore_svc.watch.command import main as command

    command()


if __name__ == "__main__":
    main()
