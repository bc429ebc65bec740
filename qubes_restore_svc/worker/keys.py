"""Key derivations, several at once and out of order.

Strategy: requests queue in archive order; as many threads as there are jobs take them from the front, wait
for the memory, and hand what they took to the engine. OpenSSL's scrypt releases the interpreter lock, so
the derivations really run side by side. A result is a future; nobody waits for the others.
"""

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

from qubes_restore_svc.archive.kdf import KdfEngine, KdfRequest
from qubes_restore_svc.errors import Cancelled
from qubes_restore_svc.worker.budget import Budget


@dataclass(frozen=True, slots=True)
class _Job:
    request: KdfRequest
    result: "Future[bytes]"


class KeyScheduler:
    """`jobs` threads around one `engine`, under the `budget` to which the chunks were admitted before."""

    def __init__(self, engine: KdfEngine, budget: Budget, jobs: int) -> None:
        self._engine = engine
        self._budget = budget
        self._jobs: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._turn = threading.Lock()
        self._closed = False
        for number in range(jobs):
            threading.Thread(target=self._work, name=f"kdf-{number}", daemon=True).start()

    def submit(self, request: KdfRequest) -> "Future[bytes]":
        """The 64-byte key of `request`, some time. `cancel` on the future takes it back while it waits."""
        job = _Job(request, Future())
        with self._wake:
            if not self._closed:
                self._jobs.append(job)
                self._wake.notify()
                return job.result
        self._drop(job)
        return job.result

    def close(self) -> None:
        """Let the threads end once the derivations that run now are over; the waiting ones are dropped."""
        with self._wake:
            self._closed = True
            dropped, self._jobs = self._jobs, deque()
            self._wake.notify_all()
        for job in dropped:
            self._drop(job)

    def _work(self) -> None:
        while (job := self._next_started()) is not None:
            memory = job.request.parameters.memory
            try:
                (key,) = self._engine.derive([job.request])
            except BaseException as error:  # noqa: BLE001 - somebody waits for this future, whatever happened
                self._budget.end_derivation(memory)
                job.result.set_exception(error)
            else:
                self._budget.end_derivation(memory)
                job.result.set_result(key)

    def _next_started(self) -> _Job | None:
        """The first waiting job, its memory taken; None when there will be no more."""
        # One thread at a time waits here, for the job at the front: a large derivation is never
        # overtaken again and again by small ones behind it.
        with self._turn:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._closed or self._jobs)
                    if self._closed:
                        return None
                    job = self._jobs.popleft()
                memory = job.request.parameters.memory
                if job.result.cancelled():
                    self._budget.forget_derivation(memory)
                    continue
                try:
                    self._budget.start_derivation(memory)
                except Cancelled as error:
                    if job.result.set_running_or_notify_cancel():
                        job.result.set_exception(error)
                    return None
                # It may have been taken back while it waited for its memory.
                if job.result.set_running_or_notify_cancel():
                    return job
                self._budget.end_derivation(memory)

    def _drop(self, job: _Job) -> None:
        self._budget.forget_derivation(job.request.parameters.memory)
        if job.result.set_running_or_notify_cancel():
            job.result.set_exception(Cancelled("the restore was cancelled"))
