"""What a restore that ended in an unforeseen way has left on a Qubes system, and how it is taken away.

Strategy: only what is ours without doubt. An unfinished qube of this program carries two tags and has never
been started; a worker is a disposable with the worker's tag and a worker's name. Whoever calls this holds the
lock under which such things come into being, so none of them can belong to a restore that runs.
"""

import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from qubes_restore_svc.broker.host import RESTORED_TAG
from qubes_restore_svc.errors import HostFailed, RestoreError
from qubes_restore_svc.qubes.faults import QubeInUse
from qubes_restore_svc.qubes.qube import IN_PROGRESS_TAG, UNFINISHED_TAG
from qubes_restore_svc.qubes.system import QubesSystem

#: On the worker's disposable, and on the qube that holds the backup, while a worker runs.
WORKER_TAG = "restore-svc-worker"
STORAGE_TAG = "restore-svc-storage"

#: Seconds that a guard tries to reach a qubesd that does not answer.
CONNECT_TIMEOUT_S = 60.0
#: Seconds that an import whose restore was killed may take to end.
IMPORTS_END_TIMEOUT_S = 120.0
#: Seconds in which a qube appears that qubesd was asked for.
APPEAR_TIMEOUT_S = 5.0

#: What a worker's disposable is called.
WORKER_NAME = re.compile(r"disp-restore-[0-9]{4}")
_IMPORT_SERVICE = b"/admin.vm.volume.ImportWithSize"
#: Of a qube that the stock restore in a disposable took the other tag from, as it does from every qube.
_STARTABLE = (
    "was left by an interrupted restore, incomplete, and something has allowed it to start since: remove it"
    f" (qvm-remove) and restore it again, or keep it as it is (qvm-tags QUBE del {UNFINISHED_TAG})"
)

_PAUSE_S = 0.1
_CONNECT_PAUSE_S = 0.5


def connect_patiently(connect: Callable[[], QubesSystem]) -> QubesSystem:
    """The connection of a guard, which has nobody to tell that there is none yet. Raises RestoreError."""
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            return connect()
        except RestoreError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_CONNECT_PAUSE_S)


@dataclass(slots=True)
class Leftovers:
    """Clauses for the person: what was cleared up, and what could not be."""

    cleared: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def attempt(self, action: Callable[[], None], cleared: str, kept: str) -> None:
        """Do it, and note `cleared`, or `kept` and why."""
        try:
            action()
        except HostFailed as error:
            self.kept.append(f"{kept}: {error.reason}")
        else:
            self.cleared.append(cleared)


def clear_unfinished_qubes(system: QubesSystem) -> Leftovers:
    """Remove the qubes that a restore began and did not finish. Only under the restore lock."""
    found = Leftovers()
    tags = system.tags()
    unfinished = [name for name, has in tags.items() if {IN_PROGRESS_TAG, UNFINISHED_TAG} <= has]
    for name, has in tags.items():
        if UNFINISHED_TAG not in has or IN_PROGRESS_TAG in has:
            continue
        if any(tag.startswith(RESTORED_TAG) for tag in has):  # it was finished, but for this tag
            _discard(found, system, name, UNFINISHED_TAG)
        else:  # somebody may have used it since: it is not ours to remove any more
            found.kept.append(f"{name} {_STARTABLE}")
    if unfinished:
        wait_for_imports()
    # Those that others are based on come after those, however long the chain.
    while unfinished:
        in_use = [name for name in unfinished if not _removed(system, name, found)]
        if len(in_use) == len(unfinished):
            for name in in_use:
                found.kept.append(f"{name}, left by an interrupted restore, is used by other qubes")
            break
        unfinished = in_use
    return found


def clear_worker(system: QubesSystem) -> Leftovers:
    """Remove a worker and the tag that lets it reach the backup. Only under the worker's lock."""
    found = Leftovers()
    tags = system.tags()
    for name, has in tags.items():
        if STORAGE_TAG in has:
            _discard(found, system, name, STORAGE_TAG)
    for name, has in tags.items():
        if WORKER_TAG not in has:
            continue
        # A disposable has the tags of its template: the tag alone does not make it a worker.
        if WORKER_NAME.fullmatch(name) and system.klass(name) == "DispVM":
            found.attempt(
                partial(system.destroy, name),
                f"{name}, the worker of an interrupted restore, was removed",
                f"{name}, the worker of an interrupted restore, could not be removed",
            )
        else:
            _discard(found, system, name, WORKER_TAG)
    return found


def clear_untagged(system: QubesSystem, names: Iterable[str]) -> Leftovers:
    """Remove qubes that were asked for and did not get their tags before the one who asked was killed."""
    found = Leftovers()
    for name in names:
        deadline = time.monotonic() + APPEAR_TIMEOUT_S
        while not system.exists(name) and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)
        if system.exists(name):
            found.attempt(
                partial(_remove_patiently, system, name),
                f"{name}, which an interrupted restore had just created, was removed",
                f"{name}, which an interrupted restore had just created, could not be removed",
            )
    return found


def wait_for_imports() -> None:
    """Wait until no volume is being imported any more, `IMPORTS_END_TIMEOUT_S` at most.

    The import is a process of its own that outlives whoever feeds it: it notices the end of its data, and
    waits for the disk. A storage pool does not remove a volume that it has open, and qubesd tries only once.
    """
    deadline = time.monotonic() + IMPORTS_END_TIMEOUT_S
    while _import_runs() and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)


def _discard(found: Leftovers, system: QubesSystem, name: str, tag: str) -> None:
    found.attempt(
        partial(system.discard_tag, name, tag),
        f"the tag {tag} of an interrupted restore was taken from {name}",
        f"the tag {tag} of an interrupted restore could not be taken from {name}",
    )


def _removed(system: QubesSystem, name: str, found: Leftovers) -> bool:
    """False if it cannot be removed yet because others use it."""
    try:
        system.remove(name)
    except QubeInUse:
        return False
    except HostFailed as error:
        found.kept.append(f"{name}, left by an interrupted restore, could not be removed: {error.reason}")
    else:
        found.cleared.append(f"{name} was removed: a restore that was interrupted had left it, incomplete")
    return True


def _remove_patiently(system: QubesSystem, name: str) -> None:
    """Remove a qube that qubesd may still be busy with."""
    deadline = time.monotonic() + APPEAR_TIMEOUT_S
    while True:
        try:
            system.remove(name)
            return
        except HostFailed:
            if time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_S)


def _import_runs() -> bool:
    for process in os.listdir("/proc"):
        if process.isdecimal():
            try:
                with open(f"/proc/{process}/cmdline", "rb") as command_line:
                    words = command_line.read().split(b"\0")
            except OSError:
                continue
            if any(word.endswith(_IMPORT_SERVICE) for word in words):
                return True
    return False
