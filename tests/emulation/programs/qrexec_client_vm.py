"""`qrexec-client-vm TARGET SERVICE+ARG [PROGRAM ARGUMENT…]` of a domain: calls a service.

Strategy: the command line of the original (qubes-core-qrexec, agent/qrexec-client-vm.c), whose options end at
the first word that is none. The stream is on stdin and stdout or, if a program is given, on the program's,
which finds the others as SAVED_FD_0 and SAVED_FD_1. Exits with the code of the service (or of the program, if
that is 0), 126 when the call was refused, 127 when the service is not there, 255 when the peer vanished.
"""

import getopt
import os
import socket
import stat
import sys
from collections.abc import Sequence

from tests.emulation.process_io import VANISHED, Ends, connect
from tests.emulation.trigger import Kind, Refused, request

_SHORT = "+tTa:p:s:h"
_LONG = (
    "buffer-size=", "filter-escape-chars-stdout", "filter-escape-chars-stderr",
    "no-filter-escape-chars-stdout", "no-filter-escape-chars-stderr", "agent-socket=", "prefix-data=",
    "use-stdin-socket", "source-qube=", "help",
)  # fmt: skip
_SAME = {
    "-t": "--filter-escape-chars-stdout", "-T": "--filter-escape-chars-stderr", "-a": "--agent-socket",
    "-p": "--prefix-data", "-s": "--source-qube", "-h": "--help",
}  # fmt: skip


class _UsageError(Exception):
    """The words are not those of a call; says what is wrong with them."""


def main() -> int:
    """Run the program; returns its exit code."""
    try:
        options, target, service, program = _parse(sys.argv[1:])
    except _UsageError as error:
        print(f"{error}\nusage: qrexec-client-vm [options] TARGET SERVICE [PROGRAM …]", file=sys.stderr)
        return 2
    if "--help" in options:
        print("usage: qrexec-client-vm [options] TARGET SERVICE [PROGRAM …]")
        return 0
    try:
        channel = request(options["--agent-socket"], Kind.FROM_VM, target.replace("$", "@"), service)
    except Refused as refused:
        print("Request refused", file=sys.stderr)
        return refused.code
    except OSError as error:
        print(f"connect: {error.strerror}", file=sys.stderr)
        return 1
    ends = Ends(
        stdin=0 if "--use-stdin-socket" in options else 1,
        stdout=0,
        prefix=os.fsencode(options.get("--prefix-data", "")),
        sanitize=(_filtered(options, "stdout", not program), _filtered(options, "stderr", True)),
    )
    with channel:
        return _run_with(channel, ends, program) if program else connect(channel, ends)


def _parse(words: Sequence[str]) -> tuple[dict[str, str], str, str, list[str]]:
    """Options by their long names, target, service, and the program with its arguments."""
    try:
        given, rest = getopt.gnu_getopt(words, _SHORT, list(_LONG))
    except getopt.GetoptError as error:
        raise _UsageError(str(error)) from None
    options: dict[str, str] = {}
    for word, value in given:
        name = _SAME.get(word, word)
        if name in options and name in ("--prefix-data", "--source-qube", "--use-stdin-socket"):
            raise _UsageError(f"{name} can be given once")
        opposite = name.replace("--no-filter", "--filter") if "--no-" in name else name.replace("--", "--no-")
        options.pop(opposite, None)  # the last word counts
        options[name] = value
    if "--help" in options:
        return options, "", "", []
    if len(rest) < 2:
        raise _UsageError("no target, or no service")
    target, service, *program = rest
    if "--use-stdin-socket" in options:
        if not stat.S_ISSOCK(os.fstat(0).st_mode):
            raise _UsageError("--use-stdin-socket passed, but stdin not a socket")
        if program:
            raise _UsageError("cannot spawn a local process with --use-stdin-socket")
    return options, target, service, program


def _filtered(options: dict[str, str], stream: str, if_terminal: bool) -> bool:
    if f"--no-filter-escape-chars-{stream}" in options:
        return False
    descriptor = 1 if stream == "stdout" else 2
    return f"--filter-escape-chars-{stream}" in options or (if_terminal and os.isatty(descriptor))


def _run_with(channel: socket.socket, ends: Ends, program: Sequence[str]) -> int:
    """Be the client's end of a call whose stream is the standard input and output of a program."""
    import subprocess  # as dear as all the other imports together, and seldom needed

    stdin, their_stdin = socket.socketpair()
    stdout, their_stdout = socket.socketpair()
    streams = (0, 1, 2) if os.environ.get("PASS_LOCAL_STDERR") else (0, 1)
    saved = {f"SAVED_FD_{number}": os.dup(number) for number in streams}
    with stdin, stdout:
        with their_stdin, their_stdout:
            try:
                process: subprocess.Popen[bytes] = subprocess.Popen(
                    [os.path.basename(program[0]), *program[1:]],
                    executable=program[0] if "/" in program[0] else f"./{program[0]}",  # no PATH is searched
                    stdin=their_stdin.fileno(),
                    stdout=their_stdout.fileno(),
                    pass_fds=tuple(saved.values()),
                    env=os.environ
                    | {name: str(descriptor) for name, descriptor in saved.items()}
                    | {"QREXEC_AGENT_PID": str(os.getpid())},
                )
            except OSError as error:
                print(f"execv: {error.strerror}", file=sys.stderr)
                return VANISHED
        for descriptor in saved.values():
            os.close(descriptor)

        def reap() -> int:
            code = process.wait()
            return code if code >= 0 else 128 - code

        process_fd = os.pidfd_open(process.pid)
        ends.stdin, ends.stdout, ends.process_fd, ends.reap = (
            stdin.fileno(),
            stdout.fileno(),
            process_fd,
            reap,
        )
        try:
            return connect(channel, ends)
        finally:
            os.close(process_fd)
