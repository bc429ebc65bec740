"""The tags of a restore: what each one means, who sets it and who clears it; and what a killed restore left.

* `IN_PROGRESS_TAG` and `UNFINISHED_TAG` are on a qube that is not complete. It gets them as it is created
  (`qube.py`), and `set_finished` clears them.
* `WORKER_TAG` is on the worker's disposable. It gets it as it is created, and it is cleared before the
  disposable is destroyed (`worker_vm.py`).
* `STORAGE_TAG` is on the qube that holds the backup. `PathSource` sets and clears it (`backup_source.py`).
* After a restore was killed, `clear_unfinished_qubes` and `clear_worker` here clear what it left of these.
* `RESTORED_TAG`, with the backup's id, is on a qube that was restored. `set_finished` sets it, and it stays.
* Tags of the backup itself that the configuration lets back are set with the other settings (`qube.py`).

Strategy: the tags tell what was left, and only what is certainly ours is removed. An unfinished
qube of this program carries two tags and has never been started; a worker is a disposable with the worker's
tag and a worker's name. The caller holds the lock under which such things are made. So they cannot belong to
a restore that runs.
"""

import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from qubes_restore_svc.broker.interfaces import RESTORED_TAG, restored_tag
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.qubes.system import QubeInUse, QubesSystem, insist

#: Qubes' own: a qube that carries it cannot be started.
IN_PROGRESS_TAG = "backup-restore-in-progress"
#: Ours, beside the other one: an unfinished qube of this program, which a later restore may remove.
UNFINISHED_TAG = "restore-svc-unfinished"
UNFINISHED = (IN_PROGRESS_TAG, UNFINISHED_TAG)
#: On the worker's disposable. The policy lets a qube so tagged fetch the archive, and do nothing else.
WORKER_TAG = "restore-svc-worker"
#: On the qube that holds the backup: the one from which the archive may be fetched.
STORAGE_TAG = "restore-svc-storage"

#: Seconds that an import whose restore was killed may take to end.
IMPORTS_END_TIMEOUT_S = 120.0
#: Seconds in which a qube appears that qubesd was asked for.
APPEAR_TIMEOUT_S = 5.0

#: What a worker's disposable is called: this, and four digits.
WORKER_PREFIX = "disp-restore-"
WORKER_NAME = re.compile(WORKER_PREFIX + "[0-9]{4}")
_IMPORT_SERVICE = b"/admin.vm.volume.ImportWithSize"
#: Said of a qube that has lost the other tag: the stock restore in a disposable takes it from every qube.
_STARTABLE = (
    "was left by an interrupted restore, incomplete, and something has allowed it to start since: remove it"
    f" (qvm-remove) and restore it again, or keep it as it is (qvm-tags QUBE del {UNFINISHED_TAG})"
)

_PAUSE_S = 0.1


def set_finished(system: QubesSystem, name: str, backup_id: str) -> list[str]:
    """Make a complete qube startable; returns clauses on what could not be set. Raises HostFailed if it
    cannot be."""
    remarks = []
    try:
        system.add_tag(name, restored_tag(backup_id))
    except HostFailed as error:
        remarks.append(error.reason)
    system.discard_tag(name, IN_PROGRESS_TAG)
    try:
        system.discard_tag(name, UNFINISHED_TAG)
    except HostFailed as error:  # alone it says nothing, and the next restore removes it
        remarks.append(error.reason)
    return remarks


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
                partial(insist, partial(system.remove, name), APPEAR_TIMEOUT_S),  # qubesd may be busy with it
                f"{name}, which an interrupted restore had just created, was removed",
                f"{name}, which an interrupted restore had just created, could not be removed",
            )
    return found


def wait_for_imports() -> None:
    """Wait until no volume is being imported any more, `IMPORTS_END_TIMEOUT_S` at most.

    The import is a process of its own, and outlives the process that feeds it: it notices the end of its
    data, and waits for the disk. A storage pool does not remove a volume that it has open, and qubesd tries
    only once.
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
