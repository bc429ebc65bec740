"""The command on a terminal, as a person sees it.

Strategy: a pseudo terminal of a chosen width, a person who types when asked, and just enough of a terminal to
know what the screen shows: carriage returns overwrite, as the bar does. Any other control is an error.
"""

import contextlib
import fcntl
import os
import pty
import struct
import termios
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.fixtures import REPOSITORY
from tests.system.support import command, environment


@dataclass(frozen=True)
class Seen:
    """What a run left on the screen, everything that was ever drawn, and its status."""

    status: int
    raw: str
    width: int

    @property
    def screen(self) -> list[str]:
        """The lines in the end."""
        return [rendered(line) for line in self.raw.replace("\r\n", "\n").split("\n")]

    @property
    def drawn(self) -> list[str]:
        """Every state of every line, in order."""
        return [part.strip() for line in self.raw.split("\n") for part in line.split("\r") if part.strip()]


def on_terminal(
    *arguments: str | Path,
    types: str | Sequence[str] = "",
    answers: str | Sequence[str] = "",
    width: int = 80,
    variables: Mapping[str, str] | None = None,
    module: str | None = None,
) -> Seen:
    """Run the command to its end on a terminal with `width` columns.

    One of `types` is typed where it asks for the passphrase, one of `answers` where it asks something else,
    and the end of input when none is left. `module`: that of another command.
    """
    answers = [answers] if isinstance(answers, str) and answers else list(answers)
    types = [types] if isinstance(types, str) and types else list(types)
    words = command(*arguments)
    if module is not None:
        words[words.index("-m") + 1] = module
    process, terminal = pty.fork()
    if process == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        os.chdir(REPOSITORY)
        os.execve(words[0], words, {**environment("terminal"), "TERM": "xterm", **(variables or {})})
    said = b""
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 4096):
            said += piece
            if types and said.endswith(b": "):
                os.write(terminal, types.pop(0).encode())
            elif said.endswith((b"of the backup: ", b"? [y/N] ", b"? ")):
                os.write(terminal, (answers.pop(0) if answers else "\x04").encode())
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    return Seen(os.waitstatus_to_exitcode(status), said.decode(), width)


def rendered(line: str) -> str:
    """What a line shows after everything that was written on it."""
    cells: list[str] = []
    position = 0
    for char in line:
        if char == "\r":
            position = 0
            continue
        assert char.isprintable(), f"{char!r} in {line!r}"
        cells[position : position + 1] = [char]
        position += 1
    return "".join(cells).rstrip()
