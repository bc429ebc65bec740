"""The beginning of a backup: header, its authenticated copy, qubes.xml.

Strategy: the first members in their fixed order, each by the same means as every later chunk. Nothing is
believed of the header until it equals the content of its container, and nothing of qubes.xml before its
MAC has been checked. A wrong passphrase shows after one derivation.
"""

from collections.abc import Generator
from dataclasses import dataclass, field

from qubes_restore_svc.archive import header as header_format
from qubes_restore_svc.archive.chunks import ChunkName, ChunkSequence, parse_chunk_name
from qubes_restore_svc.archive.container import VerifiedContainer, keys_match, verify
from qubes_restore_svc.archive.filters import check_filter, decompress
from qubes_restore_svc.archive.header import BackupHeader
from qubes_restore_svc.archive.inner_tar import read_small_file
from qubes_restore_svc.archive.qubes_xml import MAX_QUBES_XML, BackupContent, parse_qubes_xml
from qubes_restore_svc.errors import (
    AuthenticationFailed,
    BadArchive,
    BadHeader,
    EmptyInput,
    RestoreError,
    WrongPassphrase,
)
from qubes_restore_svc.worker.intake import Chunk, Intake

_QUBES_XML = "qubes.xml"


@dataclass(frozen=True, slots=True)
class OpenBackup:
    """An authenticated beginning. `filter` is the compression in force, by its canonical name."""

    header: BackupHeader
    content: BackupContent
    filter: str
    passphrase: str = field(repr=False)

    def passphrase_of(self, member: str) -> bytes:
        """The scrypt passphrase of a chunk, from its member name without `.enc`."""
        return header_format.member_passphrase(self.header.backup_id, member, self.passphrase)


def open_chunk(chunk: Chunk) -> VerifiedContainer:
    """Wait for the chunk's key and check its MAC; raises AuthenticationFailed."""
    key = chunk.key.result()
    try:
        if not keys_match(chunk.head, key):
            raise AuthenticationFailed("it does not belong to this backup, or not to this place in it")
        return verify(chunk.container, key)
    except RestoreError as error:
        raise error.at(chunk=chunk.name.number) from None


def open_backup(intake: Intake, passphrase: str, compression_filter: str | None) -> OpenBackup:
    """Read up to the end of qubes.xml. `compression_filter` overrides the header's.

    Raises EmptyInput, NotABackup, UnsupportedFormat, BadHeader, WrongPassphrase and whatever is wrong with
    qubes.xml and its chunks.
    """
    header = _open_header(intake, passphrase)
    filter_name = check_filter(
        compression_filter or (header.compression_filter if header.compressed else "none")
    )
    untrusted_pieces = _file_pieces(intake, _QUBES_XML, header, passphrase)
    try:
        xml = read_small_file(decompress(filter_name, untrusted_pieces), _QUBES_XML, MAX_QUBES_XML)
        content = parse_qubes_xml(xml)
    except RestoreError as error:
        raise error.at(qube=_QUBES_XML) from error
    finally:
        untrusted_pieces.close()
    return OpenBackup(header, content, filter_name, passphrase)


def _open_header(intake: Intake, passphrase: str) -> BackupHeader:
    member = intake.next_member()
    if member is None:
        raise EmptyInput("there is nothing in it")
    if member.name != header_format.HEADER_MEMBER:
        header_format.recognise_old_format(member.name)
    if member.size > header_format.MAX_HEADER_SIZE:
        raise BadHeader(f"it has {member.size} bytes")
    untrusted_text = bytes(intake.read_content(member.size))
    header_format.peek_version(untrusted_text)
    member = intake.next_member()
    if member is None or member.name != header_format.HEADER_HMAC_MEMBER:
        raise BadHeader("its authenticated copy does not follow it")
    if member.size > header_format.MAX_HEADER_SIZE:
        raise BadHeader(f"its authenticated copy has {member.size} bytes")
    name = ChunkName(member.name, 0, member.name)
    chunk = intake.take(name, member.size, header_format.header_passphrase(passphrase))
    try:
        key = chunk.key.result()
        if not keys_match(chunk.head, key):
            raise WrongPassphrase("the backup does not open with this passphrase")
        text = b"".join(bytes(piece) for piece in verify(chunk.container, key).plaintext())
    finally:
        intake.release(chunk)
    if text != untrusted_text:
        raise BadHeader("it differs from its authenticated copy")
    return header_format.parse_header(text)


def _file_pieces(
    intake: Intake, file: str, header: BackupHeader, passphrase: str
) -> Generator[bytes, None, None]:
    """The verified content of `file`, which must come next, piece by piece; stops at the next file."""
    sequence = ChunkSequence()
    found = False
    while (member := intake.next_member()) is not None:
        name = parse_chunk_name(member.name)
        if name.file != file:
            intake.push_back(member)
            break
        found = True
        sequence.expect(name)
        key = header_format.member_passphrase(header.backup_id, name.member, passphrase)
        chunk = intake.take(name, member.size, key)
        try:
            yield from open_chunk(chunk).plaintext()
        finally:
            intake.release(chunk)
    if not found:
        raise BadArchive(f"{file} does not follow the header")
