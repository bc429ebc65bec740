"""The messages of `restore.Start`, `restore.Verify` and `restore.List`: between a client and dom0's broker.

Strategy: the client opens a backup and is told the plan. It may choose otherwise, and is told the new plan.
Then it confirms the last plan, by its number, so that exactly the plan that was shown is carried out. From
then on the broker tells the progress, and at the end the result. All of it is bounded and closed, as in
`models.py`: dom0 answers every qube that the policy lets call, and that may be one that has been taken over.
What may come when is a table; messages of the two sides can cross on the way, so after a `cancel` the broker
may still say anything.

    IDLE      --open-->     PLANNING
    PLANNING  --plan-->     PLANNED    (CLOSED, if it was only to be listed)
    PLANNED   --choose-->   PLANNING
    PLANNED   --confirm-->  RUNNING
    RUNNING   --volume_started, qube_finished--> RUNNING
    from PLANNING on, log and progress; report and refused, to CLOSED; cancel, to ENDING
    IDLE      --refused-->  CLOSED     (the client does not say what it wants)
    ENDING    --everything the broker says--> ENDING, until report or refused
"""

import enum
import re
import unicodedata
from dataclasses import dataclass
from itertools import chain, starmap
from typing import Annotated, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import Field, ValidationError, model_validator

from qubes_restore_svc.errors import ProtocolViolation, RestoreError, UsageError
from qubes_restore_svc.wire.connection import Connection
from qubes_restore_svc.wire.messages import Cancel, ListedQube, Log, RefusedQube
from qubes_restore_svc.wire.models import (
    MAX_FRAME,
    ErrorInfo,
    Message,
    Model,
    Passphrase,
    ProtocolVersion,
    encoded_size,
    fullest,
)
from qubes_restore_svc.wire.names import (
    MAX_QUBES,
    MAX_TEXT,
    QUBE_NAME,
    BackupId,
    Count,
    DigestKind,
    FilterName,
    FreeText,
    LocationText,
    NetvmName,
    PoolName,
    QubeName,
    SettingName,
    Size,
    StallTimeout,
    VolumeName,
    shortened,
    strip_control,
)
from qubes_restore_svc.wire.qrexec_call import LIST, START, VERIFY
from qubes_restore_svc.wire.report import CUT, QubeReport, Remarks, Report, RestoreProgress, VolumeReport

_Model = TypeVar("_Model", bound=Model)
_Received = TypeVar("_Received", bound=Message)

#: What a call is for. Each of the three services does what its name says, and less.
Mode = Literal["list", "verify", "restore", "compare"]
SERVICES: dict[Mode, str] = {"list": LIST, "verify": VERIFY, "restore": START, "compare": START}

_Names = Annotated[tuple[FreeText, ...], Field(fail_fast=True, max_length=MAX_QUBES)]

MAX_OFFERED = 1000  #: names in one list of what can be chosen

_Settings = Annotated[tuple[SettingName, ...], Field(fail_fast=True, max_length=MAX_OFFERED)]
_Offered = Annotated[tuple[QubeName, ...], Field(fail_fast=True, max_length=MAX_OFFERED)]


# --- Client to broker ----------------------------------------------------------------------------


class BackupLocation(Model):
    """Where the backup lies: `text` is a path in the qube `qube`, or a command that writes the backup.

    With `service`, it is the name of a qrexec service of that qube, possibly with an argument after a +.
    """

    qube: QubeName | None = None  #: None: the qube that calls; `dom0`: a file in dom0
    text: LocationText
    service: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.service and self.qube == "dom0":
            raise ValueError("dom0 has no service that brings a backup")
        return self


class QubeChoice(Model):
    """What the person chose for one qube, instead of what the backup says. None: nothing was chosen.

    What cannot be (a name that is taken, a template that is not here) makes the plan refuse the qube.
    """

    name: QubeName  #: as it is called in the backup
    new_name: QubeName | None = None  #: the name that it gets; references of other qubes follow it
    template: QubeName | None = None  #: a template that is here
    netvm: NetvmName | None = None  #: a netvm that is here; "": no netvm


class Choice(Model):
    """What the person selected, and how what does not fit is to be settled."""

    #: As they are called in the backup, or patterns with * and ?; none: all, and dom0's home if `dom0_home`
    #: says so.
    names: _Names = ()
    exclude: _Names = ()  #: leave these out; patterns too
    conflicts: Literal["refuse", "skip", "rename"] = "refuse"  #: a name that is taken
    missing: Literal["refuse", "skip", "default"] = "refuse"  #: a template or netvm that is nowhere
    dom0_home: bool = False  #: restore dom0's home, even if it is not named
    ignore_username_mismatch: bool = False  #: …, even if it is that of another user name
    #: What was chosen for single qubes; it goes before all that follows.
    qubes: Annotated[tuple[QubeChoice, ...], Field(fail_fast=True, max_length=MAX_QUBES)] = ()
    template: QubeName | None = None  #: for all qubes that miss their template, and that it fits
    netvm: NetvmName | None = None  #: for all qubes that miss their netvm; "": no netvm
    pool: PoolName | None = None  #: storage pool of the restored qubes; None: as the configuration says
    resume: bool = False  #: qubes that an earlier restore of this backup has finished stay as they are
    allow: _Settings = ()  #: settings that come back this time; the configuration says which can be allowed

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({qube.name for qube in self.qubes}) < len(self.qubes):
            raise ValueError("two choices for one qube")
        return self

    @classmethod
    def asked(cls, **fields: object) -> Self:
        """From what a person asked for. Raises UsageError for what no message can say."""
        return _asked(cls, fields)


#: A size of the worker that follows the machine.
Auto = Literal["auto"]
AUTO: Auto = "auto"


class WorkerWishes(Model):
    """How the disposable that reads the backup is to be; None: as the configuration says."""

    template: QubeName | None = None  #: a disposable template
    memory: Annotated[int, Field(strict=True, ge=1, le=1 << 24)] | Auto | None = None  #: MiB
    vcpus: Annotated[int, Field(strict=True, ge=1, le=1024)] | Auto | None = None


class OpenBackup(Message):
    """Open a backup, and answer with a plan."""

    type: Literal["open"] = "open"
    protocol: ProtocolVersion = 1
    #: `restore.Start` takes all of them, `restore.Verify` `verify` and `list`, `restore.List` only `list`.
    #: Nobody but dom0 itself may compare.
    mode: Mode
    location: BackupLocation
    passphrase: Passphrase
    choice: Choice = Choice()
    compression_filter: FilterName | None = None  #: instead of the header's
    ignore_size_limit: bool = False  #: accept images larger than qubes.xml says
    ignore_cost_limit: bool = False  #: accept key derivations of more work than the fixed ceiling
    digest: DigestKind | None = None  #: which one of each volume is wanted; None: as the configuration says
    stall_timeout: StallTimeout | None = None  #: without data, in seconds; at most the configured time
    worker: WorkerWishes = WorkerWishes()
    max_size: ClassVar[int] = 1 << 20

    @classmethod
    def asked(cls, **fields: object) -> Self:
        """From what a person asked for. Raises UsageError for what no message can say."""
        return _asked(cls, fields)


class Choose(Message):
    """Make another plan, from this choice alone."""

    type: Literal["choose"] = "choose"
    choice: Choice
    max_size: ClassVar[int] = 1 << 20


class Confirm(Message):
    """Carry out the plan of this number, which must be the last one."""

    type: Literal["confirm"] = "confirm"
    plan: Count


#: The sentence about a field whose value no message can hold. For the fields of the next table, the sentence
#: also says which part, and why.
_UNFIT = {
    "names": "a list of qubes that holds something else than names",
    "exclude": "a list of qubes that holds something else than names",
    "pool": "no storage pool can have this name",
    "template": "the template has a name that no qube can have",
    "netvm": "the netvm has a name that no qube can have",
    "qubes": "a choice for a qube that holds something else than one name of each kind",
    "allow": "this is no setting: expected property:, feature:, tag: or device: and a name",
    "passphrase": "the passphrase is longer than any can be, or holds characters that none can hold",
    "compression_filter": "the compression filter has a name that no program can have",
}
_UNFIT_IN_PART = {
    "location": "the location of the backup cannot be told to dom0",
    "worker": "the qube that reads the backup cannot be as it was asked for",
}


def _asked(model: type[_Model], fields: dict[str, object]) -> _Model:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field, *parts = [str(part) for part in first["loc"]] or ["qubes"]
        if field in _UNFIT:  # never the value: it may be the passphrase
            raise UsageError(_UNFIT[field]) from None
        what = _UNFIT_IN_PART.get(field, f"{field.replace('_', '-')} cannot be told to dom0")
        part, why = f"{parts[0]}: " if parts else "", first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{what} ({part}{strip_control(why)})") from None


# --- Broker to client ----------------------------------------------------------------------------


Decision = Literal["take", "leave-out", "refuse"]
Problem = Literal[
    "excluded",
    "not-selected",
    "already-restored",
    "already-exists",
    "missing-template",
    "missing-netvm",
    "username-mismatch",
    "home-not-asked-for",
    "home-not-compared",
    "not-here",
]
#: What would settle a problem: another name (`QubeChoice.new_name`), a number after its name (`conflicts`
#: rename), a template or netvm that is here, the system's default (`missing` default), leaving the qube out,
#: or `ignore_username_mismatch`.
Settlement = Literal["new-name", "number", "template", "netvm", "default", "leave-out", "ignore"]


_OUTCOMES: dict[Decision, Literal["left out", "refused", "failed"]] = {
    "take": "failed",
    "leave-out": "left out",
    "refuse": "refused",
}

#: What is known to become of it before anything is done.
_ENDS: dict[Problem | None, Literal["missing", "already restored"]] = {
    "not-here": "missing",
    "already-restored": "already restored",
}


class PlanQube(ListedQube):
    """One qube of the backup, as it is there, and what will become of it here."""

    decision: Decision
    new_name: QubeName  #: the name that it will get
    new_template: QubeName | None = None  #: the template that it will get, if it is taken and has one
    new_netvm: NetvmName | None = None  #: the same of its netvm; None: the default; "": no netvm
    problem: Problem | None = None  #: why it is not taken
    remark: FreeText = ""  #: the same, for people
    error: ErrorInfo | None = None  #: the same, if it was wanted: what is wrong, and what to do
    settled_by: Annotated[tuple[Settlement, ...], Field(max_length=8)] = ()  #: what can be done here about it
    notes: Remarks = ()  #: what to know of it: renamed, another template
    settings_left_out: Remarks = ()  #: settings that do not come back

    @classmethod
    def taken(cls, listed: ListedQube) -> "PlanQube":
        """To be taken as it is."""
        fields = {name: getattr(listed, name) for name in ListedQube.model_fields}
        return cls.model_validate(fields | {"decision": "take", "new_name": listed.name})

    def report(self) -> QubeReport:
        """The qube's report, if nothing more happens to it."""
        is_taken = self.decision == "take"
        is_missing = self.problem == "not-here"
        return QubeReport(
            name=self.new_name,
            name_in_backup=None if self.new_name == self.name else self.name,
            klass=self.klass,
            outcome=_ENDS.get(self.problem, _OUTCOMES[self.decision]),
            remark=shortened("; ".join(self.notes), MAX_TEXT) if is_taken else self.remark,
            error=None if self.error is None else self.error.without_place(),
            settings_left_out=self.settings_left_out,
            volumes=tuple(
                VolumeReport(name=one.name, outcome="missing" if is_missing else "not reached")
                for one in self.volumes
                if is_taken or is_missing
            ),
        )

    def within(self, length: int, most: int) -> "PlanQube":
        """The same with texts of `length` characters, `most` notes, and hardly a word on settings."""
        update = {
            "remark": shortened(self.remark, length),
            "error": None if self.error is None else self.error.within(length, advice=most > 0),
            "notes": tuple(shortened(note, length) for note in self.notes[:most]),
            "settings_left_out": (CUT,) if most else (),
        }
        return self.model_copy(update=update)


class Offers(Model):
    """What can be chosen on this system; dom0's broker tells only programs of dom0 the names of qubes."""

    templates: _Offered = ()  #: for an AppVM
    disposable_templates: _Offered = ()  #: for a DispVM
    netvms: _Offered = ()  #: qubes that provide network
    settings: _Settings = ()  #: those that stay behind by this plan, and that `Choice.allow` may name


#: Characters of a text and notes on a qube in a plan that would be too large, from the most to the least.
_PLAN_ROOMS = ((MAX_TEXT, 10), (300, 10), (100, 0), (20, 0))


class Plan(Message):
    """What will be done, qube by qube, in the order of the backup."""

    type: Literal["plan"] = "plan"
    number: Count  #: rises from plan to plan of a call
    mode: Mode
    backup_id: BackupId
    archive_size: Size | None = None  #: bytes, if it is known in advance
    qubes: Annotated[tuple[PlanQube, ...], Field(fail_fast=True, max_length=MAX_QUBES)]
    unlisted: Annotated[tuple[RefusedQube, ...], Field(fail_fast=True, max_length=MAX_QUBES)] = ()
    offers: Offers = Offers()  #: what can be chosen
    excess: ErrorInfo | None = None  #: why it will be refused if it is confirmed: the administrator's limits
    max_size: ClassVar[int] = MAX_FRAME

    @property
    def taken(self) -> tuple[PlanQube, ...]:
        """Those that will be restored or verified."""
        return tuple(qube for qube in self.qubes if qube.decision == "take")

    def reports(self, why: RestoreError | None = None) -> tuple[QubeReport, ...]:
        """A report of each qube, if nothing more happens to it, in the order of the plan.

        `why` is the reason if the plan was not carried out: nothing is wrong with the qubes that it takes.
        """
        unlisted = (
            QubeReport(name=one.name, klass="?", outcome="refused", error=one.error.without_place())
            for one in self.unlisted
        )
        reports = (*(qube.report() for qube in self.qubes), *unlisted)
        if why is not None:
            for qube, report in zip(self.qubes, reports, strict=False):
                if qube.decision == "take":
                    report.error = ErrorInfo.of(why).without_place()
        return reports

    def fitting(self) -> "Plan":
        """The fullest form of it that one message holds."""
        forms = chain((self,), starmap(self._within, _PLAN_ROOMS))
        return fullest(forms, lambda form: encoded_size(form) <= MAX_FRAME)

    def _within(self, length: int, most: int) -> "Plan":
        unlisted = (
            RefusedQube(name=shortened(one.name, length), error=one.error.within(length, advice=most > 0))
            for one in self.unlisted
        )
        qubes = (qube.within(length, most) for qube in self.qubes)
        return self.model_copy(update={"qubes": tuple(qubes), "unlisted": tuple(unlisted)})


class VolumeStarted(Message):
    """A volume begins."""

    type: Literal["volume_started"] = "volume_started"
    qube: QubeName
    volume: VolumeName
    image_size: Size  #: bytes; for `home`, which has no size in advance, a ceiling


class QubeFinished(Message):
    """A qube is through, one way or the other."""

    type: Literal["qube_finished"] = "qube_finished"
    qube: QubeReport
    max_size: ClassVar[int] = MAX_FRAME

    @classmethod
    def of(cls, report: QubeReport) -> Self:
        """The message that tells of it, shortened until it fits."""
        return cls(qube=report.fitting(MAX_FRAME, lambda form: encoded_size(cls(qube=form))))


class Refused(Message):
    """The end: nothing was done, and this is why."""

    type: Literal["refused"] = "refused"
    error: ErrorInfo


# --- Where a backup lies that is in a qube, as a person names it -----------------------------------

#: Longest location, bytes; a path has 4096 at the most, and this is written without waiting for a reader.
MAX_LOCATION = 16 << 10

_SERVICE = re.compile(r"[A-Za-z0-9_.-]+(\+[A-Za-z0-9_.+-]*)?")
_MAX_SERVICE = 200


@dataclass(frozen=True, slots=True)
class QubePath:
    """A file in a qube, or a command to be run there: if it names no file, the qube takes it for a command.

    Raises UsageError for what cannot be either. Line ends in it are dropped, as the stock program does.
    """

    qube: str
    text: str

    def __post_init__(self) -> None:
        _check_qube(self.qube)
        text = self._one_line()
        if not text.strip():
            raise UsageError("the location of the backup is empty")
        if any(unicodedata.category(char) == "Cc" for char in text):
            raise UsageError("the location of the backup contains a control character")
        try:
            size = len(self.line)
        except UnicodeEncodeError:
            raise UsageError("the location of the backup is not a text that UTF-8 can carry") from None
        if size > MAX_LOCATION:
            raise UsageError(f"the location of the backup is longer than {MAX_LOCATION} bytes")

    @property
    def line(self) -> bytes:
        """What is registered. What is not UTF-8 goes there byte for byte, as it came from the shell."""
        return self._one_line().encode("utf-8", "surrogateescape") + b"\n"

    def _one_line(self) -> str:
        return self.text.replace("\r", "").replace("\n", "")


@dataclass(frozen=True, slots=True)
class QubeService:
    """A service `NAME` or `NAME+ARG` of a qube that takes a line of paths and answers with a qfile stream."""

    qube: str
    service: str

    def __post_init__(self) -> None:
        _check_qube(self.qube)
        if not _SERVICE.fullmatch(self.service) or len(self.service) > _MAX_SERVICE:
            raise UsageError(
                "the location of the backup is not the name of a qrexec service",
                advice="Give NAME or NAME+ARGUMENT: letters, digits and -_.+; with --location-is-service.",
            )


def _check_qube(qube: str) -> None:
    if qube == "dom0":
        raise UsageError("dom0 is not a qube that a backup is fetched from", advice="Leave out -d.")
    if not re.fullmatch(QUBE_NAME, qube):
        raise UsageError("the name of the qube that holds the backup is not the name of a qube")


# --- Who may say what, and when --------------------------------------------------------------------


ClientMessage = OpenBackup | Choose | Confirm | Cancel
BrokerAnswer = Log | RestoreProgress | Plan | VolumeStarted | QubeFinished | Report | Refused


class CallPhase(enum.Enum):
    """The states of a call."""

    IDLE = "idle"
    PLANNING = "planning"
    PLANNED = "planned"
    RUNNING = "running"
    ENDING = "ending"
    CLOSED = "closed"


TRANSITIONS: dict[tuple[CallPhase, type[Message]], CallPhase] = {
    (CallPhase.IDLE, OpenBackup): CallPhase.PLANNING,
    (CallPhase.IDLE, Refused): CallPhase.CLOSED,
    (CallPhase.PLANNING, Plan): CallPhase.PLANNED,
    (CallPhase.PLANNED, Choose): CallPhase.PLANNING,
    (CallPhase.PLANNED, Confirm): CallPhase.RUNNING,
}
for _phase in (CallPhase.PLANNING, CallPhase.PLANNED, CallPhase.RUNNING, CallPhase.ENDING):
    TRANSITIONS[_phase, Log] = _phase
    TRANSITIONS[_phase, RestoreProgress] = _phase
    TRANSITIONS[_phase, Report] = CallPhase.CLOSED
    TRANSITIONS[_phase, Refused] = CallPhase.CLOSED
for _phase in (CallPhase.PLANNING, CallPhase.PLANNED, CallPhase.RUNNING):
    TRANSITIONS[_phase, Cancel] = CallPhase.ENDING
for _phase in (CallPhase.RUNNING, CallPhase.ENDING):
    TRANSITIONS[_phase, VolumeStarted] = _phase
    TRANSITIONS[_phase, QubeFinished] = _phase
TRANSITIONS[CallPhase.ENDING, Plan] = CallPhase.ENDING


class _Call(Connection[CallPhase, _Received]):
    """Plans are numbered, the last one is confirmed, and all have the mode of `open`."""

    def __init__(self, kinds: tuple[type[_Received], ...]) -> None:
        super().__init__("call", TRANSITIONS, CallPhase.IDLE, kinds)
        self._mode: Mode | None = None
        self._last_plan: int | None = None

    def _after(self, message: Message, following: CallPhase) -> CallPhase:
        if isinstance(message, OpenBackup):
            self._mode = message.mode
        elif isinstance(message, Plan):
            if message.mode != self._mode or message.number <= (self._last_plan or 0):
                raise ProtocolViolation("'plan' of another mode, or one that has been before")
            self._last_plan = message.number
            return CallPhase.CLOSED if message.mode == "list" else following
        elif isinstance(message, Confirm) and message.plan != self._last_plan:
            raise ProtocolViolation(
                f"'confirm' of plan {message.plan}, and the last one is {self._last_plan}"
            )
        elif isinstance(message, Report) and message.mode != self._mode:
            raise ProtocolViolation("'report' of another mode")
        return following


def client_end() -> Connection[CallPhase, BrokerAnswer]:
    """The client's end of a call."""
    return _Call(get_args(BrokerAnswer))


def service_end() -> Connection[CallPhase, ClientMessage]:
    """The end of dom0's service."""
    return _Call(get_args(ClientMessage))
