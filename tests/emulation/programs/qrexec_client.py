"""`qrexec-client -d DOMAIN USER:QUBESRPC SERVICE+ARG dom0` of the emulated dom0: calls a service of a domain.

Strategy: the options of the original (qubes-core-qrexec, daemon/qrexec-client.c) that qubesadmin uses. No
policy is asked. Exits with the code of the service, 125 when the domain does not run, 127 when it has no
such service.
"""

import argparse
import os
import sys

from tests.emulation.process_io import Ends, connect
from tests.emulation.trigger import PROBLEM, Kind, Refused, request


def main() -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser("qrexec-client", add_help=False, allow_abbrev=False)
    parser.add_argument("-d", dest="domain", required=True)
    parser.add_argument("-t", action="store_true", dest="filter_stdout")
    parser.add_argument("-T", action="store_true", dest="filter_stderr")
    parser.add_argument("-E", "--no-exit-code", action="store_true")
    parser.add_argument("-w", type=int, dest="connection_timeout")
    parser.add_argument("-W", action="store_true")
    parser.add_argument("-p", "--prefix-data", default="")
    parser.add_argument("--use-stdin-socket", action="store_true")
    parser.add_argument("--socket-dir", required=True)
    parser.add_argument("command")
    arguments = parser.parse_args()
    try:
        switchboard = os.path.join(arguments.socket_dir, "qrexec.sock")
        channel = request(switchboard, Kind.FROM_DOM0, arguments.domain, arguments.command)
    except Refused as refused:
        return refused.code
    except OSError as error:
        print(f"connect: {error.strerror}", file=sys.stderr)
        return PROBLEM
    ends = Ends(
        stdin=0 if arguments.use_stdin_socket else 1,
        stdout=0,
        prefix=os.fsencode(arguments.prefix_data),
        sanitize=(arguments.filter_stdout, arguments.filter_stderr),
    )
    with channel:
        code = connect(channel, ends)
    return 0 if arguments.no_exit_code else code
