"""`python -m tests.qubes.service_driver FOLDER SERVICE`: dom0's restore service, with its files in FOLDER.

What the emulated qrexec starts in dom0 instead of /etc/qubes-rpc/SERVICE; all of it is real but the places of
configuration, locks and dom0's home.
"""

import sys
from pathlib import Path

from qubes_restore_svc.service.remote import main
from tests.qubes.restore_driver import places

if __name__ == "__main__":
    main(sys.argv[2:], places(Path(sys.argv[1])))
