"""The stock `qvm-backup-restore`, run as a program in the emulated dom0.

    PYTHONPATH=CHECKOUT QUBES_EMULATION=… HOME=… python -B stock_command.py WORDS…

Strategy: CHECKOUT is one of qubes-core-admin-client, of which nothing is copied here. All of it is real, but
the places of qubesd's socket and of the programs of dom0 are those of the emulation.
"""

import importlib
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """The command, with the arguments of the process."""
    place = Path(os.environ["QUBES_EMULATION"])
    # What an installed package says of itself, for --version.
    metadata: Any = importlib.metadata
    metadata.metadata = lambda _: {"summary": "", "version": "0", "author": "", "license": ""}
    admin: Any = importlib.import_module("qubesadmin.app")
    sys.modules["qubesadmin"].Qubes = admin.QubesLocal  # type: ignore[attr-defined] # it looked for the socket
    config: Any = importlib.import_module("qubesadmin.config")
    # A socket's address holds 108 bytes, which the path of a test may exceed.
    config.QUBESD_SOCKET = f"/proc/self/fd/{os.open(place / 'qubesd.sock', os.O_PATH)}"
    config.QREXEC_SERVICES_DIR = str(place / "rpc")
    config.QREXEC_CLIENT = str(place / "qrexec-client")
    command: Any = importlib.import_module("qubesadmin.tools.qvm_backup_restore")
    sys.exit(command.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
