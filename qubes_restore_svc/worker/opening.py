"""The beginning of a backup: header, its authenticated copy, qubes.xml.

Strategy: the first members in their fixed order, each by the same means as every later chunk. Nothing is
believed of the header until it equals the content of its container, and nothing of qubes.xml before its
MAC has been checked. The keys of both are derived at once. Each is a witness for the other: a passphrase is
wrong if neither opens its container, and if only one does, the computation of the other was. So a wrong
passphrase is told without deriving anything twice, and never because a processor was wrong once.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace

from qubes_restore_svc.archive import header as header_format
from qubes_restore_svc.archive.chunks import ChunkName, ChunkSequence, parse_chunk_name
from qubes_restore_svc.archive.container import VerifiedContainer, keys_match, verify
from qubes_restore_svc.archive.filters import check_filter, decompress
from qubes_restore_svc.archive.header import BackupHeader
from qubes_restore_svc.archive.inner_tar import read_small_file
from qubes_restore_svc.archive.openssl import VerifiedPiece
from qubes_restore_svc.archive.qubes_xml import MAX_QUBES_XML, BackupContent, parse_qubes_xml
from qubes_restore_svc.errors import (
    AuthenticationFailed,
    BadArchive,
    BadHeader,
    EmptyInput,
    RestoreError,
    WrongPassphrase,
)
from qubes_restore_svc.worker.events import Chunk, Piece
from qubes_restore_svc.worker.intake import Intake, PassphraseOf
from qubes_restore_svc.worker.pieces import FirstFile, Pieces, open_header

_QUBES_XML = "qubes.xml"
_QUBES_XML_CHUNK = f"{_QUBES_XML}."


#: Checks the MAC of a chunk; what it returns has the content. The last argument gets lines for the person.
OpenChunk = Callable[[Intake, Chunk | Piece, Callable[[str], None]], VerifiedContainer | VerifiedPiece]


@dataclass(frozen=True, slots=True)
class OpenBackup:
    """An authenticated beginning. `filter` is the compression in force, by its canonical name; `pieces` tells
    how they are read in a backup of format 3."""

    header: BackupHeader
    content: BackupContent
    filter: str
    passphrase: str = field(repr=False)
    pieces: Pieces | None = None

    @property
    def passphrase_of(self) -> PassphraseOf | None:
        """Makes the scrypt passphrase of a chunk from its member name without `.enc`; None in format 3."""
        if self.pieces is not None:
            return None
        return lambda member: header_format.member_passphrase(self.header.backup_id, member, self.passphrase)

    def open_chunk(
        self, intake: Intake, chunk: Chunk | Piece, remark: Callable[[str], None]
    ) -> VerifiedContainer | VerifiedPiece:
        """The content of a chunk whose MAC was checked. Raises what `open_chunk` raises, and BadContainer."""
        if isinstance(chunk, Chunk):
            return open_chunk(intake, chunk, remark)
        assert self.pieces is not None
        return self.pieces.open_piece(intake, chunk)

    def decode(self, stored: Iterable[bytes]) -> Iterator[bytes]:
        """The inner archive of a file, from the content of its chunks."""
        return decompress(self.filter, stored if self.pieces is None else self.pieces.decrypt(stored))


def open_chunk(intake: Intake, chunk: Chunk, remark: Callable[[str], None]) -> VerifiedContainer:
    """Wait for the chunk's key and check its MAC. A key that does not fit is derived once more.

    Raises AuthenticationFailed, and what `Intake.fitting_key` raises; for `remark` see there.
    """
    try:
        key = intake.fitting_key(chunk, remark, name=f"chunk {chunk.name.number}")
        if key is None:
            raise AuthenticationFailed("it does not belong to this backup, or not to this place in it")
        return verify(intake.container(chunk), key)
    except RestoreError as error:
        raise error.at(chunk=chunk.name.number) from None


def open_backup(
    intake: Intake,
    passphrase: str,
    compression_filter: str | None,
    *,
    remark: Callable[[str], None],
    ahead: bool = False,
) -> OpenBackup:
    """Read up to the end of qubes.xml. `compression_filter` overrides the header's; `remark` gets lines for
    the person.

    The keys of the header and of qubes.xml are derived at once, and with `ahead` those of the volumes that
    follow as well, before the header has been authenticated: its backup id goes into their passphrases,
    and if it was false they open nothing.

    Raises EmptyInput, NotABackup, UnsupportedFormat, BadHeader, WrongPassphrase and whatever is wrong with
    qubes.xml and its chunks.
    """
    untrusted_text = _header_text(intake)
    if header_format.peek_version(untrusted_text) == 3:
        return _open_format_3(intake, untrusted_text, passphrase, compression_filter)
    header = _Header(intake, untrusted_text, passphrase)
    xml = _QubesXml(intake, passphrase, remark)
    try:
        untrusted_id = header.untrusted_id()
        complete = xml.begin(untrusted_id, before_waiting=header.settle)
        if ahead and complete:
            intake.start(lambda member: header_format.member_passphrase(untrusted_id, member, passphrase))
        authentic = header.result(xml.opens, remark)
        filter_name = check_filter(compression_filter or authentic.effective_filter)
        content = _read_qubes_xml(xml.pieces(), filter_name, 4)
    finally:
        header.release()
        xml.release()
    return OpenBackup(authentic, content, filter_name, passphrase)


def _header_text(intake: Intake) -> bytes:
    """The header as it stands there. Raises EmptyInput, NotABackup, UnsupportedFormat, BadHeader."""
    member = intake.next_member()
    if member is None:
        raise EmptyInput("there is nothing in it")
    if member.name != header_format.HEADER_MEMBER:
        header_format.recognise_old_format(member.name)
    if member.size > header_format.MAX_HEADER_SIZE:
        raise BadHeader(f"the header has {member.size} bytes")
    return bytes(intake.read_content(member.size))


def _open_format_3(
    intake: Intake, untrusted_text: bytes, passphrase: str, compression_filter: str | None
) -> OpenBackup:
    header, pieces = open_header(intake, untrusted_text, passphrase)
    filter_name = check_filter(compression_filter or header.effective_filter)
    xml = FirstFile(intake, pieces, _QUBES_XML)
    content = _read_qubes_xml(xml.content(), filter_name, 3)
    # The format has no id; this is as good, and stays the same for every copy of the backup.
    return OpenBackup(
        replace(header, backup_id=f"format3-{xml.identity}"), content, filter_name, passphrase, pieces
    )


class _Header:
    """The header as it stands there, and the container of its authenticated copy."""

    def __init__(self, intake: Intake, untrusted_text: bytes, passphrase: str) -> None:
        self._intake = intake
        self._untrusted_text = untrusted_text
        self._container: bytes | None = None
        self._released = False
        member = intake.next_member()
        if member is None or member.name != header_format.HEADER_HMAC_MEMBER:
            raise BadHeader("the header is not followed by its authenticated copy")
        if member.size > header_format.MAX_HEADER_SIZE:
            raise BadHeader(f"the header's authenticated copy has {member.size} bytes")
        name = ChunkName(member.name, 0, member.name)
        self._copy = intake.take(name, member.size, header_format.header_passphrase(passphrase), urgent=True)

    def untrusted_id(self) -> str:
        """The backup id that the header claims, in valid form. Raises BadHeader, UnsupportedFormat."""
        return header_format.parse_header(self._untrusted_text).backup_id

    def settle(self) -> None:
        """Wait for the key, and give the copy's memory back."""
        if self._container is None:
            self._copy.key.exception()
            self._container = bytes(self._intake.container(self._copy))
            self.release()

    def result(self, witness: Callable[[], bool], remark: Callable[[str], None]) -> BackupHeader:
        """The authenticated header. `witness` tells whether something else opens with the passphrase.

        Raises WrongPassphrase, AuthenticationFailed, BadHeader, and what `Intake.fitting_key` raises.
        """
        self.settle()
        assert self._container is not None
        if not keys_match(self._copy.head, self._copy.key.result()) and not witness():
            raise WrongPassphrase("the backup does not open with this passphrase")
        key = self._intake.fitting_key(self._copy, remark, name="the header")
        if key is None:
            raise BadHeader("the header's authenticated copy does not open, though the passphrase is right")
        text = b"".join(verify(self._container, key).plaintext())
        return header_format.open_header(self._untrusted_text, text)

    def release(self) -> None:
        """Give back what is held."""
        if not self._released:
            self._released = True
            self._intake.release(self._copy)


def _read_qubes_xml(
    pieces: Generator[bytes, None, None], filter_name: str, backup_format: int
) -> BackupContent:
    try:
        text = read_small_file(decompress(filter_name, pieces), _QUBES_XML, MAX_QUBES_XML)
        return parse_qubes_xml(text, backup_format)
    except RestoreError as error:
        raise error.at(qube=_QUBES_XML) from error
    finally:
        pieces.close()


class _QubesXml:
    """The chunks of qubes.xml, which must come next; nearly always there is one."""

    def __init__(self, intake: Intake, passphrase: str, remark: Callable[[str], None]) -> None:
        self._intake = intake
        self._passphrase = passphrase
        self._remark = lambda text: remark(f"{_QUBES_XML}: {text}")
        self._backup_id = ""
        self._sequence = ChunkSequence()
        self._next: Chunk | None = None
        self._error: RestoreError | None = None
        self._over = False

    def begin(self, untrusted_id: str, before_waiting: Callable[[], None]) -> bool:
        """Take the first chunk, so that its key is derived; True if it is the only one.

        `before_waiting` gives back what the opening holds: see `Budget.admit`.
        What is wrong here is raised by `pieces`: what is wrong with the header counts first.
        """
        self._backup_id = untrusted_id
        try:
            self._next = self._take(before_waiting)
            if self._next is None:
                raise BadArchive(f"{_QUBES_XML} does not follow the header")
            member = self._intake.next_member()
            self._over = member is None or not member.name.startswith(_QUBES_XML_CHUNK)
            if member is not None:
                self._intake.push_back(member)
        except RestoreError as error:
            self._error = error
        return self._over and self._error is None

    def opens(self) -> bool:
        """Does the key of the first chunk fit? False if it does not, or cannot be had."""
        if self._next is None:
            return False
        key = self._next.key
        # If something went wrong with it, it is no witness; that is told where the chunk is read.
        return key.exception() is None and keys_match(self._next.head, key.result())

    def pieces(self) -> Generator[bytes, None, None]:
        """The verified content, piece by piece."""
        if self._error is not None:
            raise self._error
        while self._next is not None:
            yield from open_chunk(self._intake, self._next, self._remark).plaintext()
            self.release()
            self._next = None if self._over else self._take()

    def release(self) -> None:
        """Give back what is held."""
        if self._next is not None:
            self._intake.release(self._next)
            self._next = None

    def _take(self, before_waiting: Callable[[], None] | None = None) -> Chunk | None:
        member = self._intake.next_member()
        if member is None:
            return None
        if not member.name.startswith(_QUBES_XML_CHUNK):
            self._intake.push_back(member)
            return None
        name = parse_chunk_name(member.name)
        self._sequence.expect(name)
        passphrase = header_format.member_passphrase(self._backup_id, name.member, self._passphrase)
        return self._intake.take(name, member.size, passphrase, urgent=True, before_waiting=before_waiting)
