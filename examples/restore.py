"""Restore one qube of a backup, and show how it goes: `python restore.py STORAGE_QUBE PATH QUBE`."""

import sys
from getpass import getpass

from pydantic import SecretStr

from qubes_restore_svc.client.api import (
    BackupLocation,
    BlockingRestoreCall,
    Choice,
    Observer,
    OpenBackup,
    QubeReport,
    RestoreError,
    RestoreProgress,
    system_transport,
)


class Shown(Observer):
    """Prints what happens."""

    def progress(self, progress: RestoreProgress) -> None:
        """About twice a second."""
        print(f"{progress.percent} %, {progress.seconds_left} s left")

    def qube_finished(self, report: QubeReport) -> None:
        """A qube is there, or it is not."""
        print(f"{report.name}: {report.outcome}")


def restore(storage_qube: str, path: str, qube: str) -> int:
    """Restore `qube` from the file `path` of `storage_qube`; the exit status."""
    request = OpenBackup(
        mode="restore",
        location=BackupLocation(qube=storage_qube, text=path),
        passphrase=SecretStr(getpass("Passphrase of the backup: ")),
        choice=Choice(conflicts="rename"),
    )
    try:
        with BlockingRestoreCall(system_transport(), request, Shown()) as call:
            print("in the backup:", ", ".join(found.name for found in call.plan.qubes))
            plan = call.choose(Choice(names=(qube,), conflicts="rename"))
            print("will be restored:", ", ".join(taken.new_name for taken in plan.taken))
            report = call.confirm()
    except RestoreError as error:
        print(error)
        return 1
    print("everything is there" if report.status == 0 else "not everything is there")
    return report.status


if __name__ == "__main__":
    sys.exit(restore(*sys.argv[1:]))
