"""`python -m tests.emulation.watch_driver FOLDER …`: `qubes-restore-watch` in dom0, with its files in FOLDER.

The words after FOLDER are those of the command; see `restore_driver`.
"""

import sys
from functools import partial
from pathlib import Path

from qubes_restore_svc.cli import qvm_arguments
from qubes_restore_svc.client.transports import ProgramTransport
from qubes_restore_svc.watch.command import main

if __name__ == "__main__":
    qvm_arguments.QUBESD_SOCKET = Path(sys.argv[1])  # what only dom0 has is there
    service = [sys.executable, "-m", "tests.emulation.service_driver", sys.argv[1], "local"]
    main(sys.argv[2:], partial(ProgramTransport, service))
