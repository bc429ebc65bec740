"""`python -m tests.cli.qvm_driver FOLDER …`: the real command, as in a dom0 whose files are in FOLDER.

Strategy: it starts dom0's real service, whose worker is a thread and whose host is the directory
FOLDER/restored (see `tests.dom0_service.parts`). The words after FOLDER are those of the command. A backup in
a qube is a file here.
"""

import sys
from functools import partial

from qubes_restore_svc.cli.qvm_restore import main
from qubes_restore_svc.client.transports import ProgramTransport

if __name__ == "__main__":
    service = [sys.executable, "-m", "tests.dom0_service.driver", sys.argv[1], "threads", "local"]
    main(sys.argv[2:], partial(ProgramTransport, service))
