"""`qrexec-client-vm TARGET SERVICE+ARG` of a domain: calls a service, with the stream on stdin and stdout.

Strategy: the options of the original (qubes-core-qrexec, agent/qrexec-client-vm.c), but no local program.
Exits with the code of the service, 126 when the call was refused, 127 when the service is not there.
"""

import argparse
import os
import socket
import sys
from pathlib import Path

from tests.qubes.process_io import Ends, connect
from tests.qubes.trigger import Kind, Refused, request


def main() -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser("qrexec-client-vm", add_help=False, allow_abbrev=False)
    parser.add_argument("-t", "--filter-escape-chars-stdout", action="store_true", dest="filter_stdout")
    parser.add_argument("-T", "--filter-escape-chars-stderr", action="store_true", dest="filter_stderr")
    parser.add_argument("--no-filter-escape-chars-stdout", action="store_false", dest="filter_stdout")
    parser.add_argument("--no-filter-escape-chars-stderr", action="store_false", dest="filter_stderr")
    parser.add_argument("--agent-socket", type=Path, required=True)
    parser.add_argument("-p", "--prefix-data", default="")
    parser.add_argument("--use-stdin-socket", action="store_true")
    parser.add_argument("target")
    parser.add_argument("service")
    arguments = parser.parse_args()
    target = arguments.target.replace("$", "@")
    try:
        channel = request(arguments.agent_socket, Kind.FROM_VM, target, arguments.service)
    except Refused as refused:
        print("Request refused", file=sys.stderr)
        return refused.code
    except OSError as error:
        print(f"connect: {error.strerror}", file=sys.stderr)
        return 1
    return run(channel, arguments)


def run(channel: socket.socket, arguments: argparse.Namespace) -> int:
    """Be the client's end of a call that was accepted, on fds 0 and 1; returns the exit code."""
    ends = Ends(
        stdin=0 if arguments.use_stdin_socket else 1,
        stdout=0,
        prefix=os.fsencode(arguments.prefix_data),
        sanitize=(arguments.filter_stdout, arguments.filter_stderr),
    )
    with channel:
        return connect(channel, ends)
