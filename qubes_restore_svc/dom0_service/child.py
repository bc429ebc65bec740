"""`python -m qubes_restore_svc.dom0_service.child SERVICE [archive=FD] [passphrase=FD]`: for dom0's programs.

The same service, with all rights, for a program that starts it as a child and hands descriptors over. A
module of its own, which no qrexec service starts: nothing that a caller says can lead here.
"""

import sys

from qubes_restore_svc.hardening import loading

if __name__ == "__main__":
    with loading("qubes-restore-svc"):
        from qubes_restore_svc.dom0_service.program import carry_out, handed_over, service_of
        from qubes_restore_svc.qubes.grants import DOM0
    carry_out(service_of(sys.argv[1:2]), DOM0, handed=handed_over(sys.argv[2:]))
