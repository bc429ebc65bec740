"""Reports of checks."""

from datetime import UTC, datetime, timedelta

from qubes_restore_svc.report_file import KeptReport
from qubes_restore_svc.watch.documents import State, WatchReport
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.report import QubeReport, VolumeReport

NOW = datetime(2026, 11, 29, 3, 4, 5, tzinfo=UTC)


def error(kind: str) -> ErrorInfo:
    """An error of this kind."""
    return ErrorInfo(kind=kind, reason=f"it is {kind}")


def now_in_an_id(days_ago: float = 0) -> str:
    """The id of a backup that was made so long ago."""
    return f"{datetime.now() - timedelta(days=days_ago):%Y%m%dT%H%M%S}-1234"


def verification(
    *errors: ErrorInfo | None,
    status: int = 3,
    backup_id: str | None = None,
    ended_by: ErrorInfo | None = None,
) -> KeptReport:
    """One of a qube for each error; without an error it is verified."""
    qubes = [
        QubeReport(
            name=f"qube-{number}",
            klass="AppVM",
            outcome="verified" if error is None else "failed",
            error=error,
            volumes=(VolumeReport(name="private", outcome="ok" if error is None else "failed", size=4096),),
        )
        for number, error in enumerate(errors)
    ]
    return KeptReport(
        mode="verify",
        tool_version="1",
        backup_id=backup_id,
        started=NOW,
        finished=NOW,
        status=status,
        error=ended_by,
        qubes=tuple(qubes),
    )


def whole(backup_id: str) -> KeptReport:
    """That of a backup of which everything was verified."""
    return verification(None, status=0, backup_id=backup_id)


def watch_report(state: State, made: datetime | None, finished: datetime = NOW) -> WatchReport:
    """What a check found that took 90 seconds."""
    error = ErrorInfo(kind="authentication-failed", reason="its content is not what was written")
    return WatchReport(
        place="nas",
        state=state,
        reason="the reason",
        backup="/media/qubes-1",
        backup_time=made,
        max_age_days=8,
        started=finished - timedelta(seconds=90),
        finished=finished,
        verification=verification(None, error),
    )
