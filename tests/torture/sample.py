"""The small archive that is tortured, what belongs to whom in it, and what a whole restore of it gives.

Strategy: every byte costs eight restores, so the archive has no more than it must: two qubes with settings,
the second one the last thing in the archive, keys that cost nothing, and one block of filling where a
backup has up to nineteen. Nothing but the length of that filling differs from what Qubes writes.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.support.backup_writer import (
    BackupWriter,
    ImagePlan,
    QubePlan,
    RawMember,
    outer_member,
    sample_image,
)
from tests.support.compare import sha256
from tests.support.tar_blocks import BLOCK

FIREWALL = '<firewall version="2"><rules/></firewall>\n'
#: Files of a qube by their name in the record, in archive order.
SETTINGS = ("firewall", "notes", "appmenus")


@dataclass(frozen=True, slots=True)
class Span:
    """Where a member lies: `begin` to `content` its headers, to `content_end` its content, to `end` filling.

    `owner` is the qube that it belongs to; None: all of them depend on it.
    """

    member: RawMember
    owner: str | None
    begin: int
    content: int
    content_end: int
    end: int


@dataclass(frozen=True)
class Sample:
    """An archive, with all that is needed to judge what became of it."""

    writer: BackupWriter
    members: tuple[RawMember, ...]
    archive: bytes
    spans: tuple[Span, ...]

    @property
    def qubes(self) -> list[str]:
        """Their names, in archive order."""
        return [qube.name for qube in self.writer.qubes]

    def owner(self, member: str) -> str | None:
        """The qube that the member of this name belongs to."""
        folder = member.rpartition("/")[0]
        folders = {qube.backup_path(number).rstrip("/"): qube.name for number, qube in self.numbered()}
        return folders.get(folder)

    def numbered(self) -> list[tuple[int, QubePlan]]:
        """The qubes with their positions."""
        return list(enumerate(self.writer.qubes))

    def images(self, qube: str) -> dict[str, str]:
        """The SHA-256 of each image of a qube, by the name of its file."""
        plan = next(plan for plan in self.writer.qubes if plan.name == qube)
        return {f"{volume}.img": image.sha256() for volume, image in plan.volumes.items()}

    def settings(self, qube: str) -> dict[str, object]:
        """What the record says of the qube's settings files after a whole restore."""
        plan = next(plan for plan in self.writer.qubes if plan.name == qube)
        appmenus = None if plan.appmenus is None else list(plan.appmenus)
        return {
            "firewall": None if plan.firewall is None else [],
            "notes": plan.notes,
            "appmenus": appmenus,
        }


@cache
def tight_sample() -> Sample:
    """About 20 KiB of archive, with one block of filling between members.

    The directories of the two differ in more than a bit: from `vm10` to `vm11` it is one, and what a damaged
    header may have named counts as lost.
    """
    qubes = [
        QubePlan("work", volumes={"private": _image(600, 1)}, firewall=FIREWALL, notes="Blue box.\n"),
        QubePlan("vault", path="appvms/vault/", volumes={"private": _image(300, 2)}, firewall=FIREWALL),
    ]
    return _made(BackupWriter(qubes, log_n=1, r=1, chunk_size=800, jobs=1), filling=BLOCK)


@cache
def chunky_sample(compression: str) -> Sample:
    """Several chunks of every volume, in any compression, filled up as Qubes does it."""
    qubes = [
        QubePlan(
            "work", volumes={"private": sample_image(1 << 14, 0.5, 1)}, firewall=FIREWALL, notes="Blue box.\n"
        ),
        QubePlan(
            "template",
            "TemplateVM",
            template=None,
            volumes={"root": sample_image(1 << 13, 0.5, 3), "private": sample_image(1 << 13, 0.5, 4)},
            appmenus=["firefox.desktop"],
        ),
        QubePlan("vault", volumes={"private": sample_image(1 << 14, 0.5, 2)}, firewall=FIREWALL),
    ]
    return _made(BackupWriter(qubes, compression=compression, log_n=1, r=1, chunk_size=2048, jobs=1))


def joined(members: Sequence[RawMember], filling: int | None = None) -> bytes:
    """The archive with these members; `filling` bytes of zeros between them, None: as Qubes does it."""
    return b"".join(_stored(member, filling) for member in members)


def found_in(target: Path) -> Mapping[str, tuple[dict[str, str], dict[str, object]]]:
    """The qubes in a directory: the SHA-256 of each image, and the settings in the record."""
    found = {}
    for directory in target.iterdir() if target.exists() else ():
        path = directory / "qube.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        images = {image.name: sha256(image) for image in directory.glob("*.img")}
        found[directory.name] = (images, {name: record.get(name) for name in SETTINGS})
    return found


def _image(size: int, seed: int) -> ImagePlan:
    """An image of 4 KiB whose only data are `size` bytes that do not compress."""
    return ImagePlan(4096, [(512, random.Random(seed).randbytes(size))])


def _made(writer: BackupWriter, filling: int | None = None) -> Sample:
    members = tuple(writer.members())
    sample = Sample(writer, members, joined(members, filling), ())
    spans, begin = [], 0
    for member in members:
        end = begin + len(_stored(member, filling))
        content = begin + _head_size(member)
        span = Span(member, sample.owner(member.name), begin, content, content + len(member.data), end)
        spans.append(span)
        begin = end
    return Sample(writer, members, sample.archive, tuple(spans))


def _stored(member: RawMember, filling: int | None) -> bytes:
    stored = outer_member(member)
    if filling is None:
        return stored
    return stored[: _head_size(member) + len(member.data) + -len(member.data) % BLOCK] + bytes(filling)


def _head_size(member: RawMember) -> int:
    """Pax header, its records, ustar header."""
    return outer_member(RawMember(member.name, b"\xff" * BLOCK, pax=member.pax)).index(b"\xff" * BLOCK)
