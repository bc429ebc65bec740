"""Who carries out what `qvm-backup-restore --mgmt-vm` was asked for: always dom0's service.

Strategy: in dom0 the service is started as a child with all rights; a qube calls it through qrexec.
"""

from collections.abc import Callable
from pathlib import Path

from qubes_restore_svc.cli.qvm_arguments import RestoreArguments
from qubes_restore_svc.cli.qvm_remote import RemoteRestorer, remote_restorer, restorer_in_dom0
from qubes_restore_svc.client import transports

#: Makes the restorer from the arguments, the descriptor of a backup here, and what asks for the passphrase.
#: Raises RestoreError.
Assemble = Callable[[RestoreArguments, int | None, Callable[[], str]], RemoteRestorer]

#: There in dom0 only, and there in every qube.
QUBESD_SOCKET = transports.QUBESD_SOCKET
QREXEC_CLIENT = Path(transports.QREXEC_PROGRAM)


def in_a_qube() -> bool:
    """Is this a qube, from which dom0 can be asked?"""
    return not QUBESD_SOCKET.exists() and QREXEC_CLIENT.exists()


def is_file_here(arguments: RestoreArguments) -> bool:
    """Is the backup a file of the domain that the command runs in?"""
    return arguments.storage_qube is None and not (arguments.in_dom0 and in_a_qube())


def on_qubes(
    arguments: RestoreArguments, archive_fd: int | None, passphrase: Callable[[], str]
) -> RemoteRestorer:
    """The restorer for the domain that the command runs in. Raises RestoreError."""
    if in_a_qube():
        transport = transports.QrexecTransport(program=str(QREXEC_CLIENT))
        return remote_restorer(arguments, archive_fd, transport)
    return restorer_in_dom0(arguments, archive_fd, passphrase)
