"""`qvm-backup-restore`: with `--mgmt-vm` a restore of ours, without it the stock program.

Strategy: which of the two is decided before anything else is imported, so that the stock command is not
slowed down; a signal in the tenths of a second that importing takes ends the process as it does later. Only
a configuration in which something is set is worth an import before.

A restore is ours if `--mgmt-vm` says so, written out and where an option can stand, or dom0's configuration,
or the person whom it lets be asked. A configuration with a mistake could be one that keeps dom0 from reading
backups, so it ends the command. No option of the stock command takes a word that begins with a hyphen for its
value, so that a look at the words is enough. With any other spelling, the stock program gets the words and
refuses them. That is the safe way to end a misunderstanding, because the stock program reads backups in dom0.
Of the commands, only this module starts a program, which replaces it.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Never

from qubes_restore_svc.cli.terminal import QuietStream, say_wrapped
from qubes_restore_svc.errors import BadConfiguration, Cancelled, RestoreError, UsageError
from qubes_restore_svc.hardening import answer_signals_while_starting, loading
from qubes_restore_svc.owners import read_private_text

STOCK_PROGRAM = Path("/usr/bin/qvm-backup-restore")
#: The configuration, and what only dom0 has.
CONFIG = Path("/etc/qubes-restore-svc/config.yaml")
QUBESD_SOCKET = Path("/var/run/qubesd.sock")

_OPTION = "--mgmt-vm"
#: Set for the stock program: a program that finds it was started by us.
_MARK = "QUBES_RESTORE_SVC_HANDED_OVER"


def main() -> Never:
    """Carry out the arguments of the process, or hand them over; exits."""
    answer_signals_while_starting()
    words = sys.argv[1:]
    try:
        if not is_isolated(words) and not is_isolated_all_the_same(words):
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


def is_isolated_all_the_same(words: Sequence[str]) -> bool:
    """Do the configuration, or the person whom it has asked, make a restore of ours of it?

    Says that dom0 reads the backup, if it does. Raises RestoreError if that is not to be.
    """
    options = words[: words.index("--")] if "--" in words else words
    wanted = _configured()
    if wanted == "always":
        return True
    # In paranoid mode, which can be abbreviated so far, the stock command has a qube of its own for it.
    in_its_qube = any(word.startswith(("--par", "--pl")) for word in options)
    if in_its_qube or {"-h", "--help", "--version"} & set(options):
        return False
    if wanted == "ask":
        return _asked()
    if not {"-q", "--quiet"} & set(options):
        here = "dom0" if QUBESD_SOCKET.exists() else "this qube"
        say_wrapped(
            f"qvm-backup-restore: {here} reads the backup itself, with the stock command. With {_OPTION}, a"
            " throw-away qube reads it."
        )
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


def _configured() -> str:
    """The key `command.mgmt_vm`. What is all comments, as it is installed, is not worth the imports."""
    try:
        text = read_private_text(CONFIG) or ""
        if all(line.lstrip(" ")[:1] in ("", "#") for line in text.splitlines()):
            return "when-asked"
        with loading("qvm-backup-restore"):
            from qubes_restore_svc.qubes.config import parse_config
        return parse_config(text, CONFIG).command.mgmt_vm
    except BadConfiguration as error:
        raise BadConfiguration(
            f"{error.reason}; so it is not known whether dom0 may read a backup, and it reads none",
            advice=error.advice,
        ) from None


def _asked() -> bool:
    if not os.isatty(0):
        raise UsageError(
            "there is no terminal to ask on who is to read the backup, a throw-away qube or dom0",
            advice=f"Add {_OPTION} for the qube, or call {STOCK_PROGRAM} for dom0.",
        )
    say_wrapped(
        f"Answer with 'qube' (a throw-away qube reads the backup, as with {_OPTION}), 'dom0' (dom0 reads it"
        " itself, with the stock command), or nothing to end."
    )
    stream = QuietStream()
    while True:
        stream.write("Who is to read the backup? ")
        stream.flush()
        try:
            line = os.read(0, 1024)  # a line at most; what comes after it is for the command that it chooses
        except OSError:  # the terminal is gone
            line = b""
        if not line.endswith(b"\n"):  # nobody has ended the line on the screen
            stream.write("\n")
        answer = line.strip().lower()
        if answer in (b"qube", b"dom0"):
            return answer == b"qube"
        if not answer:
            raise Cancelled("it was not said who is to read the backup", advice="")


if __name__ == "__main__":
    main()
