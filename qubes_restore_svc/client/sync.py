"""The same call for programs without asyncio: every method blocks until it is done.

Strategy: the call lives in the event loop of a thread of its own; a method hands its request over to that
thread, and waits for the answer. So a program can cancel from any thread while another one waits, and does
not have to poll. The observer is called in that thread.
"""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

from qubes_restore_svc.client.aio import RestoreCall
from qubes_restore_svc.client.transports import Transport
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.report import Observer, Report

_T = TypeVar("_T")


def list_backup_blocking(transport: Transport, request: c.OpenBackup) -> c.Plan:
    """What is in the backup, as a plan that is not carried out. Raises RestoreError."""
    with BlockingRestoreCall(transport, request.model_copy(update={"mode": "list"})) as call:
        return call.plan


class BlockingRestoreCall:
    """One call, a context manager: entering it opens the backup, leaving it closes the call.

    See `aio.RestoreCall`; errors are the same. A KeyboardInterrupt that comes while a method waits cancels
    what it waits for.
    """

    def __init__(self, transport: Transport, request: c.OpenBackup, observer: Observer | None = None) -> None:
        self._call = RestoreCall(transport, request, observer)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._started = threading.Event()
        self._no_loop: OSError | None = None
        self._thread = threading.Thread(target=self._live, name="restore call", daemon=True)
        self._cancelled = False
        self._under_way: set[asyncio.Task[Any]] = set()

    @property
    def plan(self) -> c.Plan:
        """The last plan."""
        return self._call.plan

    @property
    def report(self) -> Report | None:
        """The report, as soon as dom0 has sent it, however `confirm` ended."""
        return self._call.report

    def __enter__(self) -> Self:
        """Connect, open the backup and wait for the plan. Raises RestoreError."""
        self._thread.start()
        self._started.wait()
        if self._no_loop is not None:
            self._thread.join()
            raise HostFailed(
                f"dom0 cannot be called: {self._no_loop.strerror}",
                advice="Close some programs, and try again.",
            ) from self._no_loop
        try:
            self._do(self._call.__aenter__())
        except BaseException:
            self._end_thread()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._do(self._call.__aexit__())
        finally:
            self._end_thread()

    def choose(self, choice: c.Choice) -> c.Plan:
        """Have another plan made, from this choice alone. Raises RestoreError; the call is over then."""
        return self._do(self._call.choose(choice))

    def confirm(self) -> Report:
        """Carry out the last plan, and return the report. Raises RestoreError."""
        return self._do(self._call.confirm())

    def cancel(self) -> None:
        """Cancel, from any thread, the observer's among them, at any time; returns at once."""
        with self._lock:
            self._cancelled = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._call.request_cancel)

    def _do(self, work: Coroutine[Any, Any, _T]) -> _T:
        with self._lock:  # who leaves meanwhile waits, so that nothing is handed to a loop that has ended
            assert self._loop is not None, "the call has not been entered, or has been left"
            future: concurrent.futures.Future[_T] = asyncio.run_coroutine_threadsafe(
                self._noted(work), self._loop
            )
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _end_thread(self) -> None:
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _live(self) -> None:
        try:
            with asyncio.Runner() as runner:
                runner.run(self._until_stopped())
        except OSError as error:  # no descriptor is left for a loop
            if self._started.is_set():
                raise
            self._no_loop = error
        finally:
            self._started.set()

    async def _until_stopped(self) -> None:
        self._stop = asyncio.Event()
        with self._lock:
            self._loop = asyncio.get_running_loop()
            if self._cancelled:
                self._call.request_cancel()
        self._started.set()
        await self._stop.wait()
        # What was cancelled still clears up; ending the loop would cancel that as well.
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _noted(self, work: Coroutine[Any, Any, _T]) -> _T:
        task = asyncio.current_task()
        assert task is not None
        self._under_way.add(task)
        try:
            return await work
        finally:
            self._under_way.discard(task)
