"""Who carries out what `qvm-backup-restore --mgmt-vm` was asked for: dom0 itself, or dom0 when it is asked.

Strategy: the command speaks to a `Restorer`, and shows whatever it says in the same way. In dom0 it is the
broker; in a qube, a call of dom0's restore service.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from qubes_restore_svc.broker.client import SessionOptions
from qubes_restore_svc.broker.job import Confirm
from qubes_restore_svc.broker.plan import Plan, PlanOptions
from qubes_restore_svc.cli.qvm_arguments import RestoreArguments
from qubes_restore_svc.cli.qvm_remote import remote_restorer
from qubes_restore_svc.client import transports
from qubes_restore_svc.qubes.restore import PLACES, Places, Wishes, dom0_restore
from qubes_restore_svc.qubes.storage import Dom0File, Location, QubePath, QubeService
from qubes_restore_svc.wire.report import Observer, Report


class Restorer(Protocol):
    """Carries out one restore or verification."""

    async def check(self) -> None:
        """Find out early what would fail late. Raises RestoreError."""
        ...

    def check_plan(self, plan: Plan) -> None:
        """Raises UsageError for a plan beyond the administrator's limits."""
        ...

    async def run(
        self,
        options: SessionOptions,
        choice: PlanOptions,
        observer: Observer,
        confirm: Confirm | None,
        *,
        verify_only: bool,
    ) -> Report:
        """Do it; comes back with a report also if the task is cancelled. See `run_job`."""
        ...


#: Makes the restorer from the arguments and the descriptor of a backup here; raises RestoreError.
Assemble = Callable[[RestoreArguments, int | None], Restorer]

#: There in dom0 only, and there in every qube.
QUBESD_SOCKET = transports.QUBESD_SOCKET
QREXEC_CLIENT = Path(transports.QREXEC_PROGRAM)


def in_a_qube() -> bool:
    """Is this a qube, from which dom0 can be asked?"""
    return not QUBESD_SOCKET.exists() and QREXEC_CLIENT.exists()


def is_file_here(arguments: RestoreArguments) -> bool:
    """Is the backup a file of the domain that the command runs in?"""
    return arguments.storage_qube is None and not (arguments.in_dom0 and in_a_qube())


def on_qubes(arguments: RestoreArguments, archive_fd: int | None, places: Places = PLACES) -> Restorer:
    """The restorer for the domain that the command runs in. Raises RestoreError."""
    if in_a_qube():
        transport = transports.QrexecTransport(program=str(QREXEC_CLIENT))
        return remote_restorer(arguments, archive_fd, transport)
    return in_dom0(arguments, archive_fd, places)


def in_dom0(arguments: RestoreArguments, archive_fd: int | None, places: Places = PLACES) -> Restorer:
    """The restorer of the dom0 that the command runs in. Raises RestoreError."""
    wishes = Wishes(
        template=arguments.template,
        memory=arguments.memory,
        vcpus=arguments.vcpus,
        pool=arguments.pool,
        ignore_size_limit=arguments.ignore_size_limit,
    )
    return dom0_restore(
        _location(arguments, archive_fd),
        wishes,
        places,
        activity="verifying" if arguments.verify_only else "restoring",
    )


def _location(arguments: RestoreArguments, archive_fd: int | None) -> Location:
    if arguments.storage_qube is None:
        assert archive_fd is not None, "a backup in dom0 is open by now"
        return Dom0File(archive_fd)
    if arguments.location_is_service:
        return QubeService(arguments.storage_qube, arguments.location)
    return QubePath(arguments.storage_qube, arguments.location)
