"""The connection that a qube has: each call of the Admin API is a call of a service of dom0."""

import io
import os
import shlex
import subprocess
import sys
from typing import IO, Unpack

import qubesadmin.config
import qubesadmin.exc
from qubesadmin.app import QubesBase, ServiceOptions, feed, read_answer


class QubesRemote(QubesBase):
    """`qrexec-client-vm`, and the policy of the system; in the original it is in `qubesadmin.app`."""

    qubesd_connection_type = "qrexec"

    def qubesd_call(
        self,
        dest: str | None,
        method: str,
        arg: str | None = None,
        payload: bytes | None = None,
        payload_stream: IO[bytes] | None = None,
    ) -> bytes:
        """One call; QubesDaemonAccessError if it is refused. `payload_stream` gets closed."""
        service = method if arg is None else f"{method}+{arg}"
        command = [qubesadmin.config.qrexec_client_vm(), dest or "", service]
        if payload_stream is not None:
            code, output, errors = feed(command, payload, payload_stream)
        else:
            done = subprocess.run(command, input=payload or b"", capture_output=True, check=False)
            code, output, errors = done.returncode, done.stdout, done.stderr
        if code:
            raise qubesadmin.exc.QubesDaemonAccessError("Service call error: %s", errors.decode())
        return read_answer(output)

    def run_service(
        self, dest: str, service: str, **kwargs: Unpack[ServiceOptions]
    ) -> subprocess.Popen[bytes]:
        """Call a service of a qube, or of whatever the policy chooses for an empty `dest`."""
        autostart = kwargs.pop("autostart", True)
        if not autostart and not dest:
            raise ValueError("autostart=False makes sense only with a defined target")
        if kwargs.pop("user", None):
            raise ValueError("non-default user not possible for calls from VM")
        localcmd = kwargs.pop("localcmd", None)
        if not kwargs.pop("wait", True):
            raise NotImplementedError("wait=False not implemented for calls from VM")
        prefix_data = kwargs.pop("prefix_data", None)
        if prefix_data and b"\0" in prefix_data:
            raise ValueError("prefix_data cannot contain NUL character")
        if not autostart and not self.domains.get_blind(dest).is_running():
            raise qubesadmin.exc.QubesVMNotRunningError("%s is not running", dest)
        options: list[str | bytes] = ["-p", prefix_data] if prefix_data else []
        if filter_esc := kwargs.pop("filter_esc", False):
            options.append("-t")
        if filter_esc or ("stderr" not in kwargs and _stderr_is_terminal()):
            options.append("-T")
        for stream in ("stdin", "stdout", "stderr"):
            kwargs.setdefault(stream, subprocess.PIPE)  # type: ignore[misc] # the three of them are keys
        program = [qubesadmin.config.qrexec_client_vm(), *options, dest, service]
        # What is left is Popen's, whatever it is.
        return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
            program + (shlex.split(localcmd) if localcmd else []), **kwargs
        )


def _stderr_is_terminal() -> bool:
    try:
        return os.isatty(sys.stderr.fileno())
    except io.UnsupportedOperation:
        return False
