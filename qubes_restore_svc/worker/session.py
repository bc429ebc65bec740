"""The worker's side of `restore.Session`: messages in, the answers of its work out.

Strategy: the event loop only carries messages. What blocks runs in threads, whose answers come back through
the outbox. The threads wait while many answers have not been sent. So a broker that does not read stops the
work, as one that does not fetch. Nobody waits for the threads: one that reads from a silent pipe, or derives
a key, ends when it can. Every message, in either direction, passes the connection of `wire/messages.py`. The
session is over when the broker hangs up or cancels, when everything has been said, or when one side breaks
the protocol.
"""

import asyncio
import concurrent.futures
import contextlib
import socket
import threading

from qubes_restore_svc.errors import ProtocolViolation
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.worker.output import VolumeOffers
from qubes_restore_svc.worker.threads import as_restore_error
from qubes_restore_svc.worker.work import Resources, Work

#: Seconds between signs of life.
HEARTBEAT_S = 0.5

#: Seconds that the broker gets, when all has been said, to read it and to hang up.
LINGER_S = 10.0

_READ_SIZE = 64 << 10


class Session:
    """One session, over the streams of one `restore.Session` call."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        resources: Resources,
        offers: VolumeOffers,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._resources = resources
        self._offers = offers
        self._connection = m.worker_end()
        self._outbox = Outbox(asyncio.get_running_loop())
        self._work: Work | None = None

    async def run(self) -> None:
        """Serve the session to its end."""
        tasks = [asyncio.create_task(job()) for job in (self._receive, self._send, self._heartbeat)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        except (ProtocolViolation, OSError):
            pass  # The broker broke the protocol or is gone: there is nobody to tell.
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._stop()
            # Not in an orderly way: a broker that does not read would never let it end.
            self._writer.transport.abort()

    @property
    def _closed(self) -> bool:
        state, work = self._connection.state, self._work
        failed = state is m.State.IDLE and work is not None and not work.waits_for_passphrase
        return failed or state is m.State.CLOSED

    async def _receive(self) -> None:
        while untrusted_data := await self._reader.read(_READ_SIZE):
            self._connection.receive(untrusted_data)
            while (message := self._connection.next_message()) is not None:
                if isinstance(message, m.Cancel):
                    return
                self._try_to(message)

    def _try_to(self, message: m.BrokerMessage) -> None:
        try:
            self._act(message)
        except ProtocolViolation:
            raise
        except Exception as error:  # noqa: BLE001 - no thread or no memory is left: the broker waits for a word
            self._outbox.put_at_once(m.Failed(error=m.ErrorInfo.of(as_restore_error(error))))

    def _act(self, message: m.BrokerMessage) -> None:
        if isinstance(message, m.Open) and self._work is not None:
            self._work.open_with(message.passphrase.get_secret_value())
        elif isinstance(message, m.Open):
            if message.storage is not None:
                self._resources.archive.fetch_from(message.storage)
            self._work = Work(message, self._resources, self._outbox.put, self._announce)
        elif self._work is not None and isinstance(message, m.Start):
            self._work.start(message)
        elif self._work is not None and isinstance(message, m.SkipQube):
            self._work.skip(message.key)

    async def _send(self) -> None:
        while not self._closed:
            message = await self._outbox.get()
            self._writer.write(self._connection.send(message))
            await self._writer.drain()
            self._outbox.sent()
        # A broker that is just saying something must not find the connection broken before it has read this.
        self._writer.write_eof()
        await asyncio.sleep(LINGER_S)

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if self._work is not None and self._connection.may_come(m.Progress):
                self._outbox.put_if_idle(self._work.progress())

    def _announce(self, ready: m.VolumeReady) -> "concurrent.futures.Future[socket.socket]":
        offer = self._offers.offer(ready.key, ready.volume)
        self._outbox.put(ready)
        return offer

    def _stop(self) -> None:
        """Let all threads come to an end."""
        self._outbox.close()
        if self._work is not None:
            self._work.stop()


#: Messages that may wait.
_MAX_WAITING = 16

#: Bytes of settings, as they travel, that may wait behind the first message. They take several times as much
#: here, and an honest qube has a few KiB.
_MAX_WAITING_BYTES = 1 << 20


class Outbox:
    """The queue between threads and the event loop `loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._messages: asyncio.Queue[tuple[m.Message, int]] = asyncio.Queue()
        self._changed = threading.Condition()
        self._count = 0
        self._bytes = 0
        self._size = 0  #: of the message that is being sent
        self._closed = False

    def put(self, message: m.Message) -> None:
        """Queue a message; waits for room. Never to be called on the event loop."""
        size = len(m.encode_message(message)) if isinstance(message, m.QubeSettings) else 0
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(size))
            self._add(message, size)

    def put_if_idle(self, message: m.Message) -> None:
        """Queue a message unless others wait; on the event loop."""
        with self._changed:
            if not self._count:
                self._add(message, 0)

    def put_at_once(self, message: m.Message) -> None:
        """Queue a message, however many wait; on the event loop, for the last word."""
        with self._changed:
            self._add(message, 0)

    async def get(self) -> m.Message:
        """The next message; `sent` must follow."""
        message, self._size = await self._messages.get()
        return message

    def sent(self) -> None:
        """The message of the last `get` has left."""
        with self._changed:
            self._count -= 1
            self._bytes -= self._size
            self._changed.notify()

    def close(self) -> None:
        """Drop what comes from now on, and let nobody wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _has_room(self, size: int) -> bool:
        return not self._count or (self._count < _MAX_WAITING and self._bytes + size <= _MAX_WAITING_BYTES)

    def _add(self, message: m.Message, size: int) -> None:
        if self._closed:
            return
        self._count += 1
        self._bytes += size
        with contextlib.suppress(RuntimeError):  # the loop is closed: the session is over
            self._loop.call_soon_threadsafe(self._messages.put_nowait, (message, size))
