"""What all command lines have in common: what the values of options may be, and some options."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from qubes_restore_svc.wire.names import MAX_STALL_TIMEOUT

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
    text = "leave out this qube; may be repeated"
    parser.add_argument("-x", "--exclude", metavar="QUBE", action="append", default=[], help=text)


def add_limits(parser: "argparse._ActionsContainer") -> None:
    """The options that lift limits on what a backup may ask for."""
    text = "accept disk images that are larger than the backup's qubes.xml says"
    parser.add_argument("--ignore-size-limit", action="store_true", help=text)
    text = "accept keys that take longer to derive than a fast computer's backup asks for: minutes each"
    parser.add_argument("--ignore-cost-limit", action="store_true", help=text)


def add_stall_timeout(parser: "argparse._ActionsContainer") -> None:
    """`--stall-timeout SECONDS`."""
    seconds = number_up_to(MAX_STALL_TIMEOUT)
    text = "give up when the backup brings no data for so long; without it, it is waited for"
    parser.add_argument("--stall-timeout", type=seconds, metavar="SECONDS", help=text)
