"""A call that comes through qrexec: who makes it is what qrexec says, and nothing else.

Strategy: qrexec names the calling domain in the environment of the service (`execute_qubes_rpc_command` of
libqrexec). What is missing there, or is not the name of a qube, ends the program before anything is done.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Never

from pydantic import TypeAdapter, ValidationError

from qubes_restore_svc.errors import ExitStatus, UsageError
from qubes_restore_svc.qubes.grants import DOM0
from qubes_restore_svc.qubes.restore import PLACES, Places, dom0_restore
from qubes_restore_svc.service.call import Assemble
from qubes_restore_svc.service.program import carry_out, note, service_of
from qubes_restore_svc.wire.names import QubeName

_QUBE: TypeAdapter[str] = TypeAdapter(QubeName)


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

    dom0 is none: its programs start the service themselves (see `local`).
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
