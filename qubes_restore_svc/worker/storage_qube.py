"""One conversation with a storage service: a line of paths goes out, a qfile comes in, an answer goes out.

Strategy: the conversation begins when the first byte is wanted. A reader of the qfile knows when its stream
is over: then the answer is sent and the other side gets a moment to hang up; where the stream stops before,
the reader asks why. The worker believes nothing that the storage VM says: only the MAC of a chunk tells
whether it is authentic. The other side is a call that dom0 has made, or a process of ours (`qrexec-client-vm
QUBE qubes.RestoreById+ID`), which is ended and reaped at the latest when the session is over.

The paths are prefixes (tar2qfile of qubes-core-agent-linux). The sender stops at the first member that fits
no path, as soon as each path has fitted a member. Nothing is lost: the members of a directory lie together,
and a directory is asked for with its slash, so that it is not the beginning of another one's name. A member
counts for the first path that fits, so a path that is the beginning of another comes after it.
"""

import contextlib
import os
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qubes_restore_svc.archive.header import HEADER_HMAC_MEMBER, HEADER_MEMBER
from qubes_restore_svc.archive.members import Buffer, Member
from qubes_restore_svc.archive.qfile import QfileReader
from qubes_restore_svc.archive.qubes_xml import BackupQube
from qubes_restore_svc.errors import (
    ArchiveTruncated,
    ArchiveUnreadable,
    BadArchive,
    BadMetadata,
    NotABackup,
    RestoreError,
    how_ended,
)
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.wire.messages import Storage
from qubes_restore_svc.wire.names import last_words
from qubes_restore_svc.wire.qrexec_call import (
    BROKEN_PIPE,
    CALL_FAILED,
    CALL_REFUSED,
    CONNECTION_BROKE,
    NO_SERVICE,
)
from qubes_restore_svc.worker.source import ArchivePass, LateSource

#: The beginning of a backup: its header, the copy of that, and qubes.xml however many chunks it has. The old
#: formats, which are refused by name, begin with `qubes.xml…` as well.
BEGINNING = (HEADER_HMAC_MEMBER, HEADER_MEMBER, "qubes.xml")

# No blanks, which divide the line; no wildcards; nothing that a program could take for an option.
_PATH = re.compile(r"(?!-)[A-Za-z0-9_.+@/-]{1,300}")

#: Advice for what has not come, although the service ended as it should.
_STOPS_AT_DAMAGE = (
    "The backup is incomplete, or is damaged before this place: the service of the qube that keeps it stops"
    " reading at damage. Read the file itself, in dom0 or on another machine; it may hold more."
)

#: The exit code of tar2qfile if the archive ends early, or cannot be read.
_CUT_OFF = 1


def paths_of(qubes: Iterable[BackupQube]) -> tuple[str, ...]:
    """The paths that bring all members of these qubes. dom0's home is no directory: it lies in one."""
    return tuple(
        f"{qube.path.split('/')[0] if qube.info.klass == 'AdminVM' else qube.path}/" for qube in qubes
    )


PROGRAM = "qrexec-client-vm"
SERVICE = "qubes.RestoreById"

#: Seconds that the process gets to end by itself after its stream has ended.
END_TIMEOUT_S = 5.0
#: Seconds that a killed process gets, and its last words to arrive.
_KILL_TIMEOUT_S = 1.0
_STDERR_KEPT = 4 << 10  #: bytes


@dataclass(frozen=True, slots=True)
class End:
    """The end of a call: the exit code of the service (None: not known), and its last line."""

    code: int | None
    untrusted_last_line: bytes = b""

    def __str__(self) -> str:
        code = "was ended" if self.code is None else how_ended(self.code)
        words = last_words(self.untrusted_last_line)
        return f"{code} ({words})" if words else code


def show_end(connection: socket.socket) -> None:
    """Let the reader see the end; from any thread, safe to repeat."""
    # Not closed: another thread may be reading, and the number would go to someone else.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class Peer:
    """The other side of a `restore.Archive+qfile` that dom0 made for us, to a service that it chose. Owns
    `connection`."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def end(self) -> End:
        """How the other side has ended, or must end now. qrexec does not tell."""
        return End(None)

    def why_nothing_came(self, end: End) -> ArchiveUnreadable:
        """The error for a stream without a byte, or without a member though its sender failed."""
        return ArchiveUnreadable(
            "the storage service ended without having sent anything",
            advice="Check the name of the service, and look for its error in the journal of its qube.",
        )

    def why_it_broke_off(self, end: End) -> ArchiveUnreadable | None:
        """The error for a stream that ended early; None if it is the archive that ends there."""
        return None

    def stop(self) -> None:
        """Let the reader see the end; from any thread, safe to repeat."""
        show_end(self.connection)

    def close(self) -> None:
        """Let go of everything; safe to repeat."""
        close_read(self.connection)


class StoragePass(ArchivePass):
    """A pass over the archive as a storage service gives it.

    `connect` brings the other side (it may block, and raise); `position` is where counting begins, bytes.
    `remark` gets a sentence for the person, from the thread that reads. Close it when nobody reads any more.
    """

    #: What is read here is not the whole archive: the selected qubes come in another pass.
    whole = False

    def __init__(
        self,
        connect: Callable[[], Peer],
        paths: Iterable[str],
        *,
        position: int = 0,
        remark: Callable[[str], None] | None = None,
    ) -> None:
        self._connect = connect
        self._paths = tuple(paths)
        self._remark = remark
        self._peer: Peer | None = None
        self._doubt: End | None = None
        self._late = LateSource(self._begin, position)
        super().__init__(self._late, _StorageReader(self))

    def close(self) -> None:
        """Hang up, whether the stream has ended or not."""
        if self._peer is not None:
            self._peer.close()

    def _begin(self) -> int:
        request = request_line(self._paths)
        self._peer = self._connect()
        connection = self._peer.connection
        with contextlib.suppress(ConnectionError):  # it hung up at once; reading will tell
            connection.sendall(request)
        return connection.fileno()

    def finish(self, answer: bytes, members: int) -> None:
        """The stream has ended as it should, after so many members."""
        assert self._peer is not None
        connection = self._peer.connection
        with contextlib.suppress(OSError):  # it need not wait for the answer
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
        connection.settimeout(END_TIMEOUT_S)
        untrusted_surplus = self._late.surplus
        with contextlib.suppress(OSError):  # nothing more has to come, not even the end
            untrusted_surplus = untrusted_surplus or len(connection.recv(1))
        if untrusted_surplus:
            raise BadArchive("the storage qube sends more after the end of its stream")
        self._judge(self._peer.end(), members)

    def doubt(self, error: RestoreError) -> RestoreError:
        """`error`, which says that something is missing, or why: the service has failed at the end.

        A service that has not failed may have stopped at damage: it does not tell."""
        if self._doubt is not None:
            return _failed_service(error.reason, self._doubt)
        return type(error)(error.reason, advice=_STOPS_AT_DAMAGE)

    def why(self, error: RestoreError, received: int) -> RestoreError:
        """Why the stream stopped after `received` bytes, though its reader says that it cannot (`error`)."""
        assert self._peer is not None
        end = self._peer.end()
        if not received:
            return self._peer.why_nothing_came(end)
        broke_off = self._peer.why_it_broke_off(end)
        if broke_off is not None:
            return broke_off
        if end.code == _CUT_OFF:
            return ArchiveTruncated(f"{error.reason}; the service {end}")
        return _failed_service(error.reason, end) if end.code else error

    def _judge(self, end: End, members: int) -> None:
        """The stream is complete; report a service that failed nevertheless."""
        assert self._peer is not None
        if not members:
            if end.code:
                raise self._peer.why_nothing_came(end)
            if self._paths == BEGINNING:
                raise NotABackup("the storage qube found no part of a Qubes backup in it, or it is empty")
        # A command whose output was not read to its end dies of that, each in its own way.
        elif end.code not in (0, None, BROKEN_PIPE) and self._remark is not None:
            self._doubt = end
            self._remark(
                f"the service that read the backup in the storage qube {end}, after the last file that was"
                " wanted; if its command failed, settings files may be missing"
            )


def _failed_service(reason: str, end: End) -> ArchiveUnreadable:
    return ArchiveUnreadable(
        f"{reason}; the service that read the backup in the storage qube {end}",
        advice=(
            "If the backup comes from a command, try the command in that qube; if it is a file, check that it"
            " can be read there to its end."
        ),
    )


class _StorageReader(QfileReader):
    """Tells its pass when the stream is over, and asks it why it has stopped."""

    def __init__(self, storage: StoragePass) -> None:
        super().__init__()
        self._storage = storage
        self._members = 0
        self._received = 0

    def feed(self, untrusted_data: Buffer) -> Member | None:
        member = super().feed(untrusted_data)
        self._received += len(untrusted_data)
        self._members += member is not None
        if not self.wanted:
            self._storage.finish(self.answer(), self._members)
        return member

    def eof(self, untrusted_rest: Buffer = b"") -> None:
        try:
            super().eof(untrusted_rest)
        except RestoreError as error:
            raise self._storage.why(error, self._received + len(untrusted_rest)) from None


def request_line(paths: Iterable[str]) -> bytes:
    """The line that asks for `paths`; never an empty one, which would ask for everything.

    Raises BadMetadata for a path that could be more, or something else, than one place in the archive.
    """
    untrusted_paths = tuple(paths)
    for untrusted_path in untrusted_paths:
        if _PATH.fullmatch(untrusted_path) is None:
            raise BadMetadata("qubes.xml names a place in the backup that cannot be asked for")
    if not untrusted_paths:
        raise BadMetadata("no place in the backup is to be asked for")
    return " ".join(untrusted_paths).encode("ascii") + b"\n"


class RestoreById(Peer):
    """One call of the service. `connection` is our end of its stream; owned here, as is the process."""

    def __init__(self, storage: Storage) -> None:
        """Start the process. Raises ArchiveUnreadable if that cannot be."""
        self._qube = storage.qube
        ours, theirs = socket.socketpair()
        super().__init__(ours)
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

    def stop(self) -> None:
        """End the process at once and reap it, too."""
        self._kill()
        super().stop()

    def _kill(self) -> None:
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILL_TIMEOUT_S)

    def end(self) -> End:
        """Wait for the end that must come now, help it along if it does not, and say what it was."""
        code: int | None = None
        try:
            code = self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._kill()
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
        """Everything goes: process, connection, listener."""
        self._kill()
        super().close()
        self._listener.join(_KILL_TIMEOUT_S)

    def _listen(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as stderr:
            while words := stderr.read(_STDERR_KEPT):
                self._untrusted_words = (self._untrusted_words + words)[-_STDERR_KEPT:]
