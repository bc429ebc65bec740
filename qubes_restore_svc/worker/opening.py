"""The beginning of a backup: header, its authenticated copy, qubes.xml.

Strategy: the first members in their fixed order, each by the same means as every later chunk. Nothing is
believed of the header until it equals the content of its container, and nothing of qubes.xml before its MAC
has been checked. The keys of both are derived at once. The two check each other. If neither opens its
container, the passphrase is wrong; if only one does, the other key was computed wrongly. So a wrong
passphrase is told without deriving anything twice, and never because a processor was wrong once.

In format 3 no key is derived. The header's MAC must be one of the known digests, by its length; the header
then says which one all others have.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace

from qubes_restore_svc.archive import header as header_format
from qubes_restore_svc.archive import openssl
from qubes_restore_svc.archive.container import open_small
from qubes_restore_svc.archive.filters import check_filter, decompress
from qubes_restore_svc.archive.header import HEADER_HMAC_MEMBER, MAX_HEADER_SIZE, BackupHeader
from qubes_restore_svc.archive.inner_tar import read_small_file
from qubes_restore_svc.archive.members import Buffer, ChunkName, ChunkSequence, shown
from qubes_restore_svc.archive.qubes_xml import MAX_QUBES_XML, BackupContent, parse_qubes_xml
from qubes_restore_svc.errors import (
    AuthenticationFailed,
    BadArchive,
    BadContainer,
    BadHeader,
    EmptyInput,
    RestoreError,
    WrongPassphrase,
)
from qubes_restore_svc.worker.chunk import Chunk, ChunkStore
from qubes_restore_svc.worker.keys import KeyScheduler
from qubes_restore_svc.worker.proofs import (
    ContainerProof,
    ContainerProofs,
    MacLineProof,
    MacLineProofs,
    Proofs,
    Remark,
)
from qubes_restore_svc.worker.source import MemberStream

_QUBES_XML = "qubes.xml"
_QUBES_XML_CHUNK = f"{_QUBES_XML}."


def _as_it_is(stored: Iterable[Buffer]) -> Iterable[Buffer]:
    return stored


#: Gets the error of a wrong passphrase, and returns another passphrase; it blocks, and may raise.
OtherPassphrase = Callable[[WrongPassphrase], str]


@dataclass(frozen=True, slots=True)
class OpenedBackup:
    """An authenticated beginning. `filter` is the compression in force, by its canonical name; `proofs` tells
    how the chunks that follow are proven; `decrypt` makes the content of a file from that of its chunks."""

    header: BackupHeader
    content: BackupContent
    filter: str
    proofs: Proofs = field(repr=False)
    decrypt: Callable[[Iterable[Buffer]], Iterable[Buffer]] = field(default=_as_it_is, repr=False)

    def decode(self, stored: Iterable[Buffer]) -> Iterator[bytes]:
        """The inner archive of a file, from the content of its chunks."""
        return decompress(self.filter, self.decrypt(stored))


def open_backup(
    store: ChunkStore,
    scheduler: KeyScheduler,
    passphrase: str,
    compression_filter: str | None,
    *,
    remark: Remark,
    go_ahead: Callable[[Proofs], None] | None = None,
    other_passphrase: OtherPassphrase | None = None,
) -> OpenedBackup:
    """Read up to the end of qubes.xml. `compression_filter` overrides the header's; `remark` gets lines for
    the person.

    The keys of the header and of qubes.xml are derived at once. When both were asked for, `go_ahead` is told
    how the chunks that follow are proven, so that their keys can be derived as well. That is before the
    header has been authenticated: its backup id goes into their passphrases, and if it was false they open
    nothing. So it does not go together with `other_passphrase`, which is asked for another passphrase when
    one was wrong: nothing is read a second time then, but the keys are derived anew.

    Raises EmptyInput, NotABackup, UnsupportedFormat, BadHeader, WrongPassphrase and whatever is wrong with
    qubes.xml and its chunks.
    """
    untrusted_text = _header_text(store.members)
    if header_format.peek_version(untrusted_text) == 3:
        return _open_format_3(store, untrusted_text, passphrase, compression_filter, other_passphrase)
    header = _Header(store, scheduler, untrusted_text, passphrase)
    xml = None
    try:
        untrusted_id = header_format.parse_header(untrusted_text).backup_id
        proofs = ContainerProofs(
            scheduler, lambda member: header_format.member_passphrase(untrusted_id, member, passphrase)
        )
        xml = _QubesXml(store, proofs, remark)
        complete = xml.begin(before_waiting=header.settle)
        if go_ahead is not None and complete:
            go_ahead(proofs)
        while not header.fits(xml.opens):
            if other_passphrase is None:
                raise _wrong()
            passphrase = other_passphrase(_wrong())  # `proofs` are made with this one from now on
            header.derive_again(passphrase)
            xml.derive_again(proofs)
        authentic = header.result(remark)
        filter_name = check_filter(compression_filter or authentic.effective_filter)
        content = _read_qubes_xml(xml.pieces(), filter_name, 4)
    finally:
        header.release()
        if xml is not None:
            xml.release()
    return OpenedBackup(authentic, content, filter_name, proofs)


def _header_text(members: MemberStream) -> bytes:
    """The header as it stands there. Raises EmptyInput, NotABackup, UnsupportedFormat, BadHeader."""
    member = members.next_member()
    if member is None:
        raise EmptyInput("there is nothing in it")
    if member.name != header_format.HEADER_MEMBER:
        header_format.recognise_old_format(member.name)
    if member.size > MAX_HEADER_SIZE:
        raise BadHeader(f"the header has {member.size} bytes")
    return bytes(members.read_content(member.size))


def _wrong() -> WrongPassphrase:
    return WrongPassphrase("the backup does not open with this passphrase")


def _open_format_3(
    store: ChunkStore,
    untrusted_text: bytes,
    passphrase: str,
    compression_filter: str | None,
    other_passphrase: OtherPassphrase | None,
) -> OpenedBackup:
    mac = _header_mac(store.members)
    while True:
        key = header_format.passphrase_bytes(passphrase)
        try:
            openssl.open_piece(untrusted_text, mac, key)
            break
        except AuthenticationFailed:
            if other_passphrase is None:
                raise _wrong() from None
        passphrase = other_passphrase(_wrong())
    header = header_format.parse_header(untrusted_text)
    cipher = openssl.check_cipher(header.crypto_algorithm) if header.encrypted else None
    proofs = MacLineProofs(openssl.check_digest(header.hmac_algorithm), key)
    filter_name = check_filter(compression_filter or header.effective_filter)

    def decrypt(stored: Iterable[Buffer]) -> Iterable[Buffer]:
        return stored if cipher is None else openssl.decrypt(stored, cipher, key)

    xml = _QubesXml(store, proofs, lambda _: None)
    try:
        xml.begin()
        identity = xml.identity
        content = _read_qubes_xml(decrypt(xml.pieces()), filter_name, 3)
    finally:
        xml.release()
    # The format has no id; this is as good, and stays the same for every copy of the backup.
    header = replace(header, backup_id=f"format3-{identity}")
    return OpenedBackup(header, content, filter_name, proofs, decrypt)


def _header_mac(members: MemberStream) -> openssl.PieceMac:
    """The MAC of a header of format 3, which must be the next member. Raises BadHeader."""
    member = members.next_member()
    if member is None or member.name != HEADER_HMAC_MEMBER:
        raise BadHeader("the header is not followed by its MAC")
    if member.size > openssl.MAX_MAC_LINE:
        raise BadHeader(f"the header's MAC has {member.size} bytes")
    try:
        return openssl.parse_mac(members.read_content(member.size))
    except BadContainer:
        raise BadHeader("what follows the header is not a MAC that openssl prints") from None


def _read_qubes_xml(stored: Iterable[Buffer], filter_name: str, backup_format: int) -> BackupContent:
    try:
        text = read_small_file(decompress(filter_name, stored), _QUBES_XML, MAX_QUBES_XML)
        return parse_qubes_xml(text, backup_format)
    except RestoreError as error:
        raise error.at(qube=_QUBES_XML) from error


class _Header:
    """The header as it stands there, and the container of its authenticated copy (format 4)."""

    def __init__(
        self, store: ChunkStore, scheduler: KeyScheduler, untrusted_text: bytes, passphrase: str
    ) -> None:
        self._untrusted_text = untrusted_text
        self._container: bytes | None = None
        member = store.members.next_member()
        if member is None or member.name != HEADER_HMAC_MEMBER:
            raise BadHeader("the header is not followed by its authenticated copy")
        if member.size > MAX_HEADER_SIZE:
            raise BadHeader(f"the header's authenticated copy has {member.size} bytes")
        name = ChunkName(member.name, 0, member.name)
        key = header_format.header_passphrase(passphrase)
        proofs = ContainerProofs(scheduler, lambda _: key, label="the header")
        self._copy = store.take(name, member.size, proofs, urgent=True)

    @property
    def _proof(self) -> ContainerProof:
        assert isinstance(self._copy.proof, ContainerProof)
        return self._copy.proof

    def settle(self) -> None:
        """Wait for the key, and give the copy's memory back."""
        if self._container is None:
            self._proof.failed()
            self._container = bytes(self._copy.untrusted_content())
            self.release()

    def fits(self, witness: Callable[[], bool]) -> bool:
        """Is the passphrase right? `witness` tells whether something else opens with it."""
        self.settle()
        return self._proof.fits() or witness()

    def derive_again(self, passphrase: str) -> None:
        """Derive the key from another passphrase; blocks."""
        self._proof.derive_again(header_format.header_passphrase(passphrase))

    def result(self, remark: Remark) -> BackupHeader:
        """The authenticated header. Raises AuthenticationFailed, BadHeader, and what `Chunk.open` raises."""
        assert self._container is not None
        key = self._proof.fitting_key(remark)
        if key is None:
            raise BadHeader("the header's authenticated copy does not open, though the passphrase is right")
        text = open_small(self._container, key)
        return header_format.open_header(self._untrusted_text, text)

    def release(self) -> None:
        """Give back what is held."""
        self._copy.release()


class _QubesXml:
    """The chunks of qubes.xml, which must come next; nearly always there is one."""

    def __init__(self, store: ChunkStore, proofs: Proofs, remark: Remark) -> None:
        self._store = store
        self._proofs = proofs
        self._remark = lambda text: remark(f"{_QUBES_XML}: {text}")
        self._sequence = ChunkSequence()
        self._next: Chunk | None = None
        self._error: RestoreError | None = None
        self._over = False

    def begin(self, before_waiting: Callable[[], None] | None = None) -> bool:
        """Take the first chunk, so that its key is derived; True if it is the only one.

        `before_waiting` gives back what the opening holds: see `Budget.admit`.
        What is wrong here is raised by `pieces`: what is wrong with the header counts first.
        """
        members = self._store.members
        try:
            self._next = self._take(before_waiting)
            if self._next is None:
                raise BadArchive(f"{_QUBES_XML} does not follow the header")
            member = members.next_member()
            self._over = member is None or not member.name.startswith(_QUBES_XML_CHUNK)
            if member is not None:
                members.push_back(member)
        except RestoreError as error:
            self._error = error
        return self._over and self._error is None

    def opens(self) -> bool:
        """Does the key of the first chunk fit? False if it does not, or if there is no key."""
        # If something went wrong with it, it is no witness; that is told where the chunk is read.
        proof = None if self._next is None else self._next.proof
        return isinstance(proof, ContainerProof) and not proof.failed() and proof.fits()

    def derive_again(self, proofs: ContainerProofs) -> None:
        """The same after another passphrase was asked for; blocks."""
        proof = None if self._next is None else self._next.proof
        if isinstance(proof, ContainerProof) and self._next is not None:
            proof.derive_again(proofs.passphrase_of(self._next.name.member))

    @property
    def identity(self) -> str:
        """Letters and digits that no other backup of format 3 has: the MAC of the first chunk, in which there
        is a salt; "" if `pieces` will raise."""
        proof = None if self._next is None else self._next.proof
        return proof.mac.value.hex()[:32] if isinstance(proof, MacLineProof) else ""

    def pieces(self) -> Generator[memoryview, None, None]:
        """The verified content, piece by piece."""
        if self._error is not None:
            raise self._error
        while self._next is not None:
            yield self._next.open(self._remark)
            self.release()
            self._next = None if self._over else self._take()

    def release(self) -> None:
        """Give back what is held."""
        if self._next is not None:
            self._next.release()
            self._next = None

    def _take(self, before_waiting: Callable[[], None] | None = None) -> Chunk | None:
        members = self._store.members
        member = members.next_member()
        if member is None:
            return None
        if not member.name.startswith(_QUBES_XML_CHUNK):
            members.push_back(member)
            return None
        name = self._proofs.parse_name(member.name)
        if name is None:
            raise BadArchive(f"{_QUBES_XML} lacks the piece to which {shown(member.name)} belongs")
        self._sequence.expect(name)
        return self._store.take(name, member.size, self._proofs, urgent=True, before_waiting=before_waiting)
