"""What dom0 is asked for by the command, and the way on which it is asked.

Strategy: whatever carries out a restore is dom0's service. In dom0 it is started as a child with all rights,
which is handed the backup, if that is a file there, and the passphrase. A qube calls it through qrexec. What
cannot be asked for is refused here, before anybody types a passphrase.
"""

import os
import stat
from pathlib import Path

from pydantic import ValidationError

from qubes_restore_svc.cli.qvm_arguments import RestoreArguments
from qubes_restore_svc.client import transports
from qubes_restore_svc.client.transports import Handed, ProgramTransport, QrexecTransport, Transport
from qubes_restore_svc.errors import HostFailed, UsageError
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.names import strip_control
from qubes_restore_svc.wire.qrexec_call import HANDED_OVER
from qubes_restore_svc.wire.restore_call import QubePath, QubeService

#: There in dom0 only, and there in every qube.
QUBESD_SOCKET = transports.QUBESD_SOCKET
QREXEC_CLIENT = Path(transports.QREXEC_PROGRAM)

#: What is said of a part of a request that no message can hold.
_UNFIT = {
    "location": "the location of the backup cannot be told to dom0",
    "worker": "the qube that reads the backup cannot be as it was asked for",
}
_UNFIT_OTHERWISE = "what was asked for cannot be told to dom0"


def in_a_qube() -> bool:
    """Is this a qube, from which dom0 can be asked?"""
    return not QUBESD_SOCKET.exists() and QREXEC_CLIENT.exists()


def is_file_here(arguments: RestoreArguments) -> bool:
    """Is the backup a file of the domain that the command runs in?"""
    return arguments.storage_qube is None and not (arguments.in_dom0 and in_a_qube())


def way_to_dom0(handed: Handed) -> Transport:
    """The way from the domain that the command runs in; only in dom0 itself, something can be handed over."""
    return QrexecTransport(program=str(QREXEC_CLIENT)) if in_a_qube() else ProgramTransport(handed=handed)


def check_way(way: Transport) -> None:
    """Raises HostFailed if dom0 cannot be called at all; all else is told when the call is made."""
    if isinstance(way, QrexecTransport) and not Path(way.program).exists():
        raise HostFailed(f"there is no {way.program}", advice="Run it in a qube, or in dom0.")


def restore_request(arguments: RestoreArguments, archive_fd: int | None, way: Transport) -> c.OpenBackup:
    """What is asked for, without the passphrase. Raises UsageError.

    `archive_fd`: the backup, open, if it is a file here.
    """
    choice = c.Choice.asked(
        names=tuple(arguments.qubes),
        exclude=tuple(arguments.exclude),
        conflicts=arguments.conflicts,
        missing=arguments.missing,
        dom0_home=arguments.dom0_home is True,
        ignore_username_mismatch=arguments.ignore_username_mismatch,
        pool=arguments.pool,
    )
    qube, text = _location(arguments, archive_fd, way)
    try:
        return c.OpenBackup.model_validate(
            {
                "mode": "verify" if arguments.verify_only else "restore",
                "location": {"qube": qube, "text": text, "service": arguments.location_is_service},
                "passphrase": "",
                "choice": choice,
                "compression_filter": arguments.compression_filter,
                "ignore_size_limit": arguments.ignore_size_limit,
                "ignore_cost_limit": arguments.ignore_cost_limit,
                "stall_timeout": arguments.stall_timeout,
                "worker": {
                    "template": arguments.template,
                    "memory": arguments.memory,
                    "vcpus": arguments.vcpus,
                },
            }
        )
    except ValidationError as error:
        raise _unfit(error) from None


def _location(arguments: RestoreArguments, archive_fd: int | None, way: Transport) -> tuple[str | None, str]:
    """Where the backup lies: the qube (None: this one), and what there."""
    qube = arguments.storage_qube
    if qube is not None and arguments.location_is_service:
        return qube, QubeService(qube, arguments.location).service
    if qube is not None:
        line = QubePath(qube, arguments.location).line
        return qube, line.decode("utf-8", "surrogateescape").rstrip("\n")
    if isinstance(way, ProgramTransport):
        return "dom0", HANDED_OVER
    if arguments.in_dom0:
        return "dom0", arguments.location
    assert archive_fd is not None, "a backup in this qube is open by now"
    return None, _file_here(arguments.location, archive_fd)


def _file_here(location: str, archive_fd: int) -> str:
    """The absolute path of a backup that is a file of this qube: dom0 will ask this qube for it."""
    if location == "-":
        raise UsageError(
            "a backup on standard input cannot be restored from here",
            advice="Put it into a file, or name a command that writes it, with -d and the name of this qube.",
        )
    path = os.path.realpath(location)
    shown = strip_control(location)
    # What is no file, the agent here would take for a command; and it drops spaces (qubes.RestoreById).
    if not stat.S_ISREG(os.fstat(archive_fd).st_mode):
        raise UsageError(f"{shown} is not a file", advice="Copy the backup into one.")
    if path != path.strip():
        raise UsageError(f"the name of {shown} ends with a space", advice="Rename it.")
    return path


def _unfit(error: ValidationError) -> UsageError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    what, where = _UNFIT_OTHERWISE, [str(part) for part in first["loc"]]
    if where and where[0] in _UNFIT:
        what = _UNFIT[where.pop(0)]
    problem = strip_control(first["msg"])
    return UsageError(f"{what} ({'.'.join(where)}: {problem})" if where else f"{what}: {problem}")
