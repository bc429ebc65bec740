"""The beginning of a backup of format 3, and its pieces, which are authenticated without a key derivation.

Strategy: the same order as in format 4, with other means. The header's MAC tells whether the passphrase is
right. It must be one of the known digests, by its length; the header then says which one all others have.
What `open_piece` returns has been authenticated, and `decrypt` puts the content of a file's pieces together.
"""

import re
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field

from qubes_restore_svc.archive import openssl
from qubes_restore_svc.archive.chunks import ChunkSequence, parse_piece_name
from qubes_restore_svc.archive.header import (
    HEADER_HMAC_MEMBER,
    BackupHeader,
    parse_header,
    passphrase_bytes,
)
from qubes_restore_svc.archive.types import shown
from qubes_restore_svc.errors import (
    AuthenticationFailed,
    BadArchive,
    BadHeader,
    RestoreError,
    WrongPassphrase,
)
from qubes_restore_svc.worker.events import Piece
from qubes_restore_svc.worker.intake import Intake

_NUMBER = re.compile(rb"[0-9A-Fa-f]+\s*$")


@dataclass(frozen=True, slots=True)
class Pieces:
    """How the pieces of one backup are read. `cipher` is None if they are not encrypted."""

    passphrase: bytes = field(repr=False)
    digest: str
    cipher: openssl.StreamCipher | None

    def open_piece(self, intake: Intake, piece: Piece) -> openssl.VerifiedPiece:
        """Check the piece's MAC. Raises AuthenticationFailed, BadContainer."""
        try:
            return openssl.VerifiedPiece(intake.container(piece), piece.line, self.digest, self.passphrase)
        except RestoreError as error:
            raise error.at(chunk=piece.name.number) from None

    def decrypt(self, pieces: Iterable[bytes]) -> Iterable[bytes]:
        """The plaintext of a file from the content of its pieces. Raises BadContainer."""
        return pieces if self.cipher is None else openssl.decrypt(pieces, self.cipher, self.passphrase)


def open_header(intake: Intake, untrusted_text: bytes, passphrase: str) -> tuple[BackupHeader, Pieces]:
    """Authenticate the header, whose MAC must be the next member. Raises WrongPassphrase, BadHeader."""
    member = intake.next_member()
    if member is None or member.name != HEADER_HMAC_MEMBER:
        raise BadHeader("the header is not followed by its MAC")
    if member.size > openssl.MAX_MAC_LINE:
        raise BadHeader(f"the header's MAC has {member.size} bytes")
    untrusted_line = bytes(intake.read_content(member.size))
    digest = openssl.digest_of(untrusted_line)
    if digest is None:
        raise BadHeader("what follows the header is not a MAC that openssl prints")
    key = passphrase_bytes(passphrase)
    try:
        openssl.VerifiedPiece(untrusted_text, untrusted_line, digest, key)
    except AuthenticationFailed:
        raise WrongPassphrase("the backup does not open with this passphrase") from None
    header = parse_header(untrusted_text)
    cipher = openssl.check_cipher(header.crypto_algorithm) if header.encrypted else None
    return header, Pieces(key, openssl.check_digest(header.hmac_algorithm), cipher)


class FirstFile:
    """The pieces of the file `name`, which must come next: their content, and what identifies it."""

    def __init__(self, intake: Intake, pieces: Pieces, name: str) -> None:
        self._intake = intake
        self._pieces = pieces
        self._name = name
        self._macs = b""

    @property
    def identity(self) -> str:
        """Letters and digits that no other backup has: the MAC of what was read, which has a salt in it."""
        match = _NUMBER.search(self._macs)
        assert match is not None
        return match[0][:32].decode("ascii").lower()

    def content(self) -> Generator[bytes, None, None]:
        """The content, piece by piece."""
        yield from self._pieces.decrypt(self._stored())

    def _stored(self) -> Iterator[bytes]:
        sequence = ChunkSequence()
        while (member := self._intake.next_member()) is not None:
            if not member.name.startswith(f"{self._name}."):
                self._intake.push_back(member)
                break
            name = parse_piece_name(member.name)
            if name is None:
                raise BadArchive(f"{self._name} lacks the piece to which {shown(member.name)} belongs")
            sequence.expect(name)
            piece = self._intake.take_piece(name, member.size)
            try:
                yield from self._pieces.open_piece(self._intake, piece).plaintext()
            finally:
                self._intake.release(piece)
            self._macs = self._macs or piece.line
        if not self._macs:
            raise BadArchive(f"{self._name} does not follow the header")
