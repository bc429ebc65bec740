"""Damages of what says what a backup holds: its header, and qubes.xml.

Strategy: but for a flipped bit or a lost member, each is written by an enemy who knows the
passphrase: the document lies, and its container is authentic.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from qubes_restore_svc import errors

from .backup_writer import BackupWriter, Replacements
from .containers import header_text
from .damage_tools import (
    GIB,
    Breaker,
    DamageGroup,
    Errors,
    edited,
    flip_bit,
    with_cost,
    with_stream,
    without,
    zero_bomb,
)
from .inner_archives import plain_tar
from .outer_archive import RawMember
from .qubes_xml_writer import qubes_xml
from .tar_blocks import tar_header

METADATA_DAMAGES = DamageGroup()


# --- Header ------------------------------------------------------------------------------------------


def _with_header(change: Callable[[bytes], bytes]) -> Breaker:
    """Both copies of the header changed in the same way: it is authentic."""

    def breaker(writer: BackupWriter) -> Iterator[RawMember]:
        return _replacing(writer, header=change(_header(writer))).members()

    return breaker


_BAD, _OTHER_FORMAT = errors.BadHeader, errors.UnsupportedFormat
_HEADERS: Mapping[str, tuple[Errors, Callable[[bytes], bytes]]] = {
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
    METADATA_DAMAGES.add(_errors[0], "backup", *_errors[1:], name=_name)(_with_header(_change))


@METADATA_DAMAGES.add(errors.BadHeader, "backup")
def header_differs_from_its_copy(writer: BackupWriter) -> Iterator[RawMember]:
    text = _header(writer)
    changed = text.replace(b"backup-id=2", b"backup-id=1")
    return _replacing(writer, header=changed, header_copy=text).members()


@METADATA_DAMAGES.add(errors.BadHeader, "backup")
def copy_differs_from_the_header(writer: BackupWriter) -> Iterator[RawMember]:
    return _replacing(writer, header_copy=_header(writer) + b"extra=1\n").members()


@METADATA_DAMAGES.add(errors.AuthenticationFailed, "backup", errors.BadHeader)
def bit_flipped_in_the_header_copy(writer: BackupWriter) -> list[RawMember]:
    return edited(writer.members(), "backup-header.hmac", lambda data: flip_bit(data, 8 * 100))


@METADATA_DAMAGES.add(errors.BadHeader, "backup", errors.NotABackup, errors.BadArchive)
def missing_header(writer: BackupWriter) -> list[RawMember]:
    return list(writer.members())[1:]


@METADATA_DAMAGES.add(errors.BadHeader, "backup", errors.BadArchive)
def missing_header_copy(writer: BackupWriter) -> list[RawMember]:
    return without(list(writer.members()), [1])


@METADATA_DAMAGES.add(errors.ExcessiveCost, "backup")
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
    METADATA_DAMAGES.add(errors.BadMetadata, "backup", name=_name)(_with_xml(_change_xml))


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
    METADATA_DAMAGES.add(errors.BadMetadata, "backup", name=_name)(_described(name=_text))
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
    METADATA_DAMAGES.add(errors.BadMetadata, "qube", name=_name)(_described(name=_text))
for _name, _text in {
    "backup-path-with-dotdot": "../../etc/",
    "backup-path-that-is-absolute": "/etc/",
    "backup-path-with-an-escape-sequence": "vm\x9b2J/",
    "backup-path-that-is-empty": "",
}.items():
    METADATA_DAMAGES.add(errors.BadMetadata, "qube", name=_name)(_described(path=_text))
# A name that two qubes have belongs to the first; what lies in a place that two claim is of neither.
METADATA_DAMAGES.add(errors.BadMetadata, "qube", name="qube-name-that-stands-twice", victims=[-1])(
    _described(-1, name="vault")
)
METADATA_DAMAGES.add(errors.BadMetadata, "qube", name="backup-path-of-another-qube", victims=[-1, 2])(
    _described(-1, path="vm12/")
)


@METADATA_DAMAGES.add(errors.BadMetadata, "backup", errors.BadImage, errors.BadCompression)
def qubes_xml_bomb(writer: BackupWriter) -> Iterator[RawMember]:
    head = tar_header("qubes.xml", 8 * GIB)
    return with_stream(writer, "qubes.xml", zero_bomb(writer.compression, head, 8 * GIB))


@METADATA_DAMAGES.add(errors.BadMetadata, "backup", errors.BadImage, errors.BadCompression)
def zeros_without_end_after_qubes_xml(writer: BackupWriter) -> Iterator[RawMember]:
    content = qubes_xml(writer.qubes)
    honest = b"".join(plain_tar("qubes.xml", [content], len(content)))
    return with_stream(writer, "qubes.xml", zero_bomb(writer.compression, honest, 8 * GIB))


@METADATA_DAMAGES.add(errors.BadMetadata, "backup", errors.BadArchive, errors.ChunkOutOfOrder)
def missing_qubes_xml(writer: BackupWriter) -> list[RawMember]:
    return without(list(writer.members()), [2])


@METADATA_DAMAGES.add(errors.AuthenticationFailed, "backup", errors.BadMetadata)
def bit_flipped_in_qubes_xml(writer: BackupWriter) -> list[RawMember]:
    return edited(writer.members(), "qubes.xml.000.enc", lambda data: flip_bit(data, 8 * 200))
