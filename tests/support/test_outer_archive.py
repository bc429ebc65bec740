"""The writer's outer archives and qfile streams have the bytes of recorded ones."""

import io
import re
import stat
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from .backup_writer import BackupWriter
from .fixtures import shared_fixture
from .outer_archive import RawMember, outer_member, qfile_stream
from .plans import sample_qube
from .reading_back import program, read, without_stamp

WORK = sample_qube("work", 1 << 19, 0.5)
TEMPLATE = sample_qube("custom", 1 << 17, 0.5, "TemplateVM", seed=2)


def test_gnu_tar_lists_the_members_in_order(tmp_path: Path) -> None:
    writer = BackupWriter([WORK, TEMPLATE], chunk_size=1 << 16)
    writer.write(tmp_path / "backup")
    listing = subprocess.run(
        [program("tar"), "-itf", str(tmp_path / "backup")], capture_output=True, text=True, check=True
    )
    assert listing.stdout.split() == [member.name for member in writer.members()]
    assert (tmp_path / "backup").stat().st_size % 10240 == 0


def test_every_member_has_the_bytes_of_a_recorded_one() -> None:
    path = shared_fixture("gzip.qbackup")
    with tarfile.open(path, ignore_zeros=True) as tar:
        members = [RawMember(info.name, read(tar, info)) for info in tar]
    recorded = path.read_bytes()
    position = 0
    for member in members:
        ours = outer_member(member)
        theirs = recorded[position : position + len(ours)]
        position += len(ours)
        # The extended headers differ in the times alone, and so in length.
        assert ours[:124] == theirs[:124]
        assert re.findall(rb"\w+=", ours[512:1024]) == re.findall(rb"\w+=", theirs[512:1024])
        assert without_stamp(ours[1024:]) == without_stamp(theirs[1024:])
    assert position == len(recorded)


def test_a_member_can_lie_about_its_size_and_type(tmp_path: Path) -> None:
    lie = outer_member(RawMember("vm10/x", b"abc", b"2", link_target="/etc/passwd", declared_size=1 << 62))
    header = tarfile.TarInfo.frombuf(lie[1024:1536], "utf-8", "strict")
    assert (header.size, header.type, header.linkname) == (1 << 62, b"2", "/etc/passwd")


def test_a_long_name_stands_in_the_pax_header() -> None:
    name = "appvms/" + "a" * 200 + "/private.img.000.enc"
    with tarfile.open(fileobj=io.BytesIO(outer_member(RawMember(name, b"x")))) as tar:
        assert tar.getnames() == [name]


# --- qfile -----------------------------------------------------------------------------------------


def test_a_qfile_stream_has_the_bytes_of_a_recorded_one() -> None:
    with tarfile.open(shared_fixture("gzip.qbackup"), ignore_zeros=True) as tar:
        members = [RawMember(info.name, read(tar, info)) for info in tar]
    for name, wanted in [
        ("gzip.manifest.qfile", members[:3]),
        ("gzip.vm11.qfile", [member for member in members if member.name.startswith("vm11/")]),
    ]:
        recorded = shared_fixture(name).read_bytes()
        assert list(qfile_entries(recorded)) == list(qfile_entries(qfile_stream(wanted)))


def test_every_folder_of_a_qfile_stream_comes_once_before_its_files() -> None:
    qube = replace(WORK, path="appvms/work/")
    entries = list(qfile_entries(qfile_stream(BackupWriter([qube, WORK], chunk_size=1 << 16).members())))
    folders = [name for name, mode, _ in entries if stat.S_ISDIR(mode)]
    assert folders == ["appvms", "appvms/work", "vm11"]
    assert [name for name, _, _ in entries].index("appvms/work") == 4


def qfile_entries(stream: bytes) -> Iterator[tuple[str, int, bytes]]:
    position = 0
    while True:
        name_length, mode, length = struct.unpack_from("<IIQ", stream, position)
        if not name_length:
            assert stream[position:] == bytes(32)
            return
        name = stream[position + 32 : position + 32 + name_length]
        assert name.endswith(b"\0")
        position += 32 + name_length
        yield name[:-1].decode(), mode, stream[position : position + length]
        position += length
