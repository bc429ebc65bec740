"""The worker's DisposableVM: a qube of its own for one restore, without network.

Strategy: it is created under a name that nobody has, with its memory all at once (keys need it at once) and
with the tag that the policy knows. Nothing in dom0 tells how much memory is free: qmemman takes from other
qubes what they do not use. So if nobody has said how much the worker gets, it is tried: qubesd refuses a
start if it cannot get the memory, and the next attempt asks for less. On leaving, the tag goes first, and
with it all that the policy grants, then the qube. What a killed restore left behind is removed before the
next one begins.
"""

import asyncio
import contextlib
import os
import secrets
from collections.abc import Iterable, Mapping

from qubes_restore_svc.errors import HostFailed, RestoreError, UsageError, WorkerLost, WorkerMissing
from qubes_restore_svc.qubes.config import CONFIG_PATH
from qubes_restore_svc.qubes.guard import connect_patiently
from qubes_restore_svc.qubes.qrexec import (
    QrexecCalls,
    Undoable,
    read_answer,
    undo,
    worker_called,
)
from qubes_restore_svc.qubes.system import NotEnoughMemory, QubesSystem
from qubes_restore_svc.qubes.tags import (
    WORKER_NAME,
    WORKER_PREFIX,
    WORKER_TAG,
    clear_untagged,
    clear_worker,
)
from qubes_restore_svc.waiting import ask, in_thread, started, to_the_end
from qubes_restore_svc.wire.qrexec_call import NO_SERVICE, READY, READY_ARGUMENT, SESSION
from qubes_restore_svc.wire.restore_call import AUTO, Auto

PACKAGE = "qubes-restore-svc-vm"

_NAME_ATTEMPTS = 100
#: Seconds until a process whose stream has ended has ended as well.
_SHORTLY_S = 1.0


#: MiB for each processor beyond which memory gains little: at N = 2^19 four lanes with a whole table each, or
#: eight with every second block, which take a tenth less. And MiB for the chunks and the qube's own system.
MIB_A_PROCESSOR, _MIB_BESIDE = 2048, 1024
#: MiB with which no template of today starts, or no backup is restored.
LEAST_MIB = 400
#: Most processors that are taken: the unpacking keeps pace with no more (docs/performance.md).
MOST_VCPUS = 8


def automatic_vcpus(most: int | None = None) -> int:
    """As many as dom0 has: Xen gives dom0 one for each core of the computer, unless dom0_max_vcpus is set."""
    return min(len(os.sched_getaffinity(0)), MOST_VCPUS, most or MOST_VCPUS)


def automatic_sizes(vcpus: int, total: int | None, most: int | None = None) -> list[int]:
    """MiB to try, from the most that is of use down to the least. `total` is the computer's memory; half of
    it is for others."""
    size = MIB_A_PROCESSOR * vcpus + _MIB_BESIDE
    size = min(size, size if total is None else total // 2, most or size)
    sizes = []
    while size > LEAST_MIB:
        sizes.append(size)
        size = size * 2 // 3
    return [*sizes, LEAST_MIB]


def worker_properties(memory: int, vcpus: int) -> Mapping[str, str]:
    """What the disposable has: no network, exactly `memory` MiB, and it is removed when it stops."""
    return {
        "netvm": "",
        "maxmem": "0",  # no balancing: what it has must not be taken away while keys are derived
        "memory": str(memory),
        "vcpus": str(vcpus),
        "auto_cleanup": "True",
    }


class WorkerVm(Undoable):
    """The qube, started when this is entered and gone when it is left; `memory` in MiB.

    With `auto` it has as many processors, or as much memory, as there is and is of use, and `most` (MiB,
    processors) at the most.
    """

    def __init__(
        self,
        system: QubesSystem,
        template: str,
        memory: int | Auto,
        vcpus: int | Auto,
        most: tuple[int | None, int | None] = (None, None),
    ) -> None:
        self._system = system
        self._template = template
        self._automatic = memory == AUTO
        self._memory = 0 if memory == AUTO else memory
        self._most_memory, most_vcpus = most
        self._vcpus = automatic_vcpus(most_vcpus) if vcpus == AUTO else vcpus
        self.name = ""  #: the qube's name, empty as long as there is none

    @property
    def size(self) -> str:
        """What it has, as a clause."""
        return f"the worker has {self._memory} MiB of memory and {self._vcpus} processors"

    async def set_up(self) -> None:
        """Create and start it. Raises HostFailed."""
        sizes = [self._memory]
        if self._automatic:
            sizes = automatic_sizes(self._vcpus, await ask(self._system.memory), self._most_memory)
        for self._memory in sizes:
            await to_the_end(self._create())
            try:
                await self._start()
                return
            except NotEnoughMemory as error:
                if self._memory == sizes[-1]:
                    raise self._failed("started", error) from error
                left = await to_the_end(self.take_down(error))
                if left:
                    raise HostFailed("; ".join(left)) from error

    async def take_down(self, error: BaseException | None) -> list[str]:
        """Take its tag, then the qube itself away."""
        name, self.name = self.name, ""
        # A start that failed has removed it already.
        if name == "" or not await in_thread(self._system.may_exist, name):
            return []
        left = await undo(
            lambda: self._system.discard_tag(name, WORKER_TAG), f"the tag {WORKER_TAG} of the qube {name}"
        )
        left += await undo(lambda: self._system.destroy(name), f"the qube {name}")
        return left if await in_thread(self._system.may_exist, name) else []

    async def _create(self) -> None:
        name = await started(self._free_name)
        try:
            await started(
                lambda: self._system.create(
                    name,
                    "DispVM",
                    "red",
                    template=self._template,
                    tags=[WORKER_TAG],
                    properties=worker_properties(self._memory, self._vcpus),
                )
            )
        except RestoreError as error:
            # Half of it may be there. Without the tag somebody else may have taken the name.
            with contextlib.suppress(RestoreError):
                if name in await started(self._system.tagged, WORKER_TAG):
                    self.name = name
            raise self._failed("created", error) from error
        self.name = name

    def _free_name(self) -> str:
        for _ in range(_NAME_ATTEMPTS):
            name = f"{WORKER_PREFIX}{secrets.randbelow(10000):04}"
            if not self._system.exists(name):
                return name
        raise HostFailed("there is no free name for the worker's qube", advice="Remove some disposables.")

    async def _start(self) -> None:
        starting = started(self._system.start, self.name)
        try:
            await asyncio.wait([starting])
        except asyncio.CancelledError:
            # Starting takes a while; killing the qube ends it at once.
            with contextlib.suppress(RestoreError):
                await in_thread(self._system.destroy, self.name)
            with contextlib.suppress(RestoreError):
                await to_the_end(starting)
            raise
        error = starting.exception()
        if isinstance(error, RestoreError) and not isinstance(error, NotEnoughMemory):
            raise self._failed("started", error) from error
        starting.result()

    def _failed(self, done: str, error: RestoreError) -> HostFailed:
        if isinstance(error, NotEnoughMemory) and self._automatic:
            advice = f"Not even {self._memory} MiB are free. Shut some qubes down."
        elif isinstance(error, NotEnoughMemory):
            advice = (
                f"It needs {self._memory} MiB. Shut some qubes down, or let it have what there is: --memory"
                f" auto (or in {CONFIG_PATH})."
            )
        else:
            advice = f"See whether other disposables of it start: qvm-run --dispvm={self._template} true."
        return HostFailed(f"the worker's qube could not be {done}: {error.reason}", advice=advice)


async def choose_template(system: QubesSystem, template: str | None) -> str:
    """The disposable template to make the worker of: `template`, or the system's own for management.

    Raises UsageError if that is none, and WorkerMissing if it says that it has no worker.
    """
    name = template or await ask(system.default, "management_dispvm")
    is_one = None if name is None else await ask(system.is_disposable_template, name)
    if name is None or not is_one:
        why = "this system has no management disposable template"
        if name is not None:
            why = f"there is no qube {name}" if is_one is None else f"no disposables can be made from {name}"
        raise UsageError(why, advice="Name a disposable template with --mgmt-template NAME.")
    if await ask(system.reports_service, name, SESSION) is False:
        raise await worker_missing(system, name)
    return name


async def ask_ready(
    system: QubesSystem, calls: QrexecCalls, qube: str, template: str, timeout_s: float
) -> None:
    """Ask the worker for a sign of life; raises WorkerMissing or WorkerLost if there is none."""
    with worker_called():
        connection, call = await calls.converse(qube, f"{SESSION}+{READY_ARGUMENT}")
    with connection:
        connection.setblocking(False)
        try:
            async with asyncio.timeout(timeout_s):
                untrusted_answer = await read_answer(connection, len(READY))
        except TimeoutError:
            raise WorkerLost(f"the worker was not ready after {timeout_s:.0f} seconds") from None
        if untrusted_answer == READY:
            return
        code = await call.wait(_SHORTLY_S)
    if code == NO_SERVICE:
        raise await worker_missing(system, template)
    raise WorkerLost(
        "the worker did not say that it is ready" + (f": {call.fault}" if call.fault else ""),
        advice=f"Check that {template} has the newest version of the worker's package, and try again.",
    )


async def worker_missing(system: QubesSystem, template: str) -> WorkerMissing:
    """The error for a disposable template without a worker: it names what to install, where and how."""
    # What a disposable runs is installed in the template of its template.
    where = await ask(system.template_of, template) or template
    return WorkerMissing(
        f"the template {where}, which the disposables of {template} run, has no worker",
        advice=(
            f"Install the package {PACKAGE} in {where}: sudo dnf install {PACKAGE} (Fedora) or"
            f" sudo apt install {PACKAGE} (Debian) there; shut {where} down and try again."
        ),
    )


async def clear_worker_left(system: QubesSystem) -> None:
    """Remove the worker and the tags that a killed restore has left. Only under the worker's lock.

    Raises HostFailed: what still carries a tag of ours could reach the next backup.
    """
    found = await in_thread(clear_worker, system)
    if found.kept:
        raise HostFailed("; ".join(found.kept))


def clear_up_after_kill(being_created: Iterable[str]) -> None:
    """What the guard of the worker's lock does. There is nobody to tell; the next restore tries again."""
    system = connect_patiently()
    with contextlib.suppress(RestoreError):
        clear_worker(system)
    with contextlib.suppress(RestoreError):
        clear_untagged(system, (name for name in being_created if WORKER_NAME.fullmatch(name)))
