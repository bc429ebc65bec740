"""How a call reaches dom0: through qrexec from a qube, as a child process in dom0 itself.

Strategy: a transport connects to a service and gives a `Connection`, two streams and a word on why they
ended. Both ways start a program that carries the stream; only the meaning of its exit code differs, and how
long it may take to end when the call is closed.
"""

import asyncio
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from qubes_restore_svc.client.processes import NOTHING_HANDED, Handed, ProcessConnection, connect_to_program
from qubes_restore_svc.errors import HostFailed, NotGranted, RestoreError, how_ended

#: The qrexec client of every qube (qubes-core-qrexec).
QREXEC_PROGRAM = "/usr/bin/qrexec-client-vm"
#: There in dom0 only.
QUBESD_SOCKET = Path("/var/run/qubesd.sock")
#: The file of dom0's policy in which the calls are granted.
GRANTS = "/etc/qubes/policy.d/include/qubes-restore-svc"

#: The service's own program, for dom0. -I: neither environment nor working directory decides what it is.
SERVICE_PROGRAM = (sys.executable, "-I", "-m", "qubes_restore_svc.service.local")

#: Exit codes of qrexec-client-vm (qrexec.h of qubes-core-qrexec; 255: process_io.c there).
_PROBLEM, _REFUSED, _NOT_FOUND, _BROKEN = 125, 126, 127, 255

#: Seconds that a qrexec call may take to end by itself; dom0 knows that it is closed, however it ends.
_QREXEC_PATIENCE_S = 2.0
#: Seconds that the service may take to undo what it has begun, in dom0, as its own process.
_PROGRAM_PATIENCE_S = 60.0

_QUBE = re.compile(r"[a-zA-Z][a-zA-Z0-9_.-]{0,30}")
_INTERRUPTED = "If a restore was under way, dom0 has undone the qube it was at; what was finished stays."


class Connection(Protocol):
    """A connected call. Whoever has it closes it."""

    @property
    def reader(self) -> asyncio.StreamReader:
        """What dom0 says."""
        ...

    @property
    def writer(self) -> asyncio.StreamWriter:
        """What dom0 is told."""
        ...

    async def fault(self) -> RestoreError | None:
        """Why the call ended, once `reader` has; None if nothing is known. Takes seconds at the most."""
        ...

    async def close(self) -> None:
        """Close the call, and with it everything it needed here; safe to repeat."""
        ...


class Transport(Protocol):
    """A way to dom0."""

    async def connect(self, service: str) -> Connection:
        """Call `service` (`restore.Start`); raises RestoreError. If it is cancelled, nothing is left."""
        ...


class QrexecTransport:
    """From a qube: a qrexec call, which dom0's policy allows or not."""

    def __init__(self, target: str = "dom0", program: str = QREXEC_PROGRAM) -> None:
        self.program = program
        self._target = target

    async def connect(self, service: str) -> ProcessConnection:
        """Raises HostFailed if there is no qrexec here. A refusal shows when the call ends."""

        def explain(exit_code: int, words: str) -> RestoreError:
            return _qrexec_fault(service, exit_code, words)

        command = [self.program, self._target, service]
        return await connect_to_program(command, explain, _QREXEC_PATIENCE_S)


class ProgramTransport:
    """In dom0: the program `command`, with the name of the service behind it, and what it is handed over."""

    def __init__(self, command: Sequence[str] = SERVICE_PROGRAM, handed: Handed = NOTHING_HANDED) -> None:
        self._command = tuple(command)
        self._handed = handed

    async def connect(self, service: str) -> ProcessConnection:
        """Raises HostFailed if the program cannot be started."""
        command = [*self._command, service]
        return await connect_to_program(command, _program_fault, _PROGRAM_PATIENCE_S, self._handed)


def system_transport() -> QrexecTransport | ProgramTransport:
    """The way to dom0 from wherever this is: from dom0, or from a qube."""
    if QUBESD_SOCKET.exists():
        return ProgramTransport()
    return QrexecTransport()


def _qrexec_fault(service: str, exit_code: int, words: str) -> RestoreError:
    if exit_code == _REFUSED:
        return NotGranted(
            f"dom0's policy does not let this qube call {service}, or somebody there said no",
            advice=f"To allow it, an administrator adds this line to {GRANTS} in dom0:"
            f" {service} * {_own_name()} @adminvm allow target=dom0",
        )
    if exit_code == _NOT_FOUND:
        return HostFailed(
            f"dom0 has no service {service}",
            advice="Install the package qubes-restore-svc-dom0 in dom0.",
        )
    if exit_code == _PROBLEM:
        return HostFailed(f"the call of {service} could not be made", advice=_advice_of(words))
    if exit_code == _BROKEN:
        return HostFailed("the connection to dom0 broke off", advice=_INTERRUPTED)
    return _ended("the call to dom0", exit_code, words)


def _program_fault(exit_code: int, words: str) -> RestoreError:
    return _ended("dom0's restore service", exit_code, words)


def _ended(what: str, exit_code: int, words: str) -> RestoreError:
    how = how_ended(exit_code) if exit_code else "ended"
    said = f" ({words})" if words else ""
    return HostFailed(f"{what} {how}, without an answer{said}", advice=_INTERRUPTED)


def _advice_of(words: str) -> str:
    return f"qrexec says: {words}" if words else "Look into the system log of this qube."


def _own_name() -> str:
    """The name of this qube, which is its host name; or what to write its name for."""
    name = socket.gethostname()
    return name if _QUBE.fullmatch(name) else "THIS-QUBE"
