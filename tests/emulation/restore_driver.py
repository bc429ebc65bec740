"""`python -m tests.emulation.restore_driver FOLDER …`: the command in dom0, with its files in FOLDER.

The words after FOLDER are those of the command; all of it is real but the places of configuration, locks and
dom0's home.
"""

import sys
from functools import partial
from pathlib import Path

from qubes_restore_svc.cli.qvm_parts import in_dom0
from qubes_restore_svc.cli.qvm_restore import main
from qubes_restore_svc.qubes.restore import Places


def places(folder: Path) -> Places:
    """Where dom0 of the emulation keeps what a restore needs."""
    return Places(
        config=folder / "config.yaml",
        restore_lock=folder / "restore.lock",
        worker_lock=folder / "worker.lock",
        stock_lock=folder / "stock.lock",
        home=folder / "home",
    )


if __name__ == "__main__":
    main(sys.argv[2:], partial(in_dom0, places=places(Path(sys.argv[1]))))
