"""The writer's backups come back from every filter and sparse format, layer by layer.

Strategy: everything is opened by code that is not the writer's (see reading_back); each layer by
itself is tested beside its file.
"""

import gzip
import hashlib
import io
import json
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from qubes_restore_svc.archive.filters import FILTERS

from . import backup_writer
from .backup_writer import BackupWriter, Replacements
from .fixtures import expectation
from .inner_archives import plain_tar
from .outer_archive import join_members
from .plans import image_of_file, sample_qube
from .reading_back import content_of, decompressed, file_of, opened, read

STYLES = ["gnu", "pax", "none"]
WORK = sample_qube("work", 1 << 19, 0.5)
TEMPLATE = sample_qube("custom", 1 << 17, 0.5, "TemplateVM", seed=2)


def names(writer: BackupWriter) -> list[str]:
    return [member.name for member in writer.members()]


@pytest.mark.parametrize("log_n", [[4, 5, 6], lambda number: 4 + number % 3])
def test_chunks_of_one_backup_can_differ_in_cost(log_n: backup_writer.Costs) -> None:
    writer = BackupWriter([WORK], log_n=log_n, chunk_size=1 << 16)
    assert [member.data[7] for member in writer.members()][1:6] == [4, 5, 6, 4, 5]
    image = content_of(file_of(writer, "vm10/private.img"), "vm10/private.img")
    assert hashlib.sha256(image).hexdigest() == WORK.volumes["private"].sha256()


def test_a_file_is_backed_up_with_its_holes(tmp_path: Path) -> None:
    disk, backup, expected = tmp_path / "disk", tmp_path / "backup", tmp_path / "expected"
    with disk.open("wb") as file:
        file.truncate(5 << 20)
        file.seek(2 << 20)
        file.write(b"data" * 1024)
    assert image_of_file(disk).extents == [(2 << 20, b"data" * 1024)]
    words = [str(backup), "--qube", "a:1:1", "--image", f"a/private={disk}", "--log-n", "1", "--expect"]
    backup_writer.main([*words, str(expected)])
    volumes = json.loads(expected.read_text())["volumes"]
    content = disk.read_bytes()
    assert volumes == {"a/private": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    with pytest.raises(SystemExit):
        backup_writer.main([*words, str(expected), "--image", f"b/private={disk}"])


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
