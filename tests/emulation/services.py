"""How a domain runs a service that was called: executables, sockets, socket activation, configuration.

Strategy: as the agent does it (qubes-core-qrexec, `libqrexec/exec.c`): look the file up, read its
configuration, then start it with a socket pair each for stdin and stdout, or connect to it and send the
descriptor first. In dom0 qrexec-daemon does the same, but keeps stderr: the caller never sees it.
"""

import contextlib
import os
import select
import socket
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .domain import Domain
from .process_io import Ends, serve
from .trigger import PROBLEM, SERVICE_NOT_FOUND, Refused, connect_unix, listen_unix

#: Run by the interpreter: makes a descriptor number 3, says so as systemd does, and becomes the command.
_ACTIVATE = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); "
    "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); os.execvp(sys.argv[2], sys.argv[2:])"
)


@dataclass(frozen=True, slots=True)
class Call:
    """A call as the domain that is called sees it: `restore.Volume`, `vm10.private` (None: no plus), `dom0`.

    `requested_target` is told to services of dom0 only: ("name", "dom0") or ("keyword", "adminvm").
    """

    service: str
    argument: str | None
    source: str
    requested_target: tuple[str, str] | None = None

    @property
    def full_name(self) -> str:
        """The service with its argument, as files are looked up; always with a plus."""
        return f"{self.service}+{self.argument or ''}"

    @property
    def descriptor(self) -> bytes:
        """What a socket service receives first."""
        name = self.service if self.argument is None else self.full_name
        return " ".join((name, self.source, *(self.requested_target or ()))).encode() + b"\0"


@dataclass(frozen=True, slots=True)
class Config:
    """What `rpc-config/SERVICE` can say."""

    wait_for_session: bool = False
    skip_service_descriptor: bool = False
    exit_on_client_eof: bool = False
    exit_on_service_eof: bool = False


def run_service(domain: Domain, call: Call, channel: socket.socket) -> None:
    """Serve a call from its first frame to its exit code, or until the client vanishes.

    Raises Refused with the exit code of qrexec itself when the service cannot be run.
    """
    config = read_config(domain, call)
    if config.wait_for_session:
        _wait_for_session(domain, call)
    path = _find(domain.services, call)
    if path is None:
        raise Refused(SERVICE_NOT_FOUND)
    eof = {"exit_on_client_eof": config.exit_on_client_eof, "exit_on_service_eof": config.exit_on_service_eof}
    if stat.S_ISSOCK(path.stat().st_mode):
        try:
            connection = connect_unix(path)
        except OSError:
            raise Refused(PROBLEM) from None
        with connection:
            if not config.skip_service_descriptor:
                connection.sendall(call.descriptor)
            serve(channel, Ends(connection.fileno(), connection.fileno()), **eof)
    elif os.access(path, os.X_OK):
        _run_executable(domain, call, path, channel)
    else:
        raise Refused(PROBLEM)


def read_config(domain: Domain, call: Call) -> Config:
    """The configuration of a service; raises Refused for one that qrexec does not accept."""
    path = _find(domain.config, call)
    if path is None:
        return Config()
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise Refused(PROBLEM) from None
    wait = entries.get("wait-for-session", False)
    flags = ("skip-service-descriptor", "exit-on-client-eof", "exit-on-service-eof")
    skip, client_eof, service_eof = (entries.get(key, False) for key in flags)
    user = entries.get("force-user")
    wrong = any(not isinstance(flag, bool) for flag in (skip, client_eof, service_eof)) or wait not in (0, 1)
    if wrong or not (user is None or (isinstance(user, str) and not (skip or client_eof or service_eof))):
        raise Refused(PROBLEM)
    return Config(bool(wait), skip, client_eof, service_eof)


def socket_activated(
    domain: Domain, socket_path: Path, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> None:
    """Listen on `socket_path` and start `command` at the first connection, once, as systemd would.

    The command gets the listening socket as fd 3 (LISTEN_FDS, LISTEN_PID); its output goes to the journal.
    After its end, connections are refused, as with a unit that must not be started again. All ends with the
    domain.
    """
    socket_path.parent.mkdir(parents=True, exist_ok=True)
    listener = listen_unix(socket_path)
    domain.at_stop(lambda: listener.shutdown(socket.SHUT_RDWR))
    whole = domain.environment() | dict(environment or {})
    name = f"activation of {socket_path.name} in {domain.name}"
    threading.Thread(
        target=_activate, args=(domain, listener, command, whole), name=name, daemon=True
    ).start()


def _run_executable(domain: Domain, call: Call, path: Path, channel: socket.socket) -> None:
    stdin, their_stdin = socket.socketpair()
    stdout, their_stdout = socket.socketpair()
    with contextlib.ExitStack() as ours:
        ours.enter_context(stdin)
        ours.enter_context(stdout)
        with their_stdin, their_stdout, contextlib.ExitStack() as theirs:
            if domain.name == "dom0":
                stderr, their_stderr = -1, theirs.enter_context(domain.journal.open("ab")).fileno()
            else:
                stderr, their_stderr = os.pipe()
                ours.callback(os.close, stderr)
                theirs.callback(os.close, their_stderr)
            process = _start(domain, call, path, their_stdin.fileno(), their_stdout.fileno(), their_stderr)
        process_fd = os.pidfd_open(process.pid)
        ours.callback(os.close, process_fd)

        def reap() -> int:
            code = process.wait()
            return code if code >= 0 else 128 - code

        ends = Ends(stdin.fileno(), stdout.fileno(), stderr, process_fd, reap, domain.log)
        serve(channel, ends, exit_on_client_eof=False, exit_on_service_eof=False)
    process.wait()


def _start(
    domain: Domain, call: Call, path: Path, stdin: int, stdout: int, stderr: int
) -> subprocess.Popen[bytes]:
    environment = domain.environment() | {
        "QREXEC_SERVICE_FULL_NAME": call.service if call.argument is None else call.full_name,
        "QREXEC_REMOTE_DOMAIN": call.source,
        "QREXEC_REQUESTED_TARGET_TYPE": "",
    }
    if call.argument is not None:
        environment["QREXEC_SERVICE_ARGUMENT"] = call.argument
    if call.requested_target is not None:
        kind, target = call.requested_target
        environment["QREXEC_REQUESTED_TARGET_TYPE"] = kind
        environment["QREXEC_REQUESTED_TARGET" + ("" if kind == "name" else "_KEYWORD")] = target
    command: list[str | Path] = [path, call.argument] if call.argument else [path]
    try:
        return domain.start(command, environment=environment, stdin=stdin, stdout=stdout, stderr=stderr)
    except OSError:
        raise Refused(PROBLEM) from None


def _wait_for_session(domain: Domain, call: Call) -> None:
    """Run qubes.WaitForSession, if the domain has it, to its end; the call goes on whatever it says."""
    path = _find(domain.services, Call("qubes.WaitForSession", None, call.source))
    if path is None:
        return
    environment = domain.environment() | {"QREXEC_REMOTE_DOMAIN": call.source}
    with domain.journal.open("ab") as journal, contextlib.suppress(OSError):
        null = subprocess.DEVNULL
        domain.start([path], environment=environment, stdin=null, stdout=null, stderr=journal).wait()


def _find(folder: Path, call: Call) -> Path | None:
    """The file of a service: with the argument first. A dangling symlink counts as not there."""
    candidates = (folder / call.full_name, folder / call.service)
    return next((path for path in candidates if path.exists()), None)


def _activate(
    domain: Domain, listener: socket.socket, command: Sequence[str], environment: Mapping[str, str]
) -> None:
    with listener, contextlib.suppress(OSError):
        waiting = select.poll()
        waiting.register(listener, select.POLLIN)
        waiting.poll()  # someone connects, or the domain is stopped
        words = [sys.executable, "-IS", "-c", _ACTIVATE, str(listener.fileno()), *command]
        with domain.journal.open("ab") as journal:
            process = domain.start(
                words,
                environment=environment,
                stdin=subprocess.DEVNULL,
                stdout=journal.fileno(),
                stderr=journal,
                pass_fds=(listener.fileno(),),
            )
        process.wait()
        listener.shutdown(socket.SHUT_RDWR)
