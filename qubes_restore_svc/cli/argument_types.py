"""What the values of options may be, for the command lines of all commands."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

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
