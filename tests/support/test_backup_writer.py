"""The writer's backups are what the real programs write and read, layer by layer.

Strategy: everything is opened by code that is not the writer's: hashlib's scrypt, tarfile and the
standard decompressors always, and the real scrypt, tar and compressors where they are installed.
"""

import bz2
import gzip
import hashlib
import hmac
import io
import json
import lzma
import re
import shutil
import stat
import struct
import subprocess
import tarfile
import tracemalloc
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from . import backup_writer
from .backup_writer import (
    BackupWriter,
    ImagePlan,
    RawMember,
    Replacements,
    chunks,
    compress,
    inner_tar,
    join_members,
    outer_member,
    plain_tar,
    qfile_stream,
    qubes_xml,
    sample_image,
    sample_qube,
    scrypt_container,
)
from .fixtures import expectation, shared_fixture

FILTERS = ["gzip", "pigz", "bzip2", "pbzip2", "xz", "lzma", "zstd", "zstdmt", "none"]
STYLES = ["gnu", "pax", "none"]
WORK = sample_qube("work", 1 << 19, 0.5)
TEMPLATE = sample_qube("custom", 1 << 17, 0.5, "TemplateVM", seed=2)
#: Runs at both ends, neighbours, a gap of one block, and more runs than a header and one extension hold.
RUNS = ImagePlan(
    1 << 20,
    [(0, b"a" * 512), (512, b"b" * 512), (1536, b"c" * 512)]
    + [(number * 8192, b"%04d" % number * 256) for number in range(1, 60)]
    + [((1 << 20) - 512, b"z" * 512)],
)


def program(name: str) -> str:
    """The path of a real program; skips the calling test where it is missing."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def opened(container: bytes, passphrase: str) -> bytes:
    """The content of a scrypt container whose three checks are right."""
    magic, version, log_n, r, p, salt = struct.unpack(">6sBBII32s", container[:48])
    assert (magic, version) == (b"scrypt", 0)
    assert container[48:64] == hashlib.sha256(container[:48]).digest()[:16]
    keys = hashlib.scrypt(
        passphrase.encode(), salt=salt, n=1 << log_n, r=r, p=p, maxmem=256 << (log_n + 3), dklen=64
    )
    assert container[64:96] == hmac.digest(keys[32:], container[:64], "sha256")
    assert container[-32:] == hmac.digest(keys[32:], container[:-32], "sha256")
    return Cipher(algorithms.AES(keys[:32]), modes.CTR(bytes(16))).decryptor().update(container[96:-32])


def decompressed(filter_name: str, data: bytes) -> bytes:
    openers: dict[str, Callable[[bytes], bytes]] = {
        "gzip": gzip.decompress,
        "pigz": gzip.decompress,
        "bzip2": bz2.decompress,
        "pbzip2": bz2.decompress,
        "xz": lzma.decompress,
        "lzma": lzma.decompress,
        "zstd": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
        "zstdmt": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
        "none": lambda data: data,
    }
    return openers[filter_name](data)


def file_of(writer: BackupWriter, name: str) -> bytes:
    """The inner archive of one file, put together from the members."""
    stream = b""
    for member in writer.members():
        if member.name.startswith(name + "."):
            plain_name = member.name.removesuffix(".enc")
            stream += opened(member.data, f"{writer.backup_id}!{plain_name}!{writer.passphrase}")
    return decompressed(writer.compression, stream)


def content_of(archive: bytes, name: str) -> bytes:
    """The one member of an inner archive, which must be called `name`."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        (member,) = tar.getmembers()
        assert member.name == name
        file = tar.extractfile(member)
        assert file is not None
        return file.read()


def names(writer: BackupWriter) -> list[str]:
    return [member.name for member in writer.members()]


# --- Images ------------------------------------------------------------------------------------


def test_an_image_hashes_with_its_holes_as_zeros() -> None:
    image = ImagePlan(20, [(3, b"abc"), (10, b"xyz")])
    assert image.sha256() == hashlib.sha256(b"\0\0\0abc\0\0\0\0xyz" + bytes(7)).hexdigest()
    assert ImagePlan(3 << 20).sha256() == hashlib.sha256(bytes(3 << 20)).hexdigest()


@pytest.mark.parametrize("extents", [[(15, b"xxxxxx")], [(0, b"abc"), (2, b"d")], [(5, b"a"), (1, b"b")]])
def test_an_image_whose_extents_do_not_fit_has_no_hash(extents: list[tuple[int, bytes]]) -> None:
    with pytest.raises(ValueError, match="extent"):
        ImagePlan(20, extents).sha256()


def test_a_sample_image_is_sparse_half_noise_half_text_and_always_the_same() -> None:
    image = sample_image(32 << 20, 0.25, seed=3)
    data = b"".join(piece for _, piece in image.extents)
    assert 0.2 < len(data) / image.size <= 0.25
    assert len(image.extents) == 8
    piece = image.extents[1][1]
    assert piece[len(piece) // 2 :].replace(b" ", b"").isalpha()
    assert len(gzip.compress(piece[: len(piece) // 2])) > len(piece) // 2
    assert image.sha256() == sample_image(32 << 20, 0.25, seed=3).sha256()
    assert image.sha256() != sample_image(32 << 20, 0.25, seed=4).sha256()


@pytest.mark.parametrize(("size", "fill"), [(0, 0.5), (1000, 1), (1 << 20, 0), (1 << 20, 1), (5000, 0.1)])
def test_a_sample_image_of_any_size_and_fill_fits_its_size(size: int, fill: float) -> None:
    image = sample_image(size, fill, seed=1)
    image.sha256()
    filled = sum(len(data) for _, data in image.extents)
    assert filled == size * fill or 0 < fill < 1


# --- Containers --------------------------------------------------------------------------------


def test_the_scrypt_program_opens_a_container(tmp_path: Path) -> None:
    scrypt = program("scrypt")
    (tmp_path / "container").write_bytes(scrypt_container(b"some text" * 1000, b"pass phrase", 10, 8, 2))
    command = [scrypt, "dec", "-P", str(tmp_path / "container")]
    result = subprocess.run(command, input=b"pass phrase\n", capture_output=True, check=True)
    assert result.stdout == b"some text" * 1000


def test_a_container_is_128_bytes_longer_than_its_content_and_salted() -> None:
    assert len(scrypt_container(b"12345", b"p", 4)) == 133
    assert scrypt_container(b"12345", b"p", 4) != scrypt_container(b"12345", b"p", 4)


@pytest.mark.parametrize("log_n", [[4, 5, 6], lambda number: 4 + number % 3])
def test_chunks_of_one_backup_can_differ_in_cost(log_n: backup_writer.Costs) -> None:
    writer = BackupWriter([WORK], log_n=log_n, chunk_size=1 << 16)
    assert [member.data[7] for member in writer.members()][1:6] == [4, 5, 6, 4, 5]
    image = content_of(file_of(writer, "vm10/private.img"), "vm10/private.img")
    assert hashlib.sha256(image).hexdigest() == WORK.volumes["private"].sha256()


# --- Compression and chunks --------------------------------------------------------------------


@pytest.mark.parametrize("filter_name", [name for name in FILTERS if name != "none"])
def test_the_real_program_decompresses_a_stream(filter_name: str) -> None:
    data = [sample_image(1 << 21, 0.9, 1).extents[0][1]] * 5
    stream = b"".join(compress(filter_name, data))
    result = subprocess.run([program(filter_name), "-dc"], input=stream, capture_output=True, check=True)
    assert result.stdout == b"".join(data)


def test_chunks_are_cut_at_the_size_and_the_last_one_is_shorter() -> None:
    assert list(chunks([b"abc", b"", b"defgh"], 3)) == [b"abc", b"def", b"gh"]
    assert list(chunks([b"abcdef"], 3)) == [b"abc", b"def", b""]
    assert list(chunks([], 3)) == [b""]


# --- Inner archives ------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "image",
    [
        RUNS,
        sample_image(1 << 20, 0.5, 1),
        sample_image(1 << 20, 1, 1),
        ImagePlan(1 << 20),
        ImagePlan(0),
        ImagePlan(10000, [(3, b"odd"), (700, b"extents"), (9999, b"!")]),
    ],
    ids=["runs", "sample", "full", "hole", "nothing", "odd"],
)
def test_gnu_tar_and_tarfile_extract_the_image(image: ImagePlan, style: str, tmp_path: Path) -> None:
    archive = b"".join(inner_tar("vm10/private.img", image, style))
    if style != "pax" or image.size:  # tarfile does not know that a map of nothing is a map
        assert hashlib.sha256(content_of(archive, "vm10/private.img")).hexdigest() == image.sha256()
    subprocess.run([program("tar"), "-x", "-C", str(tmp_path)], input=archive, check=True)
    assert hashlib.sha256((tmp_path / "vm10/private.img").read_bytes()).hexdigest() == image.sha256()


def test_a_full_image_is_a_plain_file_and_one_with_holes_a_sparse_file() -> None:
    full, holes = sample_image(1 << 16, 1, 1), RUNS
    assert next(inner_tar("vm10/private.img", full, "gnu"))[156:157] == b"0"
    header, first, second, third, *_ = inner_tar("vm10/private.img", holes, "gnu")
    assert (header[156:157], header[482], first[504], second[504], third[504]) == (b"S", 1, 1, 1, 0)


@pytest.mark.parametrize("style", ["gnu", "pax"])
def test_an_image_past_8_gib_keeps_its_size_and_places(style: str, tmp_path: Path) -> None:
    image = ImagePlan(20 << 30, [(4096, b"low" * 512), ((19 << 30) + 512, b"high" * 512)])
    archive = b"".join(inner_tar("vm10/root.img", image, style))
    subprocess.run([program("tar"), "-x", "-C", str(tmp_path)], input=archive, check=True)
    with (tmp_path / "vm10/root.img").open("rb") as file:
        assert file.seek(0, io.SEEK_END) == 20 << 30
        file.seek((19 << 30) + 512)
        assert file.read(2052) == b"high" * 512 + bytes(4)


@pytest.mark.parametrize("style", STYLES)
def test_an_inner_archive_ends_as_its_writer_ends_it(style: str) -> None:
    archive = b"".join(inner_tar("vm10/private.img", RUNS, style))
    assert archive.endswith(bytes(1024))
    assert len(archive) % (512 if style == "pax" else 10240) == 0


def test_an_inner_archive_has_the_bytes_of_a_recorded_one() -> None:
    for backup, qube, file, style in [
        ("sparse-map.qbackup", "work", "vm10/private.img", "pax"),
        ("gzip.qbackup", "vault", "vm11/private.img", "gnu"),
    ]:
        recorded = file_of_recorded(backup, file)
        size = expectation(shared_fixture(backup)).volumes[f"{qube}/private"].size
        content = content_of(recorded, file)
        blocks = [(start, content[start : start + 512]) for start in range(0, size, 512)]
        image = ImagePlan(size, [(start, block) for start, block in blocks if any(block)])
        assert without_stamp(b"".join(inner_tar(file, image, style))) == without_stamp(recorded)


# --- The outer archive ---------------------------------------------------------------------------


def test_gnu_tar_lists_the_members_in_order(tmp_path: Path) -> None:
    writer = BackupWriter([WORK, TEMPLATE], chunk_size=1 << 16)
    writer.write(tmp_path / "backup")
    listing = subprocess.run(
        [program("tar"), "-itf", str(tmp_path / "backup")], capture_output=True, text=True, check=True
    )
    assert listing.stdout.split() == names(writer)
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


# --- Whole backups -----------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("filter_name", FILTERS)
def test_every_volume_comes_back_from_every_kind_of_backup(filter_name: str, style: str) -> None:
    writer = BackupWriter([WORK, TEMPLATE], compression=filter_name, sparse=style, chunk_size=1 << 16)
    for qube, folder in [(WORK, "vm10"), (TEMPLATE, "vm11")]:
        for volume, image in qube.volumes.items():
            name = f"{folder}/{volume}.img"
            found = content_of(file_of(writer, name), name)
            assert hashlib.sha256(found).hexdigest() == image.sha256()
    header = next(iter(writer.members())).data
    assert (b"\ncompressed=False\n" in header) == (filter_name == "none")


def test_the_members_stand_in_the_order_of_a_real_backup() -> None:
    qubes = [
        replace(WORK, firewall="<firewall/>", notes="n", appmenus=["a.desktop"]),
        replace(TEMPLATE, included=False),
        sample_qube("scratch", 0, 0, "DispVM"),
    ]
    assert names(BackupWriter(qubes, dom0_home=True)) == [
        "backup-header",
        "backup-header.hmac",
        "qubes.xml.000.enc",
        "vm10/private.img.000.enc",
        "vm10/whitelisted-appmenus.list.000.enc",
        "vm10/firewall.xml.000.enc",
        "vm10/notes.txt.000.enc",
        "vm12/empty.000.enc",
        "dom0-home/user.000.enc",
    ]


def test_the_header_is_authenticated_by_its_copy() -> None:
    writer = BackupWriter([WORK])
    header, copy, *_ = writer.members()
    assert opened(copy.data, f"backup-header!{writer.passphrase}") == header.data


def test_small_files_and_the_dom0_home_can_be_extracted(tmp_path: Path) -> None:
    writer = BackupWriter([replace(WORK, notes="Grüße\n")], dom0_home=True)
    assert content_of(file_of(writer, "vm10/notes.txt"), "vm10/notes.txt") == "Grüße\n".encode()
    with tarfile.open(fileobj=io.BytesIO(file_of(writer, "dom0-home/user"))) as tar:
        assert tar.getnames() == ["dom0-home/user", "dom0-home/user/.bashrc", "dom0-home/user/link"]


def test_the_same_arguments_give_the_same_bytes_with_any_number_of_threads() -> None:
    writer = BackupWriter([WORK, TEMPLATE], chunk_size=1 << 16, log_n=4)
    assert writer.to_bytes() == replace(writer, jobs=7).to_bytes() == replace(writer, jobs=1).to_bytes()
    assert join_members(writer.members()) == writer.to_bytes()


def test_writing_holds_a_few_chunks_in_memory_whatever_the_size() -> None:
    writer = BackupWriter(
        [sample_qube("big", 128 << 20, 0.9)], compression="none", chunk_size=1 << 20, log_n=4, jobs=2
    )
    tracemalloc.start()
    total = sum(len(member.data) for member in writer.members())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 100 << 20
    assert peak < 32 << 20


# --- qubes.xml ---------------------------------------------------------------------------------------


def test_qubes_xml_lists_dom0_the_qubes_and_all_they_refer_to() -> None:
    devices = [("pci", "dom0", "00_1")]
    qube = replace(WORK, netvm="sys-firewall", tags=["t"], features={"f": "<&>"}, devices=devices)
    root = ElementTree.fromstring(qubes_xml([qube, replace(TEMPLATE, included=False)], dom0_home=True))
    domains = {domain.findtext("properties/property[@name='name']"): domain for domain in root.iter("domain")}
    assert {name: domain.get("class") for name, domain in domains.items()} == {
        None: "AdminVM",
        "fedora-41": "TemplateVM",
        "sys-firewall": "AppVM",
        "work": "AppVM",
        "custom": "TemplateVM",
    }
    work = domains["work"]
    features = {feature.get("name"): feature.text for feature in work.iter("feature")}
    assert features["backup-content"] == "True"
    assert features["backup-path"] == "vm10/"
    assert features["f"] == "<&>"
    label = work.findtext("properties/property[@name='label']")
    assert root.findtext(f"labels/label[@id='{label}']") == "red"
    assert work.findtext("properties/property[@name='netvm']") == "sys-firewall"
    volumes = {volume.get("name"): volume for volume in work.iter("volume")}
    assert [name for name, volume in volumes.items() if volume.get("save_on_stop")] == ["private"]
    assert volumes["private"].get("size") == str(1 << 19)
    device = work.find("devices[@class='pci']/device")
    assert device is not None
    assert (device.get("backend-domain"), device.get("id")) == ("dom0", "00_1")
    listed = [
        name
        for name, domain in domains.items()
        if domain.findtext("features/feature[@name='backup-content']") != "True"
    ]
    assert listed == ["fedora-41", "sys-firewall", "custom"]
    assert len({domain.get("id") for domain in domains.values()}) == 5


def test_a_qubes_xml_may_be_made_malformed_by_a_name() -> None:
    with pytest.raises(ElementTree.ParseError):
        ElementTree.fromstring(qubes_xml([replace(WORK, name="a\x1bb")]))


def test_a_label_is_written_as_its_id_or_as_its_name() -> None:
    assert b'name="label">label-6<' in qubes_xml([replace(WORK, label="blue")])
    assert b'name="label">blue<' in qubes_xml([replace(WORK, label="blue", label_by_name=True)])


# --- Replacements --------------------------------------------------------------------------------------


def test_every_layer_can_be_replaced_and_stays_authentic() -> None:
    lie = plain_tar("elsewhere", [b"evil"], 4)
    writer = BackupWriter(
        [WORK, TEMPLATE],
        chunk_size=4096,
        replacements=Replacements(
            header=b"one",
            header_copy=b"other",
            qubes_xml=b"<bomb/>",
            inner={"vm10/private.img": lie},
            compressed={"vm11/root.img": [b"x" * 5000, b"y" * 5000]},
        ),
    )
    members = {member.name: member.data for member in writer.members()}
    assert members["backup-header"] == b"one"
    assert opened(members["backup-header.hmac"], f"backup-header!{writer.passphrase}") == b"other"
    plain = replace(writer, replacements=Replacements(qubes_xml=b"<bomb/>"))
    assert content_of(file_of(plain, "qubes.xml"), "qubes.xml") == b"<bomb/>"
    stream = [
        opened(data, f"{writer.backup_id}!{name.removesuffix('.enc')}!{writer.passphrase}")
        for name, data in members.items()
        if name.startswith(("vm10/private", "vm11/root"))
    ]
    assert content_of(gzip.decompress(stream[0]), "elsewhere") == b"evil"
    assert b"".join(stream[1:]) == b"x" * 5000 + b"y" * 5000
    assert content_of(file_of(writer, "vm11/private.img"), "vm11/private.img")


# --- Command line ----------------------------------------------------------------------------------------


def test_the_command_line_writes_a_backup_and_says_what_it_holds(tmp_path: Path) -> None:
    out, facts = tmp_path / "b", tmp_path / "b.json"
    qubes = ["--qube", "work:1:0.5", "--qube", "base:0.25:0.5:TemplateVM", "--qube", "scratch:0:0:DispVM"]
    options = ["--log-n", "4,5", "--chunk-mib", "0.25", "--compress", "zstd", "--passphrase", "p"]
    backup_writer.main([str(out), *qubes, *options, "--expect", str(facts)])
    expected = expectation(out)
    assert json.loads(facts.read_text())["passphrase"] == expected.passphrase == "p"
    assert set(expected.volumes) == {"work/private", "base/root", "base/private"}
    assert expected.volumes["work/private"].size == 1 << 20
    with tarfile.open(out, ignore_zeros=True) as tar:
        stream = b""
        for info in tar:
            if info.name.startswith("vm11/root.img."):
                passphrase = f"{expected.backup_id}!{info.name.removesuffix('.enc')}!p"
                stream += opened(read(tar, info), passphrase)
    image = content_of(decompressed("zstd", stream), "vm11/root.img")
    assert hashlib.sha256(image).hexdigest() == expected.volumes["base/root"].sha256


# --- Helpers -----------------------------------------------------------------------------------------------


def read(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None
    return file.read()


def file_of_recorded(backup: str, file: str) -> bytes:
    """The inner archive of a file in a recorded backup."""
    path = shared_fixture(backup)
    facts = expectation(path)
    stream = b""
    with tarfile.open(path, ignore_zeros=True) as tar:
        for info in tar:
            if info.name.startswith(file + "."):
                passphrase = f"{facts.backup_id}!{info.name.removesuffix('.enc')}!{facts.passphrase}"
                stream += opened(read(tar, info), passphrase)
    return gzip.decompress(stream)


def without_stamp(archive: bytes) -> bytes:
    """The archive without the time of its first header, and the checksum, which depends on it."""
    return archive[:136] + bytes(20) + archive[156:]


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
