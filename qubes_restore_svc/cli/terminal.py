"""Speaking to the person: standard error for words, standard output for results.

Strategy: losing somebody who listens never stops the work. When a terminal was closed, or the reader of a
pipe has gone, what is said on standard error vanishes; for a result on standard output the caller is told.
"""

import contextlib
import os
import sys
import textwrap
from typing import TextIO

_LEAST_WIDTH = 20


class QuietStream:
    """Standard error, as a stream to which writing cannot fail."""

    encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding

    def write(self, text: str) -> int:
        """Write `text`, if anybody is there to read it."""
        try:
            if sys.stderr is not None:
                sys.stderr.write(text)
        except (OSError, ValueError):
            _silence(sys.stderr)
        return len(text)

    def flush(self) -> None:
        """Send what was written."""
        try:
            if sys.stderr is not None:
                sys.stderr.flush()
        except (OSError, ValueError):
            _silence(sys.stderr)


def say(text: str) -> None:
    """A line on standard error."""
    stream = QuietStream()
    stream.write(text + "\n")
    stream.flush()


def say_wrapped(text: str) -> None:
    """A sentence or two on standard error, in lines as wide as the terminal."""
    say(wrapped(text, width_of(sys.stderr)))


def print_result(program: str, text: str, end: str = "\n") -> bool | None:
    """`text` on standard output; False if it could not be written, which has been said.

    None if nobody is there to read it: standard output was closed, or the reader has had enough, as in
    `| head`. That is no fault.
    """
    if sys.stdout is None:
        return None
    try:
        print(text, end=end, flush=True)  # noqa: T201 - the result of the command
    except OSError as error:
        _silence(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return None
        say(f"{program}: standard output cannot be written: {error.strerror}")
        return False
    return True


def width_of(stream: TextIO | None) -> int | None:
    """Columns of the terminal that `stream` is, None if it is none."""
    try:
        if stream is None or not stream.isatty():
            return None
        return max(_LEAST_WIDTH, os.get_terminal_size(stream.fileno()).columns or 80)
    except (OSError, ValueError):
        return None


def can_redraw(stream: TextIO | None) -> bool:
    """Is `stream` a terminal on which a line can be drawn again and again?"""
    return width_of(stream) is not None and os.environ.get("TERM", "dumb") != "dumb"


def wrapped(text: str, width: int | None) -> str:
    """`text` in lines of at most `width` columns, all but the first indented; as it is if that is None."""
    if width is None:
        return text
    return textwrap.fill(
        text, width - 1, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _silence(stream: TextIO) -> None:
    """Let what the stream still holds vanish; the interpreter would fail at it again when it ends."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null, stream.fileno())
        os.close(null)
