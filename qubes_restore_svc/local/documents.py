"""What `list --json` prints, and what `extract` puts beside the images of a qube."""

from typing import Annotated, Literal

from pydantic import Field

from qubes_restore_svc.broker.interfaces import RestoredQube
from qubes_restore_svc.wire.documents import Document
from qubes_restore_svc.wire.messages import FirewallRule, ListedQube, ManifestQube, RefusedQube, VolumeInfo
from qubes_restore_svc.wire.names import MAX_QUBES, AppmenuName, BackupId, Notes, QubeName, Sha256
from qubes_restore_svc.wire.report import Remarks, VolumeReport


class BackupList(Document):
    """What a backup holds."""

    type: Literal["list"] = "list"
    backup_id: BackupId
    qubes: Annotated[tuple[ListedQube, ...], Field(max_length=MAX_QUBES)]
    refused: Annotated[tuple[RefusedQube, ...], Field(max_length=MAX_QUBES)]  #: those that cannot be listed


class RecordedVolume(VolumeInfo):
    """A volume as it lies beside the record; `size` is that of its file, and the digest is one over it."""

    file: Literal["root.img", "private.img", "home.tar"]
    fsverity: Sha256 | None = None  #: its fs-verity digest, if the restore told that one
    sha256: Sha256 | None = None  #: its SHA-256, if the restore told that one


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
    complete: bool = True  #: false: something that it lacks stood too late in the backup
    warnings: Remarks  #: what else to know of it

    def restored(self) -> RestoredQube | None:
        """What the record proves to be here; None if it proves nothing."""
        volumes = tuple(
            VolumeReport(
                name=volume.name,
                outcome="ok",
                size=volume.size,
                fsverity=volume.fsverity,
                sha256=volume.sha256,
            )
            for volume in self.volumes
            if volume.size is not None and (volume.fsverity or volume.sha256)
        )
        if not self.complete or len(volumes) < len(self.volumes):
            return None
        return RestoredQube(self.name, self.name_in_backup, volumes, has_firewall=self.firewall is not None)
