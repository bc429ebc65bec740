"""What a restore is made of on a Qubes system: the only place that knows all the parts.

Strategy: one function from the arguments and the configuration to the parts. It creates nothing. What needs a
Qubes system is imported when one is needed, so that the help is there everywhere.
"""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

from qubes_restore_svc.broker.allowlist import AllowList
from qubes_restore_svc.broker.config import CONFIG_PATH, load_config
from qubes_restore_svc.broker.plan import Plan
from qubes_restore_svc.cli.qvm_arguments import RestoreArguments
from qubes_restore_svc.cli.qvm_limits import check_limits, check_options
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.host.base import Host
from qubes_restore_svc.host.restore_lock import RESTORE_LOCK, WORKER_LOCK
from qubes_restore_svc.host.stock_lock import STOCK_LOCK
from qubes_restore_svc.link.base import Link
from qubes_restore_svc.link.qrexec import QrexecLink
from qubes_restore_svc.link.storage import Dom0File, Location, QubePath, QubeService
from qubes_restore_svc.waiting import in_thread


@dataclass(frozen=True, slots=True)
class Parts:
    """What a restore is made of here.

    `check` finds out early what would fail late, and `check_plan` whether the plan keeps the administrator's
    limits; both raise RestoreError. `report_directory` is where the last `reports_kept` reports are, and
    `log_file` where the log is, if anywhere.
    """

    link: Link
    host: Host
    allow: AllowList
    check: Callable[[], Coroutine[object, object, None]]
    check_plan: Callable[[Plan], None] = lambda plan: None
    report_directory: Path | None = None
    reports_kept: int = 100
    log_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Places:
    """Where dom0 keeps what a restore needs; a test has its own. `home`: None is that of dom0's user."""

    config: Path = CONFIG_PATH
    restore_lock: Path = RESTORE_LOCK
    worker_lock: Path = WORKER_LOCK
    stock_lock: Path = STOCK_LOCK
    home: Path | None = None


#: Makes the parts from the arguments and the descriptor of a backup in dom0; raises RestoreError.
Assemble = Callable[[RestoreArguments, int | None], Parts]


def on_qubes(arguments: RestoreArguments, archive_fd: int | None, places: Places = Places()) -> Parts:
    """The parts on the Qubes system whose dom0 this is. Raises RestoreError, BadConfiguration among them."""
    config = load_config(places.config)
    check_options(config.limits, ignore_size_limit=arguments.ignore_size_limit)
    location = _location(arguments, archive_fd)
    try:
        from qubes_restore_svc.host.dom0_home import dom0_home, dom0_user
        from qubes_restore_svc.host.qubes import QubesSystem
        from qubes_restore_svc.host.qubes_host import QubesHost
    except ModuleNotFoundError as error:
        if error.name != "qubesadmin":
            raise
        raise HostFailed(
            "this is not the dom0 of a Qubes system",
            advice="Run it in dom0. On any other machine, `qubes-restore-svc` opens the backup.",
        ) from None
    system = QubesSystem.connect()
    link = QrexecLink(
        system,
        location,
        template=arguments.template or config.worker.template,
        memory=arguments.memory or config.worker.memory,
        vcpus=arguments.vcpus or config.worker.vcpus,
        ready_timeout_s=config.worker.start_timeout,
        lock_path=places.worker_lock,
    )
    host = QubesHost(
        system,
        pool=arguments.pool or config.restore.pool,
        home=places.home or dom0_home(dom0_user()),
        lock_path=places.restore_lock,
        worker_lock_path=places.worker_lock,
        stock_lock_path=places.stock_lock,
    )

    async def check() -> None:
        await link.check()
        await in_thread(host.free_space)  # fails if there is no such pool

    return Parts(
        link,
        host,
        config.restore.policy(),
        check,
        lambda plan: check_limits(config.limits, plan),
        report_directory=config.report.directory,
        reports_kept=config.report.keep,
        log_file=config.log.file,
    )


def _location(arguments: RestoreArguments, archive_fd: int | None) -> Location:
    if arguments.storage_qube is None:
        assert archive_fd is not None, "a backup in dom0 is open by now"
        return Dom0File(archive_fd)
    if arguments.location_is_service:
        return QubeService(arguments.storage_qube, arguments.location)
    return QubePath(arguments.storage_qube, arguments.location)
