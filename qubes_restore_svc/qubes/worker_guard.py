"""What removes a worker whose restore, verification or listing was killed."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qubes_restore_svc.errors import RestoreError
from qubes_restore_svc.qubes.guard import Guard
from qubes_restore_svc.qubes.leftovers import (
    WORKER_NAME,
    clear_untagged,
    clear_worker,
    connect_patiently,
)
from qubes_restore_svc.qubes.system import QubesSystem


@contextmanager
def worker_guard(
    system: QubesSystem,
    lock_file: int,
    lock_path: Path,
    connect: Callable[[], QubesSystem] = QubesSystem.connect,
) -> Iterator[None]:
    """While it lasts, a guard stands by: if this process is killed, it removes the worker and its access.

    To be entered under the worker's lock, before there is one. `connect` makes the connection of the guard,
    which cannot use this one. Raises HostFailed.
    """

    def clear_up(being_created: Iterable[str]) -> None:
        guards = connect_patiently(connect)
        with suppress(RestoreError):  # there is nobody to tell; the next restore tries again
            clear_worker(guards)
        with suppress(RestoreError):
            clear_untagged(guards, (name for name in being_created if WORKER_NAME.fullmatch(name)))

    guard = Guard(lock_file, lock_path, clear_up)
    try:
        with system.watched_by(guard):
            yield
    finally:
        guard.dismiss()
