"""The process around a call: its standard streams, signals, and the lines that are logged of it.

Strategy: standard input and output are the call and nothing else. They are moved to other numbers at once,
and the descriptors 0 and 1 then lead nowhere and to standard error. So no library, and no program that is
started, can write into the call. qrexec appends standard error to dom0's log of the calling qube
(`/var/log/qubes/qrexec.QUBE.log`), and the caller never sees it. This program never waits until it can be
written.

Only qrexec says who calls: it names the calling domain in the environment of the service
(`execute_qubes_rpc_command` of libqrexec). If the name is missing there, or is not the name of a qube, the
program ends before anything is done.
"""

import asyncio
import contextlib
import dataclasses
import fcntl
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Never

from pydantic import TypeAdapter, ValidationError

from qubes_restore_svc.dom0_service.call import NOTHING, Assemble, Call, HandedOver
from qubes_restore_svc.errors import ExitStatus, UsageError, unforeseen
from qubes_restore_svc.hardening import close_read, prepare_process
from qubes_restore_svc.qubes.dom0_restore import PLACES, Places, dom0_restore
from qubes_restore_svc.qubes.grants import DOM0, MODES
from qubes_restore_svc.wire.names import QubeName, strip_control

_QUBE: TypeAdapter[str] = TypeAdapter(QubeName)
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def main(words: Sequence[str], places: Places = PLACES, assemble: Assemble = dom0_restore) -> Never:
    """Serve the service that `words` name for the domain that calls; exits."""
    service = service_of(words)
    try:
        caller = caller_of(os.environ)
    except UsageError as error:
        note(f"{service}: {error.reason}")
        sys.exit(ExitStatus.NOTHING)
    carry_out(service, caller, places, assemble)


def caller_of(environment: Mapping[str, str]) -> str:
    """The domain that calls. Raises UsageError if that is not known, or if the call has an argument.

    dom0 is none: its programs start the service themselves (see `child`).
    """
    try:
        caller = _QUBE.validate_python(environment.get("QREXEC_REMOTE_DOMAIN", ""))
    except ValidationError:
        raise UsageError("qrexec does not say which qube calls") from None
    if caller == DOM0:
        raise UsageError("dom0 does not call itself through qrexec")
    full_name = environment.get("QREXEC_SERVICE_FULL_NAME", "")
    if environment.get("QREXEC_SERVICE_ARGUMENT") or full_name.partition("+")[2]:
        raise UsageError("the service takes no argument")
    return caller


def service_of(words: Sequence[str]) -> str:
    """The service that the arguments name; exits with an explanation if they name none."""
    if len(words) != 1 or words[0] not in MODES:
        note(f"expected one of {', '.join(MODES)}")
        sys.exit(ExitStatus.USAGE)
    return words[0]


def handed_over(words: Sequence[str]) -> HandedOver:
    """The descriptors that the arguments name (`archive=5`), which no child of this process inherits.

    Exits with an explanation if they name anything else.
    """
    named = dict.fromkeys(field.name for field in dataclasses.fields(HandedOver))
    descriptors: dict[str, int] = {}
    for word in words:
        name, _, number = word.partition("=")
        try:
            if name not in named or int(number) <= 2:
                raise ValueError(name)
            os.set_inheritable(int(number), False)
        except (ValueError, OSError):
            note(f"expected {' or '.join(f'{name}=DESCRIPTOR' for name in named)}")
            sys.exit(ExitStatus.USAGE)
        descriptors[name] = int(number)
    return HandedOver(**descriptors)


def carry_out(
    service: str,
    caller: str,
    places: Places = PLACES,
    assemble: Assemble = dom0_restore,
    handed: HandedOver = NOTHING,
) -> Never:
    """Serve the call on standard input and output, and exit: with 0 if it was told how it ended."""
    prepare_process()

    def say(text: str) -> None:
        note(f"{service} for {caller}: {text}")

    read_fd, write_fd = _take_standard_streams()
    call = Call(service, caller, say, places, assemble, handed)
    try:
        delivered = asyncio.run(_served(call, read_fd, write_fd))
    except Exception as error:  # noqa: BLE001 - the last one that can say it in words
        say(unforeseen(error).reason)
        sys.exit(ExitStatus.NOTHING)
    sys.exit(ExitStatus.COMPLETE if delivered else ExitStatus.NOTHING)


def note(text: str) -> None:
    """A line for dom0's log of the calls, if it can be written."""
    with contextlib.suppress(OSError):
        os.write(2, f"{strip_control(text)}\n".encode("utf-8", "replace"))


async def _served(call: Call, read_fd: int, write_fd: int) -> bool:
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, call.cancel)
    return await call.serve(read_fd, write_fd)


def _take_standard_streams() -> tuple[int, int]:
    read_fd, write_fd = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (0, 1))
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nowhere, 0)
    os.dup2(2, 1)
    close_read(nowhere)
    return read_fd, write_fd
