"""The three ways in which an archive reaches a worker, for tests that want the same of each.

Strategy: `fake_storage` puts a `qrexec-client-vm` on PATH, which is `stock_storage.py`, and tells afterwards
how it was called. `serve` is the other side of a call that dom0 makes on behalf of a storage service.
"""

import asyncio
import contextlib
import io
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from qubes_restore_svc.wire import messages as m

from . import stock_storage
from .support import in_thread, wait_until

LOCATION = m.Storage(qube="sys-usb", location_id="aB3xY7zQ")


@dataclass(slots=True)
class FakeStorage:
    """A storage VM that holds `archive` in `folder`, and writes into `notes` how it is called."""

    folder: Path
    notes: BinaryIO
    _noted: dict[int, dict[str, Any]] = field(default_factory=dict)
    _rest: bytes = b""

    def behave(self, behaviour: str) -> None:
        """What the calls from now on do: see stock_storage.main."""
        (self.folder / "behaviour").write_text(behaviour)

    @property
    def calls(self) -> list[dict[str, Any]]:
        """What was noted of each call, in order."""
        *lines, self._rest = (self._rest + (self.notes.read() or b"")).split(b"\n")
        for line in lines:
            call = json.loads(line)
            self._noted[call["pid"]] = call
        return list(self._noted.values())

    async def wait_for(self, count: int, **facts: object) -> None:
        """Wait until there are `count` calls and the last one has these facts."""

        def there() -> bool:
            calls = self.calls
            return len(calls) == count and facts.items() <= calls[-1].items()

        await asyncio.to_thread(wait_until, there, f"call {count} with {facts}")

    def processes(self) -> list[int]:
        """The calls' processes that are still there, zombies as well."""
        return [call["pid"] for call in self.calls if Path(f"/proc/{call['pid']}").exists()]


@contextlib.contextmanager
def fake_storage(folder: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStorage]:
    """Put the storage VM's `qrexec-client-vm` on PATH."""
    programs = folder / "bin"
    programs.mkdir()
    program = programs / "qrexec-client-vm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {stock_storage.__file__} {folder} "$@"\n')
    program.chmod(0o755)
    (folder / "archive").write_bytes(archive)
    os.mkfifo(folder / "notes")
    # Open for writing as well: a pipe that nobody writes to has no end, and nobody waits for us to open it.
    descriptor = os.open(folder / "notes", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    with open(descriptor, "rb", buffering=0) as notes:
        storage = FakeStorage(folder, notes)
        storage.behave("serves")
        yield storage


@dataclass(slots=True)
class Served:
    """What became of one conversation: the paths that were asked for, and whether the answer was right."""

    paths: list[str]
    answered: bool = False


def serve(archive: bytes, connection: socket.socket, served: list[Served]) -> threading.Thread:
    """Be the storage service behind `connection`: read the line, send the qfile, read the answer, hang up."""

    connection.setblocking(True)

    def run() -> None:
        # The test may have closed it already.
        with contextlib.suppress(OSError, EOFError), connection, connection.makefile("rb") as incoming:
            one = Served(incoming.readline().decode().split())
            served.append(one)
            crc = stock_storage.tar2qfile(io.BytesIO(archive), one.paths, connection.sendall)
            one.answered = incoming.read() == stock_storage.ANSWER.pack(0, 0, crc, 0)

    return in_thread(run)
