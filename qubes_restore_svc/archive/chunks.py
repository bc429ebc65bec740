"""The order of chunks: which member is which piece of which file, and that no piece is missing or comes
twice.

Strategy: a MAC binds a chunk to its name, so a name can be trusted once its chunk has been verified; but
anybody who holds the archive can leave out chunks, or change their order. `ChunkSequence` accepts one order
only: the chunks 0, 1, 2, … of one file, then those of the next. A file that breaks it stays broken, and the
files after it are not concerned. A missing last chunk shows later, at the end of the inner archive.
"""

import re
from dataclasses import dataclass
from hashlib import blake2b

from qubes_restore_svc.archive.members import check_member_name, shown
from qubes_restore_svc.errors import BadArchive, ChunkOutOfOrder

#: Most files that one archive may hold; only their digests are kept, about 100 bytes each.
MAX_FILES = 100_000

# Numbers have three digits, or more from 1000 on: `%03d`. Seven are a thousand terabytes.
_NAME = re.compile(r"(.+)\.([0-9]{3}|[1-9][0-9]{3,6})\.enc")

_PIECE_NAME = re.compile(r"(.+)\.([0-9]{3}|[1-9][0-9]{3,6})(\.hmac)?")


@dataclass(frozen=True, slots=True)
class ChunkName:
    """The name of a chunk, taken apart: `file` as in `vm10/private.img`, `number` from 0, `member` the name
    without .enc, which is part of the passphrase in format 4."""

    file: str
    number: int
    member: str


def parse_chunk_name(untrusted_name: str) -> ChunkName:
    """Take apart `vm10/private.img.000.enc`. Raises BadArchive for every other kind of name."""
    match = _NAME.fullmatch(untrusted_name)
    if match is None:
        raise BadArchive(f"it holds {shown(untrusted_name)}, which is not named like a piece of a backup")
    file = check_member_name(match[1].encode("utf-8", "backslashreplace"))
    return ChunkName(file, int(match[2]), untrusted_name.removesuffix(".enc"))


def parse_piece_name(untrusted_name: str) -> ChunkName | None:
    """Take apart `appvms/work/private.img.000`, a piece of a backup of format 3; None for a piece's MAC.

    The archive of a whole directory is called `vm-templates/fedora-23/.`. Raises BadArchive for every other
    kind of name.
    """
    match = _PIECE_NAME.fullmatch(untrusted_name)
    if match is None:
        raise BadArchive(f"it holds {shown(untrusted_name)}, which is not named like a piece of a backup")
    directory = match[1].removesuffix("/.")
    file = check_member_name(directory.encode("utf-8", "backslashreplace"))
    if match[3]:
        return None
    return ChunkName(file + match[1][len(directory) :], int(match[2]), untrusted_name)


def names_a_chunk(name: str) -> bool:
    """Is this a chunk's name, or that of a piece or of its MAC?"""
    return _NAME.fullmatch(name) is not None or _PIECE_NAME.fullmatch(name) is not None


class ChunkSequence:
    """Watches the chunks of one archive go by, each of them, wanted or not."""

    def __init__(self) -> None:
        self._file: str | None = None
        self._next_number = 0
        self._seen: set[bytes] = set()
        self._broken: set[bytes] = set()

    def is_broken(self, file: str) -> bool:
        """Has `expect` raised ChunkOutOfOrder for this file? Then it will for each of its later chunks,
        too."""
        return _digest(file) in self._broken

    def expect(self, name: ChunkName) -> None:
        """Take note of the next chunk of the archive.

        Raises ChunkOutOfOrder if it does not belong here: its file is broken, and the caller goes on with
        the chunks of other files. Raises BadArchive if there are more than MAX_FILES files.
        """
        if self.is_broken(name.file):
            raise self._out_of_order(name, f"{_label(name)} follows a chunk that was out of order")
        if name.file != self._file:
            self._begin(name)
        if name.number != self._next_number:
            raise self._out_of_order(name, self._why(name))
        self._next_number += 1

    def _begin(self, name: ChunkName) -> None:
        digest = _digest(name.file)
        if digest in self._seen:
            raise self._out_of_order(name, f"{_label(name)} comes again after other files")
        if len(self._seen) >= MAX_FILES:
            raise BadArchive(f"it holds more than {MAX_FILES} files")
        self._seen.add(digest)
        self._file, self._next_number = name.file, 0

    def _why(self, name: ChunkName) -> str:
        if self._next_number == 0:
            return f"{_label(name)} is the first of its file"
        last = self._next_number - 1
        if name.number == last:
            return f"{_label(name)} stands twice"
        return f"{_label(name)} follows chunk {last:03d}"

    def _out_of_order(self, name: ChunkName, reason: str) -> ChunkOutOfOrder:
        self._broken.add(_digest(name.file))
        return ChunkOutOfOrder(reason, chunk=name.number)


def _label(name: ChunkName) -> str:
    return f"chunk {name.number:03d} of {shown(name.file)}"


def _digest(file: str) -> bytes:
    return blake2b(file.encode("utf-8"), digest_size=16).digest()
