"""`python -m tests.dom0_service.driver FOLDER remote|local SERVICE`: the service, with its files in FOLDER.

All of it is real but the places of configuration, locks and dom0's home. With `threads` after FOLDER, the
worker is a thread and the host a directory (see `parts`).
"""

import sys
from pathlib import Path

from qubes_restore_svc.dom0_service.call import Assemble
from qubes_restore_svc.dom0_service.program import carry_out, handed_over, main, service_of
from qubes_restore_svc.qubes.dom0_restore import dom0_restore
from qubes_restore_svc.qubes.grants import DOM0

from .parts import Parts, places

if __name__ == "__main__":
    folder, *words = sys.argv[1:]
    assemble: Assemble = dom0_restore
    if words[0] == "threads":
        assemble, words = Parts(Path(folder)), words[1:]
    if words[0] == "local":
        carry_out(service_of(words[1:2]), DOM0, places(Path(folder)), assemble, handed_over(words[2:]))
    main(words[1:], places(Path(folder)), assemble)
