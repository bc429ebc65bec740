"""The data connection of one qrexec call, seen from either end: frames on a channel, descriptors behind it.

Strategy: one loop over `poll`, the same for the client (qrexec-client, qrexec-client-vm) and for the agent
that runs the service, as in qubes-core-qrexec (`libqrexec/process_io.c`, whose names for the descriptors are
kept: *stdin* is what we write to, *stdout* what we read from). Frames are a type, a length and at most 64 KiB
of data; one without data is the end of its direction; the exit code comes last. A channel that ends without
it is a peer that vanished.

Programs that are started for every call import this, `trigger` and little else: tests wait for each of them.
"""

import contextlib
import os
import select
import socket
import stat
import struct
from collections.abc import Callable

FRAME = struct.Struct("<II")  #: type, length of the data
MAX_DATA = 65536  #: bytes of data in a frame

DATA_STDIN, DATA_STDOUT, DATA_STDERR, DATA_EXIT_CODE = 0x190, 0x191, 0x192, 0x193

VANISHED = 255  #: exit code of a client whose peer was gone before it told one

_CLOSED = -1


class Vanished(Exception):
    """The peer is gone, or no longer speaks the protocol."""


class Ends:
    """What is behind one end of a call. `stdin` may be `stdout`: a socket service.

    `process_fd` (of pidfd_open) and `reap` (which returns the exit code) belong to the process that was
    started for the call, if any. `stderr` is sent on by the agent, which also gives it to `journal`.
    `prefix` goes before what comes from `stdout`; `sanitize` is asked about what goes to stdin and to stderr.
    """

    def __init__(
        self,
        stdin: int,
        stdout: int,
        stderr: int = _CLOSED,
        process_fd: int = _CLOSED,
        reap: Callable[[], int] = lambda: 0,
        journal: Callable[[bytes], None] = lambda data: None,
        prefix: bytes = b"",
        sanitize: tuple[bool, bool] = (False, False),
    ) -> None:
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr
        self.process_fd, self.reap = process_fd, reap
        self.journal = journal
        self.prefix, self.sanitize = prefix, sanitize


def serve(channel: socket.socket, ends: Ends, *, exit_on_client_eof: bool, exit_on_service_eof: bool) -> None:
    """The agent's part: returns when the service is over and its exit code was sent, or the client vanished.

    The two flags are those of the service's configuration. The descriptors stay the caller's.
    """
    _Agent(channel, ends, exit_on_client_eof, exit_on_service_eof).run()


def connect(channel: socket.socket, ends: Ends) -> int:
    """The client's part: returns the exit code, VANISHED if there is none. Descriptors below 3 are closed.

    With a process of its own, the call is over when that has ended, too; its exit code counts if that of the
    service is 0.
    """
    return _Client(channel, ends).run()


def fail(channel: socket.socket, code: int) -> None:
    """The agent's part where there is nothing to run: nothing is read, both directions end, then the code."""
    ends = FRAME.pack(DATA_STDOUT, 0) + FRAME.pack(DATA_STDERR, 0)
    _finish(channel, ends, code)


class _End:
    """What both ends do: move data, with at most one frame under way in each direction."""

    is_agent: bool

    def __init__(self, channel: socket.socket, ends: Ends) -> None:
        self.channel = channel
        self.ends = ends
        self.stdin, self.stdout, self.stderr = ends.stdin, ends.stdout, ends.stderr
        self.single_socket = ends.stdin == ends.stdout
        self.to_stdin = b""
        self.to_channel = b""
        self.from_channel = bytearray()
        self.process_fd = ends.process_fd
        self.channel_open = True
        channel.setblocking(False)
        for descriptor in {self.stdin, self.stdout, self.stderr} - {_CLOSED}:
            os.set_blocking(descriptor, False)  # also inherited ones, whoever else has them
        if ends.prefix:
            self.send(self.out_type, ends.prefix)

    @property
    def out_type(self) -> int:
        return DATA_STDOUT if self.is_agent else DATA_STDIN

    @property
    def all_closed(self) -> bool:
        return self.stdin == self.stdout == self.stderr == _CLOSED

    def send(self, kind: int, data: bytes) -> None:
        self.to_channel += FRAME.pack(kind, len(data)) + data

    def done(self) -> bool:
        raise NotImplementedError

    def take(self, kind: int, data: bytes) -> None:
        raise NotImplementedError

    def process_ended(self) -> None:
        """The process that was started for the call has ended."""
        self.close_stdin()

    def loop(self) -> None:
        """Move data until all is done; raises Vanished."""
        while not self.done():
            if self.next_frame():
                continue
            if not self.channel_open and not self.to_stdin:
                raise Vanished
            self.wait()

    def next_frame(self) -> bool:
        """Deal with the next complete frame that has come in, if there is one."""
        if self.to_stdin or len(self.from_channel) < FRAME.size:
            return False
        kind, size = FRAME.unpack_from(self.from_channel)
        if size > MAX_DATA:
            raise Vanished
        if len(self.from_channel) < FRAME.size + size:
            return False
        data = bytes(self.from_channel[FRAME.size : FRAME.size + size])
        del self.from_channel[: FRAME.size + size]
        self.take(kind, data)
        return True

    def wait(self) -> None:
        """Wait until something can be moved, and move it."""
        wanted: dict[int, int] = {}
        if self.stdin != _CLOSED:  # asked for nothing, poll still tells of a reader that is gone
            wanted[self.stdin] = select.POLLOUT if self.to_stdin else 0
        if not self.to_channel:
            for source in {self.stdout, self.stderr} - {_CLOSED}:
                wanted[source] = wanted.get(source, 0) | select.POLLIN
        if self.process_fd != _CLOSED:
            wanted[self.process_fd] = select.POLLIN
        if self.channel_open:
            room = 0 if self.to_stdin else select.POLLIN
            wanted[self.channel.fileno()] = room | (select.POLLOUT if self.to_channel else 0)
        poll = select.poll()
        for descriptor, events in wanted.items():
            poll.register(descriptor, events)
        ready = dict(poll.poll())
        if self.channel_open and ready.get(self.channel.fileno()):
            self.move_channel()
        if ready.get(self.process_fd):
            self.process_fd = _CLOSED
            self.process_ended()
        self.move_stdin(ready.get(self.stdin, 0))
        for descriptor, kind in ((self.stdout, self.out_type), (self.stderr, DATA_STDERR)):
            if descriptor != _CLOSED and not self.to_channel and ready.get(descriptor, 0) & ~select.POLLOUT:
                self.move_out(descriptor, kind)

    def move_channel(self) -> None:
        try:
            if self.to_channel:
                with contextlib.suppress(BlockingIOError):
                    self.to_channel = self.to_channel[self.channel.send(self.to_channel) :]
            if len(self.from_channel) < FRAME.size + MAX_DATA:
                with contextlib.suppress(BlockingIOError):
                    data = self.channel.recv(FRAME.size + MAX_DATA)
                    self.channel_open = bool(data)
                    self.from_channel += data
        except OSError:
            self.channel_open = False
        if not self.channel_open:
            self.to_channel = b""

    def move_stdin(self, events: int) -> None:
        if self.stdin == _CLOSED:
            return
        if events & (select.POLLHUP | select.POLLERR):
            self.close_stdin()
        elif self.to_stdin:
            try:
                self.to_stdin = self.to_stdin[os.write(self.stdin, self.to_stdin) :]
            except BlockingIOError:
                return
            except OSError:
                self.close_stdin()

    def move_out(self, descriptor: int, kind: int) -> None:
        try:
            data = os.read(descriptor, MAX_DATA)
        except BlockingIOError:
            return
        except OSError:  # a socket whose other end was closed with our data unread
            data = b""
        if kind == DATA_STDERR:
            self.ends.journal(data)
        self.send(kind, data)
        if data:
            return
        if kind == DATA_STDERR:
            self.stderr = _CLOSED
        else:
            self.close_stdout()

    def close_stdin(self) -> None:
        self.to_stdin = b""
        if self.stdin != _CLOSED:
            self.close(self.stdin, socket.SHUT_WR)
            self.stdin = _CLOSED

    def close_stdout(self) -> None:
        if self.stdout != _CLOSED:
            self.close(self.stdout, socket.SHUT_RD)
            self.stdout = _CLOSED

    def close(self, descriptor: int, direction: int) -> None:
        """Ours and sockets used both ways are shut down in their direction; what was inherited is closed."""
        if not self.single_socket and descriptor <= 2:
            os.set_blocking(descriptor, True)
            os.close(descriptor)
        elif stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            with socket.socket(fileno=os.dup(descriptor)) as end, contextlib.suppress(OSError):
                end.shutdown(direction)


class _Agent(_End):
    is_agent = True

    def __init__(
        self, channel: socket.socket, ends: Ends, exit_on_client_eof: bool, exit_on_service_eof: bool
    ) -> None:
        super().__init__(channel, ends)
        self.exit_on_client_eof = exit_on_client_eof
        self.exit_on_service_eof = exit_on_service_eof

    def run(self) -> None:
        if self.stderr == _CLOSED:
            self.send(DATA_STDERR, b"")
        try:
            self.loop()
            _finish(self.channel, self.to_channel, self.ends.reap())
        except (Vanished, OSError):
            self.close_stdin()
            self.close_stdout()

    def done(self) -> bool:
        return self.all_closed and self.process_fd == _CLOSED

    def take(self, kind: int, data: bytes) -> None:
        if kind not in (DATA_STDIN, DATA_STDOUT) or self.stdin == _CLOSED:
            return
        if data:
            self.to_stdin = data
        elif self.exit_on_client_eof:
            if self.stdout != _CLOSED:
                self.send(DATA_STDOUT, b"")
            self.stdin = self.stdout = _CLOSED
        else:
            self.close_stdin()

    def close_stdout(self) -> None:
        super().close_stdout()
        if self.exit_on_service_eof:
            self.stdin = _CLOSED


class _Client(_End):
    is_agent = False
    status: int | None = None

    def run(self) -> int:
        with contextlib.suppress(Vanished):
            self.loop()
        self.close_stdin()
        self.close_stdout()
        status = self.ends.reap()
        return VANISHED if self.status is None else self.status & 0xFF or status

    def done(self) -> bool:
        return self.all_closed and self.status is not None

    def take(self, kind: int, data: bytes) -> None:
        if kind == DATA_EXIT_CODE:
            self.status = int.from_bytes(data[:4], "little") if len(data) >= 4 else VANISHED
            if self.stdout != _CLOSED:
                self.send(DATA_STDIN, b"")
            self.close_stdout()
        elif kind == DATA_STDERR:
            with contextlib.suppress(OSError):
                _write_all(2, printable(data) if self.ends.sanitize[1] else data)
        elif kind not in (DATA_STDIN, DATA_STDOUT):
            raise Vanished
        elif self.stdin != _CLOSED:
            if data:
                self.to_stdin = printable(data) if self.ends.sanitize[0] else data
            else:
                self.close_stdin()


def printable(data: bytes) -> bytes:
    """What `-t` and `-T` make of it: `_` for all but printable ASCII and the usual control characters."""
    return bytes(byte if 32 <= byte <= 126 or byte in b"\t\n\r\b\a" else ord("_") for byte in data)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _finish(channel: socket.socket, rest: bytes, code: int) -> None:
    """Send the rest and the exit code; then wait for the client to hang up, or it might not get them."""
    channel.setblocking(True)
    channel.sendall(rest + FRAME.pack(DATA_EXIT_CODE, 4) + struct.pack("<i", code))
    channel.shutdown(socket.SHUT_WR)
    while channel.recv(MAX_DATA):
        pass
