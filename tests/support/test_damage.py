"""Every damage is what its name says: one lie, and everything around it right.

Strategy: what a reader must say about a damage is tested with the reader. Here the broken archives
themselves are looked at: what they leave alone, that enemies' lies are authentic, that bombs are bombs.
"""

import bz2
import gzip
import io
import itertools
import lzma
import subprocess
import tarfile

import pytest

from qubes_restore_svc.errors import ERROR_KINDS

from .backup_writer import BackupWriter
from .damage import DAMAGES, sample_backup
from .damage_tools import (
    GIB,
    Damage,
    cut_off,
    edited,
    flip_bit,
    inserted,
    victim_chunks,
    victim_file,
    with_cost,
    zero_bomb,
)
from .outer_archive import RawMember, join_members
from .reading_back import content_of, opened, program

WRITER = sample_backup()
GOOD = list(WRITER.members())
VICTIM = victim_chunks(WRITER, GOOD)


def members_of(damage: Damage, writer: BackupWriter = WRITER) -> list[RawMember]:
    result = damage.breaker(writer)
    assert not isinstance(result, bytes)
    return list(result)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damage_breaks_the_backup_and_a_qube_alone_where_it_says_so(damage: Damage) -> None:
    assert damage.kinds <= ERROR_KINDS.keys()
    assert damage.kind in damage.kinds
    result = damage.breaker(WRITER)
    if isinstance(result, bytes):
        assert result != join_members(GOOD)
        victims_start = join_members(GOOD[: victim_chunks(WRITER, GOOD, damage.victim)[0]])
        assert damage.scope != "qube" or result.startswith(victims_start)
        return
    members = list(result)
    assert (members == GOOD) == (damage.passphrase is not None)
    if damage.scope == "qube":
        folder = f"vm{10 + range(len(WRITER.qubes))[damage.victim]}/"
        mine = (folder, "qubes.xml") if damage.name.startswith(("qube-name", "backup-path")) else folder
        others = [member for member in members if not member.name.startswith(mine)]
        assert others == [member for member in GOOD if not member.name.startswith(mine)]


@pytest.mark.parametrize(("compression", "sparse"), [("none", "pax"), ("zstd", "none")])
def test_every_damage_works_on_any_kind_of_backup(compression: str, sparse: str) -> None:
    writer = sample_backup(compression, sparse, log_n=2)
    good = list(writer.members())
    for damage in DAMAGES.values():
        result = damage.breaker(writer)
        if isinstance(result, bytes):
            assert result != join_members(good), damage.name
        else:  # the beginning of a bomb is enough
            members = list(itertools.islice(result, len(good) * 2))
            assert (members == good) == (damage.passphrase is not None), damage.name


def test_the_sample_backup_has_what_the_damages_need() -> None:
    assert len(VICTIM) >= 4
    assert GOOD[VICTIM[-1] + 1].name.startswith("vm10/")
    assert victim_file(WRITER) == "vm10/private.img"
    assert victim_file(WRITER, -1) == "vm13/root.img"
    assert len([name for name in DAMAGES if "chunk" in name]) > 20


# --- Single damages ----------------------------------------------------------------------------------


def order_of(name: str) -> list[int]:
    """The victim's chunk numbers as they stand in the broken archive."""
    names = [member.name for member in members_of(DAMAGES[name])]
    return [int(name.split(".")[2]) for name in names if name.startswith("vm10/private.img.")]


def test_chunks_are_lost_repeated_and_moved() -> None:
    count = len(VICTIM)
    rest = list(range(4, count))
    assert order_of("missing-first-chunk") == [1, 2, 3, *rest]
    assert order_of("missing-chunk") == [0, 1, 3, *rest]
    assert order_of("missing-last-chunk") == [0, 1, 2, 3, *rest][:-1]
    assert order_of("missing-volume") == order_of("renamed-volume") == []
    assert order_of("repeated-chunk") == [0, 1, 1, 2, 3, *rest]
    assert order_of("reordered-chunks") == [0, 2, 1, 3, *rest]
    assert order_of("chunk-with-a-later-number") == [0, 7, 2, 3, *rest]
    assert order_of("file-stands-twice") == [*range(count), *range(count)]
    repeated = [member.name for member in members_of(DAMAGES["file-stands-twice"])]
    assert repeated[VICTIM[-1] + 1 :][:2] == ["vm10/whitelisted-appmenus.list.000.enc", GOOD[VICTIM[0]].name]
    assert members_of(DAMAGES["chunk-after-other-files"])[-1] == GOOD[VICTIM[-1]]
    swapped = members_of(DAMAGES["swapped-chunks"])
    assert [swapped[place].data for place in VICTIM[1:3]] == [GOOD[place].data for place in VICTIM[2:0:-1]]


def test_a_chunk_of_another_backup_is_authentic_there_and_not_here() -> None:
    chunk = members_of(DAMAGES["chunk-of-another-backup"])[VICTIM[1]]
    assert opened(chunk.data, f"20251231T235959-99!vm10/private.img.001!{WRITER.passphrase}")
    with pytest.raises(AssertionError):
        opened(chunk.data, f"{WRITER.backup_id}!vm10/private.img.001!{WRITER.passphrase}")


@pytest.mark.parametrize(
    "name",
    ["volume-bomb", "gnu-sparse-map-overlaps", "inner-symbolic-link", "compressed-stream-is-noise"],
)
def test_what_an_enemy_with_the_passphrase_writes_is_authentic(name: str) -> None:
    chunks = [member for member in members_of(DAMAGES[name]) if member.name.startswith("vm10/private.img.")]
    for member in chunks[:3]:
        plain_name = member.name.removesuffix(".enc")
        opened(member.data, f"{WRITER.backup_id}!{plain_name}!{WRITER.passphrase}")


def test_a_bit_of_a_tar_header_is_flipped_in_the_victims_first_chunk() -> None:
    broken, good = DAMAGES["bit-flipped-in-a-tar-header"].apply(WRITER), join_members(GOOD)
    (place,) = [at for at, (one, other) in enumerate(zip(broken, good, strict=True)) if one != other]
    assert good[place - 3 :].startswith(b"vm10/private.img.000.enc\0")


def test_hostile_members_stand_before_every_qube_and_name_their_type() -> None:
    for name, kind in {"symbolic-link": b"2", "hard-link": b"1", "directory": b"5", "pipe": b"6"}.items():
        members = members_of(DAMAGES[name])
        assert [member.type_flag for member in members[:5]] == [b"0", b"0", b"0", kind, b"0"]
    archive = io.BytesIO(join_members(members_of(DAMAGES["symbolic-link"])))
    with tarfile.open(fileobj=archive, ignore_zeros=True) as tar:
        assert [info.linkname for info in tar if info.issym()] == ["/etc/shadow"]


def test_a_changed_cost_keeps_its_checksum() -> None:
    container = with_cost(GOOD[3].data, 40, 8, 2)
    assert (container[7], container[8:16]) == (40, bytes([0, 0, 0, 8, 0, 0, 0, 2]))
    assert container[:6] == b"scrypt"
    assert container[64:] == GOOD[3].data[64:]
    assert with_cost(GOOD[3].data, 10, 8, 1) == GOOD[3].data


@pytest.mark.parametrize("name", ["header-that-is-empty", "unknown-compression-filter", "format-5"])
def test_a_lying_header_is_authentic(name: str) -> None:
    header, copy, *_ = members_of(DAMAGES[name])
    assert opened(copy.data, f"backup-header!{WRITER.passphrase}") == header.data
    assert header.data != GOOD[0].data


@pytest.mark.parametrize("name", ["header-differs-from-its-copy", "copy-differs-from-the-header"])
def test_a_header_and_its_copy_differ_while_both_are_well_formed(name: str) -> None:
    header, copy, *_ = members_of(DAMAGES[name])
    authentic = opened(copy.data, f"backup-header!{WRITER.passphrase}")
    assert authentic != header.data
    assert authentic.count(b"=") >= 6
    assert header.data.count(b"=") == 6


def test_a_lie_in_qubes_xml_is_in_the_backup() -> None:
    def xml_of(name: str) -> bytes:
        stream = b"".join(
            opened(member.data, f"{WRITER.backup_id}!{member.name[:-4]}!{WRITER.passphrase}")
            for member in members_of(DAMAGES[name])
            if member.name.startswith("qubes.xml.")
        )
        return content_of(gzip.decompress(stream), "qubes.xml")

    assert b"&e9;</property>" in xml_of("entity-bomb")
    assert b'SYSTEM "file:///etc/passwd"' in xml_of("external-entity")
    assert "\x9b2J".encode() in xml_of("qube-name-with-a-c1-control-sequence")
    assert b"work\x1b[2J" in xml_of("qube-name-with-an-escape-sequence")
    assert xml_of("backup-path-of-another-qube").count(b">vm12/<") == 2
    assert xml_of("qube-name-that-stands-twice").count(b'name="name">vault<') == 2
    assert len(xml_of("qubes-xml-of-100-mib")) > 100 << 20


@pytest.mark.parametrize("style", ["gnu", "pax"])
def test_a_sparse_map_lies_in_an_archive_that_is_otherwise_right(style: str) -> None:
    def archive_of(name: str) -> bytes:
        lying = DAMAGES[f"{style}-{name}"].breaker(WRITER)
        stream = b"".join(
            opened(member.data, f"{WRITER.backup_id}!{member.name[:-4]}!{WRITER.passphrase}")
            for member in lying
            if isinstance(member, RawMember) and member.name.startswith("vm10/private.img.")
        )
        return gzip.decompress(stream)

    with tarfile.open(fileobj=io.BytesIO(archive_of("image-of-a-tebibyte"))) as tar:
        (member,) = tar.getmembers()
        assert (member.name, member.size) == ("vm10/private.img", (1 << 40) + (1 << 20))
    numbers = (b"%011o\0%011o\0" if style == "gnu" else b"%d\n%d\n") % (4096, 8192)
    assert numbers in archive_of("sparse-map-overlaps")
    assert archive_of("sparse-map-overlaps").endswith(bytes(1024))


# --- Bombs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filter_name", ["gzip", "bzip2", "xz", "lzma", "none"])
def test_a_zero_bomb_holds_its_head_and_its_zeros(filter_name: str) -> None:
    stream = b"".join(zero_bomb(filter_name, b"head", 32 << 20))
    if filter_name == "gzip":
        found = gzip.decompress(stream)
    elif filter_name == "bzip2":
        found = bz2.decompress(stream)
    else:
        found = stream if filter_name == "none" else lzma.decompress(stream)
    assert found == b"head" + bytes(32 << 20)


def test_a_zero_bomb_of_gibibytes_is_small() -> None:
    assert sum(map(len, zero_bomb("gzip", b"", 8 * GIB))) < 16 << 20
    assert sum(map(len, zero_bomb("zstd", b"", 8 * GIB))) < 4 << 20


def test_the_zstd_bomb_opens_with_the_real_program() -> None:
    stream = b"".join(zero_bomb("zstd", b"head", 32 << 20))
    result = subprocess.run([program("zstd"), "-dc"], input=stream, capture_output=True, check=True)
    assert result.stdout == b"head" + bytes(32 << 20)


# --- Building blocks ---------------------------------------------------------------------------------------


def test_a_bit_is_flipped_and_flipped_back() -> None:
    assert flip_bit(b"\0\0\0", 9) == b"\0\2\0"
    assert flip_bit(flip_bit(b"abc", 23), 23) == b"abc"
    assert flip_bit(b"abc", -1) == b"ab\xe3"


def test_an_archive_is_cut_off() -> None:
    assert cut_off(b"abcdef", 2) == b"ab"


def test_editing_a_member_that_is_not_there_is_noticed() -> None:
    with pytest.raises(ValueError, match="no member"):
        edited(GOOD, "vm99/private.img.000.enc", bytes.upper)


def test_a_member_is_inserted_before_the_first_qube() -> None:
    members = inserted(WRITER, RawMember("x", b"y"))
    assert members[3] == RawMember("x", b"y")
    assert members[:3] + members[4:] == GOOD
