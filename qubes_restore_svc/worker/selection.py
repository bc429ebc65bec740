"""Which files of the archive are wanted, and the state of the qubes that they belong to.

Strategy: one small object a qube with a named stage. `Wanted` is asked for every chunk when it comes, and
again before its key is derived; the pipeline and the session move the stages on, under a lock. A stage only
ever moves forward, so a late answer is a safe one.
"""

import enum
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from qubes_restore_svc.archive.members import Damage, shown
from qubes_restore_svc.archive.qubes_xml import BackupContent, BackupQube
from qubes_restore_svc.errors import ArchiveDamaged, RestoreError, SkippedOnRequest
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.names import KEPT_VOLUMES, VolumeName

IMAGES: dict[str, VolumeName] = {"private.img": "private", "root.img": "root"}
#: What format 3 calls the archive of a whole directory, in it.
DIRECTORY = "."
SETTINGS = ("firewall.xml", "notes.txt", "whitelisted-appmenus.list")

#: What lies beside them in the directory of a qube, in backups of all ages, and is no part of a restore.
_IGNORED = frozenset(
    {
        *("empty", "icon.png", "apps", "apps.icons", "apps.tempicons", "apps.templates", "kernels"),
        *("vm-whitelisted-appmenus.list", "netvm-whitelisted-appmenus.list"),
        *("volatile.img", "clean-volatile.img.tar", "root-cow.img", "modules.img", "."),
    }
)

#: At most so many files that belong to nobody are named.
_MAX_NAMED = 8

#: At most so many places of damage get a closer look at their headers.
_MAX_DAMAGES = 100
_NOT_WANTED = "it is not wanted any more"

_KNOWN_FILES = (*IMAGES, *SETTINGS, "empty", DIRECTORY)


class Wanted:
    """Is a file wanted, still? All who need to know ask this one object, from any thread.

    Before it is known which qubes are, everything is that a restore could want.
    """

    def __init__(self) -> None:
        self._selection: Selection | None = None

    def narrow(self, selection: "Selection") -> None:
        """From now on only what `selection` wants is."""
        self._selection = selection

    def __call__(self, file: str) -> bool:
        return might_be_wanted(file) if self._selection is None else self._selection.wanted(file)

    def check(self, file: str) -> None:
        """Raise SkippedOnRequest if it is not."""
        if not self(file):
            raise SkippedOnRequest(_NOT_WANTED)


def might_be_wanted(file: str) -> bool:
    """Could a restore want this file, whatever qubes.xml says? Only images, settings, directories of
    templates (format 3) and dom0's home."""
    directory, _, name = file.rpartition("/")
    return name in IMAGES or name in SETTINGS or name == DIRECTORY or directory == "dom0-home"


class Stage(enum.Enum):
    """The state of a qube."""

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
    incomplete: bool = False  #: a volume was reported as failed
    firewall: tuple[m.FirewallRule, ...] | None = None
    notes: str | None = None
    appmenus: tuple[str, ...] | None = None
    remarks: set[str] = field(default_factory=set)
    spent_files: set[str] = field(default_factory=set)
    come: set[str] = field(default_factory=set)  #: files that were read to their end
    #: Files that may have been lost, and why; "": one that nobody can name.
    doubts: dict[str, RestoreError] = field(default_factory=dict)
    _moving: threading.Lock = field(default_factory=threading.Lock)
    _waker: Callable[[], object] | None = None

    @classmethod
    def here(cls, backup: BackupQube, here: m.QubeHere) -> "SelectedQube":
        """One that is here already: what came of it is not read again, and what it lacks counts as late."""
        lacking = {file for file, volume in IMAGES.items() if volume not in here.volumes}
        lacking |= set() if here.firewall else {"firewall.xml"}
        spent_files = {"home", DIRECTORY, *IMAGES, *SETTINGS} - lacking
        return cls(backup, [], Stage.CLOSED, spent_files=spent_files)

    @classmethod
    def wanted(cls, backup: BackupQube, only: VolumeName | None) -> "SelectedQube":
        """One that is to come, or nothing of it but this volume."""
        promised = [volume.name for volume in backup.info.volumes]
        if only is None:
            return cls(backup, promised)
        others = {file for file, volume in IMAGES.items() if volume != only}
        return cls(backup, [name for name in promised if name == only], spent_files={*others, *SETTINGS})

    @property
    def info(self) -> m.ManifestQube:
        """What the manifest says of it."""
        return self.backup.info

    def keeps(self, volume: VolumeName) -> bool:
        """Does the qube have such a volume, promised or not?"""
        return volume in KEPT_VOLUMES[self.info.klass] or any(
            volume == promised.name for promised in self.info.volumes
        )

    def hold(self) -> dict[VolumeName, float]:
        """How much data its volumes hold, in bytes, as far as the backup says."""
        sizes = {volume.name: volume.size or 0 for volume in self.info.volumes}
        size = sum(sizes.values())
        data = self.info.backup_size or size
        return {name: data * (own / size if size else 1 / len(sizes)) for name, own in sizes.items()}

    def misses(self, file: str) -> bool:
        """Is it not complete, or too open, without this file, should the file exist?"""
        volume = IMAGES.get(file)
        return file not in self.come and (
            file == "firewall.xml" or (volume is not None and self.keeps(volume))
        )

    def give_up(self, error: RestoreError) -> None:
        """Read nothing more of it; the first reason counts."""
        with self._moving:
            waker = self._waker
            if self.stage is Stage.WANTED:
                self.error = self.error or error
                self.stage = Stage.GIVEN_UP
        if waker is not None:
            waker()

    def wakes(self, waker: Callable[[], object] | None) -> None:
        """Call `waker` when the qube is given up, for who waits for something of it; at once if it was."""
        with self._moving:
            self._waker = waker
            given_up = self.stage is Stage.GIVEN_UP
        if given_up and waker is not None:
            waker()

    def check(self) -> None:
        """Raise SkippedOnRequest if it was given up."""
        if self.stage is Stage.GIVEN_UP:
            raise SkippedOnRequest(_NOT_WANTED)

    def close(self) -> None:
        """Nothing more may come. Its settings are dropped: they have been sent."""
        with self._moving:
            self.stage = Stage.CLOSED
            self.firewall = self.notes = self.appmenus = None

    def settle_doubts(self) -> None:
        """Nothing more comes: a file that may have been lost, and has not come, is missing."""
        for file, error in self.doubts.items():
            if file not in self.come:
                self.error = self.error or error

    def settings(self) -> m.QubeSettings:
        """Its settings as a message; without any setting if something is wrong with the qube."""
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
    """The selected qubes of `content`, by the paths of their files; what is said to the person waits here.

    `whole`: all files of the archive are seen, and not just those of the selected qubes. Those that are
    `here` are closed from the beginning. `only`: nothing but this volume of the others is wanted.
    """

    def __init__(
        self,
        content: BackupContent,
        keys: Iterable[str],
        here: Iterable[m.QubeHere] = (),
        *,
        only: VolumeName | None = None,
        whole: bool = True,
    ) -> None:
        self.whole = whole
        wanted_keys = frozenset(keys)
        qubes = content.qubes
        self._qubes = {
            qube.info.key: SelectedQube.wanted(qube, only) for qube in qubes if qube.info.key in wanted_keys
        }
        self.is_all = whole and len(self._qubes) == len(qubes)  #: is there nothing else in the archive?
        are_here = {one.key: one for one in here}
        self._qubes |= {
            qube.info.key: SelectedQube.here(qube, are_here[qube.info.key])
            for qube in qubes
            if qube.info.key in are_here
        }
        self._by_path = {qube.backup.path: qube for qube in self._qubes.values()}
        self._names = {qube.path: qube.info.name for qube in qubes if whole or qube.info.key in wanted_keys}
        self._refused_paths = frozenset(content.refused_paths)
        self._seen: set[str] = set()  # paths of qubes
        self._unclaimed: list[str] = []
        self._more_unclaimed = 0
        self._damages = 0
        self._remarks: deque[m.Log] = deque()

    def __iter__(self) -> Iterator[SelectedQube]:
        return iter(self._qubes.values())

    def place(self, file: str) -> WantedFile | None:
        """The place of a file, or None if the file is not a volume or a settings file of a selected qube."""
        home = self._by_path.get(file)  # dom0's home is a file of its own, not a directory
        if home is not None:
            return WantedFile(home, "home", "home") if home.info.klass == "AdminVM" else None
        directory, _, name = file.rpartition("/")
        qube = self._by_path.get(directory)
        if qube is None or qube.info.klass == "AdminVM":
            return None
        if name == DIRECTORY:
            return WantedFile(qube, name, None)
        volume = IMAGES.get(name)
        if qube.keeps(volume) if volume is not None else name in SETTINGS:
            return WantedFile(qube, name, volume)
        return None

    def wanted(self, file: str) -> bool:
        """Should the next chunk of this file be derived? May be called from another thread."""
        place = self.place(file)
        if place is None or place.qube.stage is Stage.GIVEN_UP:
            return False
        if place.name in place.qube.spent_files:
            return False
        if place.qube.stage is Stage.CLOSED and not self.is_missed(place):
            self.remark_late(place)
            return False
        return True

    def is_missed(self, place: WantedFile) -> bool:
        """The qube was closed without this file: does the qube lack something, or is it too open?"""
        return place.qube.error is None and not place.qube.incomplete and place.qube.misses(place.name)

    def see(self, file: str, *, foreign: bool = False) -> None:
        """The archive holds this file, wanted or not. A file that no qube can own is kept, to be named later.

        `foreign`: a backup has no such file, whatever its name."""
        if not foreign and (claimant := self._claimant(file)):
            self._seen.add(claimant)
            if not self._is_foreign(file, claimant):
                return
        elif not foreign and not self._refused_paths.isdisjoint(_around(file)):
            return
        if len(self._unclaimed) < _MAX_NAMED:
            self._unclaimed.append(shown(file))
        else:
            self._more_unclaimed += 1

    def unclaimed(self) -> m.Log | None:
        """What the archive holds beside all that belongs to a qube."""
        if not self._unclaimed:
            return None
        more = f" and {self._more_unclaimed} more" if self._more_unclaimed else ""
        text = f"the archive also holds {', '.join(self._unclaimed)}{more}, which no qube in its list claims"
        return m.Log(level="warning", text=text[:1000])

    def unseen(self) -> list[str]:
        """Names of the listed qubes, selected or not, that have no file at all in the archive."""
        return [name for path, name in self._names.items() if path not in self._seen]

    def doubt(self, damage: Damage, after: str) -> None:
        """A file may be lost: the one that the damaged header names, but for a bit; if it names none, nobody
        knows which, and the qube that the file `after` belongs to may have had more."""
        error = ArchiveDamaged(f"{damage}; what was there may have been a part of it")
        self._damages += 1
        named = list(self._named(damage.untrusted_name)) if self._damages <= _MAX_DAMAGES else []
        if not named and (owner := self.owner(after)) is not None:
            owner.doubts[""] = error
        for path, file in named:
            qube = self._by_path.get(path)
            if qube is not None and (
                file in (*SETTINGS, DIRECTORY) or ((volume := IMAGES.get(file)) and qube.keeps(volume))
            ):
                qube.doubts[file] = error

    def _named(self, untrusted_name: bytes) -> Iterator[tuple[str, str]]:
        """The files of listed qubes, selected or not, whose chunk has this name, but for one bit."""
        text = untrusted_name.decode("latin-1")
        for path in self._names:
            for file in _KNOWN_FILES:
                expected = f"{path}/{file}." + ("0" if file == DIRECTORY else "")
                if _same_but_a_bit(expected, text[: len(expected)]):
                    yield path, file

    def _claimant(self, file: str) -> str:
        """The path of the listed qube to which a file belongs by its place; "" if there is none."""
        return next((path for path in _around(file) if path in self._names), "")

    def _is_foreign(self, file: str, claimant: str) -> bool:
        """Is this a file in the directory of a selected qube that is neither a part of the qube nor known to
        be useless?"""
        qube = self._by_path.get(claimant)
        if qube is None or file == claimant:
            return False
        return self.place(file) is None and file[len(claimant) + 1 :].split("/")[0] not in _IGNORED

    def skip(self, key: str) -> None:
        """The broker wants nothing more of this qube. May be called from another thread."""
        qube = self._qubes.get(key)
        if qube is not None:
            qube.give_up(SkippedOnRequest(_NOT_WANTED))

    def owner(self, file: str) -> SelectedQube | None:
        """The selected qube to which a file belongs, whatever kind of file it is."""
        return next((self._by_path[path] for path in _around(file) if path in self._by_path), None)

    def remark_late(self, place: WantedFile) -> None:
        """A file has come when its qube was closed already."""
        if place.name not in place.qube.remarks:
            place.qube.remarks.add(place.name)
            text = f"{place.name} stands behind the files of other qubes and was ignored"
            self._remarks.append(m.Log(level="warning", text=text, key=place.qube.info.key))

    def take_remarks(self) -> Iterator[m.Log]:
        """The remarks since the last call."""
        while self._remarks:
            yield self._remarks.popleft()


def _around(file: str) -> Iterator[str]:
    """The file and the directories that it lies in, from the inside out."""
    while file:
        yield file
        file = file.rpartition("/")[0]


def _same_but_a_bit(text: str, other: str) -> bool:
    """Are the two the same, or different in one bit only?"""
    if len(text) != len(other):
        return False
    return sum((ord(one) ^ ord(two)).bit_count() for one, two in zip(text, other, strict=True)) <= 1
