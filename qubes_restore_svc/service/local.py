"""`python -m qubes_restore_svc.service.local SERVICE`: the same for programs of dom0, which may do all.

A module of its own, which no qrexec service starts: nothing that a caller says can lead here.
"""

import sys

from qubes_restore_svc.hardening import loading

if __name__ == "__main__":
    with loading("qubes-restore-svc"):
        from qubes_restore_svc.qubes.grants import DOM0
        from qubes_restore_svc.service.program import carry_out, service_of
    carry_out(service_of(sys.argv[1:]), DOM0)
