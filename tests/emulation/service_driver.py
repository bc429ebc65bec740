"""`python -m tests.emulation.service_driver FOLDER [local] SERVICE …`: the restore service of dom0.

What the emulated qrexec starts in dom0 instead of /etc/qubes-rpc/SERVICE, and with `local` what the command
in dom0 starts. All of it is real but the places of configuration, locks and dom0's home, which are in FOLDER.
"""

import os
import sys
from pathlib import Path

from qubes_restore_svc.dom0_service.program import carry_out, handed_over, main, service_of
from qubes_restore_svc.qubes.dom0_restore import Places
from qubes_restore_svc.qubes.grants import DOM0


def places(folder: Path) -> Places:
    """Where dom0 of the emulation keeps what a restore needs."""
    return Places(
        config=folder / "config.yaml",
        restore_lock=folder / "restore.lock",
        worker_lock=folder / "worker.lock",
        stock_lock=folder / "stock.lock",
        home=folder / "home",
        volume_reader=os.getuid(),
    )


if __name__ == "__main__":
    where, words = places(Path(sys.argv[1])), sys.argv[2:]
    if words[0] == "local":
        carry_out(service_of(words[1:2]), DOM0, where, handed=handed_over(words[2:]))
    main(words, where)
