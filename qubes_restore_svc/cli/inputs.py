"""What both commands are given: common options, the backup's descriptor, the target, the passphrase."""

import argparse
import getpass
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from qubes_restore_svc.cli.terminal import say, say_wrapped
from qubes_restore_svc.errors import EXIT_MEANINGS, Cancelled, UsageError
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.wire.names import MAX_PASSPHRASE, MAX_STALL_TIMEOUT, DigestKind, strip_control
from qubes_restore_svc.wire.restore_call import AUTO, Auto

_TRIES = 3  #: of a person who types
_PROMPT = "Passphrase of the backup: "
_BYTE_ORDER_MARK = "\ufeff"  #: some editors put it at the beginning of a file
_LONGEST_LINE = 4 * MAX_PASSPHRASE + 8


def open_archive(backup: str) -> int:
    """A descriptor of the backup, which nobody here reads; `-` is standard input. Raises UsageError.

    Waits for a writer if it is a named pipe.
    """
    if backup == "-":
        if sys.stdin is None or os.isatty(0):
            raise UsageError("standard input is a terminal, not a backup")
        return os.dup(0)
    shown = strip_control(backup)
    try:
        fd = os.open(backup, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{shown} cannot be opened: {reason}") from None
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        close_read(fd)
        if os.path.exists(os.path.join(backup, "qubes.xml")):
            advice = "Qubes R2 to R3.2 can restore it; a backup that is made there can be restored here."
            raise UsageError(f"{shown} is a directory, as backups of Qubes R1 were (format 1)", advice=advice)
        raise UsageError(f"{shown} is a directory, not a backup")
    return fd


def archive_size(fd: int) -> int | None:
    """How many bytes of the archive are still to be read, if it is a file."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        return None
    return max(0, status.st_size - os.lseek(fd, 0, os.SEEK_CUR))


def check_compared(directory: Path) -> None:
    """Say before the passphrase is typed that there is nothing to compare with. Raises UsageError."""
    try:
        os.listdir(directory)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "that is no name of a directory"
        shown = strip_control(str(directory))
        raise UsageError(
            f"{shown} cannot be read: {reason}", advice="Name another one after --with."
        ) from None


def check_target(target: Path) -> None:
    """Say before the passphrase is typed that nothing can be restored to `target`. Raises UsageError.

    The host looks again, more closely, when it takes its lock.
    """
    shown = strip_control(str(target))
    is_there = True
    try:
        os.lstat(target)
    except FileNotFoundError:
        is_there = False
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "that is no name of a directory"
        raise UsageError(f"{shown} cannot be used: {reason}", advice="Name another one after --to.") from None
    if target.is_dir():
        writable = target
    elif is_there:
        raise UsageError(f"{shown} is not a directory", advice="Name another one after --to.")
    else:
        writable = target.absolute().parent
        if not writable.is_dir():
            raise UsageError(
                f"{shown} cannot be created: {strip_control(str(writable))} is no directory",
                advice="Create it first.",
            )
    if not os.access(writable, os.W_OK | os.X_OK):
        raise UsageError(f"you may not write to {strip_control(str(writable))}")


class Passphrases:
    """The passphrases to try, one after the other: what is typed, or the first line of `passphrase_file`.

    A person has three tries. A line is tried as it stands; then without the white space at its end, which the
    stock qvm-backup has cut off when it encrypted with such a file.
    """

    def __init__(self, passphrase_file: str | None, *, stdin_is_backup: bool) -> None:
        self._file = passphrase_file
        self._stdin_is_backup = stdin_is_backup
        self._is_typed = passphrase_file is None or (
            passphrase_file == "-" and sys.stdin is not None and os.isatty(0)
        )
        self._tried = 0
        self._line = ""

    def first(self) -> str:
        """Raises UsageError."""
        self._tried = 1
        if self._is_typed:
            return _checked(_ask(stdin_is_backup=self._stdin_is_backup))
        assert self._file is not None
        self._line = read_passphrase_file(self._file)
        return self._line

    @property
    def has_other(self) -> bool:
        """Is there another one, should that which was tried last be wrong?"""
        if self._is_typed:
            return self._tried < _TRIES
        return self._tried < 2 and bool(self._line.rstrip()) and self._line != self._line.rstrip()

    def other(self) -> str | None:
        """The next one, after one was wrong; None if there is none. Says what is tried. Raises UsageError."""
        if not self.has_other:
            return None
        self._tried += 1
        if self._is_typed:
            say_wrapped("The backup does not open with this passphrase. Try again.")
            return _checked(_ask(stdin_is_backup=self._stdin_is_backup))
        say_wrapped(
            "The backup does not open with the first line of the passphrase file as it stands. It is tried"
            " without the white space at its end."
        )
        return self._line.rstrip()


def read_passphrase_file(passphrase_file: str) -> str:
    """The first line of a file, or of standard input. Raises UsageError."""
    try:
        return _checked(_first_line(passphrase_file))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "that is no name of a file"
        raise UsageError(f"the passphrase file cannot be read: {reason}") from None


def _first_line(passphrase_file: str) -> str:
    """The line without its end; spaces belong to the passphrase."""
    if passphrase_file == "-":
        if sys.stdin is None:
            raise UsageError("standard input is closed")
        line = sys.stdin.buffer.readline(_LONGEST_LINE)
    else:
        with Path(passphrase_file).open("rb") as file:
            line = file.readline(_LONGEST_LINE)
    try:
        text = line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError:
        raise UsageError("the passphrase file is not UTF-8 text") from None
    return text.removeprefix(_BYTE_ORDER_MARK)


def _ask(*, stdin_is_backup: bool) -> str:
    # Without a terminal of its own, getpass would read standard input, and echo it.
    try:
        close_read(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        if stdin_is_backup or sys.stdin is None or not os.isatty(0):
            raise UsageError(
                "there is no terminal to ask for the passphrase on", advice="Use -p FILE or -p -."
            ) from None
    try:
        return getpass.getpass(_PROMPT)
    except Cancelled:
        say("")
        raise
    except EOFError:
        raise UsageError("no passphrase was given", advice="") from None
    except UnicodeDecodeError:  # its text would hold a part of what was typed
        raise UsageError("the passphrase is not UTF-8 text") from None


def _checked(passphrase: str) -> str:
    if not passphrase:
        raise UsageError("the passphrase is empty", advice="")
    if len(passphrase) > MAX_PASSPHRASE:
        raise UsageError(f"the passphrase is longer than {MAX_PASSPHRASE} characters", advice="")
    return passphrase


#: The last lines of `--help`.
EXIT_STATUS = "\n".join(
    ["exit status:", *(f"  {status:<3} {text}" for status, text in EXIT_MEANINGS.items())]
)

MAX_MIB = 1 << 30  #: a pebibyte

#: The compression programs that backups are made with; the worker knows what they mean.
FILTERS = ("gzip", "pigz", "bzip2", "pbzip2", "xz", "lzma", "zstd", "zstdmt", "none")


def number_up_to(highest: int) -> Callable[[str], int]:
    """A `type` for argparse: a whole number from 1 to `highest`."""

    def number(text: str) -> int:
        if not re.fullmatch(r"0*[1-9][0-9]{0,9}", text, re.ASCII) or int(text) > highest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {highest}")
        return int(text)

    return number


def auto_or(number: Callable[[str], int]) -> Callable[[str], int | Auto]:
    """A `type` for argparse: a `number`, or the word auto."""
    return lambda text: AUTO if text == AUTO else number(text)


def path(text: str) -> Path:
    """A `type` for argparse: the name of a file."""
    # In scripts, an empty variable: it would mean the current directory.
    found = Path(not_empty(text))
    try:
        found.absolute()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"the current directory is gone ({error.strerror})") from error
    return found


def not_empty(text: str) -> str:
    """A `type` for argparse: any text but none."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def add_passphrase_file(parser: "argparse._ActionsContainer") -> None:
    """`-p FILE`."""
    text = "read the passphrase from the first line of FILE, or of standard input if it is -"
    parser.add_argument("-p", "--passphrase-file", metavar="FILE", help=text)


def add_compression_filter(parser: "argparse._ActionsContainer") -> None:
    """`-Z FILTER`."""
    text = f"how it is compressed, if its header does not say or says it wrong: {', '.join(FILTERS)}"
    parser.add_argument("-Z", "--compression-filter", metavar="FILTER", choices=FILTERS, help=text)


def add_exclude(parser: "argparse._ActionsContainer") -> None:
    """`-x QUBE`, as often as one likes."""
    text = "leave out this qube, or those that fit, with * and ?; may be repeated"
    parser.add_argument("-x", "--exclude", metavar="QUBE", action="append", default=[], help=text)


def add_limits(parser: "argparse._ActionsContainer") -> None:
    """The options that lift limits on what a backup may ask for."""
    text = "accept disk images that are larger than the backup's qubes.xml says"
    parser.add_argument("--ignore-size-limit", action="store_true", help=text)
    text = "accept keys that take longer to derive than a fast computer's backup asks for: minutes each"
    parser.add_argument("--ignore-cost-limit", action="store_true", help=text)


def add_digest(parser: "argparse._ActionsContainer", default: DigestKind | None) -> None:
    """`--sha256`."""
    text = "tell the SHA-256 of each volume, which goes over every zero, instead of its fs-verity digest"
    parser.add_argument(
        "--sha256", dest="digest", action="store_const", const="sha256", default=default, help=text
    )


def add_stall_timeout(parser: "argparse._ActionsContainer") -> None:
    """`--stall-timeout SECONDS`."""
    seconds = number_up_to(MAX_STALL_TIMEOUT)
    text = "give up when the backup brings no data for so long; without it, it is waited for"
    parser.add_argument("--stall-timeout", type=seconds, metavar="SECONDS", help=text)
