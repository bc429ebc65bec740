"""How much memory this process may still take, in bytes.

Strategy: the smallest of these counts: the memory that the kernel calls available, and the rest that the
limit of each control group leaves, from the group of this process up to the root. Page cache that can be
dropped counts as free, in a group as in the whole machine. The person is told which one it was, because only
there more memory can be granted. Standard library only: both sides of the boundary use it.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

#: Largest limit that is one: version 1 writes LONG_MAX, rounded to a page, for "no limit".
_NO_LIMIT = 1 << 60

#: limit files, usage file and the line of memory.stat with the droppable page cache, by cgroup version
_VERSION_1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = (("memory.max", "memory.high"), "memory.current", "inactive_file")


#: Bytes with which a worker gets on at all; less is not even tried.
LEAST_MEMORY = 144 << 20

#: What a person can do about a control group.
RAISE_LIMIT = (
    "Raise that limit (MemoryMax= of a systemd unit, the memory limit of a container), or run this outside of"
    " the group."
)

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """The `available` memory, bytes; 0 at a limit. `group` is the control group that leaves no more, and
    `limit` what it may take; "" and 0 where it is the machine that has no more."""

    available: int
    limit: int = 0
    group: str = ""

    def __str__(self) -> str:
        """What `parse` takes."""
        return f"{self.available} {self.limit} {self.group}"

    @classmethod
    def parse(cls, text: str) -> "MemoryRoom":
        """The room that `str` wrote; ValueError for anything else."""
        available, limit, group = text.split(" ", 2)
        return cls(int(available), int(limit), group)

    @property
    def told(self) -> str:
        """A clause that says what there is."""
        free = f"{self.available // _MIB} MiB are free"
        if not self.group:
            return f"of this computer's memory {free}"
        return f"the control group {self.group} may take {self.limit // _MIB} MiB, of which {free}"

    def advice(self, need: int) -> str:
        """What a person can do so that a worker gets `need` bytes."""
        mib = -(-need // _MIB)
        if need <= self.available:
            return f"Grant it at least that much: --memory {mib}."
        if not self.group:
            return (
                f"Only {self.available // _MIB} MiB are free here: end other programs, or use another"
                " computer."
            )
        return f"But {self.told}. {RAISE_LIMIT}"


def memory_room(root: Path = Path("/")) -> MemoryRoom:
    """Memory available to this process, 0 bytes at a limit, and what leaves no more.

    `root` is where /proc and /sys are.
    """
    room = MemoryRoom(_system_memory(root))
    for group, name, version in _control_groups(root):
        available, limit = _room(group, version)
        if available < room.available:
            room = MemoryRoom(max(0, available), limit, name)
    return room


def group_limit(process_id: int, root: Path = Path("/")) -> int | None:
    """The least that a control group of this process may take, bytes; None where none is limited."""
    limits = [_room(group, version)[1] for group, _, version in _control_groups(root, str(process_id))]
    return min((limit for limit in limits if limit < _NO_LIMIT), default=None)


def _system_memory(root: Path) -> int:
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    if match:
        return int(match[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _control_groups(root: Path, process: str = "self") -> Iterator[tuple[Path, str, int]]:
    """The directories, with their names and their cgroup version, of a process's memory groups up to the
    topmost seen."""
    memberships = _memberships(_read(root / "proc" / process / "cgroup"))
    for version, mounted_group, mount_point in _mounts(_read(root / "proc/self/mountinfo")):
        if version not in memberships:
            continue
        top = root / mount_point.lstrip("/")
        # In a container the path can lie outside of what is mounted; the mount's own group still counts.
        path = PurePosixPath(memberships[version])
        inside = path.relative_to(mounted_group).parts if path.is_relative_to(mounted_group) else ()
        if ".." in inside:
            inside = ()
        for depth in range(len(inside), -1, -1):
            name = PurePosixPath("/").joinpath(*inside[:depth])
            yield top.joinpath(*inside[:depth]), str(name), version


def _memberships(cgroup: str) -> dict[int, str]:
    """The path of the memory group for each cgroup version, from /proc/PID/cgroup (cgroups(7))."""
    found = {}
    for line in cgroup.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            found[1] = path
        elif number == "0" and not controllers:
            found[2] = path
    return found


def _mounts(mountinfo: str) -> Iterator[tuple[int, str, str]]:
    """Version, mounted group and mount point of every cgroup mount, from /proc/PID/mountinfo (proc(5))."""
    for line in mountinfo.splitlines():
        place, separator, kind = line.partition(" - ")
        fields, filesystem = place.split(" "), kind.split(" ")
        if not separator or len(fields) < 5 or len(filesystem) < 3:
            continue
        if filesystem[0] == "cgroup2":
            yield 2, _unescape(fields[3]), _unescape(fields[4])
        elif filesystem[0] == "cgroup" and "memory" in filesystem[2].split(","):
            yield 1, _unescape(fields[3]), _unescape(fields[4])


def _room(group: Path, version: int) -> tuple[int, int]:
    """What the limits of one group leave, and what they are, bytes; huge numbers where there is no limit."""
    limit_files, usage_file, cache_line = _VERSION_1 if version == 1 else _VERSION_2
    limits = [_number(_read(group / name)) for name in limit_files]
    usage = _number(_read(group / usage_file))
    limit = min((number for number in limits if number is not None), default=_NO_LIMIT)
    if limit >= _NO_LIMIT or usage is None:
        return _NO_LIMIT, _NO_LIMIT
    cache = re.search(rf"^{cache_line} (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
    return limit - max(0, usage - (int(cache[1]) if cache else 0)), limit


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d+\n?", text, re.ASCII) else None


def _unescape(field: str) -> str:
    """mountinfo writes blanks and backslashes as octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _read(path: Path) -> str:
    """The file's text, or "" when there is none: not every machine has every file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
