"""`python -m qubes_restore_svc.service SERVICE`: what /etc/qubes-rpc in dom0 starts."""

import sys

from qubes_restore_svc.service.remote import main

if __name__ == "__main__":
    main(sys.argv[1:])
