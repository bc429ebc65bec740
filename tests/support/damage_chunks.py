"""Damages of chunks: bits flipped, containers malformed or forged, chunks lost, repeated and moved."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from qubes_restore_svc import errors

from .backup_writer import BackupWriter
from .damage_tools import (
    Breaker,
    DamageGroup,
    edited,
    flip_bit,
    victim_file,
    victim_members,
    with_cost,
    without,
)
from .outer_archive import RawMember

CHUNK_DAMAGES = DamageGroup()


def _edit_chunk(edit: Callable[[bytes], bytes]) -> Breaker:
    def breaker(writer: BackupWriter) -> list[RawMember]:
        return edited(writer.members(), f"{victim_file(writer)}.001.enc", edit)

    return breaker


_FORGED, _MALFORMED, _COSTLY = errors.AuthenticationFailed, errors.BadContainer, errors.ExcessiveCost
_CHUNK_EDITS: Mapping[str, tuple[type[errors.RestoreError], Callable[[bytes], bytes]]] = {
    "bit-flipped-in-a-chunk": (_FORGED, lambda data: flip_bit(data, 8 * 5000 + 3)),
    "bit-flipped-in-a-mac": (_FORGED, lambda data: flip_bit(data, -1)),
    "bit-flipped-in-a-key-check": (_FORGED, lambda data: flip_bit(data, 8 * 70)),
    "bit-flipped-in-a-salt": (_MALFORMED, lambda data: flip_bit(data, 8 * 20)),
    "chunk-lost-a-byte": (_FORGED, lambda data: data[:-1]),
    "chunk-grew-a-byte": (_FORGED, lambda data: data + b"\0"),
    "chunk-is-no-container": (_MALFORMED, lambda data: b"SCRYPT" + data[6:]),
    "chunk-is-shorter-than-a-container": (_MALFORMED, lambda data: data[:100]),
    "chunk-is-empty": (_MALFORMED, lambda data: b""),
    "chunk-asks-for-n-of-2-to-the-40": (_COSTLY, lambda data: with_cost(data, 40)),
    "chunk-asks-for-much-time": (_COSTLY, lambda data: with_cost(data, 10, 8, 1 << 26)),
    "chunk-asks-for-much-memory-by-r": (_COSTLY, lambda data: with_cost(data, 10, 1 << 28)),
    "chunk-asks-for-p-of-2-to-the-24": (_COSTLY, lambda data: with_cost(data, 1, 1, 1 << 24)),
    "chunk-asks-for-r-of-2-to-the-20": (_COSTLY, lambda data: with_cost(data, 1, 1 << 20)),
    "chunk-with-r-of-zero": (_MALFORMED, lambda data: with_cost(data, 10, 0)),
    "chunk-with-n-of-1": (_MALFORMED, lambda data: with_cost(data, 0)),
}
for _name, (_error, _edit) in _CHUNK_EDITS.items():
    CHUNK_DAMAGES.add(_error, "qube", name=_name)(_edit_chunk(_edit))


@CHUNK_DAMAGES.add(errors.AuthenticationFailed, "qube")
def chunk_of_another_backup(writer: BackupWriter) -> list[RawMember]:
    name = f"{victim_file(writer)}.001.enc"
    older = replace(writer, backup_id="20251231T235959-99")
    data = next(member.data for member in older.members() if member.name == name)
    return edited(writer.members(), name, lambda _: data)


@CHUNK_DAMAGES.add(errors.AuthenticationFailed, "qube")
def swapped_chunks(writer: BackupWriter) -> list[RawMember]:
    members, places = victim_members(writer)
    one, other = (members[place] for place in places[1:3])
    members[places[1]], members[places[2]] = replace(one, data=other.data), replace(other, data=one.data)
    return members


@CHUNK_DAMAGES.add(errors.ChunkOutOfOrder, "qube")
def reordered_chunks(writer: BackupWriter) -> list[RawMember]:
    members, places = victim_members(writer)
    members[places[1]], members[places[2]] = members[places[2]], members[places[1]]
    return members


@CHUNK_DAMAGES.add(errors.ChunkOutOfOrder, "qube", errors.BadCompression, errors.BadImage)
def chunk_after_other_files(writer: BackupWriter) -> list[RawMember]:
    members, places = victim_members(writer)
    return [*without(members, places[-1:]), members[places[-1]]]


@CHUNK_DAMAGES.add(errors.ChunkOutOfOrder, "qube")
def repeated_chunk(writer: BackupWriter) -> list[RawMember]:
    members, places = victim_members(writer)
    return [*members[: places[1]], members[places[1]], *members[places[1] :]]


@CHUNK_DAMAGES.add(errors.ChunkOutOfOrder, "qube")
def file_stands_twice(writer: BackupWriter) -> list[RawMember]:
    # One other file of the same qube stands between, and the qube is not complete yet.
    members, places = victim_members(writer)
    after = places[-1] + 2
    return members[:after] + [members[place] for place in places] + members[after:]


@CHUNK_DAMAGES.add(errors.ChunkOutOfOrder, "qube")
def chunk_with_a_later_number(writer: BackupWriter) -> list[RawMember]:
    members, places = victim_members(writer)
    name = members[places[1]].name.replace(".001.enc", ".007.enc")
    members[places[1]] = replace(members[places[1]], name=name)
    return members


@CHUNK_DAMAGES.add(errors.ChunkOutOfOrder, "qube")
def missing_first_chunk(writer: BackupWriter) -> list[RawMember]:
    members, places = victim_members(writer)
    return without(members, places[:1])


@CHUNK_DAMAGES.add(errors.ChunkOutOfOrder, "qube")
def missing_chunk(writer: BackupWriter) -> list[RawMember]:
    members, places = victim_members(writer)
    return without(members, places[2:3])


@CHUNK_DAMAGES.add(errors.BadCompression, "qube", errors.BadImage)
def missing_last_chunk(writer: BackupWriter) -> list[RawMember]:
    members, places = victim_members(writer)
    return without(members, places[-1:])


@CHUNK_DAMAGES.add(errors.MissingVolume, "qube")
def missing_volume(writer: BackupWriter) -> list[RawMember]:
    members, places = victim_members(writer)
    return without(members, places)


@CHUNK_DAMAGES.add(errors.MissingVolume, "qube")
def renamed_volume(writer: BackupWriter) -> list[RawMember]:
    members, places = victim_members(writer)
    for place in places:
        members[place] = replace(members[place], name=members[place].name.replace(".img.", ".old."))
    return members
