"""What happened, qube by qube and volume by volume: the result of every restore and verify.

Strategy: plain models, filled while things happen, written as JSON at the end. The exit status is computed
from them, so the report and the status cannot disagree.
"""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qubes_restore_svc import __version__
from qubes_restore_svc.errors import Cancelled, RestoreError, UsageError

COMPLETE, NOTHING, USAGE, PARTLY, CANCELLED = 0, 1, 2, 3, 130  #: exit statuses


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class ErrorReport(_Model):
    """An error: a stable `kind`, and the texts for people."""

    kind: str
    reason: str
    advice: str
    chunk: int | None = None

    @classmethod
    def of(cls, error: RestoreError) -> "ErrorReport":
        """The report of `error`."""
        return cls(kind=error.kind, reason=error.reason, advice=error.advice, chunk=error.chunk)


class VolumeReport(_Model):
    """One volume. Sizes in bytes; `sha256` is over the whole image, with holes as zeros."""

    name: str
    outcome: Literal["ok", "failed", "skipped", "not reached"] = "not reached"
    size: int | None = None
    data_bytes: int | None = None
    sha256: str | None = None
    error: ErrorReport | None = None


class QubeReport(_Model):
    """One qube of the backup; `name` is the name it got.

    `name_in_backup` is told if it is another one; `settings_left_out` did not pass the allow-list.
    """

    name: str
    name_in_backup: str | None = None
    klass: str
    outcome: Literal["restored", "verified", "failed", "refused", "left out"] = "failed"
    remark: str = ""
    error: ErrorReport | None = None
    warnings: list[str] = Field(default_factory=list)
    settings_left_out: list[str] = Field(default_factory=list)
    volumes: list[VolumeReport] = Field(default_factory=list)

    @property
    def succeeded(self) -> bool:
        """Is it there, or verified, to its last byte?"""
        return self.outcome in ("restored", "verified")


class Report(_Model):
    """A whole run. `status` is the exit status; `error` is what ended it early, if something did.

    `asked_by` is the domain that asked dom0 for it, if it was another than the one that keeps the report.
    """

    tool: str = "qubes-restore-svc"
    version: str = __version__
    mode: Literal["restore", "verify"]
    asked_by: str | None = None
    backup_id: str | None = None
    started: datetime
    finished: datetime | None = None
    status: int = NOTHING
    error: ErrorReport | None = None
    warnings: list[str] = Field(default_factory=list)
    qubes: list[QubeReport] = Field(default_factory=list)

    def close(self, finished: datetime, error: RestoreError | None = None) -> None:
        """Set the end, the error that ended the run, and the exit status that follows from all of it."""
        self.finished = finished
        self.error = None if error is None else ErrorReport.of(error)
        wanted = [qube for qube in self.qubes if qube.outcome != "left out"]
        if isinstance(error, Cancelled):
            self.status = CANCELLED
        elif isinstance(error, UsageError):
            self.status = USAGE
        elif not any(qube.succeeded for qube in wanted):
            self.status = NOTHING
        elif error is None and all(qube.succeeded for qube in wanted):
            self.status = COMPLETE
        else:
            self.status = PARTLY
