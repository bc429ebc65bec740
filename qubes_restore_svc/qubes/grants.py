"""What a caller of `restore.Start`, `restore.Verify` or `restore.List` may do with it.

Strategy: dom0's policy says who may call which service. What the call asks for is then compared with the
caller's section of the configuration, before anything is looked up. So a refusal depends on the request and
the configuration alone: it is the same whether or not there is such a qube, pool or file here. Programs of
dom0 itself may ask for everything, within the limits of the section `limits`, which hold for everybody.

Those limits are applied to the plan. The sizes are those that the backup records, and no volume that is
written may be larger than that. So a volume that has no recorded size, or may be larger than recorded, is
refused where sizes are limited.
"""

from pathlib import Path
from typing import Never

from qubes_restore_svc.broker.allowlist import with_wildcards
from qubes_restore_svc.errors import NotGranted, UsageError
from qubes_restore_svc.qubes.config import (
    CONFIG_PATH,
    UNGRANTED_MEMORY,
    UNGRANTED_VCPUS,
    Config,
    LimitsConfig,
)
from qubes_restore_svc.wire.names import strip_control
from qubes_restore_svc.wire.qrexec_call import LIST, START, VERIFY
from qubes_restore_svc.wire.restore_call import (
    AUTO,
    SERVICES,
    BackupLocation,
    Choice,
    Mode,
    Offers,
    OpenBackup,
    Plan,
    WorkerWishes,
)

DOM0 = "dom0"

#: What each service does; the first is its purpose.
MODES: dict[str, tuple[Mode, ...]] = {
    START: ("restore", "verify", "list", "compare"),
    VERIFY: ("verify", "list"),
    LIST: ("list",),
}


def largest_worker(config: Config, caller: str) -> tuple[int, int]:
    """The most MiB and processors that a worker has for `caller`, a qube, whatever it asks for."""
    grant, worker = config.grant(caller), config.worker
    memory = UNGRANTED_MEMORY if worker.memory == AUTO else worker.memory
    vcpus = UNGRANTED_VCPUS if worker.vcpus == AUTO else worker.vcpus
    return max(memory, grant.max_memory or 0), max(vcpus, grant.max_vcpus or 0)


class Rights:
    """The rights of `caller` under `config`, which stands in the file `path`: what errors refer to.

    Everything here raises NotGranted, or comes back.
    """

    def __init__(self, caller: str, config: Config, path: Path = CONFIG_PATH) -> None:
        self.caller = caller
        self._config = config
        self._grant = config.grant(caller)
        self._path = path

    @property
    def unlimited(self) -> bool:
        """Is it dom0 itself that asks?"""
        return self.caller == DOM0

    @property
    def dom0_directories(self) -> tuple[Path, ...]:
        """Directories of dom0 below which the caller's backups may lie; dom0 needs none."""
        return self._grant.dom0_directories

    def check_request(self, service: str, request: OpenBackup) -> None:
        """May all of this be asked of that service?"""
        if request.mode not in MODES[service]:
            raise NotGranted(
                f"the service {service} does not {request.mode} backups",
                advice=f"Call {SERVICES[request.mode]}, if dom0's policy lets you.",
            )
        if self.unlimited:
            return
        if request.mode == "compare":
            raise NotGranted(
                f"backups are compared with the qubes that are here for dom0 alone, not for {self.caller}",
                advice="Run it in dom0, or verify the backup.",
            )
        if request.mode == "restore" and self._grant.verify_only:
            self._refuse(f"{self.caller} may verify backups, but restore none", "verify_only", "false")
        self._check_location(request.location)
        self._check_wishes(request.worker)
        if request.ignore_size_limit and self._config.limits.of_sizes:
            raise NotGranted(
                "sizes are limited here, so no image may be larger than the backup says",
                advice="An administrator can lift the limits in dom0: limits.volume_size and"
                f" limits.total_size in {self._path}.",
            )
        self.check_choice(request.mode, request.choice)

    def check_choice(self, mode: Mode, choice: Choice) -> None:
        """May this be chosen?"""
        if self.unlimited:
            return
        if mode == "restore" and (choice.dom0_home or DOM0 in choice.names):
            self._refuse_home()
        self._check_pool(choice.pool)
        for setting in choice.allow:
            if not _matches(setting, self._grant.choosable):
                self._refuse(f"the qube {self.caller} may not let {setting} come back", "choosable", setting)

    def check_plan(self, mode: Mode, plan: Plan) -> None:
        """The same for the qubes of a plan, whatever their names in the backup."""
        if mode == "restore" and not self.unlimited and any(one.klass == "AdminVM" for one in plan.taken):
            self._refuse_home()

    def narrowed(self, plan: Plan) -> Plan:
        """The plan as the caller may see it: nobody outside dom0 learns which qubes there are here."""
        if self.unlimited:
            return plan
        settings = (one for one in plan.offers.settings if _matches(one, self._grant.choosable))
        return plan.model_copy(update={"offers": Offers(settings=tuple(settings))})

    # --- One thing each --------------------------------------------------------------------------

    def _check_location(self, location: BackupLocation) -> None:
        qube = location.qube or self.caller
        if qube == DOM0:
            self._check_dom0_path(location.text)
            return
        if qube != self.caller and not _matches(qube, self._grant.storage):
            self._refuse(f"the qube {self.caller} may not have a backup read from {qube}", "storage", qube)
        if location.service and not _matches(location.text, self._grant.services):
            shown = strip_control(location.text)
            self._refuse(f"the qube {self.caller} may not have the service {shown} called", "services", shown)

    def _check_dom0_path(self, text: str) -> None:
        path = Path(text)
        if path.is_absolute() and ".." not in path.parts:
            if any(path != folder and path.is_relative_to(folder) for folder in self.dom0_directories):
                return
            advice = "the directory of the backup"
        else:
            advice = "the directory of the backup, which is to be named by its whole path without .."
        self._refuse(
            f"the qube {self.caller} may not have {strip_control(text)} read in dom0",
            "dom0_directories",
            advice,
        )

    def _check_wishes(self, wishes: WorkerWishes) -> None:
        configured, grant = self._config.worker, self._grant
        template = wishes.template
        if template not in (None, configured.template) and not _matches(template, grant.templates):
            self._refuse(
                f"the qube {self.caller} may not have the worker made from {template}", "templates", template
            )
        most_memory, most_vcpus = largest_worker(self._config, self.caller)
        for key, what, wanted, usual, most in (
            ("max_memory", "MiB of memory", wishes.memory, configured.memory, most_memory),
            ("max_vcpus", "processors", wishes.vcpus, configured.vcpus, most_vcpus),
        ):
            if wanted == AUTO and usual != AUTO:
                raise NotGranted(
                    f"the worker's {what} are a number here, and the qube {self.caller} may not change that",
                    advice="Ask for a number, or for none.",
                )
            if wanted is not None and wanted != AUTO and wanted > most:
                reason = f"the qube {self.caller} may not give the worker more than {most} {what}"
                self._refuse(reason, key, str(wanted))

    def _check_pool(self, pool: str | None) -> None:
        if pool is None or pool == self._config.restore.pool or _matches(pool, self._grant.pools):
            return
        self._refuse(
            f"the qube {self.caller} may not have qubes restored to the storage pool {pool}", "pools", pool
        )

    # --- Refusing --------------------------------------------------------------------------------

    def _refuse_home(self) -> None:
        raise NotGranted(
            f"dom0's home is not restored for the qube {self.caller}, nor for any other",
            advice="Restore it in dom0 itself, or leave it out. It can be verified.",
        )

    def _refuse(self, reason: str, key: str, value: str) -> Never:
        """`key` of the caller's section would have to be, or hold, `value`."""
        name = f"grants.{self.caller}.{key}"
        is_list = isinstance(getattr(self._grant, key), tuple)
        change = f"add {value} to {name}" if is_list else f"set {name} to {value}"
        raise NotGranted(
            reason, advice=f"An administrator can allow it in dom0: {change} in {self._path}."
        ) from None


# --- The limits for everybody ------------------------------------------------------------------------

_ADVICE = "Restore fewer qubes at a time, or change the section `limits` of the configuration."


def check_limits(limits: LimitsConfig, plan: Plan) -> None:
    """Raises UsageError if the taken qubes exceed the limits. dom0's home has no size, and does not count."""
    taken = [qube for qube in plan.taken if qube.klass != "AdminVM"]
    if limits.qubes is not None and len(taken) > limits.qubes:
        count = f"{len(taken)} qubes are to be restored"
        raise UsageError(f"{count}, and the configuration allows {limits.qubes}", advice=_ADVICE)
    if not limits.of_sizes:
        return
    total = 0
    for qube in taken:
        for volume in qube.volumes:
            place = f"the volume {qube.name}/{volume.name}"
            if volume.size is None:
                raise UsageError(f"{place} has no recorded size, but sizes are limited here", advice=_ADVICE)
            _check_size(f"{place} has {{}}", volume.size, limits.volume_size)
            total += volume.size
    _check_size("the volumes have {} together", total, limits.total_size)


def _check_size(has: str, size: int, most_gib: int | None) -> None:
    if most_gib is not None and size > most_gib << 30:
        has = has.format(f"{size / (1 << 30):.1f} GiB")
        raise UsageError(f"{has}, and the configuration allows {most_gib}", advice=_ADVICE)


def check_options(limits: LimitsConfig, *, ignore_size_limit: bool) -> None:
    """Raises UsageError for the option that would make a limit on sizes void."""
    if ignore_size_limit and limits.of_sizes:
        raise UsageError("--ignore-size-limit is not possible: the configuration limits sizes", advice="")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Upper and lower case are different."""
    return any(with_wildcards(pattern).fullmatch(name) for pattern in patterns)
