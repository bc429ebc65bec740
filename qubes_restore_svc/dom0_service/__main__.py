"""`python -m qubes_restore_svc.dom0_service SERVICE`: what /etc/qubes-rpc in dom0 starts."""

import sys

from qubes_restore_svc.hardening import loading

if __name__ == "__main__":
    with loading("qubes-restore-svc"):
        from qubes_restore_svc.dom0_service.program import main
    main(sys.argv[1:])
