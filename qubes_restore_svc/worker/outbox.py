"""Messages on their way to the broker.

Strategy: the threads of the pipeline put messages in and wait while many are there, so that a broker that
does not read stops the pipeline like one that does not fetch; the event loop takes them out, one at a time.
"""

import asyncio
import contextlib
import threading

from qubes_restore_svc.wire import messages as m

#: Messages that may wait; the largest, a manifest apart, has 2 MiB.
_MAX_WAITING = 16


class Outbox:
    """The queue between threads and the event loop `loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._messages: asyncio.Queue[m.Message] = asyncio.Queue()
        self._changed = threading.Condition()
        self._count = 0
        self._closed = False

    def put(self, message: m.Message) -> None:
        """Queue a message; waits for room. Never to be called on the event loop."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._count < _MAX_WAITING)
            self._add(message)

    def put_if_idle(self, message: m.Message) -> None:
        """Queue a message unless others wait; on the event loop."""
        with self._changed:
            if not self._count:
                self._add(message)

    async def get(self) -> m.Message:
        """The next message; `sent` must follow."""
        return await self._messages.get()

    def sent(self) -> None:
        """The message of the last `get` has left."""
        with self._changed:
            self._count -= 1
            self._changed.notify()

    def close(self) -> None:
        """Drop what comes from now on, and let nobody wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _add(self, message: m.Message) -> None:
        if self._closed:
            return
        self._count += 1
        with contextlib.suppress(RuntimeError):  # the loop is closed: the session is over
            self._loop.call_soon_threadsafe(self._messages.put_nowait, message)
