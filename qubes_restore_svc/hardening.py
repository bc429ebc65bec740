"""What every program of ours does first, before it is told a passphrase or opens a file.

Strategy: the process that starts a program can have closed its streams, ignored signals, or set limits. All
of that is put right here, or made harmless. It uses the standard library only, and little of it, because the
rest is not imported yet.
"""

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from qubes_restore_svc.errors import ExitStatus

if TYPE_CHECKING:  # it would be the first thing to be imported
    import socket

_LOADING_ADVICE = (
    "Close other programs, or raise the limit (ulimit -v). If that does not help, install it again."
)


def prepare_process() -> None:
    """Standard streams that are there, children that can be waited for, and no core dump."""
    _open_standard_streams()
    # Where it is ignored, the kernel reaps our children itself, and nobody can tell how they ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    forbid_core_dumps()


def forbid_core_dumps() -> None:
    """A core dump would hold the passphrase. 1: 0 lets the kernel pipe it to a collector (core(5))."""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    except (OSError, ValueError):  # it is 0 for good
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def answer_signals_while_starting() -> None:
    """Imports take a few tenths of a second; a person who ends the command meanwhile gets an answer, too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end_cancelled)


@contextlib.contextmanager
def loading(program: str) -> Iterator[None]:
    """Around the imports of a command. If they fail, `program` says so in one line, and the process ends."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - short of memory, Python fails in many ways
        why = type(error).__name__
        if isinstance(error, MemoryError):
            why = "there is no memory left"
        elif isinstance(error, OSError | ImportError):
            why = ascii(str(error))
        with contextlib.suppress(OSError):
            os.write(2, f"{program}: it cannot be loaded: {why}. {_LOADING_ADVICE}\n".encode())
        raise SystemExit(ExitStatus.NOTHING) from None


def _end_cancelled(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"cancelled\n")
    os._exit(ExitStatus.CANCELLED)


def _open_standard_streams() -> None:
    """Started without one of them, the first file that is opened would get its number, and its output."""
    for standard in (0, 1, 2):
        try:
            os.fstat(standard)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def close_read(opened: "int | socket.socket") -> None:
    """Close what holds nothing of ours: what was only read, a directory, a lock, a socket, an end of a pipe.

    An error that comes now changes nothing. A written file is closed with `os.close`: there, it counts.
    """
    with contextlib.suppress(OSError):
        if isinstance(opened, int):
            os.close(opened)
        else:
            opened.close()
