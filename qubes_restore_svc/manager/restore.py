"""The interface of `qubesadmin.backup.restore` on the isolated restore: the same names, another engine.

    >>> backup = BackupRestore(app, "/path/of/backup", qube, passphrase)
    >>> backup.options.verify_only = True
    >>> info = backup.get_restore_info()      # remove from it what is not wanted
    >>> info = backup.restore_info_verify(info)
    >>> print(backup.get_restore_summary(info))
    >>> backup.restore_do(info)

Strategy: a thin shell around one call to dom0's broker, which `get_restore_info` opens and `restore_do` ends.
The keys of the restore info say which qubes are wanted. Everything else in it is the broker's last plan, and
that plan is carried out. Every error of ours becomes one of `qubesadmin.exc`, with its reason
and what to do. Differences to the original: the constructor does not read the backup yet; `restore_do` raises
if any qube was not restored; nothing is staged in `tmpdir`; dom0's home comes back as one unopened archive.
"""

import contextlib
import os
import textwrap
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

from qubesadmin import exc

from qubes_restore_svc.cli.tables import plan_table, settings_left_behind
from qubes_restore_svc.errors import Cancelled, RestoreError, UsageError
from qubes_restore_svc.manager import entries, wording
from qubes_restore_svc.manager.call import LOG, Events, KeptCall, OpenCall, RestoreListener, call_dom0
from qubes_restore_svc.manager.entries import BackupRestoreOptions, choice_from, open_request
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.messages import RefusedQube
from qubes_restore_svc.wire.report import Report

__all__ = ["BackupCanceledError", "BackupRestore", "BackupRestoreOptions"]


#: Of the summary, where there is a choice: the stock dialog is as wide.
_COLUMNS = 96


class BackupCanceledError(exc.BackupCancelledError):
    """The person cancelled. The stock dialog catches its base; this name is that of the stock module."""

    tmpdir: None = None


class NamedQube(Protocol):
    """A qube, as `qubesadmin` has it."""

    @property
    def name(self) -> str:
        """Its name."""


@dataclass(frozen=True, slots=True)
class HeaderData:
    """The facts from the backup's header."""

    backup_id: str
    version: Literal[4] = 4
    encrypted: Literal[True] = True


class BackupRestore:
    """One backup, to be looked at and then restored or verified. Close it, or let go of it."""

    VMToRestore = entries.VMToRestore
    Dom0ToRestore = entries.Dom0ToRestore

    def __init__(
        self,
        app: object,
        backup_location: str,
        backup_vm: NamedQube | None,
        passphrase: str,
        *,
        location_is_service: bool = False,
        force_compression_filter: str | None = None,
        tmpdir: str | None = None,
        open_call: OpenCall | None = None,
    ) -> None:
        """`backup_vm`: the qube that holds the backup; None: the one that this runs in.

        `backup_location`: a path there, a command, or, with `location_is_service`, a qrexec service of it.
        `tmpdir` is of no use here. `open_call` makes the call to the broker (None: to this system's dom0).
        """
        self.app = app
        self.options = BackupRestoreOptions()
        self.backup_vm = backup_vm
        self.backup_location = backup_location
        self.location_is_service = location_is_service
        self.force_compression_filter = force_compression_filter
        self.passphrase = passphrase
        self.tmpdir = tmpdir
        self.log = LOG
        #: None until the backup is open
        self.header_data: HeaderData | None = None
        #: what came of `restore_do`, once it is through
        self.report: Report | None = None
        #: what can be chosen by the last plan, and the qubes of the backup that cannot be listed
        self.offers = c.Offers()
        self.unlisted: tuple[RefusedQube, ...] = ()
        #: why the qubes that were verified last are beyond the administrator's limits; empty: they are not
        self.excess = ""
        self._events = Events()
        self._call = KeptCall(call_dom0 if open_call is None else open_call, self._events)
        # The worker's qube lives as long as the call: also a dialog that is just dropped ends it.
        self._finalizer = weakref.finalize(self, self._call.close)

    # --- The stock interface ---

    @property
    def canceled(self) -> bool:
        """Set it to stop at once, in any state and from any thread; then everything raises."""
        return self._call.cancelled

    @canceled.setter
    def canceled(self, canceled: bool) -> None:
        if not canceled:
            self._call.set_free()
        elif not self._call.cancelled:
            self._events.cancelling()
            self._call.cancel()

    @property
    def progress_callback(self) -> Callable[[int], None] | None:
        """Called with the percents that are done, 0 to 100, in a thread of the client."""
        return self._events.progress_callback

    @progress_callback.setter
    def progress_callback(self, callback: Callable[[int], None] | None) -> None:
        self._events.progress_callback = callback

    def get_restore_info(self) -> dict[str, entries.VMToRestore]:
        """All qubes of the backup by their names in it, as they would be restored now.

        Opens the backup, which takes a disposable qube and some seconds; again, it only asks again.
        Raises QubesException, BackupCancelledError among them.
        """
        with _qubes_exceptions():
            home = self.options.dom0_home and self._may_have_home
            plan = self._call.plan(self._request(choice_from(self.options, dom0_home=home)))
            self.header_data = HeaderData(plan.backup_id)
            for qube in plan.unlisted:
                if qube not in self.unlisted:  # the dialog asks again and again
                    LOG.error("%s", wording.unlisted_text(qube))
            self.offers, self.unlisted = plan.offers, plan.unlisted
            info = entries.restore_info(plan)
            if not home:
                info.pop("dom0", None)
            return info

    def restore_info_verify(
        self, restore_info: dict[str, entries.VMToRestore]
    ) -> dict[str, entries.VMToRestore]:
        """The same dict, its entries as they would be restored if these and no others are.

        Raises QubesException; for a dict with something in it that is not from `get_restore_info`, too.
        """
        with _qubes_exceptions():
            names = entries.checked_names(restore_info)
            if names:  # to dom0, no names would mean all
                plan = self._call.plan(self._request(choice_from(self.options, names)))
                self.offers = plan.offers
                self.excess = "" if plan.excess is None else wording.error_text(plan.excess.to_error())
                entries.update_entries(restore_info, plan)
            return restore_info

    @staticmethod
    def get_restore_summary(restore_info: Mapping[str, entries.VMToRestore]) -> str:
        """Why qubes are not restored, the table that the stock command shows, and what stays behind."""
        with _qubes_exceptions():
            entries.checked_names(restore_info)
            planned = tuple(entry.planned for entry in restore_info.values())
            plan = c.Plan(number=1, mode="restore", backup_id="0", qubes=planned)
            lines = [
                _wrapped(f"{entry.vm.name}: {wording.problem_text(entry.planned)}") + "\n"
                for entry in restore_info.values()
                if entry.planned.error is not None
            ]
            lines.append(plan_table(plan, _COLUMNS).replace(" <-- ", " ← "))  # no "<": see `wording`
            if behind := settings_left_behind(plan, everything=True):
                lines += ["", *map(_wrapped, behind)]
            return wording.plain("\n".join(lines)) + "\n"

    def restore_do(self, restore_info: Mapping[str, entries.VMToRestore]) -> None:
        """Restore, or verify, what is good to go in `restore_info`, as it was shown last.

        Raises BackupCancelledError if it was cancelled, and QubesException if not every one of these qubes
        was restored: the text says which were, which were not, why, and what to do. `report` has it all.
        """
        self.report = None
        try:
            with _qubes_exceptions():
                self._check_everything(self._carry_out(restore_info))
        finally:
            self._call.close()

    # --- What a caller of ours has beside it ---

    @property
    def listener(self) -> RestoreListener | None:
        """Told of everything; see RestoreListener."""
        return self._events.listener

    @listener.setter
    def listener(self, listener: RestoreListener | None) -> None:
        self._events.listener = listener

    def close(self) -> None:
        """End the call, and the worker's qube with it; cancels what is under way. Returns at once."""
        self._call.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- Below ---

    def _carry_out(self, restore_info: Mapping[str, entries.VMToRestore]) -> Report:
        try:
            wanted = entries.checked_names(restore_info)
            good = [name for name in wanted if restore_info[name].good_to_go]
            for name in wanted:
                if name not in good:
                    word = wording.outcome_word("left out", "")
                    LOG.warning("%s: %s. %s", name, word, wording.problem_text(restore_info[name].planned))
            if not good:
                raise UsageError("no qube is left that could be restored", advice="Select at least one.")
            request = self._request(choice_from(self.options, good))
            plan = self._call.last_plan(request)
            if changed := entries.differences(restore_info, plan):
                raise RestoreError(
                    f"what would become of {', '.join(changed)} has changed since it was shown",
                    advice="Look at the summary again.",
                )
            self._events.started(plan)
            self.report = self._call.confirm()
        except RestoreError as error:
            self._events.ended(None, error)
            raise
        self._events.ended(self.report, None)
        return self.report

    def _check_everything(self, report: Report) -> None:
        if wording.is_cancelled(report):
            raise BackupCanceledError("%s", wording.report_text(report))
        missing = [one for one in wording.outcomes(report) if not one.succeeded]
        if missing or report.error is not None or report.status != 0:
            raise exc.QubesException("%s", wording.report_text(report))
        LOG.info("%s", wording.translate("Restore", "Done."))

    def _request(self, choice: c.Choice) -> c.OpenBackup:
        return open_request(self, self._storage, self.options, choice)

    @property
    def _here(self) -> str:
        return str(getattr(self.app, "local_name", None) or os.uname().nodename)

    @property
    def _storage(self) -> str | None:
        """The qube that holds the backup, in the call's terms: None is the one that calls."""
        name = None if self.backup_vm is None else self.backup_vm.name
        return None if name == self._here else name

    @property
    def _may_have_home(self) -> bool:
        """dom0 gives its home to nobody else; looking through it is another thing."""
        return self._here == "dom0" or self.options.verify_only


def _wrapped(text: str) -> str:
    """`text` in lines, as wide as the table."""
    return textwrap.fill(text, _COLUMNS, subsequent_indent="  ", break_on_hyphens=False)


@contextlib.contextmanager
def _qubes_exceptions() -> Iterator[None]:
    """Our errors as those that callers of the stock interface catch."""
    try:
        yield
    except Cancelled as error:
        raise BackupCanceledError("%s", wording.error_text(error)) from error
    except RestoreError as error:
        # The first argument of a QubesException is a format.
        raise exc.QubesException("%s", wording.error_text(error)) from error
