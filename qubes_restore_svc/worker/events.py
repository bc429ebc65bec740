"""What the intake tells the pipeline: files, their chunks, and where they end.

Strategy: small frozen values, and chunks, in a bounded queue, in archive order. They go one way. A wanted
file is one `FileStart`, its `Chunk`s and one `FileEnd`, any other one `Passed`; between files there may be
`Damaged`, and after the last there is one `ArchiveEnd`.
"""

import queue
from dataclasses import dataclass
from typing import TypeAlias

from qubes_restore_svc.archive.members import Damage
from qubes_restore_svc.errors import RestoreError
from qubes_restore_svc.worker.chunk import Chunk

#: Events that may wait. The budget bounds the chunks, and this the files that come without any.
_MAX_EVENTS = 64


@dataclass(frozen=True, slots=True)
class FileStart:
    """The chunks of the file `name` (`vm10/private.img`) follow."""

    name: str


@dataclass(frozen=True, slots=True)
class FileEnd:
    """The file is over; `error` if chunks of it are missing or unusable.

    `damage` was met in it or right behind it: its last chunks may have been there.
    """

    error: RestoreError | None = None
    damage: Damage | None = None


@dataclass(frozen=True, slots=True)
class Passed:
    """The file `name` is in the archive, and not wanted. `foreign`: it is a member that is no chunk."""

    name: str
    foreign: bool = False


@dataclass(frozen=True, slots=True)
class Damaged:
    """Something was passed over behind the file `after` (the last that was seen, wanted or not)."""

    damage: Damage
    after: str


@dataclass(frozen=True, slots=True)
class ArchiveEnd:
    """The archive is over; `error` if it could not be read to its end.

    `last_file` is the file, wanted or not, of the last member that was seen. `damage`: no more files were
    found behind this. `position` is how far it was read, bytes.
    """

    error: RestoreError | None = None
    last_file: str = ""
    damage: Damage | None = None
    position: int = 0


Event = FileStart | Chunk | FileEnd | Passed | Damaged | ArchiveEnd
EventQueue: TypeAlias = "queue.Queue[Event]"


def event_queue() -> EventQueue:
    """The way from an intake to its pipeline; an intake that is too far ahead waits."""
    return queue.Queue(_MAX_EVENTS)
