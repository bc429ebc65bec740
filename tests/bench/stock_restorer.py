"""The stock client's restorer, run as a program: its own code to the last stage, files in place of volumes.

    PYTHONPATH=CHECKOUT BACKUP=… PASSPHRASE=… TARGET=… python -B stock_restorer.py

Strategy: the checkout is one of qubes-core-admin-client, of which nothing is copied here. It retrieves,
verifies, decrypts and unpacks as in dom0, with its staging below TARGET. What it would hand to qubesd goes
to the `dd` that qubesd's import service runs, and so into TARGET/vm10/private.img, by the names in the
backup. Qubes are not created, and their settings are not set.
"""

import importlib
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

_DD = ("dd", "bs=128K", "iflag=fullblock", "conv=sparse,notrunc,nocreat,fdatasync", "status=none")


def main() -> None:
    """The command."""
    backup, passphrase, target = (os.environ[name] for name in ("BACKUP", "PASSPHRASE", "TARGET"))
    restorer: Any = importlib.import_module("qubesadmin.backup.restore")
    restore = restorer.BackupRestore(None, backup, None, passphrase, tmpdir=f"{target}/staging")
    qubes = [qube for qube in restore.backup_app.domains.values() if qube.included_in_backup]
    handlers: dict[str, Callable[..., None]] = {}
    for qube in qubes:
        for volume in ("root", "private"):
            name = os.path.join(qube.backup_path, f"{volume}.img")
            handlers[name] = partial(_import, Path(target) / name)
        for file in ("firewall.xml", "notes.txt", "whitelisted-appmenus.list"):
            handlers[os.path.join(qube.backup_path, file)] = _read
    restore._restore_vm_data([qube.backup_path for qube in qubes], sum(int(q.size) for q in qubes), handlers)


def _import(image: Path, stream: IO[bytes], *, file_size: int) -> None:
    image.parent.mkdir(parents=True, exist_ok=True)
    with image.open("wb") as file:
        file.truncate(file_size)
    subprocess.run([*_DD, f"of={image}"], stdin=stream, check=True)


def _read(stream: IO[bytes]) -> None:
    stream.read()


if __name__ == "__main__":
    main()
