"""The public interface of the client: what a program needs to list, verify or restore a backup.

It changes as the version of the package says (`qubes_restore_svc.__version__`), and CHANGELOG.md tells how.
Everything else of the package may change without notice. A module of its own, so that dom0's command loads
no more of the client than it runs.
"""

from qubes_restore_svc.client.aio import RestoreCall, list_backup
from qubes_restore_svc.client.sync import BlockingRestoreCall, list_backup_blocking
from qubes_restore_svc.client.transports import (
    ProgramTransport,
    QrexecTransport,
    Transport,
    system_transport,
)
from qubes_restore_svc.errors import RestoreError
from qubes_restore_svc.wire.report import Observer, QubeReport, Report, RestoreProgress, VolumeReport
from qubes_restore_svc.wire.restore_call import (
    BackupLocation,
    Choice,
    OpenBackup,
    Plan,
    PlanQube,
    WorkerWishes,
)

__all__ = [
    "BackupLocation",
    "BlockingRestoreCall",
    "Choice",
    "Observer",
    "OpenBackup",
    "Plan",
    "PlanQube",
    "ProgramTransport",
    "QrexecTransport",
    "QubeReport",
    "Report",
    "RestoreCall",
    "RestoreError",
    "RestoreProgress",
    "Transport",
    "VolumeReport",
    "WorkerWishes",
    "list_backup",
    "list_backup_blocking",
    "system_transport",
]
