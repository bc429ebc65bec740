"""The host that keeps one volume of one qube, and passes it on through standard output, raw.

Strategy: the worker checks each chunk before it sends a byte of it, but whether the volume is complete is
known at its end only. So the exit status tells whether what has come out is whole. The qube's other volumes
are not read. That something of them is damaged or lost is a warning, where it shows at all.

Into a regular file that has nothing behind the place where it is written to, holes are left as holes.
Everything else (a pipe, a socket, a device, a file that is appended to) gets their zeros. Such a reader can
be slow: nothing is written before it can take it, so that a cancel need not wait for it.
"""

import fcntl
import os
import select
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from qubes_restore_svc.broker.filesystem import reporting, write_fully
from qubes_restore_svc.broker.interfaces import Definition, HostView, NewQube, RestoredQube, VolumeSink
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.wire.messages import QubeSettings
from qubes_restore_svc.wire.names import VolumeName
from qubes_restore_svc.wire.report import VolumeReport

_ZEROS = memoryview(bytes(1 << 20))
#: How long a write that waits for the reader takes to see that it was given up, milliseconds.
_WAIT_MS = 100


class VolumePipe:
    """A `Host` for a restore of one qube; what it creates is the output of `volume` to the file `output`."""

    def __init__(self, volume: VolumeName, output: int) -> None:
        self._volume = volume
        self._output = output

    @contextmanager
    def lock(self) -> Iterator[Sequence[str]]:
        """Nothing has to be locked: nobody else writes to this output."""
        yield ()

    def view(self) -> HostView:
        """No name is taken."""
        return HostView(frozenset())

    def free_space(self, pool: str | None = None) -> int | None:
        """Nobody knows what the reader can take."""
        return None

    def begin(self, qube: NewQube) -> "PipedQube":
        """The qube that the volume is of."""
        return PipedQube(self._volume, self._output)

    def set_default_dispvm(self, qube: str, default_dispvm: str) -> None:
        """A volume has no settings."""

    def restored_from(self, backup_id: str) -> Sequence[RestoredQube]:
        """Nothing is here."""
        return ()

    def take_back(self, qube: str, backup_id: str, *, from_before: bool) -> bool:
        """A volume has no network."""
        return False


class PipedQube:
    """A `QubeTransaction` that keeps one volume. It cannot roll back what it has passed on."""

    def __init__(self, volume: VolumeName, output: int) -> None:
        self._volume = volume
        self._sink = PipeSink(output, volume)

    def create_volume(self, volume: VolumeName, image_size: int) -> VolumeSink:
        """The output, or a sink that drops everything."""
        return self._sink if volume == self._volume else _Dropped()

    def change_template(self, template: str) -> None:
        """A volume has no template."""

    def commit(
        self,
        settings: QubeSettings,
        definition: Definition | None,
        volumes: Sequence[VolumeReport] = (),
    ) -> Sequence[str]:
        """Raises HostFailed if not all of the volume has been passed on."""
        if not self._sink.is_complete:
            raise HostFailed("the volume is not complete", volume=self._volume)
        return ()

    def rollback(self) -> None:
        """Stop what is under way."""
        self._sink.abandon()


class PipeSink:
    """A `VolumeSink` that writes to an open file, from where that stands."""

    def __init__(self, output: int, volume: VolumeName) -> None:
        self._output = output
        self._volume = volume
        self._start = _start_of_holes(output)
        self._position = 0  #: what has been passed on, in bytes
        self._given_up = False
        self.is_complete = False

    def write(self, offset: int, data: memoryview) -> None:
        """Raises HostFailed or NoSpace."""
        with self._reporting():
            self._zeros_up_to(offset)
            if self._start is None:
                self._pass_on(data)
            else:
                write_fully(self._output, data, self._start + offset)
            self._position = offset + len(data)

    def finish(self, size: int) -> None:
        """Raises HostFailed or NoSpace."""
        with self._reporting():
            self._zeros_up_to(size)
            if self._start is not None:
                os.ftruncate(self._output, self._start + size)
                os.lseek(self._output, self._start + size, os.SEEK_SET)  # for who writes after us
                os.fsync(self._output)
        self.is_complete = True

    def abandon(self) -> None:
        """Lets a write that waits for the reader end."""
        self._given_up = True

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            with reporting("writing to standard output", volume=self._volume):
                yield
        except HostFailed as error:
            if isinstance(error.__cause__, BrokenPipeError):
                raise HostFailed(
                    "the program that reads standard output has ended before it had all",
                    volume=self._volume,
                    advice="",
                ) from None
            raise

    def _zeros_up_to(self, end: int) -> None:
        while self._start is None and self._position < end:
            count = min(len(_ZEROS), end - self._position)
            self._pass_on(_ZEROS[:count])
            self._position += count

    def _pass_on(self, data: memoryview) -> None:
        ready = select.poll()
        ready.register(self._output, select.POLLOUT)
        while data:
            if self._given_up:
                raise HostFailed("it was given up", volume=self._volume)
            if ready.poll(_WAIT_MS):  # so much can be taken without waiting, then
                data = data[os.write(self._output, data[: select.PIPE_BUF]) :]


class _Dropped:
    def write(self, offset: int, data: memoryview) -> None:
        pass

    def finish(self, size: int) -> None:
        pass

    def abandon(self) -> None:
        pass


def _start_of_holes(output: int) -> int | None:
    """Where a regular file stands, if what is skipped from there on reads as zeros; None: it may not."""
    status = os.fstat(output)
    if not stat.S_ISREG(status.st_mode) or fcntl.fcntl(output, fcntl.F_GETFL) & os.O_APPEND:
        return None
    start = os.lseek(output, 0, os.SEEK_CUR)
    return start if status.st_size <= start else None
