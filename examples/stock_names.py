"""Restore with the names of `qubesadmin.backup.restore`: `stock_names.py STORAGE_QUBE PATH LEFT_OUT`."""

import sys
from getpass import getpass

import qubesadmin
from qubesadmin import exc

from qubes_restore_svc.manager import restore  # instead of: from qubesadmin.backup import restore


def main(storage_qube: str, path: str, left_out: str) -> None:
    """Restore all qubes of the backup but one."""
    app = qubesadmin.Qubes()
    backup = restore.BackupRestore(
        app, path, app.domains[storage_qube], getpass("Passphrase of the backup: ")
    )
    backup.progress_callback = lambda percent: print(f"{percent} %")
    try:
        info = backup.get_restore_info()
        del info[left_out]
        info = backup.restore_info_verify(info)
        print(backup.get_restore_summary(info))
        backup.restore_do(info)
    except exc.QubesException as error:
        print(error)
    else:
        print("everything is there")


if __name__ == "__main__":
    main(*sys.argv[1:])
