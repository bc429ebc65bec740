"""Who carries out what `qvm-backup-restore --mgmt-vm` was asked for: dom0 itself, if this is dom0.

Strategy: the command speaks to a `Restorer`, and shows whatever it says in the same way.
"""

from collections.abc import Callable
from typing import Protocol

from qubes_restore_svc.broker.client import SessionOptions
from qubes_restore_svc.broker.job import Confirm
from qubes_restore_svc.broker.plan import Plan, PlanOptions
from qubes_restore_svc.broker.report import Report
from qubes_restore_svc.broker.restore import Observer
from qubes_restore_svc.cli.qvm_arguments import RestoreArguments
from qubes_restore_svc.dom0 import PLACES, Places, Wishes, dom0_restore
from qubes_restore_svc.link.storage import Dom0File, Location, QubePath, QubeService


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


def on_qubes(arguments: RestoreArguments, archive_fd: int | None, places: Places = PLACES) -> Restorer:
    """The restorer on the Qubes system whose dom0 this is. Raises RestoreError."""
    wishes = Wishes(
        template=arguments.template,
        memory=arguments.memory,
        vcpus=arguments.vcpus,
        pool=arguments.pool,
        ignore_size_limit=arguments.ignore_size_limit,
    )
    return dom0_restore(_location(arguments, archive_fd), wishes, places)


def _location(arguments: RestoreArguments, archive_fd: int | None) -> Location:
    if arguments.storage_qube is None:
        assert archive_fd is not None, "a backup in dom0 is open by now"
        return Dom0File(archive_fd)
    if arguments.location_is_service:
        return QubeService(arguments.storage_qube, arguments.location)
    return QubePath(arguments.storage_qube, arguments.location)
