"""The process that fetches the archive from a storage VM: `qrexec-client-vm QUBE qubes.RestoreById+ID`.

Strategy: one process a call, with one socket as its standard input and output. It is ended and reaped by
whoever owns it, at the latest when the session is over. What it says on its standard error, which is what the
service in the storage VM says, is read all the time, so that it never waits for us; the end of it is kept.
"""

import contextlib
import os
import socket
import subprocess
import threading
from dataclasses import dataclass

from qubes_restore_svc.errors import ArchiveUnreadable, how_ended
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.wire.messages import Storage
from qubes_restore_svc.wire.names import last_words
from qubes_restore_svc.wire.service import CALL_FAILED, CALL_REFUSED, CONNECTION_BROKE, NO_SERVICE

PROGRAM = "qrexec-client-vm"
SERVICE = "qubes.RestoreById"

#: Seconds that the process gets to end by itself after its stream has ended.
END_TIMEOUT_S = 5.0
#: Seconds that a killed process gets, and its last words to arrive.
_KILL_TIMEOUT_S = 1.0
_STDERR_KEPT = 4 << 10  #: bytes


@dataclass(frozen=True, slots=True)
class End:
    """How a call has ended: the exit code of the service (None: not known), and its last line."""

    code: int | None
    untrusted_last_line: bytes = b""

    def __str__(self) -> str:
        code = "was ended" if self.code is None else how_ended(self.code)
        words = last_words(self.untrusted_last_line)
        return f"{code} ({words})" if words else code


class RestoreById:
    """One call of the service. `connection` is our end of its stream; owned here, as is the process."""

    def __init__(self, storage: Storage) -> None:
        """Start the process. Raises ArchiveUnreadable if that cannot be."""
        self._qube = storage.qube
        self.connection, theirs = socket.socketpair()
        reader, writer = os.pipe()
        try:
            self._process = subprocess.Popen(
                # A name and an id of letters and digits (see wire.names): neither can be taken for an option.
                [PROGRAM, storage.qube, f"{SERVICE}+{storage.location_id}"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=writer,
                start_new_session=True,
            )
        except OSError as error:
            close_read(self.connection)
            close_read(reader)
            raise ArchiveUnreadable(
                f"{PROGRAM} could not be started: {error.strerror}",
                advice="The worker's VM must be a Qubes VM with the package qubes-core-qrexec.",
            ) from error
        finally:
            close_read(theirs)
            close_read(writer)
        self._untrusted_words = b""
        self._listener = threading.Thread(
            target=self._listen, args=(reader,), name="storage-stderr", daemon=True
        )
        self._listener.start()

    def kill(self) -> None:
        """End the process at once and reap it; from any thread, safe to repeat."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILL_TIMEOUT_S)

    def end(self) -> End:
        """Wait for the end that must come now, help it along if it does not, and say what it was."""
        code: int | None = None
        try:
            code = self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._listener.join(_KILL_TIMEOUT_S)
        lines = [line for line in self._untrusted_words.splitlines() if line.strip()]
        return End(code, lines[-1].strip() if lines else b"")

    def why_nothing_came(self, end: End) -> ArchiveUnreadable:
        """The error for a call that has brought not a single byte, or nothing of a backup."""
        qube = self._qube
        if end.code == CALL_REFUSED:
            return ArchiveUnreadable(
                f"the worker was not allowed to fetch the backup from the qube {qube}",
                advice=(
                    f"Look in dom0's journal for the call of {SERVICE} that was denied, and in"
                    " /etc/qubes/policy.d for a rule that comes before those of qubes-restore-svc."
                ),
            )
        if end.code == NO_SERVICE:
            return ArchiveUnreadable(
                f"the qube {qube} does not have the service {SERVICE}",
                advice=f"Update qubes-core-agent in the template of {qube}, and restart {qube}.",
            )
        if end.code is None or end.code < 0 or end.code in (CALL_FAILED, CONNECTION_BROKE):
            return ArchiveUnreadable(
                f"the connection to the qube {qube} broke off: the call {end}",
                advice=f"Check that {qube} is running, and try again.",
            )
        return ArchiveUnreadable(
            f"the qube {qube} did not deliver the backup: its service {end}",
            advice=(
                f"Check in {qube} that the file is still there and can be read; if it comes from a command,"
                " try the command there."
            ),
        )

    def why_it_broke_off(self, end: End) -> ArchiveUnreadable | None:
        """The error for a stream that ended early, unless it is the archive that ends there."""
        if end.code is None or end.code < 0 or end.code >= CALL_FAILED:
            return ArchiveUnreadable(
                f"the transfer from the qube {self._qube} broke off: the call {end}",
                advice=f"Check that {self._qube} runs and that its disks still answer, and try again.",
            )
        return None

    def close(self) -> None:
        """Everything goes: process, connection, listener. Safe to repeat."""
        self.kill()
        close_read(self.connection)
        self._listener.join(_KILL_TIMEOUT_S)

    def _listen(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as stderr:
            while words := stderr.read(_STDERR_KEPT):
                self._untrusted_words = (self._untrusted_words + words)[-_STDERR_KEPT:]
