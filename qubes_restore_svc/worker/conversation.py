"""One conversation with a storage service: a line of paths goes out, a qfile comes in, an answer goes out.

Strategy: the conversation begins when the first byte is wanted. A reader of the qfile knows when its stream
is over: then the answer is sent and the other side gets a moment to hang up; where the stream stops before,
the reader asks why. Nothing that the storage VM says is believed: what a chunk is worth, its MAC decides.

The paths are prefixes (tar2qfile of qubes-core-agent-linux). The sender stops at the first member that none
of them fits, once each has fitted at least once. Nothing is lost by that: the members of a directory lie
together, and a directory is asked for with its slash, so that it is not the beginning of another one's name.
A member counts for the first path that fits, so a path that is the beginning of another comes after it.
"""

import contextlib
import re
import socket
from collections.abc import Callable, Iterable
from typing import Protocol

from qubes_restore_svc.archive.header import HEADER_HMAC_MEMBER, HEADER_MEMBER
from qubes_restore_svc.archive.members import Member
from qubes_restore_svc.archive.qfile import QfileReader
from qubes_restore_svc.archive.qubes_xml import BackupQube
from qubes_restore_svc.archive.types import Buffer
from qubes_restore_svc.errors import (
    ArchiveTruncated,
    ArchiveUnreadable,
    BadArchive,
    BadMetadata,
    NotABackup,
    RestoreError,
)
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.wire.service import BROKEN_PIPE
from qubes_restore_svc.worker.restore_by_id import END_TIMEOUT_S, End
from qubes_restore_svc.worker.source import LateSource

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

#: How tar2qfile ends where the archive does, or where it cannot be read.
_CUT_OFF = 1


def paths_of(qubes: Iterable[BackupQube]) -> tuple[str, ...]:
    """The paths that bring all members of these qubes. dom0's home is no directory: it lies in one."""
    return tuple(
        f"{qube.path.split('/')[0] if qube.info.klass == 'AdminVM' else qube.path}/" for qube in qubes
    )


class Peer(Protocol):
    """Who is on the other side: a call of dom0's, or a process of ours. Owns `connection`."""

    @property
    def connection(self) -> socket.socket: ...

    def end(self) -> End:
        """How the other side has ended, or must end now."""
        ...

    def why_nothing_came(self, end: End) -> ArchiveUnreadable:
        """The error for a stream without a byte, or without a member though its sender failed."""
        ...

    def why_it_broke_off(self, end: End) -> ArchiveUnreadable | None:
        """The error for a stream that ended early; None if it is the archive that ends there."""
        ...

    def close(self) -> None:
        """Let go of everything; safe to repeat."""
        ...


class Conversation:
    """A pass over the archive as a storage service gives it: `source` and `reader` are for an intake.

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
        self.source = LateSource(self._begin, position)
        self.reader = _ConversationReader(self)

    def close(self) -> None:
        """Hang up, whether the stream has ended or not; safe to repeat."""
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
        untrusted_surplus = self.source.surplus
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
        """The stream is complete; what is to be said of a service that failed nevertheless."""
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


class CalledPeer:
    """The other side of a `restore.Archive+qfile` that dom0 made for us, to a service that it chose."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def end(self) -> End:
        """qrexec does not tell."""
        return End(None)

    def why_nothing_came(self, end: End) -> ArchiveUnreadable:
        return ArchiveUnreadable(
            "the storage service ended without having sent anything",
            advice="Check the name of the service, and look for its error in the journal of its qube.",
        )

    def why_it_broke_off(self, end: End) -> ArchiveUnreadable | None:
        return None

    def close(self) -> None:
        close_read(self.connection)


class _ConversationReader(QfileReader):
    """Tells its conversation when the stream is over, and asks it why it has stopped."""

    def __init__(self, conversation: Conversation) -> None:
        super().__init__()
        self._conversation = conversation
        self._members = 0
        self._received = 0

    def feed(self, untrusted_data: Buffer) -> Member | None:
        member = super().feed(untrusted_data)
        self._received += len(untrusted_data)
        self._members += member is not None
        if not self.wanted:
            self._conversation.finish(self.answer(), self._members)
        return member

    def eof(self, untrusted_rest: Buffer = b"") -> None:
        try:
            super().eof(untrusted_rest)
        except RestoreError as error:
            raise self._conversation.why(error, self._received + len(untrusted_rest)) from None


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
