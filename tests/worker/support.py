"""A worker without a process around it: engines that tests control, an archive as a descriptor, a pass
over it in threads, and a broker's ends of the sockets.

Strategy: everything here is the real worker but for three things that tests want in their hands: when a key
derivation ends, where the archive's bytes come from, and how fast the broker reads.
"""

import contextlib
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Literal

from qubes_restore_svc.archive.outer_tar import OuterTarReader
from qubes_restore_svc.kdf.engine import KdfEngine, KdfRequest, OpensslEngine
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.names import DigestKind
from qubes_restore_svc.wire.volume import MAX_IMAGE_SIZE, VolumeDecoder, encode_header
from qubes_restore_svc.worker.chunk import ChunkStore
from qubes_restore_svc.worker.intake import Intake
from qubes_restore_svc.worker.keys import KeyScheduler
from qubes_restore_svc.worker.memory import Budget
from qubes_restore_svc.worker.opening import OpenedBackup, open_backup
from qubes_restore_svc.worker.pipeline import Pipeline
from qubes_restore_svc.worker.selection import Selection, Wanted
from qubes_restore_svc.worker.source import ArchiveSource, MemberStream
from qubes_restore_svc.worker.threads import Stop

from ..support.backup_writer import PASSPHRASE

MIB = 1 << 20
#: Seconds after which something that should have ended counts as hanging.
PATIENCE_S = 60.0


class Hanging(AssertionError):
    """Something did not come to its end."""


def wait_until(condition: Callable[[], object], what: str = "it") -> None:
    """Wait for `condition`; fails the test with `what` after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise Hanging(f"{what} did not happen")
        time.sleep(0.001)


_started: list[threading.Thread] = []
_SETTLE_S = 0.5


def in_thread(work: Callable[[], object]) -> threading.Thread:
    """Run `work` in a daemon thread."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    _started.append(thread)
    return thread


def settle(besides: threading.Thread | None = None) -> None:
    """Give the threads of a test a moment to end, before a descriptor is closed.

    One that went on reading would take the bytes of whatever gets that number next, in another test.
    """
    deadline = time.monotonic() + _SETTLE_S
    for thread in _started:
        if thread is not besides:
            thread.join(max(0.0, deadline - time.monotonic()))
    _started.clear()


def join(thread: threading.Thread) -> None:
    """Wait for the end of a thread, which must come."""
    thread.join(PATIENCE_S)
    if thread.is_alive():
        raise Hanging("a thread does not end")


class Engine(OpensslEngine):
    """The real engine, which notes every request, and asks `gate` (if any) before it carries it out."""

    def __init__(self, gate: Callable[[KdfRequest], object] | None = None) -> None:
        super().__init__()
        self.requests: list[KdfRequest] = []
        self.gate = gate

    def derive(self, requests: Sequence[KdfRequest]) -> list[bytes]:
        self.requests += requests
        if self.gate is not None:
            for request in requests:
                self.gate(request)
        return super().derive(requests)

    @property
    def members(self) -> list[str]:
        """The members whose keys were asked for: the middle of their passphrases."""
        return [request.passphrase.decode().split("!")[-2] for request in self.requests]


@contextlib.contextmanager
def file_with(content: bytes) -> Iterator[int]:
    """A regular, seekable file that lies on no disk; its descriptor."""
    descriptor = os.memfd_create("archive")
    try:
        os.write(descriptor, content[:1])
        written = min(1, len(content))
        while written < len(content):
            written += os.write(descriptor, memoryview(content)[written:])
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        settle()
        os.close(descriptor)


@contextlib.contextmanager
def pipe_with(content: bytes, *, keep_open: bool = False) -> Iterator[int]:
    """A pipe into which `content` is written as fast as it is read; its end comes at once, or never."""
    reader, writer = os.pipe()

    def feed() -> None:
        with contextlib.suppress(OSError):
            position = 0
            while position < len(content):
                position += os.write(writer, memoryview(content)[position : position + (1 << 16)])
        if not keep_open:
            os.close(writer)

    thread = in_thread(feed)
    try:
        yield reader
    finally:
        if keep_open:
            os.close(writer)
        settle(besides=thread)
        os.close(reader)
        if not keep_open:
            join(thread)


class Pass:
    """Opening and one pass of intake and pipeline over an archive, outside of any session."""

    def __init__(
        self,
        archive_fd: int,
        *,
        memory: int = 64 * MIB,
        jobs: int = 2,
        engine: Engine | None = None,
        passphrase: str = PASSPHRASE,
        second: KdfEngine | None = None,
    ) -> None:
        self.engine = engine or Engine()
        self.stop = Stop()
        self.budget = Budget(memory, self.engine, jobs * self.engine.lanes + 2, self.stop, own=0)
        self.scheduler = KeyScheduler(self.engine, self.budget, jobs, second)
        self.source = ArchiveSource(archive_fd)
        self.members = MemberStream(self.source, OuterTarReader(), self.stop.check)
        self.store = ChunkStore(self.members, self.budget)
        self.wanted = Wanted()
        self.intake = Intake(self.store, self.scheduler, self.wanted)
        self.messages: list[m.Message] = []
        self.remarks: list[str] = []
        self.passphrase = passphrase
        self.backup: OpenedBackup
        self.pipeline: Pipeline
        self.thread: threading.Thread

    def open(self, compression_filter: str | None = None, *, ahead: bool = False) -> OpenedBackup:
        """Read the beginning."""
        self.backup = open_backup(
            self.store,
            self.scheduler,
            self.passphrase,
            compression_filter,
            remark=self.remarks.append,
            go_ahead=self.intake.start if ahead else None,
        )
        return self.backup

    def start(
        self,
        names: Sequence[str] | None = None,
        *,
        mode: Literal["restore", "verify"] = "verify",
        receiver: "Receiver | None" = None,
        digest: DigestKind = "sha256",
        ignore_size_limit: bool = False,
        ahead: bool = False,
    ) -> None:
        """Open it and begin to stream the qubes of these names (None: all)."""
        content = self.open(ahead=ahead).content
        keys = tuple(qube.info.key for qube in content.qubes if names is None or qube.info.name in names)
        self.names = {qube.info.key: qube.info.name for qube in content.qubes}
        self.selection = Selection(content, keys)
        self.wanted.narrow(self.selection)
        self.pipeline = Pipeline(
            self.backup,
            self.selection,
            self.intake.events,
            self.stop,
            restoring=mode == "restore",
            digest=digest,
            ignore_size_limit=ignore_size_limit,
            emit=self.messages.append,
            announce=(receiver or Receiver(self.messages.append)).announce,
        )
        self.store.open_ahead(2)
        self.stop.wakes(self.store.close)
        self.intake.start(self.backup.proofs)
        self.thread = in_thread(self.pipeline.run)

    def progress(self) -> m.Progress:
        """How far it is."""
        return self.pipeline.progress(self.source.position)

    def finish(self) -> None:
        """Wait for the end of the pass, and until all memory has been given back."""
        join(self.thread)
        self.store.close()
        self.scheduler.close()
        wait_until(lambda: self.budget.used == 0, "the release of all memory")

    @property
    def volumes(self) -> dict[str, m.VolumeDone]:
        """The answers, by `QUBE/VOLUME`."""
        done = [message for message in self.messages if isinstance(message, m.VolumeDone)]
        answers = {f"{self.names[message.key]}/{message.volume}": message for message in done}
        assert len(answers) == len(done), "a volume was answered for twice"
        return answers

    @property
    def outcomes(self) -> dict[str, str]:
        """`ok`, or the kind of error, by `QUBE/VOLUME`."""
        return {name: done.error.kind if done.error else "ok" for name, done in self.volumes.items()}

    @property
    def settings(self) -> dict[str, m.QubeSettings]:
        """The settings, by name of the qube."""
        settings = [message for message in self.messages if isinstance(message, m.QubeSettings)]
        by_name = {self.names[message.key]: message for message in settings}
        assert len(by_name) == len(settings), "a qube was closed twice"
        return by_name

    @property
    def warnings(self) -> list[str]:
        """What was logged."""
        return [message.text for message in self.messages if isinstance(message, m.Log)]


def verified(archive: bytes, names: Sequence[str] | None = None, **options: object) -> Pass:
    """A pass over `archive` from its beginning to its end, in verify mode."""
    with file_with(archive) as descriptor:
        run = Pass(descriptor, **options)  # type: ignore[arg-type] # options of Pass, whatever they are
        run.start(names)
        run.finish()
    return run


class Receiver:
    """The broker's end of the volumes: fetches each when it is announced, and keeps its SHA-256.

    `pause` (if any) is called with the connection before anything is read from it.
    """

    def __init__(
        self, emit: Callable[[m.Message], None], pause: Callable[[socket.socket], object] | None = None
    ) -> None:
        self._emit = emit
        self._pause = pause
        self.sha256: dict[str, str] = {}
        self.connections: list[socket.socket] = []
        self.threads: list[threading.Thread] = []

    def announce(self, ready: m.VolumeReady) -> "Future[socket.socket]":
        ours, theirs = socket.socketpair()
        self._emit(ready)
        self.connections.append(ours)
        self.threads.append(in_thread(lambda: self._receive(f"{ready.key}.{ready.volume}", ours)))
        taker: Future[socket.socket] = Future()
        taker.set_result(theirs)
        return taker

    def _receive(self, name: str, connection: socket.socket) -> None:
        with connection:
            if self._pause is not None:
                self._pause(connection)
            sha256 = receive(connection)
            if sha256 is not None:
                self.sha256[name] = sha256


def receive(connection: socket.socket) -> str | None:
    """Read a volume's stream to its end: the SHA-256 of the image, None if the stream broke off."""
    beginning = _exactly(connection, len(encode_header(0)))
    if not beginning:
        return None
    size = int.from_bytes(beginning[-8:], "big")
    decoder = VolumeDecoder(size)
    decoder.feed(beginning)
    digest, position = hashlib.sha256(), 0
    while decoder.wanted:
        header = _exactly(connection, decoder.wanted)
        if not header:
            return None
        if (extent := decoder.feed(header)) is not None:
            _hash_zeros(digest.update, extent.offset - position)
            data = _exactly(connection, extent.length)
            if len(data) < extent.length:
                return None
            digest.update(data)
            position = extent.offset + extent.length
    if size < MAX_IMAGE_SIZE:
        _hash_zeros(digest.update, size - position)
    return digest.hexdigest()


def _hash_zeros(update: Callable[[bytes], None], count: int) -> None:
    while count:
        piece = min(count, MIB)
        update(bytes(piece))
        count -= piece


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    with contextlib.suppress(OSError):
        while len(data) < size and (piece := connection.recv(size - len(data))):
            data += piece
    return data if len(data) == size else b""
