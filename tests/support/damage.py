"""Named ways to break a backup, each with the error that a restore must end in.

Strategy: a damage takes a `BackupWriter` and gives the bytes of a broken archive. What can be done
to a finished backup (drop, swap, flip, cut) is done to its members or bytes; what an enemy who knows
the passphrase would do is written through the writer's `Replacements`, so that everything around
the one lie is authentic. Bombs are repeated streams: gibibytes cost the writer nothing.

The first qube of the writer is the victim, unless the damage says otherwise. Its first volume must fill
four chunks or more, as in `sample_backup()`. The damages are in files by what they break: damage_outer,
damage_chunks, damage_metadata, damage_inner.
"""

from .backup_writer import BackupWriter
from .damage_chunks import CHUNK_DAMAGES
from .damage_inner import INNER_DAMAGES
from .damage_metadata import METADATA_DAMAGES
from .damage_outer import OUTER_DAMAGES
from .damage_tools import (
    Damage,
    DamageGroup,
    cut_off,
    edited,
    flip_bit,
    victim_chunks,
    victim_file,
    with_cost,
)
from .plans import QubePlan, sample_image, sample_qube

#: With the edits that tests of single damages use.
__all__ = [
    "DAMAGES",
    "Damage",
    "cut_off",
    "edited",
    "flip_bit",
    "sample_backup",
    "victim_chunks",
    "victim_file",
    "with_cost",
]


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


def _all_of(*groups: DamageGroup) -> dict[str, Damage]:
    together = {name: damage for group in groups for name, damage in group.items()}
    if len(together) != sum(len(group) for group in groups):
        raise ValueError("there are two damages of one name")
    return together


#: Every damage by its name.
DAMAGES = _all_of(OUTER_DAMAGES, CHUNK_DAMAGES, METADATA_DAMAGES, INNER_DAMAGES)
