"""The check of one place: its newest backup is verified, and what came of it becomes a document.

Strategy: the command of this machine verifies, with its own options, in this process: in dom0 and for a
backup in another qube `qvm-backup-restore --mgmt-vm`, otherwise `qubes-restore-svc`. Its report says what
came of it. The state and the exit status are computed from that alone.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from qubes_restore_svc.cli import qvm_arguments
from qubes_restore_svc.cli.process import Interruption
from qubes_restore_svc.cli.qvm_arguments import way_to_dom0
from qubes_restore_svc.cli.qvm_restore import Way
from qubes_restore_svc.cli.qvm_restore import run as run_on_qubes
from qubes_restore_svc.cli.terminal import say_wrapped
from qubes_restore_svc.errors import (
    ERROR_KINDS,
    ArchiveTruncated,
    EmptyInput,
    ExitStatus,
    HostFailed,
    RestoreError,
    UsageError,
    how_ended,
)
from qubes_restore_svc.report_file import KeptReport
from qubes_restore_svc.watch.documents import State, WatchReport
from qubes_restore_svc.watch.newest import Found, NoBackup, newest_backup
from qubes_restore_svc.watch.places import Place
from qubes_restore_svc.wire.connection import parse_object
from qubes_restore_svc.wire.models import ErrorInfo, validated
from qubes_restore_svc.wire.names import MAX_TEXT, backup_time, shortened, strip_control
from qubes_restore_svc.wire.report import Report

#: What the backup cannot be blamed for, beside what a worker does not get to say.
_NOT_THE_BACKUP = (
    "archive-unreadable", "budget-too-small", "faulty-machine", "resources-exhausted", "source-stalled",
    "wrong-passphrase", "no-space", "skipped", "error",
)  # fmt: skip

#: What a backup looks like if the command that brings it breaks off.
_CUT_OFF = (ArchiveTruncated.kind, EmptyInput.kind)

_CLOCKS_DIFFER = timedelta(days=1)

#: Carries out a command in this process: its words, and the exit status.
Run = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Verifier:
    """The command that verifies, and the words before its own."""

    words: tuple[str, ...]
    run: Run


def verifier(place: Place, interruption: Interruption, way: Way = way_to_dom0) -> Verifier:
    """The command of this machine that can verify a backup in this place."""
    if place.qube is None and not qvm_arguments.QUBESD_SOCKET.exists():
        try:
            from qubes_restore_svc.local.command import run as run_here
        except ModuleNotFoundError as error:
            if error.name != "qubes_restore_svc.local":  # which a Qubes system does not have
                raise
        else:
            return Verifier(("verify",), lambda words: run_here(words, interruption))
    there = () if place.qube is None else ("-d", place.qube)
    return Verifier(
        ("--mgmt-vm", "--verify-only", *there), lambda words: run_on_qubes(words, interruption, way)
    )


def check(name: str, place: Place, state: Path, verify: Verifier) -> WatchReport:
    """Verify the newest backup in a place. `state` is a directory for the time being."""
    started = datetime.now(UTC)
    found: Found | None = None
    report: KeptReport | None = None
    judged: tuple[State, str]
    try:
        with newest_backup(place) as found:
            words = [*verify.words, "-p", _passphrase_file(place, state), *place.options, found.location]
            report = _verified(words, state / f".{name}-{os.getpid()}.json", verify.run)
        judged = _judged(report, place, found)
    except NoBackup as none:
        judged = "no backup", str(none)
    except RestoreError as error:
        judged = "not verified", str(error)
    made = None if found is None else _time_of(report, found)
    if judged[0] == "good" and (why := too_old(made, place.max_age_days, started)):
        judged = "too old", why
    return WatchReport(
        place=name,
        state=judged[0],
        reason=shortened(judged[1], MAX_TEXT),
        backup=None if found is None else shortened(found.shown, MAX_TEXT),
        backup_id=None if report is None else report.backup_id,
        backup_time=made,
        max_age_days=place.max_age_days,
        started=started,
        finished=datetime.now(UTC),
        verification=report,
    )


def not_ended(name: str, reason: str, max_age_days: int) -> WatchReport:
    """What stands for a check until it has ended, or if it cannot begin."""
    now = datetime.now(UTC)
    return WatchReport(
        place=name,
        state="not verified",
        reason=shortened(reason, MAX_TEXT),
        max_age_days=max_age_days,
        started=now,
        finished=now,
    )


def too_old(made: datetime | None, max_age_days: int, now: datetime) -> str:
    """Why a backup that was made then is too old, a clause; empty if it is not."""
    if made is None:
        return "it is not known when it was made"
    if made > now + _CLOCKS_DIFFER:
        return "it was made in the future, by its own date"
    age = now - made
    if age > timedelta(days=max_age_days):
        return f"it is {age.days} days old, and {max_age_days} are allowed"
    return ""


def _passphrase_file(place: Place, state: Path) -> str:
    """Raises UsageError."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    if place.passphrase_file is not None:
        path = Path(place.passphrase_file).expanduser()
        if path.is_file() and path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            say_wrapped(f"Warning: others than its owner can read {strip_control(str(path))}: chmod 600.")
        return str(path)
    if credentials is not None and (path := Path(credentials, "passphrase")).exists():
        return str(path)
    raise UsageError(
        "there is no passphrase",
        advice="Name a file in the settings (passphrase_file), or give the service a credential.",
    )


def _verified(words: Sequence[str], path: Path, run: Run) -> KeptReport:
    """The report of the command. Raises RestoreError."""
    try:
        path.unlink(missing_ok=True)  # of a run that was killed
    except OSError as error:
        shown = strip_control(str(path))
        raise HostFailed(f"{shown}, which is old, cannot be removed: {error.strerror}") from None
    try:
        try:
            status = run([*words[:-1], "--report", str(path), "--", words[-1]])
        except RestoreError:
            if not path.exists():
                raise
        except SystemExit as end:  # argparse: an option of the settings is none
            raise UsageError("the options in the settings are refused", advice="") from end
        else:
            if not path.exists():
                raise RestoreError(f"there is no report of the verification, which {how_ended(status)}")
        return validated(KeptReport, parse_object(path.read_bytes()))
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _judged(report: Report, place: Place, found: Found) -> tuple[State, str]:
    """State and reason, whatever the age."""
    wanted = [qube for qube in report.qubes if qube.outcome != "left out"]
    broke_off = f"the command that brings the backup {how_ended(found.ended)}"
    if report.status == ExitStatus.COMPLETE:
        if found.broke_off:
            return "not verified", broke_off
        left_out = len(report.qubes) - len(wanted)
        more = f", {left_out} left out" if left_out else ""
        return "good", f"{len(wanted)} of {len(report.qubes)} qubes verified{more}"
    failed = [(f"{qube.name}: ", qube.error) for qube in wanted if qube.error is not None]
    errors = [*([("", report.error)] if report.error is not None else []), *failed]
    if not errors:
        return "not verified", "the report does not say why"
    if any(error.kind in _CUT_OFF for _, error in errors):
        if found.broke_off:
            return "not verified", broke_off
        if errors[0][1].kind == EmptyInput.kind and place.command is not None:
            return "no backup", errors[0][1].reason
    errors.sort(key=lambda error: not _is_damage(error[1]))
    where, first = errors[0]
    others = len({error.reason for _, error in errors}) - 1
    more = f" (and {others} more)" if others else ""
    if place.qube is not None and place.directory is not None and report.backup_id is None:
        more = f"; or no file there is called {place.pattern}"  # the agent tells no difference
    return "bad" if _is_damage(first) else "not verified", f"{where}{first.reason}{more}"


def _is_damage(error: ErrorInfo) -> bool:
    """Is it the backup's own fault? What is not known here is taken for that."""
    kind = ERROR_KINDS.get(error.kind)
    return error.kind not in _NOT_THE_BACKUP and (kind is None or kind.for_a_worker_to_say)


def _time_of(report: Report | None, found: Found) -> datetime | None:
    """When the backup was made: its id begins with that, by the clock and the zone of its machine.

    The ids of old backups do not. Then it is when the file was written.
    """
    made = None if report is None or report.backup_id is None else backup_time(report.backup_id)
    made = found.modified if made is None else made
    return None if made is None else datetime.fromtimestamp(made, UTC)
