"""The archive as a blocking stream of bytes (a file, a pipe, a device or a socket), and of members.

Strategy: small reads go through a small buffer, large ones straight into the caller's memory. The
end of the input shows as a short read. What is not needed is skipped: by seeking where the
input can seek, by reading it away where it cannot. What a file cannot give (EIO) is stepped over and reads
as zeros: checksums and MACs then show what is lost, and `gap` tells the reason. That holds for a disk
(a block device), too. A pipe cannot be read past an error.
"""

import contextlib
import errno
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator

from qubes_restore_svc.archive.members import Damage, Member, MemberReader
from qubes_restore_svc.errors import ArchiveTruncated, ArchiveUnreadable, RestoreError
from qubes_restore_svc.hardening import close_read

_BUFFER_SIZE = 16 << 10
_SKIP_SIZE = 1 << 20

#: A place that cannot be read is stepped over in pages of the system's memory, bytes, as it reads them.
_PAGE = 4096
#: With so much that cannot be read in one place, it is the medium that has gone, bytes.
_MAX_GAP = 16 << 20
#: Gaps that are remembered; so many of them are a medium that has gone, too.
_MAX_GAPS = 10_000

#: Content is read in pieces of this size, bytes: the reader must see it, and a cancel must be noticed.
_PIECE = 4 << 20
#: What is not wanted is skipped in pieces of this size, bytes, so that a cancel is noticed.
_SKIP_PIECE = 64 << 20


class ArchiveSource:
    """Reads descriptor `fd` from where it stands; does not close it. `position` counts bytes from there."""

    _seekable_end: int | None = None  #: where it ends, if it is a file; None: what is skipped is read away
    _readable_end: int | None = None  #: where a file or a disk ends; None: nothing can be stepped over
    _start = 0  #: where reading began, in a file

    def __init__(self, fd: int) -> None:
        self._begin(fd, 0)
        try:
            status = os.fstat(fd)
            # Its owner before us may have left it non-blocking.
            os.set_blocking(fd, True)
        except OSError as error:
            raise self._unreadable(error) from error
        self._seekable_end = self._readable_end = self._find_end(status)
        if stat.S_ISBLK(status.st_mode):
            self._readable_end = _end_of_disk(fd)
        if self._readable_end is not None:
            self._start = os.lseek(fd, 0, os.SEEK_CUR)

    def _begin(self, fd: int, position: int) -> None:
        self._fd = fd
        self._buffer = b""
        self._offset = 0
        self._gaps: list[tuple[int, int, OSError]] = []
        self._counting = threading.Lock()  # several threads may read
        self._waits = 0
        self.received = 0  #: bytes that reading has brought, ahead of `position` or behind it
        self.position = position

    @property
    def seekable(self) -> bool:
        """Can what lies ahead be read later, with `read_at`?"""
        return self._seekable_end is not None

    @property
    def size(self) -> int:
        """Bytes from where reading began to the end; 0 if that is not known."""
        return 0 if self._readable_end is None else max(0, self._readable_end - self._start)

    def gap(self, start: int, end: int) -> ArchiveUnreadable | None:
        """The reason why bytes between the positions `start` and `end` read as zeros; None if they could be
        read."""
        for gap_start, gap_end, error in self._gaps:
            if gap_start < end and start < gap_end:
                return self._unreadable(error, max(gap_start, start))
        return None

    @property
    def waited_for(self) -> bool:
        """Does a thread wait for data at this moment? From any thread."""
        return self._waits > 0

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        with self._counting:
            self._waits += 1
        try:
            yield
        finally:
            with self._counting:
                self._waits -= 1

    def _count(self, taken: int) -> None:
        with self._counting:
            self.received += taken

    def read_at(self, position: int, target: memoryview) -> int:
        """Fill `target` with what lies at `position`, wherever reading stands; how many bytes there were."""
        filled = 0
        while filled < len(target):
            try:
                with self._waiting():
                    taken = os.preadv(self._fd, [target[filled:]], self._start + position + filled)
            except OSError as error:
                raise self._unreadable(error, position + filled) from error
            if not taken:
                break
            filled += taken
            self._count(taken)
        return filled

    def will_need(self, position: int, size: int) -> None:
        """Let the system read `size` bytes at `position` ahead of time, into memory of its own."""
        with contextlib.suppress(OSError):  # it is only a wish
            os.posix_fadvise(self._fd, self._start + position, size, os.POSIX_FADV_WILLNEED)

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end of the input. Raises ArchiveUnreadable."""
        if len(self._buffer) - self._offset >= size:
            self._offset += size
            self.position += size
            return self._buffer[self._offset - size : self._offset]
        data = bytearray(size)
        return bytes(data[: self.read_into(memoryview(data))])

    def read_into(self, target: memoryview) -> int:
        """Fill `target`; returns how many bytes there were, fewer only at the end of the input."""
        filled = 0
        while filled < len(target):
            buffered = len(self._buffer) - self._offset
            if buffered:
                taken = min(buffered, len(target) - filled)
                target[filled : filled + taken] = self._buffer[self._offset : self._offset + taken]
                self._offset += taken
            elif len(target) - filled >= _BUFFER_SIZE:
                taken = self._system_read_into(target[filled:])
            else:
                fresh = bytearray(_BUFFER_SIZE)
                taken = self._system_read_into(memoryview(fresh))
                self._buffer, self._offset = bytes(fresh[:taken]), 0
                if taken:
                    continue
            if not taken:
                break
            filled += taken
        self.position += filled
        return filled

    def skip(self, size: int) -> int:
        """Pass over `size` bytes; returns how many there were, fewer only at the end of the input."""
        buffered = min(size, len(self._buffer) - self._offset)
        self._offset += buffered
        self.position += buffered
        rest = size - buffered
        if rest and self._seekable_end is not None:
            try:
                here = os.lseek(self._fd, 0, os.SEEK_CUR)
                rest = min(rest, max(0, self._seekable_end - here))
                os.lseek(self._fd, rest, os.SEEK_CUR)
            except OSError as error:
                raise self._unreadable(error) from error
            self.position += rest
            return buffered + rest
        scratch = memoryview(bytearray(min(rest, _SKIP_SIZE)))
        skipped = buffered
        while skipped < size:
            taken = self.read_into(scratch[: size - skipped])
            if not taken:
                break
            skipped += taken
        return skipped

    def _find_end(self, status: os.stat_result) -> int | None:
        """Where a seekable input ends, or None if it cannot seek. Seeking past the end would go unnoticed."""
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def _system_read_into(self, target: memoryview) -> int:
        try:
            with self._waiting():
                taken = os.readv(self._fd, [target])
            self._count(taken)
            return taken
        except OSError as error:
            passed = self._step_over(error, len(target))
            target[:passed] = bytes(passed)
            return passed

    def _step_over(self, error: OSError, size: int) -> int:
        """Pass over at most `size` bytes that cannot be read, and read what can be of them another time.

        How many bytes were passed. Raises ArchiveUnreadable where that is of no use.
        """
        if error.errno != errno.EIO or self._readable_end is None:
            raise self._unreadable(error) from error
        here = os.lseek(self._fd, 0, os.SEEK_CUR)
        passed = min(size, _PAGE - here % _PAGE, self._readable_end - here)
        position = here - self._start
        gap_start = position
        if self._gaps and self._gaps[-1][1] == position:
            gap_start = self._gaps.pop()[0]
        # A copy: the traceback of the error itself would keep the memory that was to be filled.
        self._gaps.append((gap_start, position + passed, OSError(error.errno, error.strerror)))
        if position + passed - gap_start > _MAX_GAP or len(self._gaps) > _MAX_GAPS:
            raise self._unreadable(error) from error
        os.lseek(self._fd, passed, os.SEEK_CUR)
        return passed

    def _unreadable(self, error: OSError, position: int | None = None) -> ArchiveUnreadable:
        reason = error.strerror or "input/output error"
        where = self.position if position is None else position
        return ArchiveUnreadable(f"reading the archive failed at byte {where}: {reason}")


def _end_of_disk(fd: int) -> int | None:
    """The end of a block device, bytes; None if the device does not report it. The position stays the
    same."""
    try:
        here = os.lseek(fd, 0, os.SEEK_CUR)
        end = os.lseek(fd, 0, os.SEEK_END)
        os.lseek(fd, here, os.SEEK_SET)
    except OSError:
        return None
    return end


class LateSource(ArchiveSource):
    """Reads a connection that `connect` brings, as a descriptor, when the first byte is wanted.

    It cannot seek. `position` is where counting begins, bytes. `connect` may block, and raise RestoreError.
    """

    def __init__(self, connect: Callable[[], int], position: int = 0) -> None:
        self._begin(-1, position)
        self._connect = connect

    @property
    def surplus(self) -> int:
        """Bytes that have come and that nobody has taken."""
        return len(self._buffer) - self._offset

    def _system_read_into(self, target: memoryview) -> int:
        self._be_connected()
        try:
            return super()._system_read_into(target)
        except ArchiveUnreadable as error:
            # A peer that goes before it has read all that it was sent resets the connection: that is its end.
            if isinstance(error.__cause__, ConnectionResetError):
                return 0
            raise

    def _be_connected(self) -> None:
        if self._fd < 0:
            with self._waiting():
                self._fd = self._connect()


class MemberStream:
    """The members that `reader` finds in `source`, one after the other, and their content.

    `check` is called again and again, and may raise to stop the reading. Raises what readers raise.
    """

    def __init__(self, source: ArchiveSource, reader: MemberReader, check: Callable[[], None]) -> None:
        self.source = source
        self._reader = reader
        self._check = check
        self._next: Member | None = None
        self.content_end = 0  #: of the last member of which all was taken or passed over, bytes

    def next_member(self) -> Member | None:
        """Step to the next member, None at the end of the archive."""
        self._check()
        if self._next is not None:
            pushed_back, self._next = self._next, None
            return pushed_back
        while wanted := self._reader.wanted:
            self._check()
            header = self.source.read(wanted)
            if len(header) < wanted:
                self._reader.eof(header)
                return None
            member = self._reader.feed(header)
            if member is not None:
                return member
        return None

    def push_back(self, member: Member) -> None:
        """`member`, whose content has not been touched, is to be the next one again."""
        self._next = member

    def take_damage(self) -> Damage | None:
        """What was passed over before the last member, or the end, that was found; once."""
        return self._reader.take_damage()

    @property
    def can_return(self) -> bool:
        """Can content that is skipped be read later, from `source`?"""
        return self.source.seekable and self._reader.skip(0)

    def read_content(self, size: int) -> bytearray:
        """The next `size` bytes of the current member's content. Raises ArchiveTruncated."""
        content = bytearray(size)
        self.read_into(memoryview(content))
        return content

    def read_into(self, target: memoryview) -> None:
        """Fill `target` with the next bytes of the current member's content. Raises ArchiveTruncated."""
        for start in range(0, len(target), _PIECE):
            self._check()
            piece = target[start : start + _PIECE]
            read = self.source.read_into(piece)
            self._reader.content(piece[:read])
            if read < len(piece):
                self._reader.eof()
                raise ArchiveTruncated("the archive ends inside a chunk")

    def skip_content(self, size: int) -> None:
        """Pass over `size` bytes of the current member's content. Raises ArchiveTruncated."""
        while size:
            self._check()
            piece = min(size, _SKIP_PIECE)
            if self._reader.skip(piece):
                if self.source.skip(piece) < piece:
                    raise ArchiveTruncated("the archive ends inside a chunk")
            else:
                piece = len(self.read_content(min(piece, _PIECE)))
            size -= piece

    def skip_rest(self) -> None:
        """Pass over what is left of the current member's content, unless that is to come again."""
        if self._next is None:
            self.skip_content(self._reader.content_left)
            self.content_end = self.source.position


class ArchivePass:
    """The backup, read as it is in one pass. Owns `connection`, if `source` reads from one."""

    #: Is it all of the archive, so that there is no second pass?
    whole = True

    def __init__(
        self, source: ArchiveSource, reader: MemberReader, connection: socket.socket | None = None
    ) -> None:
        self.source = source
        self.reader = reader
        self._connection = connection

    def doubt(self, error: RestoreError) -> RestoreError:
        """Returns `error`, which says that something is missing, or the reason if the archive's side has
        failed."""
        return error

    def close(self) -> None:
        """Nobody reads from it any more; safe to repeat. A mere descriptor stays its owner's."""
        if self._connection is not None:
            close_read(self._connection)
