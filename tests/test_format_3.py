"""Backups of format 3, whole: what Qubes R2 to R3.2 wrote comes back, and what was changed is noticed.

A piece's MAC does not bind its place. So the attacks here are judged by what came out: nothing that is called
restored may differ from what was backed up, and nothing may be left of what failed.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qubes_restore_svc.broker.job import OLD_FORMAT
from qubes_restore_svc.errors import ExitStatus
from qubes_restore_svc.wire.report import Report

from .support.compare import sha256
from .support.format3_writer import Format3Writer
from .support.inner_archives import directory_tar
from .support.outer_archive import RawMember, join_members
from .support.plans import QubePlan, sample_image, sample_qube
from .support.restoring import Recorder, kinds, restore

FIREWALL = (
    '<QubesFirewallRules policy="deny" dns="allow" icmp="deny"><rule address="1.2.3.4"/></QubesFirewallRules>'
)


def sample(**changes: object) -> Format3Writer:
    """Four qubes: one with several pieces and settings, one without network, an HVM, a template."""
    work = QubePlan(
        "work", volumes={"private": sample_image(1 << 18, 0.7, 1)}, firewall=FIREWALL, appmenus=["a.desktop"]
    )
    qubes = [
        work,
        replace(sample_qube("vault", 1 << 17, 0.5, seed=2), netvm=""),
        sample_qube("win", 1 << 16, 0.5, "StandaloneVM", seed=3),
        sample_qube("tpl", 1 << 17, 0.6, "TemplateVM", seed=4),
    ]
    return replace(Format3Writer(qubes, piece_size=1 << 15, dom0_home=True), **changes)  # type: ignore[arg-type]


def judged(archive: bytes, writer: Format3Writer, directory: Path) -> Report:
    """Restore the archive; what is called restored must be what was backed up, and nothing else may be
    there."""
    backup = directory / "backup"
    backup.write_bytes(archive)
    report = restore(backup, directory / "out")
    plans = {qube.name: qube for qube in writer.qubes}
    restored = {qube.name for qube in report.qubes if qube.outcome == "restored"}
    found = {path.name for path in (directory / "out").iterdir()} if (directory / "out").exists() else set()
    assert found == restored, report
    for name in restored:
        for volume, image in plans[name].volumes.items():
            assert sha256(directory / "out" / name / f"{volume}.img") == image.sha256(), (name, volume)
    assert report.status == ExitStatus.COMPLETE or report.error is not None or len(restored) < len(plans)
    return report


# --- What must come out ------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "xz", "lzma", "zstd", "none"])
@pytest.mark.parametrize("encrypted", [True, False])
def test_a_backup_of_format_3_is_restored_bit_by_bit(
    compression: str, encrypted: bool, tmp_path: Path
) -> None:
    writer = sample(compression=compression, encrypted=encrypted)
    report = judged(writer.to_bytes(), writer, tmp_path)
    assert report.status == ExitStatus.COMPLETE, report


@pytest.mark.parametrize("digest", ["sha1", "sha224", "sha256", "sha384", "sha512"])
@pytest.mark.parametrize("key_size", [16, 24, 32])
def test_every_digest_and_key_size_is_read(digest: str, key_size: int, tmp_path: Path) -> None:
    writer = replace(sample(), qubes=sample().qubes[:1], digest=digest, key_size=key_size)
    assert judged(writer.to_bytes(), writer, tmp_path).status == ExitStatus.COMPLETE


def test_settings_arrive_in_the_words_of_today(tmp_path: Path) -> None:
    writer = sample(attributes={"work": {"services": "{'cups': False}", "memory": "800"}})
    judged(writer.to_bytes(), writer, tmp_path)
    work = json.loads((tmp_path / "out/work/qube.json").read_text())
    assert [rule["action"] for rule in work["firewall"]] == ["accept", "drop", "accept", "drop"]
    assert work["features"]["service.cups"] == ""
    assert work["properties"]["memory"] == "800"
    assert json.loads((tmp_path / "out/vault/qube.json").read_text())["netvm"] == ""


def test_the_settings_in_a_templates_directory_arrive(tmp_path: Path) -> None:
    template = replace(sample_qube("tpl", 1 << 16, 0.5, "TemplateVM"), firewall=FIREWALL)
    writer = sample(qubes=[template], dom0_home=False)
    assert judged(writer.to_bytes(), writer, tmp_path).status == ExitStatus.COMPLETE
    assert len(json.loads((tmp_path / "out/tpl/qube.json").read_text())["firewall"]) == 4


def test_the_weakness_of_the_format_is_told_before_the_restore(tmp_path: Path) -> None:
    (tmp_path / "backup").write_bytes(sample().to_bytes())
    observer = Recorder()
    report = restore(tmp_path / "backup", None, observer=observer)
    assert observer.lines[0] == f"warning: {OLD_FORMAT}"
    assert OLD_FORMAT in report.warnings


def test_the_same_backup_has_the_same_id_and_another_one_another(tmp_path: Path) -> None:
    ids = set()
    for number, writer in enumerate([sample(), sample(), sample(dom0_home=False)]):
        (tmp_path / str(number)).write_bytes(writer.to_bytes())
        ids.add(restore(tmp_path / str(number), None).backup_id)
    assert len(ids) == 2
    assert all(found is not None and found.startswith("format3-") for found in ids)


def test_a_wrong_passphrase_is_known_at_the_header(tmp_path: Path) -> None:
    (tmp_path / "backup").write_bytes(join_members(list(sample().members())[:2]))
    report = restore(tmp_path / "backup", tmp_path / "out", passphrase="wrong")
    assert (report.status, kinds(report)) == (ExitStatus.NOTHING, {"wrong-passphrase"})


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"aes-256-cbc", b"des-ede3-cbc"), (b"SHA512", b"MD5"), (b"gzip", b"rm"), (b"version=3", b"version=5")],
)
def test_a_header_that_names_what_is_not_known_is_refused(old: bytes, new: bytes, tmp_path: Path) -> None:
    writer = sample(header=sample().header_text().replace(old, new))
    (tmp_path / "backup").write_bytes(writer.to_bytes())
    report = restore(tmp_path / "backup", tmp_path / "out")
    assert report.status == ExitStatus.NOTHING
    assert kinds(report) <= {"bad-header", "unknown-filter", "unsupported-format"}


# --- What was changed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "kind"), [(1, "bad-header"), (3, "bad-container")], ids=["of the header", "of qubes.xml"]
)
def test_a_mac_of_a_tebibyte_is_refused_unread(place: int, kind: str, tmp_path: Path) -> None:
    members = list(sample().members())[: place + 1]
    members[place] = replace(members[place], declared_size=1 << 40)
    (tmp_path / "backup").write_bytes(join_members(members))
    report = restore(tmp_path / "backup", tmp_path / "out")
    assert (report.status, kinds(report)) == (ExitStatus.NOTHING, {kind})


def test_qubes_xml_whose_pieces_are_not_in_order_is_refused_as_such(tmp_path: Path) -> None:
    members = list(sample(compression="none", encrypted=False, piece_size=2048).members())
    swapped = [*members[:2], *members[4:6], *members[2:4], *members[6:]]
    repeated = [*members[:4], members[3], *members[4:]]
    for name, edited, kind in (("a", swapped, "chunk-out-of-order"), ("b", repeated, "bad-archive")):
        (tmp_path / name).write_bytes(join_members(edited))
        report = restore(tmp_path / name, tmp_path / "out")
        assert (report.status, kinds(report)) == (ExitStatus.NOTHING, {kind})


Members = list[RawMember]
Edit = Callable[[Members, int], Members]


def other(members: Members, place: int, *, same_file: bool) -> int:
    """The place of another piece, of the same file or of another one."""
    file = members[place].name.rpartition(".")[0]
    for found, member in enumerate(members):
        is_piece = found > 3 and not member.name.endswith(".hmac")
        if is_piece and found != place and (member.name.rpartition(".")[0] == file) == same_file:
            return found
    return place


def exchanged(members: Members, place: int, with_place: int) -> Members:
    """The contents, and their MACs, of two pieces change places."""
    edited = list(members)
    for offset in (0, 1):
        one, two = members[place + offset], members[with_place + offset]
        edited[place + offset] = replace(one, data=two.data)
        edited[with_place + offset] = replace(two, data=one.data)
    return edited


def with_line(line: bytes) -> Edit:
    """The MAC of the piece replaced by this."""
    return lambda members, place: [
        *members[: place + 1],
        replace(members[place + 1], data=line),
        *members[place + 2 :],
    ]


def flipped(members: Members, place: int) -> Members:
    data = bytearray(members[place].data)
    data[len(data) // 2] ^= 1
    return [*members[:place], replace(members[place], data=bytes(data)), *members[place + 1 :]]


def shortened(members: Members, place: int) -> Members:
    shorter = replace(members[place], data=members[place].data[:-1])
    return [*members[:place], shorter, *members[place + 1 :]]


EDITS: dict[str, Edit] = {
    "dropped": lambda members, place: members[:place] + members[place + 2 :],
    "without its MAC": lambda members, place: members[: place + 1] + members[place + 2 :],
    "MAC alone": lambda members, place: members[:place] + members[place + 1 :],
    "repeated": lambda members, place: members[: place + 2] + members[place:],
    "before its MAC's place": lambda members, place: (
        [*members[:place], members[place + 1], members[place], *members[place + 2 :]]
    ),
    "exchanged in its file": lambda members, place: exchanged(
        members, place, other(members, place, same_file=True)
    ),
    "exchanged with another file": lambda members, place: exchanged(
        members, place, other(members, place, same_file=False)
    ),
    "flipped": flipped,
    "shortened": shortened,
    "empty MAC": with_line(b""),
    "MAC of another digest": with_line(b"SHA1(stdin)= " + b"a" * 40 + b"\n"),
    "MAC of 1 MB": with_line(b"a" * 1_000_000),
    "wrong MAC": with_line(b"SHA512(stdin)= " + b"a" * 128 + b"\n"),
}


def places(members: Members) -> Iterator[int]:
    """The places of all pieces behind qubes.xml."""
    for place, member in enumerate(members):
        if place > 3 and not member.name.endswith(".hmac"):
            yield place


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_no_piece_that_was_changed_is_called_restored(edit: str, compression: str, tmp_path: Path) -> None:
    writer = sample(compression=compression, dom0_home=False)
    members = list(writer.members())
    for place in list(places(members))[:: 1 if compression == "gzip" else 3]:
        directory = tmp_path / str(place)
        directory.mkdir()
        edited = EDITS[edit](members, place)
        if edited == members or (compression == "none" and edit.startswith("exchanged")):
            continue  # what can be exchanged unseen in such a backup is told in docs/threat-model.md
        report = judged(join_members(edited), writer, directory)
        name = members[place].name
        # Nothing promises a settings file, in no format.
        unseen = edit == "dropped" and ("firewall" in name or "appmenus" in name)
        assert (report.status == ExitStatus.COMPLETE) == unseen, (name, report)


@pytest.mark.parametrize("behind", [6, 14, None])
def test_a_foreign_member_between_files_or_pieces_costs_nothing(behind: int | None, tmp_path: Path) -> None:
    writer = sample(dom0_home=False)
    members = list(writer.members())
    members.insert(len(members) if behind is None else behind, RawMember("README", b"x"))
    report = judged(join_members(members), writer, tmp_path)
    assert report.status == ExitStatus.COMPLETE
    assert any("README" in warning for warning in report.warnings)


def test_a_backup_that_was_cut_anywhere_is_not_complete(tmp_path: Path) -> None:
    writer = sample(dom0_home=False)
    archive = writer.to_bytes()
    source = random.Random(3)
    for number in range(20):
        directory = tmp_path / str(number)
        directory.mkdir()
        size = source.randrange(1, len(archive) - 20_480)
        assert judged(archive[:size], writer, directory).status != ExitStatus.COMPLETE


def test_bits_that_were_flipped_anywhere_cost_one_qube(tmp_path: Path) -> None:
    writer = sample(dom0_home=False)
    archive = writer.to_bytes()
    members = list(writer.members())
    start = len(join_members(members[:4]))
    source = random.Random(4)
    for number in range(30):
        directory = tmp_path / str(number)
        directory.mkdir()
        place = source.randrange(start, len(archive))
        damaged = archive[:place] + bytes([archive[place] ^ 1 << number % 8]) + archive[place + 1 :]
        report = judged(damaged, writer, directory)
        assert len([qube for qube in report.qubes if qube.outcome == "restored"]) >= 3, (place, report)


# --- What stands in the archive of a directory -------------------------------------------------------


@pytest.mark.parametrize(
    ("directory", "names"),
    [
        ("vm-templates/other", ["root.img", "private.img"]),
        ("vm-templates/tpl", ["root.img"]),
        ("vm-templates/tpl", ["root.img", "private.img", "root.img"]),
    ],
)
def test_a_directory_that_is_not_the_templates_own_fails_it(
    directory: str, names: list[str], tmp_path: Path
) -> None:
    template = sample_qube("tpl", 1 << 16, 0.5, "TemplateVM")
    first = directory_tar(directory, {name: template.volumes[name[:-4]] for name in names[:2]}, {})
    more = directory_tar(directory, {}, dict.fromkeys(names[2:], b"x"))
    inner = first.rstrip(b"\0") + bytes(-len(first.rstrip(b"\0")) % 512) + more
    writer = sample(qubes=[template], inner={"vm-templates/tpl/.": inner}, dom0_home=False)
    report = judged(writer.to_bytes(), writer, tmp_path)
    assert report.qubes[0].outcome == "failed"


def test_a_settings_file_of_a_tebibyte_in_a_directory_is_never_held(tmp_path: Path) -> None:
    template = sample_qube("tpl", 1 << 16, 0.5, "TemplateVM")
    files = {f"{name}.img": image for name, image in template.volumes.items()}
    files["firewall.xml"] = replace(template.volumes["root"], size=1 << 40)
    inner = directory_tar("vm-templates/tpl", files, {})
    writer = sample(qubes=[template], inner={"vm-templates/tpl/.": inner}, dom0_home=False)
    report = judged(writer.to_bytes(), writer, tmp_path)
    assert (report.qubes[0].outcome, kinds(report)) == ("failed", {"bad-metadata"})


@pytest.mark.parametrize("file", ["root.img", "private.img", "firewall.xml"])
@pytest.mark.parametrize("directory_first", [True, False])
def test_a_file_that_comes_alone_and_in_its_directory_fails_the_template(
    file: str, directory_first: bool, tmp_path: Path
) -> None:
    template = replace(sample_qube("tpl", 1 << 16, 0.5, "TemplateVM"), firewall=FIREWALL)
    writer = sample(qubes=[template], dom0_home=False)
    alone = replace(writer, qubes=[replace(template, klass="StandaloneVM", path="vm-templates/tpl")])
    members = list(writer.members())
    again = [member for member in alone.members() if f"/{file}." in member.name]
    parts = [members[4:], again] if directory_first else [again, members[4:]]
    report = judged(join_members([*members[:4], *parts[0], *parts[1]]), writer, tmp_path)
    assert report.qubes[0].outcome == "failed"
    assert "twice" in str(report.qubes[0].error)
