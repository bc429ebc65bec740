"""Messages on their way to the broker.

Strategy: the threads of the pipeline put messages in and wait while many are there, so that a broker that
does not read stops the pipeline like one that does not fetch; the event loop takes them out, one at a time.
"""

import asyncio
import contextlib
import threading

from qubes_restore_svc.wire import messages as m

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
