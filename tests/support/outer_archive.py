"""The outer archive, as GNU tar writes it, and the qfile stream that a storage VM makes of it.

Strategy: Qubes calls tar once for every member, so each member is a complete archive of its own and
the outer archive is those in a row. Nothing is checked: a member may lie about its size or type.
"""

import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .tar_blocks import BLOCK, MTIME, RECORD, padded, pax_records, tar_header


@dataclass(frozen=True, slots=True)
class RawMember:
    """One member of the outer archive.

    `link_target` is for type flags `1` and `2`. `declared_size` stands in the header instead of the
    true size. `pax` adds extended header records to those that tar writes, or replaces them.
    """

    name: str
    data: bytes
    type_flag: bytes = b"0"
    link_target: str = ""
    declared_size: int | None = None
    pax: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of data, as the header says."""
        return len(self.data) if self.declared_size is None else self.declared_size


def outer_member(member: RawMember) -> bytes:
    """One member as the POSIX tar archive of its own that GNU tar writes for it."""
    return b"".join(outer_pieces(member))


def join_members(members: Iterable[RawMember]) -> bytes:
    """The outer archive with these members."""
    return b"".join(piece for member in members for piece in outer_pieces(member))


def outer_pieces(member: RawMember) -> list[bytes]:
    """The bytes of `outer_member` in pieces, the data not copied."""
    stamp = f"{MTIME}.123456789"
    records = {"mtime": stamp, "atime": stamp, "ctime": stamp}
    if len(member.name.encode()) > 100 or not member.name.isascii():
        records["path"] = member.name
    extended = pax_records(records | dict(member.pax))
    folder, _, file = member.name.rpartition("/")
    pieces = [
        tar_header(f"{folder or '.'}/PaxHeaders/{file}", len(extended), b"x", flavour="posix", owner=False),
        padded(extended, BLOCK),
        tar_header(
            member.name, member.size, member.type_flag, flavour="posix", link_target=member.link_target
        ),
        member.data,
        bytes(-len(member.data) % BLOCK + 2 * BLOCK),
    ]
    written = sum(len(piece) for piece in pieces)
    return [*pieces, bytes(-written % RECORD)]


def qfile_stream(members: Iterable[RawMember]) -> bytes:
    """The same members as the qfile stream that the storage VM's service makes of the archive.

    Every folder comes once, before the first member in it, with the mode bits of that member.
    """
    pieces: list[bytes] = []
    sent: set[str] = set()
    for member in members:
        folders = member.name.split("/")[:-1]
        for depth in range(1, len(folders) + 1):
            folder = "/".join(folders[:depth])
            if folder not in sent:
                sent.add(folder)
                pieces.append(qfile_entry(folder, stat.S_IFDIR | 0o644, 0))
        if member.type_flag == b"2":
            target = member.link_target.encode()
            pieces += [qfile_entry(member.name, stat.S_IFLNK | 0o644, len(target)), target]
        else:
            kind = stat.S_IFDIR if member.type_flag == b"5" else stat.S_IFREG
            pieces += [qfile_entry(member.name, kind | 0o644, member.size), member.data]
    return b"".join([*pieces, bytes(32)])


def qfile_entry(name: str, mode: int, length: int) -> bytes:
    """One header of a qfile stream with the name after it."""
    encoded = name.encode() + b"\0"
    return struct.pack("<IIQIIII", len(encoded), mode, length, MTIME, 0, MTIME, 0) + encoded
