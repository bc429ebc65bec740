"""`python -m tests.cli.remote_driver FOLDER …`: the real command, as in a qube whose dom0 is in FOLDER.

Strategy: what it takes for qrexec-client-vm starts dom0's real service, whose worker is a thread and whose
host is the directory FOLDER/restored. With a file FOLDER/refused, it refuses the call with the exit code in
it, as qrexec would; FOLDER/service names the service that was called last.
"""

import shlex
import sys
from pathlib import Path

from qubes_restore_svc.cli import qvm_arguments
from qubes_restore_svc.cli.qvm_restore import main

_QREXEC = """\
#!/bin/sh
test "$1" = dom0 && test $# = 2 || exit 2
echo "$2" > {folder}/service
if test -e {folder}/refused; then
    echo "Request refused" >&2
    exit "$(cat {folder}/refused)"
fi
QREXEC_REMOTE_DOMAIN=sys-gui exec {python} -m tests.dom0_service.driver {folder} threads remote "$2"
"""


def install(folder: Path) -> Path:
    """Write the program that calls dom0."""
    program = folder / "qrexec-client-vm"
    python = shlex.quote(sys.executable)
    program.write_text(_QREXEC.format(folder=shlex.quote(str(folder)), python=python))
    program.chmod(0o755)
    return program


if __name__ == "__main__":
    qvm_arguments.QUBESD_SOCKET = Path("/nowhere")
    qvm_arguments.QREXEC_CLIENT = install(Path(sys.argv[1]))
    main(sys.argv[2:])
