"""What `list --json` prints, and what `extract` puts beside the images of a qube."""

from typing import Annotated, Literal

from pydantic import Field

from qubes_restore_svc.wire.documents import Document
from qubes_restore_svc.wire.messages import FirewallRule, ListedQube, ManifestQube, RefusedQube, VolumeInfo
from qubes_restore_svc.wire.names import MAX_QUBES, AppmenuName, BackupId, Notes, QubeName
from qubes_restore_svc.wire.report import Remarks


class BackupList(Document):
    """What a backup holds."""

    type: Literal["list"] = "list"
    backup_id: BackupId
    qubes: Annotated[tuple[ListedQube, ...], Field(max_length=MAX_QUBES)]
    refused: Annotated[tuple[RefusedQube, ...], Field(max_length=MAX_QUBES)]  #: those that cannot be listed


class RecordedVolume(VolumeInfo):
    """A volume as it lies beside the record; `size` is that of its file."""

    file: Literal["root.img", "private.img", "home.tar"]


class QubeRecord(ManifestQube, Document):
    """A restored qube: every setting of it that the backup knows, as data. Nothing in it is acted upon.

    `null` stands for settings files that could not be had; why is a warning.
    """

    type: Literal["qube"] = "qube"
    backup_id: BackupId
    name_in_backup: QubeName
    firewall: Annotated[tuple[FirewallRule, ...], Field(max_length=4096)] | None
    notes: Notes | None
    appmenus: Annotated[tuple[AppmenuName, ...], Field(max_length=4096)] | None
    volumes: Annotated[tuple[RecordedVolume, ...], Field(max_length=3)]  #: those that were restored
    warnings: Remarks  #: what else to know of it
