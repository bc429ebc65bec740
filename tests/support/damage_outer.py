"""Damages of the archive as a whole: other files, cut off ones, hostile members, older formats."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

from qubes_restore_svc import errors

from .backup_writer import BackupWriter
from .damage_tools import DamageGroup, cut_off, flip_bit, inserted, victim_chunks
from .outer_archive import RawMember, join_members
from .plans import sample_image

OUTER_DAMAGES = DamageGroup()


# --- The file as a whole -------------------------------------------------------------------------


@OUTER_DAMAGES.add(errors.EmptyInput, "backup")
def empty_file(writer: BackupWriter) -> bytes:
    return b""


@OUTER_DAMAGES.add(errors.NotABackup, "backup")
def some_other_file(writer: BackupWriter) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + sample_image(1 << 16, 1, 7).extents[0][1]


@OUTER_DAMAGES.add(errors.NotABackup, "backup", errors.EmptyInput)
def nothing_but_zeros(writer: BackupWriter) -> bytes:
    return bytes(20480)


@OUTER_DAMAGES.add(errors.NotABackup, "backup")
def some_other_tar(writer: BackupWriter) -> list[RawMember]:
    return [RawMember("holiday/photo.jpg", b"not a backup"), RawMember("holiday/photo2.jpg", b"either")]


@OUTER_DAMAGES.add(errors.WrongPassphrase, "backup", passphrase="correct horse battery stapler")
def wrong_passphrase(writer: BackupWriter) -> Iterator[RawMember]:
    return writer.members()


@OUTER_DAMAGES.add(errors.ArchiveTruncated, "backup", errors.NotABackup)
def cut_off_in_the_first_header(writer: BackupWriter) -> bytes:
    return cut_off(writer.to_bytes(), 300)


@OUTER_DAMAGES.add(errors.ArchiveTruncated, "backup")
def cut_off_in_the_metadata(writer: BackupWriter) -> bytes:
    members = list(writer.members())
    return cut_off(writer.to_bytes(), len(join_members(members[:2])) + 2048 + 100)


@OUTER_DAMAGES.add(errors.ArchiveTruncated, "qube", victims=[-1])
def cut_off_in_the_last_chunk(writer: BackupWriter) -> bytes:
    members = list(writer.members())
    return cut_off(writer.to_bytes(), len(join_members(members[:-1])) + 2048 + 1000)


@OUTER_DAMAGES.add(errors.MissingVolume, "qube", errors.ArchiveTruncated, victims=[-1, -2])
def cut_off_before_the_last_qube(writer: BackupWriter) -> list[RawMember]:
    members = list(writer.members())
    return members[: victim_chunks(writer, members, -1)[0]]


@OUTER_DAMAGES.add(errors.BadCompression, "qube", errors.BadImage, errors.ArchiveTruncated, victims=[-1])
def cut_off_between_chunks(writer: BackupWriter) -> list[RawMember]:
    return list(writer.members())[:-1]


@OUTER_DAMAGES.add(errors.ArchiveDamaged, "qube")
def bit_flipped_in_a_tar_header(writer: BackupWriter) -> bytes:
    members = list(writer.members())
    place = len(join_members(members[: victim_chunks(writer, members)[0]]))
    return flip_bit(writer.to_bytes(), (place + 1024 + 3) * 8)


# --- Members that no backup holds --------------------------------------------------------------------

_EVIL_MEMBERS: Mapping[str, RawMember] = {
    "member-with-dotdot": RawMember("vm10/../../etc/passwd.000.enc", b"x"),
    "member-with-an-absolute-name": RawMember("/etc/passwd.000.enc", b"x"),
    "member-without-a-name": RawMember("", b"x"),
    "member-with-control-characters": RawMember("vm10/\x1b]0;owned\x07.000.enc", b"x"),
    "member-with-a-very-long-name": RawMember("vm10/" + "a" * 5000 + ".000.enc", b"x"),
    "member-that-is-no-chunk": RawMember("vm10/private.img", b"x"),
    "symbolic-link": RawMember("vm10/private.img.000.enc", b"", b"2", link_target="/etc/shadow"),
    "hard-link": RawMember("vm10/private.img.000.enc", b"", b"1", link_target="/etc/shadow"),
    "character-device": RawMember("vm10/private.img.000.enc", b"", b"3"),
    "block-device": RawMember("vm10/private.img.000.enc", b"", b"4"),
    "directory": RawMember("vm10/", b"", b"5"),
    "pipe": RawMember("vm10/private.img.000.enc", b"", b"6"),
    "sparse-member": RawMember("vm10/private.img.000.enc", b"x", b"S"),
    "global-pax-header": RawMember("pax_global_header", b"19 path=/etc/shadow\n", b"g"),
    "gnu-long-name": RawMember("././@LongLink", b"/etc/shadow\0", b"L"),
    "member-of-4-exbibytes": RawMember("vm10/private.img.000.enc", b"x", declared_size=1 << 62),
    "member-of-negative-size": RawMember("vm10/private.img.000.enc", b"x", declared_size=-512),
    "member-with-a-negative-pax-size": RawMember("vm10/private.img.000.enc", b"x", pax={"size": "-1"}),
}
for _name, _member in _EVIL_MEMBERS.items():
    OUTER_DAMAGES.add(errors.ArchiveDamaged, "nothing", name=_name)(partial(inserted, member=_member))


# --- Older formats -----------------------------------------------------------------------------------------


@OUTER_DAMAGES.add(errors.UnsupportedFormat, "backup")
def format_1(writer: BackupWriter) -> list[RawMember]:
    return [
        RawMember("qubes.xml", b"<QubesVmCollection/>"),
        RawMember("appvms/work/private.img", bytes(4096)),
    ]


@OUTER_DAMAGES.add(errors.UnsupportedFormat, "backup")
def format_2(writer: BackupWriter) -> list[RawMember]:
    return list(_with_old_macs("qubes.xml.000", "appvms/work/private.img.000", algorithm="SHA1"))


@OUTER_DAMAGES.add(errors.WrongPassphrase, "backup")
def format_3_with_a_wrong_mac(writer: BackupWriter) -> list[RawMember]:
    header = (
        b"version=3\nhmac-algorithm=SHA512\ncrypto-algorithm=aes-256-cbc\nencrypted=True\ncompressed=True\n"
        b"compression-filter=gzip\nbackup-id=20160101T010203-1234\n"
    )
    members = _with_old_macs("backup-header", "qubes.xml.000", "vm10/private.img.000", algorithm="SHA512")
    return [replace(member, data=header) if member.name == "backup-header" else member for member in members]


def _with_old_macs(*names: str, algorithm: str) -> Iterator[RawMember]:
    """Members as formats 2 and 3 have them: each chunk is followed by a line of `openssl dgst -hmac`."""
    for name in names:
        yield RawMember(name, b"Salted__" + bytes(4088))
        yield RawMember(f"{name}.hmac", f"{algorithm}(stdin)= {'0' * 40}\n".encode())
