"""`python -m tests.emulation.service_driver FOLDER SERVICE`: the restore service of dom0, files in FOLDER.

What the emulated qrexec starts in dom0 instead of /etc/qubes-rpc/SERVICE; all of it is real but the places of
configuration, locks and dom0's home.
"""

import sys
from pathlib import Path

from qubes_restore_svc.service.remote import main
from tests.emulation.restore_driver import places

if __name__ == "__main__":
    main(sys.argv[2:], places(Path(sys.argv[1])))
