"""The proof that a qube is finished, by which a restore that goes on knows it again: a feature of the qube.

Strategy: dom0 sets it when everything else of the qube is in place, and takes the tags of an unfinished qube
away after that. So it proves something only where these tags are gone, and the one of the restored qube is
there. It says from which backup and which of its qubes this one came, for whom, and what came with it. It is
copied when a qube is cloned, and a disposable has the features of its template: so it holds the name of the
qube that it is about. No qube can set features of its own accord, and none comes back from a backup.

What is said here of the backup is the word of the worker that read it.
"""

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, ValidationError

from qubes_restore_svc.broker.interfaces import NewQube, RestoredQube
from qubes_restore_svc.errors import ProtocolViolation
from qubes_restore_svc.wire.connection import parse_object
from qubes_restore_svc.wire.models import Model
from qubes_restore_svc.wire.names import BackupId, QubeName, Sha256, Size, VolumeName
from qubes_restore_svc.wire.report import VolumeReport

FEATURE = "restore-svc-finished"


class ProvenVolume(Model):
    """A volume that came whole: its size in bytes, and one digest."""

    name: VolumeName
    size: Size
    fsverity: Sha256 | None = None
    sha256: Sha256 | None = None


class Proof(Model):
    """What the feature holds, as JSON in ASCII."""

    backup_id: BackupId
    name: QubeName
    name_in_backup: QubeName
    client: QubeName  #: the domain that the restore was for
    firewall: bool  #: did rules come with it?
    volumes: Annotated[tuple[ProvenVolume, ...], Field(max_length=3)]

    @classmethod
    def of(cls, qube: NewQube, client: str, volumes: Sequence[VolumeReport], *, firewall: bool) -> Self:
        """That of a qube of which everything is in place."""
        proven = (
            ProvenVolume(name=one.name, size=one.size or 0, fsverity=one.fsverity, sha256=one.sha256)
            for one in volumes
        )
        return cls(
            backup_id=qube.backup_id,
            name=qube.name,
            name_in_backup=qube.source.name,
            client=client,
            firewall=firewall,
            volumes=tuple(proven),
        )

    @classmethod
    def read(cls, text: str) -> "Proof | None":
        """None for what is none: another version of this program may have set it, or somebody else."""
        try:
            return cls.model_validate(parse_object(text.encode()))
        except (ProtocolViolation, ValidationError):
            return None

    @property
    def text(self) -> str:
        """What the feature is set to."""
        return self.model_dump_json(exclude_none=True)

    @property
    def restored(self) -> RestoredQube:
        """What it proves to be here."""
        volumes = tuple(
            VolumeReport(name=one.name, outcome="ok", size=one.size, fsverity=one.fsverity, sha256=one.sha256)
            for one in self.volumes
        )
        return RestoredQube(self.name, self.name_in_backup, volumes, has_firewall=self.firewall)
