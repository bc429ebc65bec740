"""Which files of the archive are wanted, and what has become of the qubes that they belong to.

Strategy: one small object a qube with a named stage. The intake asks `wanted` for every chunk, from its own
thread; the pipeline and the session move the stages on, under a lock. A stage only ever moves forward, so a
late answer is a safe one.
"""

import enum
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from qubes_restore_svc.archive.qubes_xml import BackupQube
from qubes_restore_svc.errors import RestoreError, SkippedOnRequest
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.names import VolumeName

IMAGES: dict[str, VolumeName] = {"private.img": "private", "root.img": "root"}
SETTINGS = ("firewall.xml", "notes.txt", "whitelisted-appmenus.list")


class Stage(enum.Enum):
    """What has become of a qube."""

    WANTED = "wanted"
    GIVEN_UP = "given up"  # nothing more of it is read; what is missing is still to be reported
    CLOSED = "closed"  # its settings have been sent, nothing more may come


@dataclass(slots=True)
class SelectedQube:
    """A qube on its way through the pipeline. `volumes_left` are promised and not answered yet."""

    backup: BackupQube
    volumes_left: list[VolumeName]
    stage: Stage = Stage.WANTED
    error: RestoreError | None = None
    firewall: tuple[m.FirewallRule, ...] | None = None
    notes: str | None = None
    appmenus: tuple[str, ...] | None = None
    remarks: set[str] = field(default_factory=set)
    spent_files: set[str] = field(default_factory=set)
    _moving: threading.Lock = field(default_factory=threading.Lock)

    @property
    def info(self) -> m.ManifestQube:
        """What the manifest says of it."""
        return self.backup.info

    def give_up(self, error: RestoreError) -> None:
        """Read nothing more of it; the first reason counts."""
        with self._moving:
            if self.stage is Stage.WANTED:
                self.error = self.error or error
                self.stage = Stage.GIVEN_UP

    def close(self) -> None:
        """Nothing more may come. Its settings are dropped: they have been sent."""
        with self._moving:
            self.stage = Stage.CLOSED
            self.firewall = self.notes = self.appmenus = None

    def settings(self) -> m.QubeSettings:
        """Its settings as a message; none of them if something is wrong with the qube."""
        if self.error is not None:
            return m.QubeSettings(key=self.info.key, error=m.ErrorInfo.of(self.error))
        return m.QubeSettings(
            key=self.info.key, firewall=self.firewall, notes=self.notes, appmenus=self.appmenus
        )


@dataclass(frozen=True, slots=True)
class WantedFile:
    """A file of a selected qube: an image, dom0's home, or (`volume` None) one of its settings files."""

    qube: SelectedQube
    name: str
    volume: VolumeName | None


class Selection:
    """The selected qubes, by the paths of their files. `remark` gets lines for the person, once a file."""

    def __init__(self, qubes: Iterable[BackupQube], keys: Iterable[str]) -> None:
        wanted_keys = frozenset(keys)
        self._qubes = {
            qube.info.key: SelectedQube(qube, [volume.name for volume in qube.info.volumes])
            for qube in qubes
            if qube.info.key in wanted_keys
        }
        self._by_path = {qube.backup.path: qube for qube in self._qubes.values()}
        self._remarks: deque[m.Log] = deque()

    def __iter__(self) -> Iterator[SelectedQube]:
        return iter(self._qubes.values())

    def place(self, file: str) -> WantedFile | None:
        """The place of a file, or None if it is none of a selected qube's volumes and settings."""
        home = self._by_path.get(file)  # dom0's home is a file of its own, not a directory
        if home is not None:
            return WantedFile(home, "home", "home") if home.info.klass == "AdminVM" else None
        directory, _, name = file.rpartition("/")
        qube = self._by_path.get(directory)
        if qube is None or qube.info.klass == "AdminVM" or (name not in IMAGES and name not in SETTINGS):
            return None
        return WantedFile(qube, name, IMAGES.get(name))

    def wanted(self, file: str) -> bool:
        """Should the next chunk of this file be derived? May be called from another thread."""
        place = self.place(file)
        if place is None or place.qube.stage is Stage.GIVEN_UP:
            return False
        if place.qube.stage is Stage.CLOSED:
            self.remark_late(place)
            return False
        if place.name in place.qube.spent_files:
            return False
        if place.volume is not None and all(
            place.volume != volume.name for volume in place.qube.info.volumes
        ):
            self._remark(place, "is in the archive, but qubes.xml does not promise it; it was ignored")
            return False
        return True

    def skip(self, key: str) -> None:
        """The broker wants nothing more of this qube. May be called from another thread."""
        qube = self._qubes.get(key)
        if qube is not None:
            qube.give_up(SkippedOnRequest("it is not wanted any more"))

    def owner(self, file: str) -> SelectedQube | None:
        """The selected qube to which a file belongs, whatever kind of file it is."""
        return self._by_path.get(file) or self._by_path.get(file.rpartition("/")[0])

    def remark_late(self, place: WantedFile) -> None:
        """A file has come when its qube was closed already."""
        self._remark(place, "comes after other qubes' files and was ignored")

    def take_remarks(self) -> Iterator[m.Log]:
        """The remarks since the last call."""
        while self._remarks:
            yield self._remarks.popleft()

    def _remark(self, place: WantedFile, text: str) -> None:
        if place.name not in place.qube.remarks:
            place.qube.remarks.add(place.name)
            self._remarks.append(m.Log(level="warning", text=f"{place.name} {text}", key=place.qube.info.key))
