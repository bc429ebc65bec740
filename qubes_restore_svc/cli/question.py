"""A question to the person that does not hold up the event loop.

Strategy: the terminal collects the line by itself; the loop is told when it is there, so that a cancel ends
the waiting at once and no thread is left that waits for a key. What was typed before the question was there
is no answer to it.
"""

import asyncio
import contextlib
import os
import termios

from qubes_restore_svc.cli.terminal import QuietStream, say

_LONGEST_ANSWER = 1024


def can_ask() -> bool:
    """Is somebody there to answer?"""
    return os.isatty(0)


async def ask(question: str) -> bool:
    """Ask on the terminal, which standard input is; True only for a whole line that says yes."""
    with contextlib.suppress(termios.error):
        termios.tcflush(0, termios.TCIFLUSH)
    stream = QuietStream()
    stream.write(f"{question} [y/N] ")
    stream.flush()
    line = b""
    try:
        line = await _line()
    finally:
        if not line.endswith(b"\n"):  # nobody has ended the line on the screen
            say("")
    return line.lower().strip() in (b"y", b"yes") and line.endswith(b"\n")


async def _line() -> bytes:
    """What the terminal has, once it has something: a line, or nothing at the end of input."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(0, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(0)
    try:
        return os.read(0, _LONGEST_ANSWER)
    except OSError:  # the terminal is gone
        return b""
