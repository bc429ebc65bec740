"""How the worker gets the archive: it has it, a call brings it, or it fetches it.

Strategy: three ways, and the first that shows counts for good.

    a descriptor, or `restore.Archive`     the backup as it is, read in one pass
    `restore.Archive+qfile`, twice         a conversation with a storage service for each of two passes
    `open` names a storage VM              the same conversations, with processes of our own

The event loop puts calls in; the thread that opens the backup waits for them, and so does the one that reads
the second pass. `close` wakes everyone who waits or reads, and leaves no process.
"""

import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable

from qubes_restore_svc.archive.outer_tar import OuterTarReader
from qubes_restore_svc.errors import Cancelled, ProtocolViolation
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.wire.messages import Storage
from qubes_restore_svc.wire.qrexec_call import QFILE_ARGUMENT
from qubes_restore_svc.worker.source import ArchivePass, ArchiveSource
from qubes_restore_svc.worker.storage_qube import BEGINNING, Peer, RestoreById, StoragePass, show_end

_PASSES = 2


class ArchiveAccess:
    """The archive of one session. `archive_fd` is the backup, if there is one yet; it stays the caller's."""

    def __init__(self, archive_fd: int | None) -> None:
        self._changed = threading.Condition()
        self._closed = False
        self._passed = archive_fd
        self._called: socket.socket | None = None
        self._storage: Storage | None = None
        self._waiting: deque[socket.socket] = deque()
        self._conversations = 0
        self._peer: Peer | None = None

    # --- On the event loop -------------------------------------------------------------------------

    def take(self, argument: str, connection: socket.socket) -> bool:
        """Take the connection of a `restore.Archive` call; False if nobody waits for such a call."""
        with self._changed:
            if self._closed or not self._admits(argument):
                return False
            connection.setblocking(True)
            if argument == QFILE_ARGUMENT:
                self._waiting.append(connection)
                self._conversations += 1
            else:
                self._called = connection
            self._changed.notify_all()
            return True

    def fetch_from(self, storage: Storage) -> None:
        """From now on the archive is fetched from there. Raises ProtocolViolation if there is another
        source."""
        with self._changed:
            if self._passed is not None or self._called is not None or self._conversations:
                raise ProtocolViolation("'open' names a storage qube, but there is an archive already")
            self._storage = storage
            self._changed.notify_all()

    def close(self) -> None:
        """No more passes: a thread that waits gets Cancelled, one that reads an end, and no process stays."""
        with self._changed:
            self._closed = True
            for connection in self._waiting:
                close_read(connection)
            self._waiting.clear()
            self._changed.notify_all()
            peer = self._peer
        if self._called is not None:
            show_end(self._called)
        if peer is not None:
            peer.stop()

    # --- In the threads of the session -------------------------------------------------------------

    def first_pass(self) -> ArchivePass:
        """The pass that begins with the header; waits until it is known where it comes from.

        Raises Cancelled, and ArchiveUnreadable for a number that is no open descriptor.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._passed is not None or self._is_called())
            self._stop_if_closed()
            if self._passed is not None:
                return ArchivePass(ArchiveSource(self._passed), OuterTarReader())
            if self._called is not None:
                called = ArchiveSource(self._called.fileno())
                return ArchivePass(called, OuterTarReader(), self._called)
        return StoragePass(self._connect, BEGINNING)

    def second_pass(
        self, paths: Iterable[str], *, position: int, remark: Callable[[str], None]
    ) -> ArchivePass:
        """The pass over the members at `paths`; it begins when it is first read. See StoragePass."""
        return StoragePass(self._connect, paths, position=position, remark=remark)

    def _connect(self) -> Peer:
        """The other side of the next conversation; waits for a call, if it comes by one."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._storage is not None or bool(self._waiting))
            self._stop_if_closed()
            # A process is started with the lock held, so that `close` finds it.
            if self._storage is not None:
                self._peer = RestoreById(self._storage)
            else:
                self._peer = Peer(self._waiting.popleft())
            return self._peer

    def _is_called(self) -> bool:
        return self._called is not None or self._storage is not None or bool(self._waiting)

    def _admits(self, argument: str) -> bool:
        if self._passed is not None or self._called is not None or self._storage is not None:
            return False
        if argument == QFILE_ARGUMENT:
            return self._conversations < _PASSES
        return not argument and not self._conversations

    def _stop_if_closed(self) -> None:
        if self._closed:
            raise Cancelled("the session ended")
