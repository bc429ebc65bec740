"""What damages are made with: how one is described, and the edits that many of them share.

Strategy: everything takes a writer, a finished backup's members or bytes, and returns others; tests
use the same edits with numbers of their own.
"""

import gzip
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qubes_restore_svc import errors

from .backup_writer import BackupWriter, Replacements
from .containers import compress, container_head
from .outer_archive import RawMember, join_members

GIB = 1 << 30
Scope = Literal["backup", "qube", "nothing"]
Breaker = Callable[[BackupWriter], bytes | Iterable[RawMember]]
Errors = Sequence[type[errors.RestoreError]]  # the right one first


@dataclass(frozen=True, slots=True)
class Damage:
    """One way to break a backup.

    `kind` is the error's kind (see qubes_restore_svc.errors), `also` are kinds that are as right.
    Scope `backup`: nothing is restored. Scope `qube`: the qubes at the positions `victims` fail (or are
    refused from the start, perhaps under another name), every other one is restored. Scope `nothing`: all is
    restored, and the person is told. `passphrase` is
    what the person types, if not the right one.
    """

    name: str
    kind: str
    scope: Scope
    breaker: Breaker
    also: frozenset[str] = frozenset()
    victims: tuple[int, ...] = (0,)
    passphrase: str | None = None

    @property
    def victim(self) -> int:
        """The first of the victims: for most damages the only one."""
        return self.victims[0]

    @property
    def kinds(self) -> frozenset[str]:
        """All kinds of error that are right for this damage."""
        return self.also | {self.kind}

    def apply(self, writer: BackupWriter) -> bytes:
        """The broken archive."""
        result = self.breaker(writer)
        return result if isinstance(result, bytes) else join_members(result)


class DamageGroup(dict[str, Damage]):
    """Damages by their name."""

    def add(
        self,
        error: type[errors.RestoreError],
        scope: Scope,
        *also: type[errors.RestoreError],
        name: str | None = None,
        victims: Sequence[int] = (0,),
        passphrase: str | None = None,
    ) -> Callable[[Breaker], Breaker]:
        """Registers a breaker under its own name, `_` written as `-`, or under `name`."""

        def register(breaker: Breaker) -> Breaker:
            called = name or breaker.__name__.replace("_", "-")
            if called in self:
                raise ValueError(f"there are two damages {called!r}")
            kinds = frozenset(other.kind for other in also)
            self[called] = Damage(called, error.kind, scope, breaker, kinds, tuple(victims), passphrase)
            return breaker

        return register


# --- Edits of a finished backup --------------------------------------------------------------------


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


def with_stream(writer: BackupWriter, file: str, stream: Iterable[bytes]) -> Iterator[RawMember]:
    """The backup with another compressed stream for `file`, every chunk of it authentic."""
    return replace(writer, replacements=Replacements(compressed={file: stream})).members()


# --- The victim ------------------------------------------------------------------------------------


def victim_file(writer: BackupWriter, victim: int = 0) -> str:
    """The name of the first volume's file of the qube at `victim`."""
    position = range(len(writer.qubes))[victim]
    qube = writer.qubes[position]
    return f"{qube.backup_path(position).rstrip('/')}/{next(iter(qube.volumes))}.img"


def victim_chunks(writer: BackupWriter, members: list[RawMember], victim: int = 0) -> list[int]:
    """The places in `members` of the chunks of that file."""
    prefix = victim_file(writer, victim) + "."
    return [place for place, member in enumerate(members) if member.name.startswith(prefix)]


def victim_members(writer: BackupWriter) -> tuple[list[RawMember], list[int]]:
    """All members of the backup, and the places of the chunks of the victim's first volume."""
    members = list(writer.members())
    return members, victim_chunks(writer, members)


def without(members: list[RawMember], places: list[int]) -> list[RawMember]:
    """The members but for those at `places`."""
    return [member for place, member in enumerate(members) if place not in places]
