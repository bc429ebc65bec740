"""The messages of a `restore.Session`, between broker and worker, and what may come when.

Strategy: see `models.py`. First the parts that several messages have, then what the broker says, then what
the worker says, then the table of what may come when:

    IDLE       --open-->          OPENING
    OPENING    --failed-->        IDLE        (after a wrong passphrase, another `open` may try another one)
    OPENING    --manifest-->      LISTED
    LISTED     --start-->         STREAMING
    STREAMING  --volume_ready-->  VOLUME      (the volume can be fetched with restore.Volume)
    VOLUME     --volume_done-->   STREAMING   (of the same volume)
    STREAMING  --volume_done-->   STREAMING   (failed or skipped: there is nothing to fetch)
    STREAMING  --qube_settings--> STREAMING
    STREAMING  --qube_incomplete--> STREAMING (of one whose settings were sent)
    STREAMING  --finished-->      CLOSED
    from OPENING on, log and progress; failed and cancel, to CLOSED otherwise; from STREAMING on, skip_qube
"""

import enum
from typing import Annotated, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import Field, model_validator

from qubes_restore_svc.errors import ProtocolViolation
from qubes_restore_svc.wire.connection import Connection
from qubes_restore_svc.wire.models import MAX_FRAME, Model, Passphrase, ProtocolVersion
from qubes_restore_svc.wire.models import ErrorInfo as ErrorInfo
from qubes_restore_svc.wire.models import Message as Message
from qubes_restore_svc.wire.models import encode_message as encode_message
from qubes_restore_svc.wire.names import (
    MAX_QUBES,
    AppmenuName,
    BackupId,
    Count,
    DeviceClass,
    DeviceIdentity,
    DevicePort,
    DigestKind,
    FeatureName,
    FilterName,
    FreeText,
    HomeUser,
    LabelName,
    LocationId,
    NetvmName,
    Notes,
    Outcome,
    PropertyName,
    QubeKey,
    QubeName,
    SettingValue,
    Sha256,
    Size,
    TagName,
    VmClass,
    VolumeName,
)

_Received = TypeVar("_Received", bound=Message)


# --- Parts ---------------------------------------------------------------------------------------


class VolumeInfo(Model):
    """A volume that qubes.xml promises; `size` is the volume's size there, in bytes, if it says."""

    name: VolumeName
    size: Size | None = None


class DeviceInfo(Model):
    """A device that was assigned to a qube: `port` of the qube `backend` (`dom0` for most)."""

    bus: DeviceClass
    backend: QubeName
    port: DevicePort
    identity: DeviceIdentity | None = None  #: the one device that it must be; None: whichever is there
    required: bool = False  #: without it the qube does not start
    options: Annotated[dict[FeatureName, SettingValue], Field(max_length=16)] = Field(default_factory=dict)


class ListedQube(Model):
    """A qube that the backup holds, as a person is shown it."""

    key: QubeKey
    name: QubeName
    klass: Annotated[VmClass, Field(validation_alias="class", serialization_alias="class")]
    label: LabelName
    template: QubeName | None = None  #: None: has none
    netvm: NetvmName | None = None  #: None: the default; "": no netvm
    home_user: HomeUser | None = None  #: dom0: whose home its home is
    backup_size: Size = 0  #: disk space it took when it was backed up, bytes
    volumes: Annotated[tuple[VolumeInfo, ...], Field(fail_fast=True, max_length=3)] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [volume.name for volume in self.volumes]
        if len(set(names)) != len(names):
            raise ValueError("a volume stands twice")
        if not (self.klass == "AdminVM") == (self.name == "dom0") == ("home" in names):
            raise ValueError("only dom0 is an AdminVM, and only dom0 has a home")
        if self.home_user is not None and self.klass != "AdminVM":
            raise ValueError("only dom0's home has a user")
        return self


class ManifestQube(ListedQube):
    """The same with all of its settings that qubes.xml knows."""

    properties: Annotated[dict[PropertyName, SettingValue], Field(max_length=512)] = Field(
        default_factory=dict
    )
    features: Annotated[dict[FeatureName, SettingValue], Field(max_length=4096)] = Field(default_factory=dict)
    tags: Annotated[tuple[TagName, ...], Field(fail_fast=True, max_length=1024)] = ()
    devices: Annotated[tuple[DeviceInfo, ...], Field(fail_fast=True, max_length=256)] = ()


class RefusedQube(Model):
    """A qube of the backup that cannot even be listed; its name is text, not a name."""

    name: FreeText
    error: ErrorInfo


_RULE_TEXT = r"^[A-Za-z0-9:;,./_\[\]-]+$"


class FirewallRule(Model):
    """One rule of firewall.xml, with the value sets of qubesd's firewall module."""

    action: Literal["accept", "drop"]
    proto: Literal["tcp", "udp", "icmp"] | None = None
    dsthost: Annotated[str, Field(pattern=_RULE_TEXT, max_length=255)] | None = None
    dst4: Annotated[str, Field(pattern=r"^[0-9./]+$", max_length=32)] | None = None
    dst6: Annotated[str, Field(pattern=r"^[0-9a-fA-F:./]+$", max_length=64)] | None = None
    dstports: Annotated[str, Field(pattern=r"^[0-9]{1,5}(-[0-9]{1,5})?$")] | None = None
    icmptype: Annotated[str, Field(pattern=r"^[0-9]{1,3}$")] | None = None
    specialtarget: Literal["dns"] | None = None
    expire: Annotated[str, Field(pattern=r"^[0-9]{1,20}$")] | None = None
    comment: Annotated[str, Field(pattern=r"^[A-Za-z0-9:;,./_\[\] -]*$", max_length=255)] | None = None


# --- Broker to worker ----------------------------------------------------------------------------


class Storage(Model):
    """Where the worker fetches the archive: with `qubes.RestoreById+LOCATION_ID` from the qube `qube`."""

    qube: QubeName
    location_id: LocationId


class Open(Message):
    """Read the header and qubes.xml, and answer with the manifest."""

    type: Literal["open"] = "open"
    protocol: ProtocolVersion = 1
    passphrase: Passphrase
    memory: Size | None = None  #: budget in bytes; None: what the worker's machine has
    jobs: Annotated[int, Field(strict=True, ge=1, le=1024)] | None = None  #: derivations at once
    compression_filter: FilterName | None = None  #: instead of the header's
    ignore_size_limit: bool = False  #: accept images larger than qubes.xml says
    ignore_cost_limit: bool = False  #: accept key derivations of more work than the fixed ceiling
    storage: Storage | None = None  #: None: the archive was passed, or comes with `restore.Archive`
    ahead: bool = False  #: all volumes will be wanted: their keys may be derived before `start`
    retry: bool = False  #: after a wrong passphrase another may be tried; `ahead` waits until one was right


class QubeHere(Model):
    """A qube that is here already, with the volumes that came of it, and whether its firewall came."""

    key: QubeKey
    volumes: Annotated[tuple[VolumeName, ...], Field(fail_fast=True, max_length=3)]
    firewall: bool


class Start(Message):
    """Stream the volumes of these qubes (`restore`), or only check them (`verify`).

    Of those that are `here` nothing is wanted, but to know of a volume or a firewall that they lack. With
    `only`, nothing of the others is wanted but this volume.
    """

    type: Literal["start"] = "start"
    mode: Literal["restore", "verify"]
    keys: Annotated[tuple[QubeKey, ...], Field(fail_fast=True, max_length=MAX_QUBES)]
    here: Annotated[tuple[QubeHere, ...], Field(fail_fast=True, max_length=MAX_QUBES)] = ()
    only: VolumeName | None = None
    digest: DigestKind = "fsverity"  #: which one of each volume is wanted
    max_size: ClassVar[int] = 1 << 20

    @model_validator(mode="after")
    def _check(self) -> Self:
        keys = [*self.keys, *(qube.key for qube in self.here)]
        if not keys or len(set(keys)) < len(keys):
            raise ValueError("no qube, or one that stands twice")
        return self


class SkipQube(Message):
    """Nothing more of this qube is wanted; its chunks need not be derived."""

    type: Literal["skip_qube"] = "skip_qube"
    key: QubeKey


class Cancel(Message):
    """Stop; the broker closes the session right after it."""

    type: Literal["cancel"] = "cancel"


# --- Worker to broker ----------------------------------------------------------------------------


class Manifest(Message):
    """What the backup holds."""

    type: Literal["manifest"] = "manifest"
    backup_id: BackupId
    format: Annotated[int, Field(strict=True, ge=3, le=4)]
    compression_filter: FilterName
    qubes: Annotated[tuple[ManifestQube, ...], Field(fail_fast=True, max_length=MAX_QUBES)]
    refused: Annotated[tuple[RefusedQube, ...], Field(fail_fast=True, max_length=MAX_QUBES)] = ()
    max_size: ClassVar[int] = MAX_FRAME

    @model_validator(mode="after")
    def _check(self) -> Self:
        keys, names = {qube.key for qube in self.qubes}, {qube.name for qube in self.qubes}
        if not len(keys) == len(names) == len(self.qubes):
            raise ValueError("a key or a name stands twice")
        if len(self.qubes) + len(self.refused) > MAX_QUBES:
            raise ValueError(f"more than {MAX_QUBES} qubes")
        return self


class VolumeReady(Message):
    """The next volume can be fetched, once, with `restore.Volume+KEY.VOLUME`."""

    type: Literal["volume_ready"] = "volume_ready"
    key: QubeKey
    volume: VolumeName
    image_size: Size  #: bytes; for `home`, which has no size in advance, a ceiling


class VolumeDone(Message):
    """What became of a volume. `ok` says that it was read and verified to its last byte."""

    type: Literal["volume_done"] = "volume_done"
    key: QubeKey
    volume: VolumeName
    outcome: Outcome
    image_size: Size = 0  #: bytes
    data_bytes: Size = 0  #: bytes of it that travelled
    fsverity: Sha256 | None = None  #: the image's fs-verity digest (SHA-256, blocks of 4 KiB, no salt)
    sha256: Sha256 | None = None  #: over the whole image, holes as zeros
    error: ErrorInfo | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        digests = 2 - (self.fsverity, self.sha256).count(None)
        if digests != (self.outcome == "ok") or (self.error is None) != (self.outcome == "ok"):
            raise ValueError("a volume that is ok has one digest, and any other has an error")
        if self.data_bytes > self.image_size:
            raise ValueError("more data than the image has room for")
        return self


class QubeSettings(Message):
    """The archive's part of this qube is over; its settings files, or why they cannot be had."""

    type: Literal["qube_settings"] = "qube_settings"
    key: QubeKey
    firewall: Annotated[tuple[FirewallRule, ...], Field(fail_fast=True, max_length=4096)] | None = None
    notes: Notes | None = None
    appmenus: Annotated[tuple[AppmenuName, ...], Field(fail_fast=True, max_length=4096)] | None = None
    error: ErrorInfo | None = None
    max_size: ClassVar[int] = 2 << 20


class QubeIncomplete(Message):
    """A qube whose settings were sent was not all there: something has come since that it must not lack."""

    type: Literal["qube_incomplete"] = "qube_incomplete"
    key: QubeKey
    error: ErrorInfo


class Progress(Message):
    """Sent at least every few seconds, whatever happens: also the worker's sign of life."""

    type: Literal["progress"] = "progress"
    archive_bytes: Size  #: how much of the archive has been dealt with
    image_bytes: Size = 0  #: how much of all images has been produced, holes included
    #: Millionths of all work, keys included; None: it cannot be told yet.
    done: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] | None = None
    received: Size = 0  #: bytes that have come from the source, in this pass over the archive
    waiting_for_source: bool = False  #: nothing else is to be done until more comes from there


class Log(Message):
    """A line for the person."""

    type: Literal["log"] = "log"
    level: Literal["info", "warning"]
    text: FreeText
    key: QubeKey | None = None


class Failed(Message):
    """The whole session failed; nothing follows, unless it was the passphrase that was wrong."""

    type: Literal["failed"] = "failed"
    error: ErrorInfo


class Finished(Message):
    """Everything that was asked for has been answered, volume by volume; nothing follows."""

    type: Literal["finished"] = "finished"
    archive_bytes: Size
    derivations: Count = 0  #: keys that were derived, header and qubes.xml included


BrokerMessage = Open | Start | SkipQube | Cancel
WorkerMessage = (
    Manifest | VolumeReady | VolumeDone | QubeSettings | QubeIncomplete | Progress | Log | Failed | Finished
)


# --- Who may say what, and when ------------------------------------------------------------------


class State(enum.Enum):
    """The states of a session."""

    IDLE = "idle"
    OPENING = "opening"
    LISTED = "listed"
    STREAMING = "streaming"
    VOLUME = "volume"
    CLOSED = "closed"


TRANSITIONS: dict[tuple[State, type[Message]], State] = {
    (State.IDLE, Open): State.OPENING,
    (State.IDLE, Cancel): State.CLOSED,
    (State.OPENING, Manifest): State.LISTED,
    (State.LISTED, Start): State.STREAMING,
    (State.STREAMING, VolumeReady): State.VOLUME,
    (State.VOLUME, VolumeDone): State.STREAMING,
    (State.STREAMING, VolumeDone): State.STREAMING,
    (State.STREAMING, QubeSettings): State.STREAMING,
    (State.STREAMING, QubeIncomplete): State.STREAMING,
    (State.STREAMING, Finished): State.CLOSED,
}
for _state in (State.OPENING, State.LISTED, State.STREAMING, State.VOLUME):
    TRANSITIONS |= {(_state, _kind): _state for _kind in (Log, Progress)}
    TRANSITIONS[_state, Failed] = State.IDLE if _state is State.OPENING else State.CLOSED
    TRANSITIONS[_state, Cancel] = State.CLOSED
TRANSITIONS |= {(_state, SkipQube): _state for _state in (State.STREAMING, State.VOLUME)}


class _Session(Connection[State, _Received]):
    """A volume is done as the one that was announced, and ok only if it was."""

    def __init__(self, kinds: tuple[type[_Received], ...]) -> None:
        super().__init__("session", TRANSITIONS, State.IDLE, kinds)
        self._announced: tuple[str, str] | None = None

    def _after(self, message: Message, following: State) -> State:
        if isinstance(message, VolumeReady):
            self._announced = (message.key, message.volume)
        elif isinstance(message, VolumeDone):
            if self._announced not in (None, (message.key, message.volume)):
                raise ProtocolViolation("'volume_done' for another volume than the one that was announced")
            if self._announced is None and message.outcome == "ok":
                raise ProtocolViolation("'volume_done' says ok of a volume that was never announced")
            self._announced = None
        return following


def broker_end() -> Connection[State, WorkerMessage]:
    """The broker's end of a session."""
    return _Session(get_args(WorkerMessage))


def worker_end() -> Connection[State, BrokerMessage]:
    """The worker's end of a session."""
    return _Session(get_args(BrokerMessage))
