"""From files to verified volumes: the second stage of the pipeline, in a thread of its own.

Strategy: take the wanted files in archive order. The verified plaintext of a file feeds the decompressor,
that the inner tar, and its extents go to the hash and to the broker: generators all the way, so nothing
runs ahead, and everything stops at the first error. Whatever goes wrong inside a file stays there: it is
reported for its volume, and the next file begins.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future

from qubes_restore_svc.archive import settings_files
from qubes_restore_svc.archive.inner_tar import (
    Image,
    read_directory,
    read_image,
    read_small_file,
    without_zeros,
)
from qubes_restore_svc.archive.members import Buffer, Damage, shown
from qubes_restore_svc.errors import (
    ArchiveDamaged,
    ArchiveTruncated,
    BadArchive,
    BadMetadata,
    ImageTooLarge,
    MissingVolume,
    ProtocolViolation,
    RestoreError,
    SkippedOnRequest,
)
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.names import DigestKind, VolumeName
from qubes_restore_svc.wire.volume import MAX_IMAGE_SIZE, MAX_RECORD
from qubes_restore_svc.worker.files import ArchiveEnd, Damaged, EventQueue, Passed, PlaintextFiles
from qubes_restore_svc.worker.meter import Meter, Seen
from qubes_restore_svc.worker.opening import OpenedBackup
from qubes_restore_svc.worker.output import ImageHash, VolumeStream
from qubes_restore_svc.worker.selection import DIRECTORY, SelectedQube, Selection, Stage, WantedFile
from qubes_restore_svc.worker.threads import Stop, as_restore_error

_STOPS_AT_DAMAGE = (
    "the service of the qube that keeps the backup stops reading where its file is damaged; the file itself"
    " may hold more of what is missing here: read it as a file, in dom0 or on another machine"
)

Emit = Callable[[m.Message], None]
#: Announces a volume; the future brings the connection of the broker that fetches it.
Announce = Callable[[m.VolumeReady], "Future[socket.socket]"]


class Pipeline:
    """Streams, or only verifies, the volumes of the selected qubes of one opened backup."""

    def __init__(
        self,
        backup: OpenedBackup,
        selection: Selection,
        events: EventQueue,
        stop: Stop,
        *,
        restoring: bool,
        digest: DigestKind,
        ignore_size_limit: bool,
        emit: Emit,
        announce: Announce,
        doubt: Callable[[RestoreError], RestoreError] = lambda error: error,
        derivations: Callable[[], int] = lambda: 0,
    ) -> None:
        self._backup = backup
        self._files = PlaintextFiles(events)
        self._selection = selection
        self._restoring = restoring
        self._digest: DigestKind = digest
        self._ignore_size_limit = ignore_size_limit
        self._emit = emit
        self._announce = announce
        self._doubt = doubt
        self._derivations = derivations
        self._image_bytes = 0
        self._meter = Meter()
        self._hold = {qube.info.key: qube.hold() for qube in selection if qube.stage is not Stage.CLOSED}
        self._expected = int(sum(sum(holds.values()) for holds in self._hold.values()))
        self._volume_on_its_way: tuple[str, str] | None = None
        self._data_bytes = 0  # of that volume
        self._stop = stop
        self._waker: Callable[[], object] = lambda: None
        stop.wakes(lambda: self._waker())
        self._damage: Damage | None = None  # the last one that may have cost a file

    def run(self) -> None:
        """Take all events. Blocks; emits every answer, with Finished as the last one. After a stop it emits
        nothing more."""
        current: SelectedQube | None = None
        while not isinstance(file := self._files.next_file(), ArchiveEnd):
            if isinstance(file, Damaged):
                self._damaged(file)
                continue
            if isinstance(file, Passed):
                self._selection.see(file.name, foreign=file.foreign)
                continue
            self._selection.see(file)
            place = self._selection.place(file)
            if self._stop.said or place is None or not self._selection.wanted(file):
                self._files.drain()  # the intake was ahead of the selection, or of the cancel
                continue
            if current is not None and current is not place.qube:
                self._close(current)
            current = place.qube
            self._file(place, file)
        if self._stop.said:
            return
        self._end(file)
        for qube in self._selection:
            self._close(qube, file.error)
        if (unclaimed := self._selection.unclaimed()) is not None:
            self._emit(unclaimed)
        self._emit(m.Finished(archive_bytes=file.position, derivations=self._derivations()))

    @property
    def idle(self) -> bool:
        """Does it wait for more of the archive, with nothing to unpack or to send? From any thread."""
        return self._files.idle

    def progress(self, read: int, archive_size: int = 0, *, deriving: bool = False) -> m.Progress:
        """How far it is when `read` bytes of the archive have been read; may be called from any thread.

        `archive_size` is 0 if it is not known. `deriving`: is a key being derived just now?
        """
        position = self._files.position(read)
        data = self._data()
        seen = Seen(
            now=time.monotonic(),
            archive_size=archive_size if self._selection.is_all else 0,
            position=position,
            unpacked=self._files.unpacked,
            ahead=self._files.ahead(),
            data=data,
            expected=self._expected,
            deriving=deriving,
            unpacking=not (self._files.idle or self._files.opening),
        )
        return m.Progress(archive_bytes=position, image_bytes=self._image_bytes, done=self._meter.done(seen))

    def _data(self) -> float:
        """How much has come of the expected data, in bytes. Of a qube that was given up, all data counts."""
        data = 0.0
        for qube in self._selection:
            left = tuple(qube.volumes_left) if qube.stage is Stage.WANTED else ()
            for volume, holds in self._hold.get(qube.info.key, {}).items():
                if volume not in left:
                    data += holds
                elif self._volume_on_its_way == (qube.info.key, volume):
                    data += min(holds, self._data_bytes)
        return data

    def _file(self, place: WantedFile, file: str) -> None:
        qube = place.qube
        pieces = self._files.pieces(
            lambda: self._check(qube),
            lambda text: self._warn(qube, f"{place.volume or place.name}: {text}"),
        )
        error: RestoreError | None = None
        try:
            if qube.stage is Stage.CLOSED:
                self._late_file(place, pieces)
            elif place.name in qube.come:
                raise self._files.drain() or BadArchive(f"its {place.name} stands in the archive twice")
            elif place.name == DIRECTORY:
                self._directory(qube, pieces)
            elif place.volume is None:
                blocks = self._backup.decode(pieces)
                content = read_small_file(blocks, file, settings_files.MAX_SETTINGS_FILE)
                self._settings_file(qube, place.name, content)
            else:
                self._volume(place, place.volume, file, pieces)
        except Exception as caught:  # noqa: BLE001 - nothing in one file may end the others
            error = as_restore_error(caught).at(chunk=self._files.chunk)
        finally:
            pieces.close()
        if error is not None:
            qube.spent_files.add(place.name)
        # What comes wrong after the end of a volume (a chunk that stands twice) still counts.
        error = error or self._files.drain()
        self._files.drain()
        if error is None and qube.stage is not Stage.CLOSED:
            qube.come.add(place.name)
        if error is not None and not self._stop.said:
            if self._files.damage is not None and not isinstance(error, ArchiveDamaged):
                error = ArchiveDamaged(f"{error.reason}; {self._files.damage}", chunk=error.chunk)
            error = as_restore_error(error).at(qube=qube.info.name, volume=place.volume or place.name)
            self._file_failed(place, error)

    def _file_failed(self, place: WantedFile, error: RestoreError) -> None:
        qube = place.qube
        if qube.stage is Stage.CLOSED:  # nobody can say that it was authentic
            self._selection.remark_late(place)
            return
        if place.volume in qube.volumes_left:
            self._report_failed(qube, place.volume, error)
        else:
            qube.error = qube.error or error
        if self._restoring:
            qube.give_up(error)

    def _volume(self, place: WantedFile, volume: VolumeName, file: str, pieces: Iterable[Buffer]) -> None:
        blocks = self._backup.decode(pieces)
        if volume == "home":
            self._pass_on(place.qube, volume, MAX_IMAGE_SIZE, _opaque(blocks, MAX_IMAGE_SIZE))
        else:
            image = read_image(blocks, file, self._max_size(place.qube.info, volume))
            self._pass_on_image(place.qube, volume, image)

    def _pass_on_image(self, qube: SelectedQube, volume: VolumeName, image: Image) -> None:
        extents = ((extent.offset, extent.data) for extent in without_zeros(image.extents))
        self._pass_on(qube, volume, image.size, extents)

    def _pass_on(
        self, qube: SelectedQube, volume: VolumeName, size: int, extents: Iterable[tuple[int, memoryview]]
    ) -> None:
        """Hash a volume and send it to the broker. Its `size` in bytes; for `home` that is a ceiling."""
        info = qube.info
        start = self._image_bytes

        def check() -> None:
            self._check(qube)
            self._image_bytes, self._data_bytes = start + digest.hashed, digest.data_bytes

        digest = ImageHash(self._digest, check)
        ready = m.VolumeReady(key=info.key, volume=volume, image_size=size)
        self._volume_on_its_way, self._data_bytes = (info.key, volume), 0
        if volume not in qube.volumes_left:  # nobody has promised it; from here on somebody has
            qube.volumes_left.append(volume)
        with self._fetched(qube, ready) as stream, digest:
            for offset, data in extents:
                digest.write(offset, data)
                if stream is not None:
                    stream.write(offset, data)
            size = digest.position if volume == "home" else size
            found = digest.finish(size)
            if stream is not None:
                stream.finish(digest.data_bytes)
        self._image_bytes = start + size
        qube.volumes_left.remove(volume)
        self._emit(
            m.VolumeDone(
                key=info.key,
                volume=volume,
                outcome="ok",
                image_size=size,
                data_bytes=digest.data_bytes,
                fsverity=found if self._digest == "fsverity" else None,
                sha256=found if self._digest == "sha256" else None,
            )
        )

    @contextlib.contextmanager
    def _fetched(self, qube: SelectedQube, ready: m.VolumeReady) -> Iterator[VolumeStream | None]:
        """Announce the volume and wait for the broker's call; None when only verifying."""
        if not self._restoring:
            self._emit(ready)
            yield None
            return
        offer = self._announce(ready)
        with self._woken_by(offer.cancel, qube):
            try:
                connection = offer.result()
            except CancelledError:
                self._check(qube)  # says why
                raise
        stream = VolumeStream(connection, ready.image_size)
        with contextlib.closing(stream), self._woken_by(stream.abort, qube):
            stream.begin()
            yield stream

    @contextlib.contextmanager
    def _woken_by(self, waker: Callable[[], object], qube: SelectedQube) -> Iterator[None]:
        """Inside, `waker` is called when the qube is not wanted any more, or everything is to end."""
        self._waker = waker
        qube.wakes(waker)
        if self._stop.said:
            waker()
        try:
            yield
        finally:
            qube.wakes(None)
            self._waker = lambda: None

    def _max_size(self, info: m.ManifestQube, volume: VolumeName) -> int:
        promised = next((entry.size for entry in info.volumes if entry.name == volume), None)
        if promised is None or self._ignore_size_limit:
            return MAX_IMAGE_SIZE
        return min(promised, MAX_IMAGE_SIZE)

    def _directory(self, qube: SelectedQube, pieces: Iterable[Buffer]) -> None:
        """All of a template's directory, in one archive: its images, and the settings files beside them."""
        directory = qube.backup.path
        for name, image in read_directory(self._backup.decode(pieces), directory):
            place = self._selection.place(f"{directory}/{name}")
            if place is None or place.name == DIRECTORY or place.name in qube.spent_files:
                continue
            if name in qube.come:
                raise BadArchive(f"its {name} stands in the archive twice")
            if place.volume is None:
                if image.size > settings_files.MAX_SETTINGS_FILE:
                    raise BadMetadata(f"{name} has {image.size} bytes")
                self._settings_file(qube, name, image.content())
            else:
                if image.size > self._max_size(qube.info, place.volume):
                    raise ImageTooLarge(f"its {name} has {image.size >> 20} MiB")
                self._pass_on_image(qube, place.volume, image)
            qube.come.add(name)

    def _settings_file(self, qube: SelectedQube, name: str, content: bytes) -> None:
        # What was authentic and is not understood costs the file, not the qube with all of its data.
        try:
            if name == "firewall.xml":
                qube.firewall = ()  # no rule lets anything through; None would be the default, all
                qube.firewall = settings_files.parse_firewall(content)
            elif name == "notes.txt":
                qube.notes = settings_files.parse_notes(content)
            else:
                qube.appmenus = settings_files.parse_appmenus(content)
        except BadMetadata as error:
            text = f"{name} was left out: {error.reason}"
            if name == "firewall.xml":
                text += "; the qube comes back with a firewall that lets nothing through"
            self._warn(qube, text)

    def _late_file(self, place: WantedFile, pieces: Iterator[Buffer]) -> None:
        """A file of a qube that is closed. If the file is authentic and matters, the qube was not
        complete."""
        qube = place.qube
        if not self._selection.is_missed(place):
            self._selection.remark_late(place)
            return
        next(pieces, None)  # its first chunk is authentic, or this raises
        qube.come.add(place.name)
        qube.remarks.add(place.name)  # its other chunks add nothing to what this error says
        qube.error = BadArchive(
            f"its {place.name} stands behind the files of other qubes in the archive, and was not restored",
            qube=qube.info.name,
        )
        self._emit(m.QubeIncomplete(key=qube.info.key, error=m.ErrorInfo.of(qube.error)))

    def _damaged(self, event: Damaged) -> None:
        """Say where the archive is damaged, and doubt whatever may have been lost there."""
        damage = event.damage
        cost = "; nothing is lost by it" if damage.harmless else "; what was there is lost"
        self._emit(m.Log(level="warning", text=f"{damage}{cost}"[:1000]))
        if not damage.harmless:
            self._damage = damage
            self._selection.doubt(damage, event.after)

    def _end(self, end: ArchiveEnd) -> None:
        """The archive is over: find out which qubes may have had more, if it ended too early."""
        if end.damage is not None:
            self._damage = end.damage
            self._selection.doubt(end.damage, end.last_file)
        elif end.error is not None:
            self._cut_off(end.error, end.last_file)
        elif self._damage is None and (unseen := self._selection.unseen()):
            more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
            behind = f"so it may have been cut off behind {shown(end.last_file)}"
            reason = f"it holds nothing of {unseen[0]}{more}, {behind}"
            self._cut_off(ArchiveTruncated(reason), end.last_file)
        if not self._selection.whole and any(
            qube.volumes_left or qube.incomplete for qube in self._selection
        ):
            self._emit(m.Log(level="warning", text=_STOPS_AT_DAMAGE))

    def _cut_off(self, error: RestoreError, last_file: str) -> None:
        """The archive broke off. Nobody knows what else there was of the qube that was being read then:
        perhaps a firewall, which nothing promises, and without which the qube would be too open. If nothing
        has come at all, that holds for every qube, also for one that has no volumes."""
        if not last_file:
            for selected in self._selection:
                selected.error = selected.error or _copy(error, qube=selected.info.name)
            return
        qube = self._selection.owner(last_file)
        if qube is not None and qube.stage is Stage.WANTED:
            qube.error = qube.error or _copy(error, qube=qube.info.name)

    def _close(self, qube: SelectedQube, archive_error: RestoreError | None = None) -> None:
        """Nothing more comes of this qube: report what is missing, and send its settings."""
        for remark in self._selection.take_remarks():
            self._emit(remark)
        if qube.stage is Stage.CLOSED:
            return
        qube.settle_doubts()
        for volume in list(qube.volumes_left):
            self._report_failed(qube, volume, self._why_missing(qube, volume, archive_error))
        settings = _sendable(qube)
        qube.close()
        self._emit(settings)

    def _report_failed(self, qube: SelectedQube, volume: VolumeName, error: RestoreError) -> None:
        qube.volumes_left.remove(volume)
        qube.incomplete = True
        self._emit(
            m.VolumeDone(
                key=qube.info.key,
                volume=volume,
                outcome="skipped" if isinstance(error, SkippedOnRequest) else "failed",
                error=m.ErrorInfo.of(error),
            )
        )

    def _warn(self, qube: SelectedQube, text: str) -> None:
        self._emit(m.Log(level="warning", text=text[:1000], key=qube.info.key))

    def _why_missing(
        self, qube: SelectedQube, volume: VolumeName, archive_error: RestoreError | None
    ) -> RestoreError:
        """Why a volume that must come has not come."""
        name = qube.info.name
        if qube.stage is Stage.GIVEN_UP:
            cause = qube.error
            if cause is not None and not qube.incomplete and not isinstance(cause, SkippedOnRequest):
                return as_restore_error(cause)  # that of a settings file: nothing else has told it
            return SkippedOnRequest(
                "left out, because the qube cannot be restored completely",
                qube=name,
                volume=volume,
                advice="",
            )
        if archive_error is not None:
            return _copy(archive_error, qube=name, volume=volume)
        reason = "the archive does not hold it, though qubes.xml promises it"
        if self._damage is not None:
            return ArchiveDamaged(f"{reason}; {self._damage}", qube=name, volume=volume)
        return self._doubt(MissingVolume(reason)).at(qube=name, volume=volume)

    def _check(self, qube: SelectedQube) -> None:
        self._stop.check()
        qube.check()


def _copy(error: RestoreError, *, qube: str, volume: str | None = None) -> RestoreError:
    """The same error, at another place."""
    return type(error)(error.reason, qube=qube, volume=volume, advice=error.advice)


def _sendable(qube: SelectedQube) -> m.QubeSettings:
    """The qube's settings, or an error if they are too many for one message."""
    settings = qube.settings()
    try:
        m.encode_message(settings)
    except ProtocolViolation:
        qube.error = BadMetadata("its settings files hold more than is accepted", qube=qube.info.name)
        return qube.settings()
    return settings


def _opaque(blocks: Iterable[bytes], max_size: int) -> Iterator[tuple[int, memoryview]]:
    """Data without a structure of its own, as extents one behind the other."""
    position = 0
    for block in blocks:
        if position + len(block) > max_size:
            raise ImageTooLarge(f"it has more than {max_size >> 40} TiB", advice="")
        for start in range(0, len(block), MAX_RECORD):
            piece = memoryview(block)[start : start + MAX_RECORD]
            yield position, piece
            position += len(piece)
