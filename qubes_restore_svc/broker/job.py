"""A whole job: open the backup, plan, run, and always come back with a report.

Strategy: it takes resources in this order, and gives them back in reverse: the host's lock, the worker, the
session. Whatever ends the job, a wrong passphrase or a cancel, becomes the report's error, not an exception.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from qubes_restore_svc.broker.allowlist import AllowList
from qubes_restore_svc.broker.client import STALL_S, SessionClient, SessionOptions
from qubes_restore_svc.broker.interfaces import Host, HostView, Link, RestoredQube
from qubes_restore_svc.broker.plan import Planned, make_plan
from qubes_restore_svc.broker.restore_run import RestoreRun
from qubes_restore_svc.errors import (
    Cancelled,
    ProtocolViolation,
    RestoreError,
    UsageError,
    WrongPassphrase,
    exhausted,
    size_text,
)
from qubes_restore_svc.waiting import ask, in_thread, when_cleared
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.names import KEPT_VOLUMES, VolumeName
from qubes_restore_svc.wire.report import Observer, Report, warn
from qubes_restore_svc.wire.restore_call import Choice, Plan

#: Shows the plan to the person before anything is created. None: it is to be carried out. A choice: it is
#: not, another plan is to be made from that, and shown. Raises RestoreError to end the job.
AskAboutPlan = Callable[[Plan], Awaitable[Choice | None]]


_MOST_NAMES = 20  #: in a warning

#: Returns another passphrase after a wrong one; None if there is no other.
OtherPassphrase = Callable[[], Awaitable[str | None]]


async def read_manifest(
    link: Link,
    options: SessionOptions,
    observer: Observer,
    *,
    other_passphrase: OtherPassphrase | None = None,
    stall_s: float = STALL_S,
) -> m.Manifest:
    """Start the worker, have it read the backup up to qubes.xml, and destroy it. Raises RestoreError.

    `stall_s`: seconds of silence after which the worker counts as stalled.
    """
    async with link, SessionClient(link, stall_s) as client:
        manifest = await _opened(client, options, observer.log, other_passphrase)
        client.cancel()
        return manifest


async def run_job(
    link: Link,
    host: Host | None,
    options: SessionOptions,
    choice: Choice,
    observer: Observer,
    *,
    allow: AllowList | None = None,
    confirm: AskAboutPlan | None = None,
    other_passphrase: OtherPassphrase | None = None,
    stall_s: float = STALL_S,
    compare: bool = False,
    only: VolumeName | None = None,
) -> Report:
    """Restore to `host`, or verify if it is None. A cancelled task comes back with a report as well.

    `compare`: `host` has qubes that are compared with those of the backup, and nothing is written.
    `confirm` is awaited with the plan, and with every other one that it asks for; the worker waits meanwhile.
    Without `confirm` nobody is asked. `other_passphrase` is awaited when a passphrase was wrong. `allow` says
    which settings may come back; None: none of them. `stall_s`: seconds of silence after which the worker, or
    a volume's stream, counts as stalled. `only`: see `RestoreRun`.
    """
    report = Report.begun("verify" if host is None else "compare" if compare else "restore")
    error: RestoreError | None = None
    try:
        job = _RestoreJob(report, link, host, options, observer, stall_s, other_passphrase, only)
        await job.run(choice, allow, confirm)
    except RestoreError as caught:
        error = caught
    except asyncio.CancelledError:
        error = Cancelled("it was cancelled", advice="")
    except Exception as caught:
        error = exhausted(caught)
        if error is None:  # a mistake of ours
            raise
    report.close(error)
    return report


@dataclass(frozen=True, slots=True)
class _RestoreJob:
    """Fills `report`, which is about the last plan, however the job ends."""

    report: Report
    link: Link
    host: Host | None
    options: SessionOptions
    observer: Observer
    stall_s: float
    other_passphrase: OtherPassphrase | None
    only: VolumeName | None

    async def run(self, choice: Choice, allow: AllowList | None, confirm: AskAboutPlan | None) -> None:
        async with contextlib.AsyncExitStack() as locks:
            if self.host is not None:
                for remark in await locks.enter_async_context(_locked(self.host)):
                    self.say("warning", remark)
            async with self.link, SessionClient(self.link, self.stall_s) as client:
                manifest = await _opened(client, self.options, self.say, self.other_passphrase)
                if self.only is not None:
                    manifest = _with_one_volume(manifest, self.only)
                self.report.backup_id = manifest.backup_id
                planned = await self.agree(manifest, choice, allow, confirm)
                if self.only is not None:
                    _check_volume(planned.plan, self.only)
                if planned.plan.taken or planned.here:
                    await self.carry_out(planned, client)
                elif all(qube.outcome == "left out" for qube in self.report.qubes):
                    raise UsageError("no qube is selected", advice="")

    async def agree(
        self, manifest: m.Manifest, choice: Choice, allow: AllowList | None, confirm: AskAboutPlan | None
    ) -> Planned:
        """Make plans until the person confirms one."""
        for number in itertools.count(1):
            view = None if self.host is None else await ask(self.host.view)
            compare = self.report.mode == "compare"
            restored: Sequence[RestoredQube] = ()
            # Whoever forgets to go on is told that it is possible.
            names_are_taken = view is not None and any(qube.name in view.names for qube in manifest.qubes)
            if self.host is not None and not compare and (choice.resume or names_are_taken):
                restored = await ask(self.host.restored_from, manifest.backup_id)
            planned = make_plan(
                manifest, choice, view, allow=allow, number=number, compare=compare, restored=restored
            )
            plan = planned.plan
            if self.host is not None and not compare:
                self.warn_of_space(plan, await ask(self.host.free_space, choice.pool))
            for remark in () if view is None else view.remarks:
                self.say("warning", remark)
            if view is not None and compare:
                self.warn_of_unsaved(plan, view, choice)
            self.report.qubes = plan.reports()
            try:
                other = None if confirm is None else await confirm(plan)
            except RestoreError as error:
                self.report.qubes = plan.reports(error)
                raise
            if other is None:
                break
            choice = other
        return planned

    async def carry_out(self, planned: Planned, client: SessionClient) -> None:
        run = RestoreRun(
            self.link,
            client,
            planned,
            self.host,
            self.observer,
            self.report,
            digest=self.options.digest,
            ignore_size_limit=self.options.ignore_size_limit,
            tail_timeout_s=self.stall_s,
            only=self.only,
        )
        try:
            await run.run()
        except asyncio.CancelledError:
            client.cancel()
            raise

    def warn_of_space(self, plan: Plan, free: int | None) -> None:
        """Say so early when the qubes took more room than there is; their holes may still make them fit."""
        needed = sum(qube.backup_size for qube in plan.taken)
        if free is not None and needed > free:
            took, left = size_text(needed), size_text(free)
            self.say("warning", f"the qubes took {took} when they were backed up, and only {left} are free")

    def warn_of_unsaved(self, plan: Plan, view: HostView, choice: Choice) -> None:
        """Which qubes are here and not in the backup, if all are compared."""
        saved = {qube.new_name for qube in plan.qubes} | {qube.name for qube in plan.unlisted}
        unsaved = sorted(view.names - saved)
        if unsaved and not choice.names:
            more = f" and {len(unsaved) - _MOST_NAMES} more" if len(unsaved) > _MOST_NAMES else ""
            self.say("warning", f"not in the backup: {', '.join(unsaved[:_MOST_NAMES])}{more}")

    def say(self, level: str, text: str) -> None:
        """A line for the person. A warning is kept, and said once, however many plans it is about."""
        if level == "warning":
            if text in self.report.warnings:
                return
            warn(self.report, text)
        self.observer.log(level, text)


@contextlib.asynccontextmanager
async def _locked(host: Host) -> AsyncIterator[Sequence[str]]:
    """The host's lock, taken and let go of in threads: both clear up, and that may take its time."""
    held: list[AbstractContextManager[Sequence[str]]] = []

    def enter() -> Sequence[str]:
        lock = host.lock()
        remarks = lock.__enter__()
        held.append(lock)
        return remarks

    try:
        yield await when_cleared(enter)
    except BaseException as error:
        if not held or not await in_thread(held[0].__exit__, type(error), error, error.__traceback__):
            raise
    else:
        await in_thread(held[0].__exit__, None, None, None)


#: A warning that the person needs before anything is restored from a backup of Qubes R2 to R3.2.
OLD_FORMAT = (
    "the backup has format 3, which Qubes R2 to R3.2 wrote. Each piece of it is authenticated, but not its"
    " place: somebody who could change the file, and had another backup with the same passphrase, can have"
    " exchanged pieces of the two, or left out settings. Restore it only if nobody else had the file in hand"
)


def _with_one_volume(manifest: m.Manifest, name: VolumeName) -> m.Manifest:
    """The manifest as if no qube that can have this volume had another one."""
    qubes = []
    for qube in manifest.qubes:
        volumes = tuple(volume for volume in qube.volumes if volume.name == name)
        can_have = bool(volumes) or name in KEPT_VOLUMES[qube.klass]
        qubes.append(qube.model_copy(update={"volumes": volumes}) if can_have else qube)
    return manifest.model_copy(update={"qubes": tuple(qubes)})


def _check_volume(plan: Plan, name: VolumeName) -> None:
    """Raises UsageError unless all that is to come can have this volume, listed or not."""
    for qube in plan.taken:
        there = [volume.name for volume in qube.volumes]
        if name not in there and name not in KEPT_VOLUMES[qube.klass]:
            raise UsageError(
                f"this qube has no volume {name} in the backup",
                qube=qube.name,
                advice=f"It has: {', '.join(there) or 'none'}.",
            )


async def _opened(
    client: SessionClient,
    options: SessionOptions,
    say: Callable[[str, str], None],
    other_passphrase: OtherPassphrase | None,
) -> m.Manifest:
    options = replace(options, retry=other_passphrase is not None)
    while True:
        try:
            return await _manifest(client, options, say)
        except WrongPassphrase:
            other = None if other_passphrase is None else await other_passphrase()
            if other is None:
                raise
            options = replace(options, passphrase=other)


async def _manifest(
    client: SessionClient, options: SessionOptions, say: Callable[[str, str], None]
) -> m.Manifest:
    async with contextlib.aclosing(client.open(options)) as messages:
        async for message in messages:
            if isinstance(message, m.Manifest):
                if message.format == 3:
                    say("warning", OLD_FORMAT)
                return message
            if isinstance(message, m.Log):
                say(message.level, message.text)
    raise ProtocolViolation("the session ended without a manifest")
