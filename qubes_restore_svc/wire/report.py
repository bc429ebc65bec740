"""What happened, qube by qube and volume by volume: the result of every restore and verify.

Strategy: one set of models. The broker fills them while things happen and sends them to a client as they are;
every display reads them. A field is checked whenever it is set. Texts of this side are cut before that, so
that they fit (`remarks`, `ErrorInfo.of`). Texts of another side that do not fit are refused. The exit status
is computed from them, so the report and the status cannot disagree.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import ConfigDict, Field

from qubes_restore_svc import __version__
from qubes_restore_svc.errors import ExitStatus, RestoreError
from qubes_restore_svc.wire.models import MAX_FRAME, ErrorInfo, Message, Model, encoded_size, fullest
from qubes_restore_svc.wire.names import (
    MAX_COUNT,
    MAX_QUBES,
    MAX_TEXT,
    BackupId,
    Count,
    FreeText,
    Sha256,
    Size,
    Timestamp,
    VmClass,
    VolumeName,
    shortened,
)

#: Most remarks on one qube, or on the whole; and the most warnings that are kept of one.
MAX_REMARKS, MAX_WARNINGS = 1024, 100

#: A report has this in place of texts that had no room.
CUT = "there was more to say than there is room for: texts were shortened or left out"

#: Most places that are kept of those where one volume differs.
MAX_PLACES = 8

Remarks = Annotated[tuple[FreeText, ...], Field(fail_fast=True, max_length=MAX_REMARKS)]

#: What a run does with the qubes that it takes.
RunMode = Literal["verify", "restore", "compare"]

_Sized = TypeVar("_Sized", bound="QubeReport | Report")

#: Unlike what only travels, a report is filled while things happen.
_FILLED = ConfigDict(frozen=False, validate_assignment=True)


def remarks(texts: Iterable[str]) -> tuple[str, ...]:
    """`texts` as Remarks: each is cut to one line, and where they are too many, the last says so."""
    lines = tuple(shortened(text, MAX_TEXT) for text in texts)
    return lines if len(lines) <= MAX_REMARKS else (*lines[: MAX_REMARKS - 1], CUT)


class Place(Model):
    """Bytes in a row that differ: whole blocks of 4 KiB, as far as the volume reaches."""

    offset: Size  #: bytes
    length: Size  #: bytes


class Difference(Model):
    """How a volume here differs from the one of the backup. Behind its end, either counts as zeros."""

    size: Size  #: bytes of the volume here
    different_bytes: Size  #: of all places together
    places: Annotated[tuple[Place, ...], Field(fail_fast=True, max_length=MAX_PLACES)] = ()  #: the first
    more_places: Count = 0  #: how many follow


class VolumeReport(Model):
    """The result of a volume. One that is ok has one digest, over the whole image, holes as zeros.

    In place of ok, a comparison says how the volume here is: the same, or it differs, or it is missing. It is
    newer if it differs and was written to after the backup. `size` and digest are those of the backup.

    `fsverity` is the one that `fsverity digest FILE` prints (SHA-256, blocks of 4 KiB, no salt), `sha256` the
    one that `sha256sum FILE` prints.
    """

    name: VolumeName
    outcome: Literal["ok", "same", "differs", "newer", "missing", "failed", "skipped", "not reached"]
    size: Size | None = None  #: bytes
    data_bytes: Size | None = None  #: bytes of it that travelled
    fsverity: Sha256 | None = None
    sha256: Sha256 | None = None
    difference: Difference | None = None  #: if it differs
    error: ErrorInfo | None = None
    model_config = _FILLED

    @property
    def is_whole(self) -> bool:
        """Has all of it come, and been verified?"""
        return self.outcome not in ("failed", "skipped", "not reached")


class QubeReport(Model):
    """The result of a qube; `name` is the name it got."""

    name: FreeText
    name_in_backup: FreeText | None = None  #: if it is another one
    #: ?: the qube could not even be listed
    klass: Annotated[VmClass | Literal["?"], Field(validation_alias="class", serialization_alias="class")]
    outcome: Literal[
        "restored", "already restored", "verified", "same", "differs", "newer", "missing", "incomplete",
        "failed", "refused", "left out",
    ]  # fmt: skip
    remark: FreeText = ""
    error: ErrorInfo | None = None
    warnings: Remarks = ()
    settings_left_out: Remarks = ()
    volumes: Annotated[tuple[VolumeReport, ...], Field(fail_fast=True, max_length=3)] = ()
    model_config = _FILLED

    @property
    def succeeded(self) -> bool:
        """Is it there, or verified, to its last byte?"""
        return self.outcome in ("restored", "already restored", "verified", "same")

    @property
    def is_different(self) -> bool:
        """Was it compared, and is it not the same here?"""
        return self.outcome in ("differs", "newer", "missing")

    def fitting(self, limit: int, size: Callable[["QubeReport"], int] = encoded_size) -> "QubeReport":
        """The fullest form of it whose `size` is within the limit, both in bytes."""
        return fullest(chain((self,), map(self.within, _ROOMS)), lambda form: _fits(form, size, limit))

    def within(self, room: "_Room") -> "QubeReport":
        """The same, shortened. Outcomes, sizes and digests stay as they are."""
        volumes = tuple(
            volume.model_copy(
                update={
                    "error": _error_within(volume.error, room),
                    "difference": volume.difference if room.places else _without_places(volume.difference),
                }
            )
            for volume in self.volumes
            if room.volumes
        )
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


class Report(Message):
    """The end: the result of everything."""

    type: Literal["report"] = "report"
    mode: RunMode
    tool_version: FreeText  #: of the broker
    backup_id: BackupId | None = None
    started: Timestamp
    finished: Timestamp
    status: Annotated[int, Field(strict=True, ge=0, le=255)]  #: exit status of the command in dom0
    error: ErrorInfo | None = None  #: what ended the whole early
    warnings: Remarks = ()
    qubes: Annotated[tuple[QubeReport, ...], Field(fail_fast=True, max_length=MAX_QUBES)] = ()
    derivations: Count | None = None  #: keys that the worker derived, if it came to the end of the backup
    max_size: ClassVar[int] = MAX_FRAME
    model_config = _FILLED

    @classmethod
    def begun(cls, mode: RunMode, started: datetime | None = None) -> Self:
        """The report of a run that begins; as long as it is not closed, it ends there, with nothing done."""
        started = datetime.now(UTC) if started is None else started
        return cls(
            mode=mode, tool_version=__version__, started=started, finished=started, status=ExitStatus.NOTHING
        )

    def close(self, error: RestoreError | None = None, finished: datetime | None = None) -> None:
        """Set the end, the error that ended the run, and the exit status that follows from all of it."""
        self.finished = datetime.now(UTC) if finished is None else finished
        self.error = None if error is None else ErrorInfo.of(error).without_place()
        wanted = [qube for qube in self.qubes if qube.outcome != "left out"]
        if error is not None and error.exit_status is not ExitStatus.NOTHING:
            self.status = error.exit_status
        elif not any(qube.succeeded or qube.is_different or qube.outcome == "incomplete" for qube in wanted):
            self.status = ExitStatus.NOTHING
        elif error is None and all(qube.succeeded for qube in wanted):
            self.status = ExitStatus.COMPLETE
        elif error is None and all(qube.succeeded or qube.is_different for qube in wanted):
            self.status = ExitStatus.DIFFERENT
        else:
            self.status = ExitStatus.PARTLY

    def fitting(self, limit: int, size: Callable[[Self], int] = encoded_size) -> Self:
        """The fullest form of it whose `size` is within the limit, both in bytes.

        One that is not all of it says so in its warnings.
        """
        return fullest(chain((self,), map(self._within, _ROOMS)), lambda form: _fits(form, size, limit))

    @property
    def text_length(self) -> int:
        """Characters of its longest parts."""
        return sum(map(len, self.warnings)) + sum(qube.text_length for qube in self.qubes)

    def _within(self, room: "_Room") -> Self:
        return self.model_copy(
            update={
                "error": _error_within(self.error, room, always=True),
                "warnings": (*_remarks_within(self.warnings, room), CUT),
                "qubes": tuple(qube.within(room) for qube in self.qubes),
            }
        )


def warn(report: Report | QubeReport, text: str) -> None:
    """Keep a warning, as far as there is room."""
    if len(report.warnings) < MAX_WARNINGS:
        report.warnings += (shortened(text, MAX_TEXT),)


# --- Who is told meanwhile --------------------------------------------------------------------------


class RestoreProgress(Message):
    """How far it is, about twice a second."""

    type: Literal["progress"] = "progress"
    archive_bytes: Size  #: how much of the archive has been dealt with
    image_bytes: Size = 0  #: how much of all images has been produced, holes included
    percent: Annotated[int, Field(strict=True, ge=0, le=100)] | None = None  #: of all work; None: not known
    per_second: Size = 0  #: bytes of the archive; 0 as long as it has not been measured
    seconds_left: Count | None = None  #: a guess; None: there is nothing to guess from


class Observer:
    """Who watches a restore or a verification: told what happens, in its order. Texts are fit for a terminal.

    This one watches nothing: who inherits from it has methods for what it wants to hear. What they raise ends
    the restore.
    """

    def progress(self, progress: RestoreProgress) -> None:
        """How far it is."""

    def log(self, level: str, text: str) -> None:
        """A line, `info` or `warning`."""

    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        """A volume begins; `image_size` in bytes, of `home` a ceiling."""

    def qube_finished(self, report: QubeReport) -> None:
        """A qube is through, one way or the other."""


# --- What there is no room for ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Room:
    """The room for texts in a report: characters of a text, remarks on one thing, and on the volumes."""

    text: int
    remarks: int
    volume_errors: bool = True
    volumes: bool = True
    places: bool = False


#: From the largest to the smallest, in which every qube's name, outcome and reason still stand. A report of
#: as many qubes as a backup may hold takes 3 MB then.
_ROOMS = (
    _Room(MAX_TEXT, 10, places=True),
    _Room(300, 3),
    _Room(100, 1),
    _Room(60, 0, volume_errors=False),
    _Room(40, 0, volume_errors=False, volumes=False),
)


def _error_within(error: ErrorInfo | None, room: _Room, *, always: bool = False) -> ErrorInfo | None:
    if error is None or not (always or room.volume_errors):
        return None
    return error.within(room.text, advice=room.remarks > 0)


def _without_places(difference: Difference | None) -> Difference | None:
    if difference is None:
        return None
    more = difference.more_places + len(difference.places)
    return difference.model_copy(update={"places": (), "more_places": min(more, MAX_COUNT)})


def _remarks_within(lines: tuple[str, ...], room: _Room) -> tuple[str, ...]:
    return tuple(shortened(line, room.text) for line in lines[: room.remarks])


def _fits(form: _Sized, size: Callable[[_Sized], int], limit: int) -> bool:
    # What is too long by its texts alone need not be encoded, which takes seconds then.
    return form.text_length <= limit and size(form) <= limit
