"""Named ways to break a backup, each with the error that a restore must end in.

Strategy: a damage takes a `BackupWriter` and gives the bytes of a broken archive. What can be done
to a finished backup (drop, swap, flip, cut) is done to its members or bytes; what an enemy who knows
the passphrase would do is written through the writer's `Replacements`, so that everything around
the one lie is authentic. Bombs are repeated streams: gibibytes cost the writer nothing.

The first qube of the writer is the victim, unless the damage says otherwise. Its first volume must fill
four chunks or more, as in `sample_backup()`.
"""

import gzip
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from qubes_restore_svc import errors

from .backup_writer import (
    BackupWriter,
    ImagePlan,
    QubePlan,
    RawMember,
    Replacements,
    compress,
    container_head,
    gnu_sparse_tar,
    header_text,
    join_members,
    pax_sparse_tar,
    plain_tar,
    qubes_xml,
    sample_image,
    sample_qube,
    tar_header,
)

GIB = 1 << 30
Scope = Literal["backup", "qube"]
Breaker = Callable[[BackupWriter], bytes | Iterable[RawMember]]
_Errors = Sequence[type[errors.RestoreError]]  # the right one first


@dataclass(frozen=True, slots=True)
class Damage:
    """One way to break a backup.

    `kind` is the error's kind (see qubes_restore_svc.errors), `also` are kinds that are as right.
    Scope `backup`: nothing is restored. Scope `qube`: the qube at position `victim` fails (or is
    refused from the start, perhaps under another name), every other one is restored. `passphrase` is
    what the person types, if not the right one.
    """

    name: str
    kind: str
    scope: Scope
    breaker: Breaker
    also: frozenset[str] = frozenset()
    victim: int = 0
    passphrase: str | None = None

    @property
    def kinds(self) -> frozenset[str]:
        """All kinds of error that are right for this damage."""
        return self.also | {self.kind}

    def apply(self, writer: BackupWriter) -> bytes:
        """The broken archive."""
        result = self.breaker(writer)
        return result if isinstance(result, bytes) else join_members(result)


#: Every damage by its name.
DAMAGES: dict[str, Damage] = {}


def sample_backup(compression: str = "gzip", sparse: str = "gnu", log_n: int = 10) -> BackupWriter:
    """A small backup with every kind of qube, whose first volume fills several chunks; every damage
    works on it. It has four qubes: work (the victim), vault, scratch (no volumes), custom-template."""
    work = QubePlan(
        "work",
        volumes={"private": sample_image(1 << 20, 0.75, 1)},
        netvm="sys-firewall",
        tags=["created-by-dom0", "project-a"],
        features={"service.cups": ""},
        firewall='<firewall version="2"><rules/></firewall>\n',
        notes="Keep the spare key in the blue box.\n",
        appmenus=["firefox.desktop"],
    )
    qubes = [
        work,
        sample_qube("vault", 1 << 19, 0.5, seed=2),
        sample_qube("scratch", 0, 0, "DispVM"),
        sample_qube("custom-template", 1 << 18, 0.6, "TemplateVM", seed=4),
    ]
    return BackupWriter(qubes, compression=compression, sparse=sparse, chunk_size=1 << 16, log_n=log_n)


# --- Building blocks, for tests with numbers of their own ----------------------------------------


def cut_off(archive: bytes, size: int) -> bytes:
    """The first `size` bytes of the archive."""
    return archive[:size]


def flip_bit(data: bytes, bit: int) -> bytes:
    """`data` with one bit changed; bits count from 0, negative ones from the end."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def edited(members: Iterable[RawMember], name: str, edit: Callable[[bytes], bytes]) -> list[RawMember]:
    """The members with the data of the one called `name` put through `edit`."""
    found = list(members)
    if name not in {member.name for member in found}:
        raise ValueError(f"no member {name!r}")
    return [replace(member, data=edit(member.data)) if member.name == name else member for member in found]


def with_cost(container: bytes, log_n: int, r: int = 8, p: int = 1) -> bytes:
    """The container with other scrypt parameters and the right checksum for them."""
    return container_head(log_n, r, p, container[16:48]) + container[64:]


def inserted(writer: BackupWriter, member: RawMember) -> list[RawMember]:
    """The backup with one more member, before the first qube's."""
    members = list(writer.members())
    place = next(number for number, found in enumerate(members) if "/" in found.name)
    return [*members[:place], member, *members[place:]]


def zero_bomb(filter_name: str, head: bytes, size: int) -> Iterator[bytes]:
    """A compressed stream of `head` and `size` zero bytes, `size` a multiple of 16 MiB.

    Several streams of one format stand for their contents in a row, so one stream of 16 MiB is made
    and repeated; the two filters for which that does not hold get at most 64 MiB.
    """
    zeros = bytes(16 << 20)
    if filter_name in ("lzma", "none"):
        return compress(filter_name, [head, *[zeros] * min(4, size // len(zeros))])
    stream = b"".join(compress(filter_name, [zeros]))
    if filter_name in ("gzip", "pigz"):  # the writer's quick level makes zeros five times as long
        stream = gzip.compress(zeros, 9, mtime=0)
    return itertools.chain(compress(filter_name, [head]), itertools.repeat(stream, size // len(zeros)))


def victim_file(writer: BackupWriter, victim: int = 0) -> str:
    """The name of the first volume's file of the qube at `victim`."""
    position = range(len(writer.qubes))[victim]
    qube = writer.qubes[position]
    return f"{qube.backup_path(position).rstrip('/')}/{next(iter(qube.volumes))}.img"


def victim_chunks(writer: BackupWriter, members: list[RawMember], victim: int = 0) -> list[int]:
    """The places in `members` of the chunks of that file."""
    prefix = victim_file(writer, victim) + "."
    return [place for place, member in enumerate(members) if member.name.startswith(prefix)]


def _damage(
    error: type[errors.RestoreError],
    scope: Scope,
    *also: type[errors.RestoreError],
    name: str | None = None,
    victim: int = 0,
    passphrase: str | None = None,
) -> Callable[[Breaker], Breaker]:
    """Registers a breaker under its own name, `_` written as `-`, or under `name`."""

    def register(breaker: Breaker) -> Breaker:
        called = name or breaker.__name__.replace("_", "-")
        if called in DAMAGES:
            raise ValueError(f"there are two damages {called!r}")
        kinds = frozenset(other.kind for other in also)
        DAMAGES[called] = Damage(called, error.kind, scope, breaker, kinds, victim, passphrase)
        return breaker

    return register


# --- The file as a whole -------------------------------------------------------------------------


@_damage(errors.EmptyInput, "backup")
def empty_file(writer: BackupWriter) -> bytes:
    return b""


@_damage(errors.NotABackup, "backup")
def some_other_file(writer: BackupWriter) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + sample_image(1 << 16, 1, 7).extents[0][1]


@_damage(errors.NotABackup, "backup", errors.EmptyInput)
def nothing_but_zeros(writer: BackupWriter) -> bytes:
    return bytes(20480)


@_damage(errors.NotABackup, "backup")
def some_other_tar(writer: BackupWriter) -> list[RawMember]:
    return [RawMember("holiday/photo.jpg", b"not a backup"), RawMember("holiday/photo2.jpg", b"either")]


@_damage(errors.WrongPassphrase, "backup", passphrase="correct horse battery stapler")
def wrong_passphrase(writer: BackupWriter) -> Iterator[RawMember]:
    return writer.members()


@_damage(errors.ArchiveTruncated, "backup", errors.NotABackup)
def cut_off_in_the_first_header(writer: BackupWriter) -> bytes:
    return cut_off(writer.to_bytes(), 300)


@_damage(errors.ArchiveTruncated, "backup")
def cut_off_in_the_metadata(writer: BackupWriter) -> bytes:
    members = list(writer.members())
    return cut_off(writer.to_bytes(), len(join_members(members[:2])) + 2048 + 100)


@_damage(errors.ArchiveTruncated, "qube", victim=-1)
def cut_off_in_the_last_chunk(writer: BackupWriter) -> bytes:
    members = list(writer.members())
    return cut_off(writer.to_bytes(), len(join_members(members[:-1])) + 2048 + 1000)


@_damage(errors.MissingVolume, "qube", errors.ArchiveTruncated, victim=-1)
def cut_off_before_the_last_qube(writer: BackupWriter) -> list[RawMember]:
    members = list(writer.members())
    return members[: victim_chunks(writer, members, -1)[0]]


@_damage(errors.BadCompression, "qube", errors.BadImage, errors.ArchiveTruncated, victim=-1)
def cut_off_between_chunks(writer: BackupWriter) -> list[RawMember]:
    return list(writer.members())[:-1]


@_damage(errors.BadArchive, "backup")
def bit_flipped_in_a_tar_header(writer: BackupWriter) -> bytes:
    members = list(writer.members())
    place = len(join_members(members[: victim_chunks(writer, members)[0]]))
    return flip_bit(writer.to_bytes(), (place + 1024 + 3) * 8)


# --- Chunks ----------------------------------------------------------------------------------------


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
    "chunk-with-r-of-zero": (_MALFORMED, lambda data: with_cost(data, 10, 0)),
    "chunk-with-n-of-1": (_MALFORMED, lambda data: with_cost(data, 0)),
}
for _name, (_error, _edit) in _CHUNK_EDITS.items():
    _damage(_error, "qube", name=_name)(_edit_chunk(_edit))


@_damage(errors.AuthenticationFailed, "qube")
def chunk_of_another_backup(writer: BackupWriter) -> list[RawMember]:
    name = f"{victim_file(writer)}.001.enc"
    older = replace(writer, backup_id="20251231T235959-99")
    data = next(member.data for member in older.members() if member.name == name)
    return edited(writer.members(), name, lambda _: data)


@_damage(errors.AuthenticationFailed, "qube")
def swapped_chunks(writer: BackupWriter) -> list[RawMember]:
    members, places = _victim(writer)
    one, other = (members[place] for place in places[1:3])
    members[places[1]], members[places[2]] = replace(one, data=other.data), replace(other, data=one.data)
    return members


@_damage(errors.ChunkOutOfOrder, "qube")
def reordered_chunks(writer: BackupWriter) -> list[RawMember]:
    members, places = _victim(writer)
    members[places[1]], members[places[2]] = members[places[2]], members[places[1]]
    return members


@_damage(errors.ChunkOutOfOrder, "qube", errors.BadCompression, errors.BadImage)
def chunk_after_other_files(writer: BackupWriter) -> list[RawMember]:
    members, places = _victim(writer)
    return [*_without(members, places[-1:]), members[places[-1]]]


@_damage(errors.ChunkOutOfOrder, "qube")
def repeated_chunk(writer: BackupWriter) -> list[RawMember]:
    members, places = _victim(writer)
    return [*members[: places[1]], members[places[1]], *members[places[1] :]]


@_damage(errors.ChunkOutOfOrder, "qube")
def file_stands_twice(writer: BackupWriter) -> list[RawMember]:
    # One other file of the same qube stands between, and the qube is not complete yet.
    members, places = _victim(writer)
    after = places[-1] + 2
    return members[:after] + [members[place] for place in places] + members[after:]


@_damage(errors.ChunkOutOfOrder, "qube")
def chunk_with_a_later_number(writer: BackupWriter) -> list[RawMember]:
    members, places = _victim(writer)
    name = members[places[1]].name.replace(".001.enc", ".007.enc")
    members[places[1]] = replace(members[places[1]], name=name)
    return members


@_damage(errors.ChunkOutOfOrder, "qube")
def missing_first_chunk(writer: BackupWriter) -> list[RawMember]:
    members, places = _victim(writer)
    return _without(members, places[:1])


@_damage(errors.ChunkOutOfOrder, "qube")
def missing_chunk(writer: BackupWriter) -> list[RawMember]:
    members, places = _victim(writer)
    return _without(members, places[2:3])


@_damage(errors.BadCompression, "qube", errors.BadImage)
def missing_last_chunk(writer: BackupWriter) -> list[RawMember]:
    members, places = _victim(writer)
    return _without(members, places[-1:])


@_damage(errors.MissingVolume, "qube")
def missing_volume(writer: BackupWriter) -> list[RawMember]:
    members, places = _victim(writer)
    return _without(members, places)


@_damage(errors.MissingVolume, "qube")
def renamed_volume(writer: BackupWriter) -> list[RawMember]:
    members, places = _victim(writer)
    for place in places:
        members[place] = replace(members[place], name=members[place].name.replace(".img.", ".old."))
    return members


def _victim(writer: BackupWriter) -> tuple[list[RawMember], list[int]]:
    members = list(writer.members())
    return members, victim_chunks(writer, members)


def _without(members: list[RawMember], places: list[int]) -> list[RawMember]:
    return [member for place, member in enumerate(members) if place not in places]


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
    _damage(errors.BadArchive, "backup", name=_name)(partial(inserted, member=_member))


# --- Header ------------------------------------------------------------------------------------------


def _with_header(change: Callable[[bytes], bytes]) -> Breaker:
    """Both copies of the header changed in the same way: it is authentic."""

    def breaker(writer: BackupWriter) -> Iterator[RawMember]:
        return _replacing(writer, header=change(_header(writer))).members()

    return breaker


_BAD, _OTHER_FORMAT = errors.BadHeader, errors.UnsupportedFormat
_HEADERS: Mapping[str, tuple[_Errors, Callable[[bytes], bytes]]] = {
    "unknown-compression-filter": (
        [errors.UnknownFilter],
        lambda text: re.sub(rb"compressed=.*\n.*filter=.*", b"compressed=True\ncompression-filter=rar", text),
    ),
    "format-5": ([_OTHER_FORMAT], lambda text: text.replace(b"version=4", b"version=5")),
    "header-without-a-version": ([_BAD, _OTHER_FORMAT], lambda text: text.replace(b"version=4\n", b"")),
    "header-without-a-backup-id": ([_BAD], lambda text: re.sub(rb"backup-id=.*\n", b"", text)),
    "header-with-a-key-twice": ([_BAD], lambda text: text + b"encrypted=True\n"),
    "header-with-escape-sequences": ([_BAD], lambda text: re.sub(rb"-id=.*", b"-id=\x1b[2J", text)),
    "header-without-encryption": (
        [_BAD, _OTHER_FORMAT],
        lambda text: text.replace(b"encrypted=True", b"encrypted=False"),
    ),
    "header-with-another-mac": (
        [_BAD, _OTHER_FORMAT],
        lambda text: text.replace(b"algorithm=scrypt", b"algorithm=SHA512"),
    ),
    "header-that-is-no-text": ([_BAD, _OTHER_FORMAT], lambda text: b"\xff\xfe\0\0"),
    "header-that-is-empty": ([_BAD, _OTHER_FORMAT], lambda text: b""),
    "header-of-a-mebibyte": (
        [_BAD, errors.BadArchive],
        lambda text: text + b"comment=" + b"a" * (1 << 20) + b"\n",
    ),
}
for _name, (_errors, _change) in _HEADERS.items():
    _damage(_errors[0], "backup", *_errors[1:], name=_name)(_with_header(_change))


@_damage(errors.BadHeader, "backup")
def header_differs_from_its_copy(writer: BackupWriter) -> Iterator[RawMember]:
    text = _header(writer)
    changed = text.replace(b"backup-id=2", b"backup-id=1")
    return _replacing(writer, header=changed, header_copy=text).members()


@_damage(errors.BadHeader, "backup")
def copy_differs_from_the_header(writer: BackupWriter) -> Iterator[RawMember]:
    return _replacing(writer, header_copy=_header(writer) + b"extra=1\n").members()


@_damage(errors.AuthenticationFailed, "backup", errors.BadHeader)
def bit_flipped_in_the_header_copy(writer: BackupWriter) -> list[RawMember]:
    return edited(writer.members(), "backup-header.hmac", lambda data: flip_bit(data, 8 * 100))


@_damage(errors.BadHeader, "backup", errors.NotABackup, errors.BadArchive)
def missing_header(writer: BackupWriter) -> list[RawMember]:
    return list(writer.members())[1:]


@_damage(errors.BadHeader, "backup", errors.BadArchive)
def missing_header_copy(writer: BackupWriter) -> list[RawMember]:
    return _without(list(writer.members()), [1])


@_damage(errors.ExcessiveCost, "backup")
def header_copy_asks_for_n_of_2_to_the_40(writer: BackupWriter) -> list[RawMember]:
    return edited(writer.members(), "backup-header.hmac", lambda data: with_cost(data, 40))


def _header(writer: BackupWriter) -> bytes:
    return header_text(writer.compression, writer.backup_id)


def _replacing(
    writer: BackupWriter, *, header: bytes | None = None, header_copy: bytes | None = None
) -> BackupWriter:
    return replace(writer, replacements=Replacements(header=header, header_copy=header_copy))


# --- qubes.xml -----------------------------------------------------------------------------------------


def _with_xml(change: Callable[[bytes, BackupWriter], bytes]) -> Breaker:
    def breaker(writer: BackupWriter) -> Iterator[RawMember]:
        content = change(qubes_xml(writer.qubes, dom0_home=writer.dom0_home), writer)
        return replace(writer, replacements=Replacements(qubes_xml=content)).members()

    return breaker


def _doctype(declarations: bytes, entity: bytes) -> Callable[[bytes, BackupWriter], bytes]:
    """The document with these declarations, and `entity` used in the victim's label."""

    def change(text: bytes, writer: BackupWriter) -> bytes:
        text = text.replace(b"<qubes ", b"<!DOCTYPE qubes [" + declarations + b"]><qubes ", 1)
        return text.replace(b'<property name="label">label-1', b'<property name="label">' + entity, 1)

    return change


_LAUGHS = b'<!ENTITY e0 "lol">' + b"".join(
    b'<!ENTITY e%d "%s">' % (level, b"&e%d;" % (level - 1) * 10) for level in range(1, 10)
)
_XML_CHANGES: Mapping[str, Callable[[bytes, BackupWriter], bytes]] = {
    "entity-bomb": _doctype(_LAUGHS, b"&e9;"),
    "external-entity": _doctype(b'<!ENTITY e SYSTEM "file:///etc/passwd">', b"&e;"),
    "external-document-type": _doctype(b'<!ENTITY % e SYSTEM "http://127.0.0.1/x.dtd"> %e;', b"label-1"),
    "qubes-xml-of-100-mib": lambda text, _: text + b"<!--" + b"a" * (100 << 20) + b"-->",
    "qubes-xml-nested-deeply": lambda text, _: text.replace(
        b"<features>", b"<features>" + b"<a>" * 200_000 + b"</a>" * 200_000, 1
    ),
    "qubes-xml-cut-off": lambda text, _: text[: len(text) // 2],
    "qubes-xml-is-no-xml": lambda text, _: b"\0\1\2\3 no xml",
    "qubes-xml-is-empty": lambda text, _: b"",
    "qubes-xml-of-another-kind": lambda text, _: b"<html><body/></html>",
}
for _name, _change_xml in _XML_CHANGES.items():
    _damage(errors.BadMetadata, "backup", name=_name)(_with_xml(_change_xml))


def _described(victim: int = 0, *, name: str | None = None, path: str | None = None) -> Breaker:
    """The victim described in another way in qubes.xml; its files stay what and where they were."""

    def breaker(writer: BackupWriter) -> Iterator[RawMember]:
        qubes = list(writer.qubes)
        qube = qubes[victim]
        qubes[victim] = replace(
            qube, name=qube.name if name is None else name, path=qube.path if path is None else path
        )
        content = qubes_xml(qubes, dom0_home=writer.dom0_home)
        return replace(writer, replacements=Replacements(qubes_xml=content)).members()

    return breaker


# XML itself forbids these characters, so nothing can be known of any qube.
for _name, _text in {
    "qube-name-with-a-control-character": "work\x07",
    "qube-name-with-an-escape-sequence": "work\x1b[2J",
}.items():
    _damage(errors.BadMetadata, "backup", name=_name)(_described(name=_text))
for _name, _text in {
    "qube-name-with-a-c1-control-sequence": "work\x9b2J",
    "qube-name-that-runs-backwards": "work\u202egpj",
    "qube-name-with-a-newline": "work\nmallory",
    "qube-name-with-dotdot": "../../etc",
    "qube-name-of-an-option": "--help",
    "qube-name-of-dom0": "dom0",
    "qube-name-of-10000-letters": "a" * 10_000,
    "qube-name-that-is-empty": "",
}.items():
    _damage(errors.BadMetadata, "qube", name=_name)(_described(name=_text))
for _name, _text in {
    "backup-path-with-dotdot": "../../etc/",
    "backup-path-that-is-absolute": "/etc/",
    "backup-path-with-an-escape-sequence": "vm\x9b2J/",
    "backup-path-that-is-empty": "",
}.items():
    _damage(errors.BadMetadata, "qube", name=_name)(_described(path=_text))
# What two qubes claim belongs to the one that comes first.
_damage(errors.BadMetadata, "qube", name="qube-name-that-stands-twice", victim=-1)(
    _described(-1, name="vault")
)
_damage(errors.BadMetadata, "qube", name="backup-path-of-another-qube", victim=-1)(
    _described(-1, path="vm11/")
)


@_damage(errors.BadMetadata, "backup", errors.BadImage, errors.BadCompression)
def qubes_xml_bomb(writer: BackupWriter) -> Iterator[RawMember]:
    head = tar_header("qubes.xml", 8 * GIB)
    return _with_stream(writer, "qubes.xml", zero_bomb(writer.compression, head, 8 * GIB))


@_damage(errors.BadMetadata, "backup", errors.BadImage, errors.BadCompression)
def zeros_without_end_after_qubes_xml(writer: BackupWriter) -> Iterator[RawMember]:
    content = qubes_xml(writer.qubes)
    honest = b"".join(plain_tar("qubes.xml", [content], len(content)))
    return _with_stream(writer, "qubes.xml", zero_bomb(writer.compression, honest, 8 * GIB))


@_damage(errors.BadMetadata, "backup", errors.BadArchive, errors.ChunkOutOfOrder)
def missing_qubes_xml(writer: BackupWriter) -> list[RawMember]:
    return _without(list(writer.members()), [2])


@_damage(errors.AuthenticationFailed, "backup", errors.BadMetadata)
def bit_flipped_in_qubes_xml(writer: BackupWriter) -> list[RawMember]:
    return edited(writer.members(), "qubes.xml.000.enc", lambda data: flip_bit(data, 8 * 200))


# --- Compressed streams --------------------------------------------------------------------------------


def _with_stream(writer: BackupWriter, file: str, stream: Iterable[bytes]) -> Iterator[RawMember]:
    return replace(writer, replacements=Replacements(compressed={file: stream})).members()


def _victim_stream(change: Callable[[bytes, BackupWriter], Iterable[bytes]]) -> Breaker:
    """The victim's compressed stream changed, every chunk of it authentic."""

    def breaker(writer: BackupWriter) -> Iterator[RawMember]:
        file = victim_file(writer)
        inner = dict(writer.files())[file]
        stream = b"".join(writer.compressed(file, inner))
        return _with_stream(writer, file, change(stream, writer))

    return breaker


_STREAMS: Mapping[str, Callable[[bytes, BackupWriter], Iterable[bytes]]] = {
    "data-after-the-compressed-stream": lambda stream, _: [stream, b"trailing data"],
    "compressed-stream-ends-early": lambda stream, _: [stream[: len(stream) * 2 // 3]],
    "compressed-stream-loses-its-end": lambda stream, writer: [
        stream[: -20480 if writer.compression == "none" else -1]  # a tar ends in padding that no one misses
    ],
    "compressed-stream-is-noise": lambda stream, _: [sample_image(1 << 18, 1, 9).extents[0][1]],
    "compressed-stream-is-empty": lambda stream, _: [],
    "compressed-stream-of-another-filter": lambda stream, writer: compress(
        "bzip2" if writer.compression in ("gzip", "pigz") else "gzip", [stream]
    ),
}
for _name, _change_stream in _STREAMS.items():
    # Without compression the same bytes are a malformed inner archive.
    _damage(errors.BadCompression, "qube", errors.BadImage, name=_name)(_victim_stream(_change_stream))


# --- Inner archives --------------------------------------------------------------------------------------

MadeArchive = Callable[[str, ImagePlan], Iterable[bytes]]


def _victim_archive(make: MadeArchive) -> Breaker:
    """The victim's inner archive replaced by `make(file name, its image)`."""

    def breaker(writer: BackupWriter) -> Iterator[RawMember]:
        file, image = victim_file(writer), next(iter(writer.qubes[0].volumes.values()))
        return replace(writer, replacements=Replacements(inner={file: make(file, image)})).members()

    return breaker


def _sparse(
    style: str, spans: Callable[[int], list[tuple[int, int]]], *, grown: int = 0, stored: int | None = None
) -> MadeArchive:
    """An archive that claims an image `grown` bytes larger than the true one, with the map that
    `spans` makes for that size, a header that says `stored`, and data for every span."""
    write = gnu_sparse_tar if style == "gnu" else pax_sparse_tar

    def make(file: str, image: ImagePlan) -> Iterator[bytes]:
        size = image.size + grown
        return write(
            file, size, spans(size), [b"x" * length for _, length in spans(size)], stored_size=stored
        )

    return make


_MAP, _IMAGE, _LARGE = errors.BadSparseMap, errors.BadImage, errors.ImageTooLarge
for _style in ("gnu", "pax"):
    _cases: list[tuple[str, _Errors, MadeArchive]] = [
        (
            "sparse-map-overlaps",
            [_MAP],
            _sparse(_style, lambda size: [(0, 8192), (4096, 8192), (size, 0)]),
        ),
        (
            "sparse-map-runs-backwards",
            [_MAP],
            _sparse(_style, lambda size: [(8192, 4096), (0, 4096), (size, 0)]),
        ),
        ("sparse-map-past-the-size", [_MAP], _sparse(_style, lambda size: [(size - 4096, 8192)])),
        ("sparse-map-far-past-the-size", [_MAP], _sparse(_style, lambda size: [(1 << 62, 4096)])),
        ("sparse-map-wraps-around", [_MAP], _sparse(_style, lambda size: [((1 << 64) - 4096, 8192)])),
        ("sparse-map-starts-below-zero", [_MAP, _IMAGE], _sparse(_style, lambda size: [(-4096, 8192)])),
        (
            "sparse-map-of-less-than-the-data",
            [_MAP, _IMAGE],
            _sparse(_style, lambda size: [(0, 4096), (size, 0)], stored=65536),
        ),
        (
            "sparse-map-of-more-than-the-data",
            [_MAP, _IMAGE],
            _sparse(_style, lambda size: [(0, 65536), (size, 0)], stored=4096),
        ),
        ("image-of-4-exbibytes", [_LARGE, _IMAGE], _sparse(_style, lambda size: [(size, 0)], grown=1 << 62)),
        ("image-of-a-tebibyte", [_LARGE], _sparse(_style, lambda size: [(size, 0)], grown=1 << 40)),
        (
            "image-of-negative-size",
            [_IMAGE, _LARGE, _MAP],
            _sparse(_style, lambda size: [(0, 4096)], grown=-(1 << 30)),
        ),
    ]
    for _name, _errors, _make in _cases:
        _damage(_errors[0], "qube", *_errors[1:], name=f"{_style}-{_name}")(_victim_archive(_make))

_MIB_OF_DIGITS = b"9" * (1 << 20) + b"\n"
_INNER: Mapping[str, tuple[_Errors, MadeArchive]] = {
    "pax-sparse-map-of-no-numbers": (
        [_MAP],
        lambda file, image: pax_sparse_tar(file, image.size, [], [], map_text=b"1\n-1\n0x10\n"),
    ),
    "pax-sparse-map-of-2-to-the-40-entries": (
        [_MAP],
        lambda file, image: pax_sparse_tar(file, image.size, [], [], map_text=b"%d\n" % (1 << 40)),
    ),
    "pax-sparse-map-with-a-huge-number": (
        [_MAP],
        lambda file, image: pax_sparse_tar(file, image.size, [], [], map_text=b"1\n" + _MIB_OF_DIGITS),
    ),
    "gnu-sparse-map-without-end": (
        [_MAP],
        lambda file, image: itertools.chain(
            [tar_header(file, 0, b"S", patches={386: b"0" * 96, 482: b"\1", 483: b"%011o\0" % image.size})],
            itertools.repeat((b"0" * 504 + b"\1").ljust(512, b"\0") * 2048, 64),
        ),
    ),
    "inner-archive-of-another-name": (
        [_IMAGE],
        lambda file, image: plain_tar("vm11/private.img", [bytes(image.size)], image.size),
    ),
    "inner-symbolic-link": ([_IMAGE], lambda file, image: _special(file, b"2")),
    "inner-hard-link": ([_IMAGE], lambda file, image: _special(file, b"1")),
    "inner-device": ([_IMAGE], lambda file, image: _special(file, b"4")),
    "inner-directory": ([_IMAGE], lambda file, image: _special(file + "/", b"5")),
    "inner-archive-with-two-members": (
        [_IMAGE],
        lambda file, image: [*_entry(file, image), *plain_tar("../../etc/passwd", [b"x"], 1)],
    ),
    "inner-archive-ends-early": ([_IMAGE], lambda file, image: _entry(file, image)[:-1]),
    "inner-archive-without-its-end": ([_IMAGE], lambda file, image: _entry(file, image)),
    "inner-archive-with-data-after-its-end": (
        [_IMAGE],
        lambda file, image: [*_entry(file, image), bytes(10240), b"x" * 512],
    ),
    "inner-archive-is-noise": ([_IMAGE], lambda file, image: [sample_image(8192, 1, 5).extents[0][1]]),
    "inner-archive-is-empty": ([_IMAGE], lambda file, image: []),
    "inner-header-with-a-wrong-checksum": (
        [_IMAGE],
        lambda file, image: [b"V" + _entry(file, image)[0][1:], *_entry(file, image)[1:]],
    ),
    "inner-pax-header-of-a-gibibyte": (
        [_IMAGE],
        lambda file, image: [
            tar_header("x", GIB, b"x", flavour="posix"),
            b"1073741824 comment=".ljust(1 << 20),
        ],
    ),
}
for _name, (_errors, _make) in _INNER.items():
    _damage(_errors[0], "qube", *_errors[1:], name=_name)(_victim_archive(_make))


@_damage(errors.ImageTooLarge, "qube")
def volume_bomb(writer: BackupWriter) -> Iterator[RawMember]:
    file = victim_file(writer)
    stream = zero_bomb(writer.compression, tar_header(file, 8 * GIB), 8 * GIB)
    return _with_stream(writer, file, stream)


@_damage(errors.BadImage, "qube")
def zeros_without_end_after_the_image(writer: BackupWriter) -> Iterator[RawMember]:
    file = victim_file(writer)
    honest = b"".join(dict(writer.files())[file])
    return _with_stream(writer, file, zero_bomb(writer.compression, honest, 8 * GIB))


@_damage(errors.BadMetadata, "qube", errors.BadImage, errors.BadCompression)
def firewall_bomb(writer: BackupWriter) -> Iterator[RawMember]:
    file = f"{victim_file(writer).rpartition('/')[0]}/firewall.xml"
    return _with_stream(writer, file, zero_bomb(writer.compression, tar_header(file, 8 * GIB), 8 * GIB))


def _special(file: str, type_flag: bytes) -> list[bytes]:
    return [tar_header(file, 0, type_flag, link_target="/etc/shadow"), bytes(10240 - 512)]


def _entry(file: str, image: ImagePlan) -> list[bytes]:
    """A plain file in an inner archive that has no end: its header and its data."""
    return [tar_header(file, image.size), *[bytes(1 << 16)] * (image.size >> 16)]


# --- Older formats -----------------------------------------------------------------------------------------


@_damage(errors.UnsupportedFormat, "backup")
def format_1(writer: BackupWriter) -> list[RawMember]:
    return [
        RawMember("qubes.xml", b"<QubesVmCollection/>"),
        RawMember("appvms/work/private.img", bytes(4096)),
    ]


@_damage(errors.UnsupportedFormat, "backup")
def format_2(writer: BackupWriter) -> list[RawMember]:
    return list(_with_old_macs("qubes.xml.000", "appvms/work/private.img.000", algorithm="SHA1"))


@_damage(errors.UnsupportedFormat, "backup")
def format_3(writer: BackupWriter) -> list[RawMember]:
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
