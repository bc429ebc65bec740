"""`python -m tests.emulation.restore_driver FOLDER …`: the command in dom0, with its files in FOLDER.

The words after FOLDER are those of the command; all of it is real, and so is the service that it starts, but
for the places of configuration, locks and dom0's home.
"""

import sys
from functools import partial

from qubes_restore_svc.cli.qvm_restore import main
from qubes_restore_svc.client.transports import ProgramTransport

if __name__ == "__main__":
    service = [sys.executable, "-m", "tests.emulation.service_driver", sys.argv[1], "local"]
    main(sys.argv[2:], partial(ProgramTransport, service))
