"""A call as its client sees it, and a look at what it leaves.

Strategy: the service runs in the test's own event loop behind a socket pair; its client says whatever the
test wants, right or wrong. When the call is over, nothing may be left but what a complete restore leaves.
"""

import asyncio
import json
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from qubes_restore_svc.dom0_service.call import Call
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.messages import Log
from qubes_restore_svc.wire.qrexec_call import START
from qubes_restore_svc.wire.report import Observer, Report, RestoreProgress
from tests.support import wire
from tests.support.backup_writer import PASSPHRASE
from tests.support.wire import from_dom0, parsed

from .parts import CALLER, Parts, places

PATIENCE_S = 60.0

Json = dict[str, object]
_Answer = TypeVar("_Answer", c.Plan, c.VolumeStarted, c.Refused, Report)


def open_message(backup: Path, mode: str = "restore", /, **fields: object) -> Json:
    """A request that is in order, but for `fields`."""
    return {
        "type": "open",
        "mode": mode,
        "location": {"text": str(backup)},
        "passphrase": PASSPHRASE,
        **fields,
    }


def frame(message: Json | bytes) -> bytes:
    """The frame of a message, whatever it is."""
    payload = message if isinstance(message, bytes) else json.dumps(message).encode()
    return wire.frame(payload)


@dataclass
class Client:
    """The other side of a call. `heard` is everything that dom0 has said."""

    connection: socket.socket
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    heard: list[c.BrokerAnswer] = field(default_factory=list)

    def say(self, *messages: Json | bytes) -> None:
        """Say all of it at once."""
        self.writer.write(b"".join(frame(message) for message in messages))

    def raw(self, data: bytes) -> None:
        self.writer.write(data)

    def hang_up(self) -> None:
        """Be gone."""
        self.writer.transport.abort()

    def stop_speaking(self) -> None:
        """Close only what goes to dom0."""
        self.writer.write_eof()

    async def plan(self) -> c.Plan:
        """Wait for the next plan."""
        return await self._next(c.Plan)

    async def started(self) -> c.VolumeStarted:
        return await self._next(c.VolumeStarted)

    async def refused(self) -> c.Refused:
        """Wait for the end, which must be this, and the end of the stream."""
        refused = await self._next(c.Refused)
        await self.end()
        return refused

    async def report(self) -> Report:
        """The same."""
        report = await self._next(Report)
        await self.end()
        return report

    async def end(self) -> None:
        """Nothing more comes."""
        assert await self.hear() is None, self.heard[-1]

    async def _next(self, kind: type[_Answer]) -> _Answer:
        while (message := await self.hear()) is not None:
            if isinstance(message, kind):
                return message
            assert isinstance(message, (Log, RestoreProgress, c.VolumeStarted, c.QubeFinished)), message
        raise AssertionError(f"the call ended without a {kind.__name__}")

    async def hear(self) -> c.BrokerAnswer | None:
        """The next message, None at the end."""
        async with asyncio.timeout(PATIENCE_S):
            head = await self._read(4)
            if head is None:
                return None
            payload = await self._read(struct.unpack("!I", head)[0])
        assert payload is not None
        message = parsed(from_dom0(), payload)
        self.heard.append(message)
        return message

    async def _read(self, size: int) -> bytes | None:
        try:
            return await self.reader.readexactly(size)
        except asyncio.IncompleteReadError as error:
            assert not error.partial
            return None
        except OSError:  # it is gone, and has not read all that we had to say
            return None


@dataclass
class Bed:
    """A system, and calls of it. `notes` is what was logged in dom0."""

    folder: Path
    backup: Path
    notes: list[str] = field(default_factory=list)
    delivered: bool | None = None

    def __post_init__(self) -> None:
        self.parts = Parts(self.folder)
        (self.folder / "reports").mkdir()
        self.configure("")

    @property
    def phase(self) -> c.CallPhase:
        """Of the call that was made last, as dom0 sees it."""
        conversation = self._call._conversation
        return c.CallPhase.IDLE if conversation is None else conversation._connection.state

    @property
    def ended(self) -> bool:
        """Does dom0 know that the client of that call wants no more?"""
        assert self._call._conversation is not None
        return self.phase is c.CallPhase.CLOSED or self._call._conversation.ended is not None

    @property
    def observer(self) -> Observer:
        """What the restore of that call speaks to."""
        assert self._call._conversation is not None
        return self._call._conversation

    def cancel(self) -> None:
        """As a signal does."""
        self._call.cancel()

    def configure(self, text: str) -> None:
        config = self.folder / "config.yaml"
        config.write_text(f"report: {{directory: {self.folder / 'reports'}}}\n{text}")
        config.chmod(0o644)

    @property
    def restored(self) -> list[str]:
        """Whatever is in the target."""
        return sorted(os.listdir(self.parts.target)) if self.parts.target.exists() else []

    @property
    def reports(self) -> list[Json]:
        paths = sorted((self.folder / "reports").iterdir())
        return [json.loads(path.read_text()) for path in paths]

    @asynccontextmanager
    async def call(
        self, service: str = START, caller: str = CALLER, small_buffers: bool = False, shared: bool = False
    ) -> AsyncIterator[Client]:
        """A call; at its end it must end, and leave nothing, unless the system is `shared` with another."""
        ours, theirs = socket.socketpair()
        if small_buffers:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        call = Call(service, caller, self.notes.append, places(self.folder), self.parts)
        self._call = call
        task = asyncio.create_task(call.serve(ours.fileno(), ours.fileno()))
        task.add_done_callback(lambda _: ours.close())
        reader, writer = await asyncio.open_connection(sock=theirs)
        try:
            yield Client(theirs, reader, writer)
            async with asyncio.timeout(PATIENCE_S):
                self.delivered = await asyncio.shield(task)
        finally:
            writer.transport.abort()
            self.parts.check.set()
            self.parts.begin.set()
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
        if not shared:
            self.check_nothing_is_left()

    def check_nothing_is_left(self) -> None:
        """No lock, nothing half done, and the passphrase nowhere."""
        assert sorted(path.name for path in self.folder.glob("*.lock")) == []
        assert not [name for name in self.restored if name.startswith(".")]
        assert PASSPHRASE not in "\n".join(self.notes)
        assert PASSPHRASE not in json.dumps(self.reports)
