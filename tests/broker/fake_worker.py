"""A worker for tests of the broker: in this process, honest unless its script says otherwise.

Strategy: a worker is a list of steps (hear this, say that, stream these bytes) played over real socket pairs.
`honest` writes the list that an honest worker would play; a test changes it at any place.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from socket import SHUT_RDWR, SO_SNDBUF, SOL_SOCKET, socket, socketpair
from typing import Self

from qubes_restore_svc.errors import ArchiveUnreadable, WorkerLost
from qubes_restore_svc.waiting import to_the_end
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire import qrexec_call
from qubes_restore_svc.wire.report import Report
from qubes_restore_svc.wire.volume import MAX_IMAGE_SIZE, encode_end, encode_header, encode_record
from tests.support.wire import frame, from_broker, heard

BACKUP_ID = "20260101T010203-1234"

Json = dict[str, object]


# --- What is in the backup -----------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """A volume: its size in bytes, and what is not zero."""

    size: int
    extents: tuple[tuple[int, bytes], ...] = ()

    @property
    def content(self) -> bytes:
        content = bytearray(self.size)
        for offset, data in self.extents:
            content[offset : offset + len(data)] = data
        return bytes(content)

    @property
    def data_bytes(self) -> int:
        return sum(len(data) for _, data in self.extents)

    @property
    def stream(self) -> bytes:
        """What an honest worker answers to `restore.Volume`."""
        records = (encode_record(offset, len(data)) + data for offset, data in self.extents)
        return encode_header(self.size) + b"".join(records) + encode_end(self.data_bytes)


@dataclass(frozen=True)
class BackupQube:
    """A qube as a backup holds it."""

    key: str
    name: str
    volumes: Mapping[str, Image]
    klass: str = "AppVM"
    fields: Mapping[str, object] = field(default_factory=dict)

    @property
    def listed(self) -> Json:
        volumes = [
            {"name": name, "size": None if name == "home" else image.size}
            for name, image in self.volumes.items()
        ]
        listed = {"key": self.key, "name": self.name, "klass": self.klass, "label": "red", "volumes": volumes}
        return {**listed, **self.fields}


WORK = BackupQube("vm1", "work", {"private": Image(70_000, ((0, b"w" * 4096), (65_536, b"W" * 100)))})
VAULT = BackupQube(
    "vm2",
    "vault",
    {
        "root": Image(50_000, ((512, b"r" * 3000), (4000, b"R" * 1000))),
        "private": Image(20_000, ((0, b"v" * 20_000),)),
    },
    klass="StandaloneVM",
)
EMPTY = BackupQube("vm3", "empty", {}, klass="DispVM")
DOM0 = BackupQube("dom0-home", "dom0", {"home": Image(3000, ((0, b"h" * 3000),))}, klass="AdminVM")


def renamed(qube: BackupQube, **changes: object) -> BackupQube:
    """The qube with other values in its entry of the manifest."""
    return replace(qube, fields={**qube.fields, **changes})


# --- What the worker does ------------------------------------------------------------------------


@dataclass(frozen=True)
class Hear:
    """Wait for a message of this type."""

    type: str


@dataclass(frozen=True)
class Say:
    """Send this, whatever it is, as a frame."""

    message: Json


@dataclass(frozen=True)
class Raw:
    """Send these bytes on the session."""

    data: bytes


@dataclass(frozen=True)
class Stream:
    """Wait until the volume is called for and answer with these bytes."""

    key: str
    volume: str
    data: bytes
    keep_open: bool = False


@dataclass(frozen=True)
class HangUp:
    """End the session."""


@dataclass(frozen=True)
class Die:
    """Go, as if killed."""


@dataclass(frozen=True)
class Pause:
    """Do nothing for some seconds."""

    seconds: float


@dataclass(frozen=True)
class CancelJob:
    """The person presses Ctrl-C now."""


Step = Hear | Say | Raw | Stream | HangUp | Die | Pause | CancelJob


def manifest(qubes: Sequence[BackupQube], **fields: object) -> Json:
    """The manifest of these qubes."""
    return {
        "type": "manifest",
        "backup_id": BACKUP_ID,
        "format": 4,
        "compression_filter": "gzip",
        "qubes": [qube.listed for qube in qubes],
        **fields,
    }


def honest(
    qubes: Sequence[BackupQube] = (WORK, VAULT), *, taken: Iterable[str] | None = None, verify: bool = False
) -> "Script":
    """What an honest worker does with this backup when the qubes named `taken` (or all) are selected."""
    steps: list[Step] = [Hear("open"), Say(manifest(qubes)), Hear("start")]
    for qube in qubes:
        if taken is not None and qube.name not in taken:
            continue
        for volume, image in qube.volumes.items():
            is_home = volume == "home"
            place: Json = {"key": qube.key, "volume": volume}
            announced = MAX_IMAGE_SIZE if is_home else image.size
            steps.append(Say({"type": "volume_ready", **place, "image_size": announced}))
            if not verify:
                header = encode_header(announced)
                steps.append(Stream(qube.key, volume, header + image.stream[len(header) :]))
            done = {
                "type": "volume_done",
                **place,
                "outcome": "ok",
                "image_size": image.size,
                "data_bytes": image.data_bytes,
                "fsverity": hashlib.sha256(image.content).hexdigest(),
            }
            steps.append(Say(done))
        steps.append(Say({"type": "qube_settings", "key": qube.key}))
    return Script([*steps, Say({"type": "finished", "archive_bytes": 1})])


class Script(list[Step]):
    """Steps, with ways to change them that make a new script each."""

    def find(self, kind: str, key: str | None = None, volume: str | None = None) -> int:
        """Where the first message (or stream, or hearing) of this kind stands."""
        for index, step in enumerate(self):
            if isinstance(step, Stream):
                place: tuple[object, ...] = ("stream", step.key, step.volume)
            elif isinstance(step, Say):
                said = step.message
                place = (said.get("type"), said.get("key"), said.get("volume"))
            else:
                place = (f"hear {step.type}" if isinstance(step, Hear) else None, None, None)
            wanted = (kind, key or place[1], volume or place[2])
            if place == wanted:
                return index
        raise LookupError(kind)

    def changed(
        self, kind: str, key: str | None = None, volume: str | None = None, /, **fields: object
    ) -> Self:
        """With other values in one message; a field given as `...` is taken out."""
        index = self.find(kind, key, volume)
        step = self[index]
        assert isinstance(step, Say)
        message = {name: value for name, value in {**step.message, **fields}.items() if value is not ...}
        return self.with_steps(index, Say(message))

    def streaming(self, key: str, volume: str, data: bytes, *, keep_open: bool = False) -> Self:
        """With another answer to the call for a volume."""
        return self.with_steps(self.find("stream", key, volume), Stream(key, volume, data, keep_open))

    def with_steps(self, index: int, *steps: Step, instead_of: int = 1) -> Self:
        """With `steps` at `index`, instead of as many of those that stand there."""
        return type(self)([*self[:index], *steps, *self[index + instead_of :]])

    def before(self, index: int, *steps: Step) -> Self:
        return self.with_steps(index, *steps, instead_of=0)

    def after(self, index: int, *steps: Step) -> Self:
        return self.with_steps(index + 1, *steps, instead_of=0)

    def until(self, index: int, *steps: Step) -> Self:
        """Cut off before `index`, and ending in `steps`."""
        return type(self)([*self[:index], *steps])


class _Over(Exception):
    """The broker has hung up."""


class FakeLink:
    """A `Link` whose worker plays a script and then waits until the broker hangs up.

    Like an honest worker it drops a qube that it is told to skip, or whose stream the broker ends. It sends
    a sign of life every `heartbeat_s` seconds, if given. A `deaf` one reads nothing after `open`; a
    `stubborn` one says what is in its script although the qube is not wanted any more.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        heartbeat_s: float | None = None,
        deaf: bool = False,
        stubborn: bool = False,
    ) -> None:
        self._deaf = deaf
        self._stubborn = stubborn
        self.heard: list[m.BrokerMessage] = []
        self.calls: list[str] = []  #: `SERVICE+ARGUMENT` of each call
        self.fault: ArchiveUnreadable | None = None  #: of the side that brings the archive
        self.gaps: str | None = None  #: of what it has brought
        self.left = False  #: has the broker destroyed the worker?
        self.job: asyncio.Task[Report] | None = None
        self.failures: list[BaseException] = []
        self._steps = steps
        self._heartbeat_s = heartbeat_s
        self._session: socket | None = None
        self._end = from_broker()
        self._sockets: list[socket] = []
        self._callers: dict[str, socket] = {}
        self._given_up: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._gone = asyncio.Event()
        self._over = False
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await to_the_end(self._leave())

    async def _leave(self) -> None:
        for _turn in range(3):  # what has been sent is heard
            await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in self._sockets:
            connection.close()
        self.left = True

    async def call(self, service_name: str, argument: str = "") -> socket:
        self.calls.append(f"{service_name}+{argument}")
        if self._gone.is_set():
            raise WorkerLost("the worker cannot be called")
        ours, theirs = socketpair()
        theirs.setblocking(False)
        self._sockets.append(theirs)
        if service_name == qrexec_call.SESSION:
            if self._deaf:
                ours.setsockopt(SOL_SOCKET, SO_SNDBUF, 4096)
            self._session = theirs
            jobs = [self._listen, self._play, *([self._beat] if self._heartbeat_s else [])]
            self._tasks = [asyncio.create_task(self._guarded(job)) for job in jobs]
        else:
            self._callers[argument] = theirs
            self._changed.set()
        return ours

    @property
    def source(self) -> str:
        return "sys-usb"

    @property
    def storage(self) -> None:
        """It makes the archive up."""

    async def provide_archive(self) -> None:
        """It makes the archive up."""

    async def archive_fault(self) -> ArchiveUnreadable | None:
        return self.fault

    @property
    def archive_gaps(self) -> str | None:
        return self.gaps

    async def wait_gone(self) -> str:
        await self._gone.wait()
        return "the worker was killed (SIGKILL)"

    async def _guarded(self, job: Callable[[], Coroutine[None, None, None]]) -> None:
        try:
            await job()
        except (_Over, OSError):
            self._over = True
            self._changed.set()
        except Exception as failure:
            self.failures.append(failure)
            raise

    async def _listen(self) -> None:
        assert self._session is not None
        while data := await asyncio.get_running_loop().sock_recv(self._session, 1 << 16):
            self._hear_data(data)
            if self._deaf:
                return
        raise _Over

    def _hear_data(self, data: bytes) -> None:
        for message in heard(self._end, data):
            self.heard.append(message)
            if isinstance(message, m.SkipQube):
                self._given_up.add(message.key)
        self._changed.set()

    async def _beat(self) -> None:
        while self._heartbeat_s:
            await asyncio.sleep(self._heartbeat_s)
            if self.heard:
                await self._send(frame(b'{"type": "progress", "archive_bytes": 1}'))

    async def _play(self) -> None:
        for step in self._steps:
            if isinstance(step, Hear):
                await self._hear(step.type)
            elif isinstance(step, Say):
                message = self._still_true(step.message)
                payload = json.dumps(message).encode() if message else b""
                await self._send(frame(payload) if payload else b"")
            elif isinstance(step, Raw):
                await self._send(step.data)
            elif isinstance(step, Stream):
                await self._stream(step)
            elif isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
            elif isinstance(step, CancelJob):
                assert self.job is not None
                self.job.cancel()
            elif isinstance(step, HangUp):
                assert self._session is not None
                self._session.shutdown(SHUT_RDWR)
            else:
                for connection in self._sockets:
                    connection.shutdown(SHUT_RDWR)
                self._gone.set()

    def _still_true(self, message: Json) -> Json:
        """What an honest worker says instead, about a qube that is not wanted any more."""
        if self._stubborn or message.get("key") not in list(self._given_up):  # a lie need not be hashable
            return message
        error = {"error": {"kind": "skipped", "reason": "it is not wanted any more"}}
        if message["type"] == "volume_ready":
            return {}
        if message["type"] == "volume_done":
            kept = {name: message[name] for name in ("type", "key", "volume")}
            return {**kept, "outcome": "skipped", **error}
        return {**message, **error} if message["type"] == "qube_settings" else message

    async def _hear(self, kind: str) -> None:
        await self._until(lambda: any(kind == message.type for message in self.heard))

    async def _stream(self, step: Stream) -> None:
        argument = qrexec_call.volume_argument(step.key, step.volume)
        await self._until(lambda: argument in self._callers or step.key in self._given_up)
        connection = self._callers.pop(argument, None)
        if connection is None:
            return
        try:
            await asyncio.get_running_loop().sock_sendall(connection, step.data)
            if not step.keep_open:
                connection.shutdown(SHUT_RDWR)
        except OSError:
            self._given_up.add(step.key)

    async def _send(self, data: bytes) -> None:
        assert self._session is not None
        await asyncio.get_running_loop().sock_sendall(self._session, data)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._over:
                raise _Over
            self._changed.clear()
            await self._changed.wait()
