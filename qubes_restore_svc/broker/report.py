"""What happened, qube by qube and volume by volume: the result of every restore and verify.

Strategy: plain models, filled while things happen, written as JSON at the end. The exit status is computed
from them, so the report and the status cannot disagree.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from qubes_restore_svc import __version__
from qubes_restore_svc.errors import ExitStatus, RestoreError
from qubes_restore_svc.wire.names import MAX_TEXT, shortened

#: Stands in a report in place of what there was no room for.
CUT = "there was more to say than there is room for: texts were shortened or left out"


@dataclass(frozen=True, slots=True)
class _Room:
    """How much a report may say: characters of a text, remarks on one thing, and on the volumes."""

    text: int
    remarks: int
    volume_errors: bool = True
    volumes: bool = True


#: From the largest to the smallest, in which every qube's name, outcome and reason still stand. A report of
#: as many qubes as a backup may hold takes 3 MB then.
_ROOMS = (
    _Room(MAX_TEXT, 10),
    _Room(300, 3),
    _Room(100, 1),
    _Room(60, 0, volume_errors=False),
    _Room(40, 0, volume_errors=False, volumes=False),
)


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

    def within(self, room: _Room) -> "ErrorReport":
        """The same, shortened."""
        return ErrorReport(
            kind=self.kind,
            reason=shortened(self.reason, room.text),
            advice=shortened(self.advice, room.text) if room.remarks else "",
            chunk=self.chunk,
        )


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

    `name_in_backup` is told if it is another one; `settings_left_out` did not pass the allow-list. A qube
    that is `incomplete` is there, but lacks what only came when it was finished.
    """

    name: str
    name_in_backup: str | None = None
    klass: str
    outcome: Literal["restored", "verified", "incomplete", "failed", "refused", "left out"] = "failed"
    remark: str = ""
    error: ErrorReport | None = None
    warnings: list[str] = Field(default_factory=list)
    settings_left_out: list[str] = Field(default_factory=list)
    volumes: list[VolumeReport] = Field(default_factory=list)

    @property
    def succeeded(self) -> bool:
        """Is it there, or verified, to its last byte?"""
        return self.outcome in ("restored", "verified")

    def within(self, room: _Room) -> "QubeReport":
        """The same, shortened. Outcomes, sizes and digests stay as they are."""
        volumes = [
            volume.model_copy(update={"error": _error_within(volume.error, room)})
            for volume in self.volumes
            if room.volumes
        ]
        return self.model_copy(
            update={
                "name": shortened(self.name, room.text),
                "remark": shortened(self.remark, room.text),
                "error": _error_within(self.error, room, always=True),
                "warnings": _remarks_within(self.warnings, room),
                "settings_left_out": _remarks_within(self.settings_left_out, room),
                "volumes": volumes,
            }
        )

    def fitting(self, size: Callable[["QubeReport"], int], limit: int) -> "QubeReport":
        """The fullest form of it whose `size` is within the limit, both in bytes."""
        return _fullest(self, self.within, size, limit)

    @property
    def text_length(self) -> int:
        """Characters of its longest parts."""
        errors = (self.error, *(volume.error for volume in self.volumes))
        return (
            len(self.remark)
            + sum(len(error.reason) + len(error.advice) for error in errors if error is not None)
            + sum(map(len, self.warnings))
            + sum(map(len, self.settings_left_out))
        )


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
    status: int = ExitStatus.NOTHING
    error: ErrorReport | None = None
    warnings: list[str] = Field(default_factory=list)
    qubes: list[QubeReport] = Field(default_factory=list)

    def close(self, finished: datetime, error: RestoreError | None = None) -> None:
        """Set the end, the error that ended the run, and the exit status that follows from all of it."""
        self.finished = finished
        self.error = None if error is None else ErrorReport.of(error)
        wanted = [qube for qube in self.qubes if qube.outcome != "left out"]
        if error is not None and error.exit_status is not ExitStatus.NOTHING:
            self.status = error.exit_status
        elif not any(qube.succeeded or qube.outcome == "incomplete" for qube in wanted):
            self.status = ExitStatus.NOTHING
        elif error is None and all(qube.succeeded for qube in wanted):
            self.status = ExitStatus.COMPLETE
        else:
            self.status = ExitStatus.PARTLY

    def fitting(self, size: Callable[["Report"], int], limit: int) -> "Report":
        """The fullest form of it whose `size` is within the limit, both in bytes.

        One that is not all of it says so in its warnings.
        """
        return _fullest(self, self._within, size, limit)

    @property
    def text_length(self) -> int:
        """Characters of its longest parts."""
        return sum(map(len, self.warnings)) + sum(qube.text_length for qube in self.qubes)

    def _within(self, room: _Room) -> "Report":
        return self.model_copy(
            update={
                "error": _error_within(self.error, room, always=True),
                "warnings": [*_remarks_within(self.warnings, room), CUT],
                "qubes": [qube.within(room) for qube in self.qubes],
            }
        )


_Sized = TypeVar("_Sized", QubeReport, Report)


def _error_within(error: ErrorReport | None, room: _Room, *, always: bool = False) -> ErrorReport | None:
    return error.within(room) if error is not None and (always or room.volume_errors) else None


def _remarks_within(remarks: list[str], room: _Room) -> list[str]:
    return [shortened(remark, room.text) for remark in remarks[: room.remarks]]


def _fullest(
    whole: _Sized, within: Callable[[_Room], _Sized], size: Callable[[_Sized], int], limit: int
) -> _Sized:
    """The first form whose size is within the limit, or else the last."""
    form = whole
    rooms = iter(_ROOMS)
    # What is too long by its texts alone need not be encoded, which takes seconds then.
    while form.text_length > limit or size(form) > limit:
        room = next(rooms, None)
        if room is None:
            break
        form = within(room)
    return form
