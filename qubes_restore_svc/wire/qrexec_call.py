"""Calls as qrexec makes them: the service descriptor that a socket service receives first.

In a VM: `NAME+ARG SOURCE` and a NUL, then the caller's bytes; without an argument `NAME+ SOURCE` or, when
dom0 called directly, `NAME SOURCE` (qrexec-agent's socket services).
"""

import re
from dataclasses import dataclass

from qubes_restore_svc.errors import ProtocolViolation
from qubes_restore_svc.wire.names import QUBE_NAME

SESSION = "restore.Session"
VOLUME = "restore.Volume"
ARCHIVE = "restore.Archive"

#: The services of dom0's broker: a domain that may call one can restore, verify, or only look.
START = "restore.Start"
VERIFY = "restore.Verify"
LIST = "restore.List"

#: As the location of a backup in dom0: not a path, but the descriptor that was handed over to the service.
HANDED_OVER = "-"

#: What a worker says when it can take calls: a local one once, on its calls socket; one behind qrexec to a
#: caller of `restore.Session+ready`, which is no session, and then it hangs up.
READY = b"ready"
READY_ARGUMENT = "ready"
#: Argument of a `restore.Archive` that is a conversation with a storage service: the worker writes the wanted
#: paths, gets a qfile, and answers it. Without an argument the call brings the backup file as it is.
QFILE_ARGUMENT = "qfile"

MAX_DESCRIPTOR = 256  #: bytes, with the final NUL

#: Exit codes of qrexec itself (libqrexec/qrexec.h of qubes-core-qrexec): the call could not be made, the
#: policy refused it, or there is no such service (a shell says the same of a program).
CALL_FAILED, CALL_REFUSED, NO_SERVICE = 125, 126, 127
#: The connection broke off before there was an exit code (process_io.c there): as a rule, the qube died.
CONNECTION_BROKE = 255
#: What a program dies of whose reader stops early, as a shell tells it: 128 + SIGPIPE.
BROKEN_PIPE = 141

_DESCRIPTOR = re.compile(rf"([A-Za-z0-9_.-]+)(?:\+([A-Za-z0-9_.+-]*))? ({QUBE_NAME})\0".encode())


@dataclass(frozen=True, slots=True)
class ServiceCall:
    """One call: the service, its argument ("" for none) and the name of the calling domain."""

    service: str
    argument: str
    source: str


def encode_descriptor(call: ServiceCall) -> bytes:
    """The descriptor, as qrexec would send it; raises ProtocolViolation for a call that it could not make."""
    text = f"{call.service}{'+' if call.argument else ''}{call.argument} {call.source}\0"
    descriptor = text.encode("ascii", "replace")
    if len(descriptor) > MAX_DESCRIPTOR or not _DESCRIPTOR.fullmatch(descriptor):
        raise ProtocolViolation("a service call that qrexec would refuse")
    return descriptor


def parse_descriptor(untrusted_descriptor: bytes) -> ServiceCall:
    """The call that a descriptor (with its NUL) describes; raises ProtocolViolation."""
    match = _DESCRIPTOR.fullmatch(untrusted_descriptor)
    if match is None or len(untrusted_descriptor) > MAX_DESCRIPTOR:
        raise ProtocolViolation("a malformed service descriptor")
    name, argument, source = match.groups(default=b"")
    return ServiceCall(name.decode(), argument.decode(), source.decode())


def volume_argument(key: str, volume: str) -> str:
    """The argument of `restore.Volume` for a volume: `vm10.private`."""
    return f"{key}.{volume}"
