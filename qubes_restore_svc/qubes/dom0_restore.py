"""A restore in dom0, made of its parts: the only place that knows all of them.

Strategy: one function from the configuration, the location and what is requested to a `Dom0Restore`, which
creates nothing until it runs.

A report of every restore is kept, and a log of what was said. People look for these files later, so a fault
here never fails the restore. If a file cannot be written, the caller's `warn` is told so once. Both
files may hold names of qubes: only their owner and group may read them, whatever the umask is. (qrexec starts
services of dom0 with umask 0077, and the group reads the files, too.)
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from qubes_restore_svc.broker.client import SessionOptions
from qubes_restore_svc.broker.interfaces import Host, Link
from qubes_restore_svc.broker.job import AskAboutPlan, read_manifest, run_job
from qubes_restore_svc.broker.job import OtherPassphrase as OtherPassphrase
from qubes_restore_svc.broker.plan import make_plan
from qubes_restore_svc.errors import RestoreError, UsageError
from qubes_restore_svc.qubes.backup_source import Location
from qubes_restore_svc.qubes.comparison import ComparedSystem
from qubes_restore_svc.qubes.config import CONFIG_PATH, Config
from qubes_restore_svc.qubes.dom0_home import dom0_home, dom0_user
from qubes_restore_svc.qubes.grants import DOM0, check_limits, check_options, largest_worker
from qubes_restore_svc.qubes.host import QubesHost
from qubes_restore_svc.qubes.locks import RESTORE_LOCK, STOCK_LOCK, WORKER_LOCK, Activity
from qubes_restore_svc.qubes.qrexec_link import QrexecLink
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.report_file import write_report
from qubes_restore_svc.waiting import ask
from qubes_restore_svc.wire.report import Observer, QubeReport, Report, RestoreProgress
from qubes_restore_svc.wire.restore_call import Mode, OpenBackup, Plan


@dataclass(frozen=True, slots=True)
class Places:
    """Where dom0 keeps what a restore needs; a test has its own. `home`: None is that of dom0's user."""

    config: Path = CONFIG_PATH
    restore_lock: Path = RESTORE_LOCK
    worker_lock: Path = WORKER_LOCK
    stock_lock: Path = STOCK_LOCK
    home: Path | None = None
    volume_reader: int = 0  #: the user who can read the volumes of qubes


#: Where it all is on a Qubes system.
PLACES = Places()


#: What another caller is told that this one does.
ACTIVITIES: dict[Mode, Activity] = {
    "restore": "restoring",
    "verify": "verifying",
    "list": "listing a backup",
    "compare": "comparing",
}


class Dom0Link(Link, Protocol):
    """A link that can be tried before anything is done. `log` gets lines for the person in dom0."""

    log: Callable[[str, str], None]

    async def check(self) -> object:
        """Raises RestoreError for what would fail later."""
        ...


@dataclass(frozen=True, slots=True)
class Dom0Restore:
    """A restore with the parts of this system. `client` is the domain that asked for it.

    `note` says a line in dom0, if `client` is another domain. Report and log are kept in dom0, so it is told
    there if they cannot be.
    """

    link: Dom0Link
    host: Host
    config: Config
    client: str = "dom0"
    note: Callable[[str], None] | None = None

    async def check(self, pool: str | None = None) -> None:
        """Find out early what would fail late (no such pool, no worker). Raises RestoreError."""
        await self.link.check()
        await ask(self.host.free_space, pool)

    def excess(self, plan: Plan) -> RestoreError | None:
        """How the plan is beyond the administrator's limits, if it is."""
        try:
            check_limits(self.config.limits, plan)
        except UsageError as error:
            return error
        return None

    async def listed(
        self, request: OpenBackup, observer: Observer, other_passphrase: OtherPassphrase | None = None
    ) -> Plan:
        """What is in the backup, as a plan that is not carried out. Raises RestoreError."""
        manifest = await read_manifest(
            self.link, self.session_options(request), observer, other_passphrase=other_passphrase
        )
        return make_plan(manifest, request.choice, None).plan.model_copy(update={"mode": "list"})

    async def run(
        self,
        request: OpenBackup,
        observer: Observer,
        confirm: AskAboutPlan | None,
        other_passphrase: OtherPassphrase | None = None,
    ) -> Report:
        """As `run_job`, with the configured allow-list; report and log are kept as it is configured."""
        mode = request.mode

        def warn(text: str) -> None:
            observer.log("warning", text)
            if self.note is not None:
                self.note(text)

        watched, log = observer, None
        if self.config.log.file is not None:
            log = LogFile(self.config.log.file, warn)
            log.write(f"{mode}: begun" + (f" for {self.client}" if self.client != "dom0" else ""))
            watched = LoggedObserver(observer, log)
        # How much memory the computer has is nobody's business but dom0's.
        if self.client == "dom0":
            self.link.log = watched.log
        elif log is not None:
            self.link.log = LoggedObserver(Observer(), log).log
        report = await run_job(
            self.link,
            None if mode == "verify" else self.host,
            self.session_options(request),
            request.choice,
            watched,
            allow=self.config.restore.policy(),
            confirm=confirm,
            other_passphrase=other_passphrase,
            compare=mode == "compare",
        )
        if self.config.report.directory is not None:
            asked_by = None if self.client == "dom0" else self.client
            file_report(self.config.report.directory, self.config.report.keep, report, warn, asked_by)
        if log is not None:
            reason = "" if report.error is None else f": {report.error.reason}"
            log.write(f"{mode}: ended with status {report.status}{reason}")
        return report

    def session_options(self, request: OpenBackup) -> SessionOptions:
        """What the worker is told, with the configured `limits.stall_timeout` where that holds.

        dom0's own word goes before it; a client in a qube can only shorten it.
        """
        stall_timeout, configured = request.stall_timeout, self.config.limits.stall_timeout
        if configured is not None and (
            stall_timeout is None or (self.client != "dom0" and stall_timeout > configured)
        ):
            stall_timeout = configured
        return SessionOptions(
            passphrase=request.passphrase.get_secret_value(),
            compression_filter=request.compression_filter,
            ignore_size_limit=request.ignore_size_limit,
            ignore_cost_limit=request.ignore_cost_limit,
            digest=request.digest or self.config.report.digest,
            stall_timeout_s=stall_timeout,
            # Of what is here already, no key is to be derived.
            ahead=request.mode != "list" and not request.choice.names and not request.choice.resume,
        )


def dom0_restore(
    location: Location,
    request: OpenBackup,
    places: Places,
    config: Config,
    client: str = "dom0",
    note: Callable[[str], None] | None = None,
) -> Dom0Restore:
    """What `client` requests, from `location`, on the system whose dom0 this is. Raises RestoreError."""
    check_options(config.limits, ignore_size_limit=request.ignore_size_limit)
    if request.mode == "compare" and os.geteuid() != places.volume_reader:
        raise UsageError(
            "only root can read the volumes of qubes in dom0", advice="Run the command again, with sudo."
        )
    system = QubesSystem.connect()
    link = QrexecLink(
        system,
        location,
        template=request.worker.template or config.worker.template,
        memory=request.worker.memory or config.worker.memory,
        vcpus=request.worker.vcpus or config.worker.vcpus,
        most=(None, None) if client == DOM0 else largest_worker(config, client),
        ready_timeout_s=config.worker.start_timeout,
        lock_path=places.worker_lock,
        client=client,
        activity=ACTIVITIES[request.mode],
    )
    host = (ComparedSystem if request.mode == "compare" else QubesHost)(
        system,
        pool=config.restore.pool,
        home=places.home or dom0_home(dom0_user()),
        lock_path=places.restore_lock,
        stock_lock_path=places.stock_lock,
        client=client,
        activity=ACTIVITIES[request.mode],
    )
    return Dom0Restore(link, host, config, client, note)


_MODE = 0o640
_REPORT_NAME = re.compile(r"(?:restore|verify|compare)-([0-9]{8}T[0-9]{6}Z-[0-9]+)\.json")


def file_report(
    directory: Path, keep: int, report: Report, warn: Callable[[str], None], asked_by: str | None = None
) -> None:
    """Put the report into the directory, and delete the oldest of those that are there beyond `keep`.

    `asked_by`: see `write_report`.
    """
    name = f"{report.mode}-{report.started:%Y%m%dT%H%M%SZ}-{os.getpid()}.json"
    try:
        write_report(directory / name, report, _MODE, asked_by)
        found = sorted(
            (match[1], entry) for entry in os.listdir(directory) if (match := _REPORT_NAME.fullmatch(entry))
        )
        for _, entry in found[: max(0, len(found) - keep)]:
            (directory / entry).unlink(missing_ok=True)
    except OSError as error:
        warn(f"the report cannot be kept in {directory}: {error.strerror}")


class LogFile:
    """Appends lines to a file, each with the time. After the first that fails it tries no more."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path = path
        self._warn = warn
        self._works = True

    def write(self, text: str) -> None:
        """Append a line."""
        if not self._works:
            return
        line = f"{datetime.now().astimezone().isoformat(timespec='seconds')} [{os.getpid()}] {text}\n"
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open(self._path, flags, _MODE), "ab") as file:
                if file.tell() == 0:  # it is new: whatever the umask, the group may read it
                    with suppress(PermissionError):  # logrotate has created it, with a mode of its own
                        os.fchmod(file.fileno(), _MODE)
                file.write(line.encode("utf-8", "replace"))
        except OSError as error:
            self._works = False
            self._warn(f"the log cannot be written to {self._path}: {error.strerror}")


class LoggedObserver(Observer):
    """An observer whose words, but not its progress, go to a log as well."""

    def __init__(self, observer: Observer, log: LogFile) -> None:
        self._observer = observer
        self._log = log

    def progress(self, progress: RestoreProgress) -> None:
        """Passed on only."""
        self._observer.progress(progress)

    def log(self, level: str, text: str) -> None:
        """Both."""
        self._observer.log(level, text)
        self._log.write(f"{level}: {text}")

    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        """Both."""
        self._observer.volume_started(qube, volume, image_size)
        self._log.write(f"{qube}/{volume}: begun")

    def qube_finished(self, report: QubeReport) -> None:
        """Both."""
        self._observer.qube_finished(report)
        reason = "" if report.error is None else f": {report.error.reason}"
        self._log.write(f"{report.name}: {report.outcome}{reason}")
