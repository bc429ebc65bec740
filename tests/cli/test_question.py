"""The question on a terminal: what counts as an answer, and that nothing has to be pressed for a cancel."""

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.fixtures import REPOSITORY

ASKING = """
import asyncio
from qubes_restore_svc.cli.qvm_review import ask, can_ask
print(can_ask(), asyncio.run(ask("Sure?")))
"""
CANCELLING = """
import asyncio
from qubes_restore_svc.cli.qvm_review import ask

async def cancelled():
    task = asyncio.create_task(ask("Sure?"))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    print(task.cancelled())

asyncio.run(cancelled())
"""


@dataclass
class Terminal:
    """A terminal that is the standard input of programs, and the person at it."""

    person: int
    program: int

    def type(self, text: bytes) -> None:
        os.write(self.person, text)

    def run(self, code: str, answer: bytes | None) -> tuple[str, str]:
        """What a program says on standard output and error if its question is answered so."""
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=self.program,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=REPOSITORY,
            bufsize=0,  # what is read ahead here would be missed by communicate()
        )
        assert process.stderr is not None
        said = b""
        while not said.endswith(b"[y/N] ") and (byte := process.stderr.read(1)):
            said += byte
        if answer is not None:
            self.type(answer)
        output, rest = process.communicate(timeout=30)
        return output.decode().strip(), (said + rest).decode()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    person, program = pty.openpty()
    yield Terminal(person, program)
    os.close(person)
    os.close(program)


@pytest.mark.parametrize(
    ("answer", "means"),
    [
        *((answer, True) for answer in (b"y\n", b"Y\n", b" yes \n", b"YES\n")),
        *((answer, False) for answer in (b"n\n", b"\n", b"no\n", b"ye\n", b"yessir\n", b"q\n")),
        *((answer, False) for answer in (b"\x04", b"y\x04")),
    ],
)
def test_only_a_yes_is_a_yes(answer: bytes, means: bool, terminal: Terminal) -> None:
    assert terminal.run(ASKING, answer)[0] == f"True {means}"


def test_what_was_typed_before_is_no_answer(terminal: Terminal) -> None:
    terminal.type(b"y\ny\n")
    assert terminal.run(ASKING, b"n\n")[0] == "True False"


def test_the_end_of_input_is_a_no_and_the_line_is_ended(terminal: Terminal) -> None:
    assert terminal.run(ASKING, b"\x04") == ("True False", "Sure? [y/N] \n")


def test_a_cancel_needs_no_key(terminal: Terminal) -> None:
    assert terminal.run(CANCELLING, None) == ("True", "Sure? [y/N] \n")


def test_a_pipe_is_nobody() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from qubes_restore_svc.cli.qvm_review import can_ask; print(can_ask())"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=True,
    )
    assert done.stdout == "False\n"
