"""The backups that are restored: written once, kept beside the results, named by what is in them.

Strategy: the shared tool writes them with the programs that a Qubes system uses; where it or those programs
are missing, the project's own writer does, with key derivations that cost what the scrypt program chose on
one machine in one run. A backup gets its name when it is complete, so one that was broken off is written
again.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support.backup_writer import CHUNK_SIZE, BackupWriter, Costs
from tests.support.fixtures import REPOSITORY, Expectation, expectation
from tests.support.format3_writer import Format3Writer
from tests.support.outer_archive import outer_pieces
from tests.support.plans import QubePlan, sample_qube

MIB = 1 << 20

#: The qubes of a backup of 1024 MiB: name, MiB of its volume, share of it that is data.
QUBES = (("work", 2048, 0.5), ("vault", 1024, 0.3), ("tiny", 64, 0.05))
_WHOLE = 1024

#: log2 N of the containers in turn, where the project's own writer is to choose.
CHOSEN_COSTS = (19, 20, 20, 21)

#: The programs without which the shared tool cannot write.
_NEEDED = ("scrypt", "tar", "gzip")


@dataclass(frozen=True, slots=True)
class Sample:
    """A backup and what a restore of it must give."""

    backup: Path
    expected: Expectation

    @property
    def size(self) -> int:
        """Bytes of the archive."""
        return self.backup.stat().st_size

    def read_once(self) -> None:
        """Bring it into the page cache, as far as it fits: no run is to pay for another one's disk."""
        with self.backup.open("rb", buffering=0) as file:
            while file.read(8 * MIB):
                pass


def existing(backup: Path) -> Sample:
    """A backup that is there, with its JSON beside it (its name with .json added)."""
    return Sample(backup, expectation(backup))


def make_sample(directory: Path, size_mib: int, log_n: int | None, writer: str = "auto") -> Sample:
    """The backup of about `size_mib` MiB in `directory`, written now if it is not there.

    `log_n` is log2 of scrypt's N; None: as scrypt chooses. `writer` is `shared`, `own`, or `auto`: shared
    where it can be had. Raises SystemExit for `shared` where it cannot.
    """
    tool = shared_tool()
    if writer == "shared" and tool is None:
        raise SystemExit("the shared tool (shared/tools/make_backup.py beside the clone) cannot be used here")
    uses_tool = tool is not None and writer != "own"
    costs = "chosen" if log_n is None else f"n{log_n}"
    backup = directory / f"sample-{size_mib}-{costs}-{'shared' if uses_tool else 'own'}.qbackup"
    if not backup.exists():
        partial = backup.with_suffix(".partial")
        print(f"writing {backup} …", file=sys.stderr, flush=True)
        if tool is not None and uses_tool:
            _write_with_tool(tool, partial, scaled(size_mib), log_n)
        else:
            _write_ourselves(partial, scaled(size_mib), CHOSEN_COSTS if log_n is None else log_n)
        _json_of(partial).rename(_json_of(backup))
        partial.rename(backup)
    return existing(backup)


def make_special(
    directory: Path, name: str, qubes: Sequence[QubePlan], log_n: int, chunk_size: int = CHUNK_SIZE
) -> Sample:
    """A backup of these qubes by the project's own writer, if it is not there. What is in it is known by
    fs-verity digests, for which holes cost nothing."""
    backup = directory / f"sample-{name}-n{log_n}-own.qbackup"
    if not backup.exists():
        print(f"writing {backup} …", file=sys.stderr, flush=True)
        writer = BackupWriter(qubes, log_n=log_n, chunk_size=chunk_size)
        partial = backup.with_suffix(".partial")
        writer.write(partial)
        volumes = {
            f"{qube.name}/{volume}": {"size": image.size, "sha256": "", "fsverity": image.fsverity()}
            for qube in qubes
            for volume, image in qube.volumes.items()
        }
        facts = {"passphrase": writer.passphrase, "backup_id": writer.backup_id, "volumes": volumes}
        _json_of(backup).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        partial.rename(backup)
    sample = existing(backup)
    sample.read_once()
    return sample


def make_format_3_sample(directory: Path, size_mib: int) -> Sample:
    """The same qubes in a backup of format 3, by the project's own writer, if it is not there."""
    backup = directory / f"sample-{size_mib}-format3-own.qbackup"
    if not backup.exists():
        print(f"writing {backup} …", file=sys.stderr, flush=True)
        qubes = [replace(plan, path=f"vm{number}") for number, plan in enumerate(plans(scaled(size_mib)), 1)]
        writer = Format3Writer(qubes)
        partial = backup.with_suffix(".partial")
        with partial.open("wb") as file:
            for member in writer.members():
                file.writelines(outer_pieces(member))
        _json_of(backup).write_text(json.dumps(writer.expectation(), indent=1) + "\n", encoding="utf-8")
        partial.rename(backup)
    return existing(backup)


def shared_tool(environment: Path = REPOSITORY.parent) -> Path | None:
    """The tool `shared/tools/make_backup.py` beside the clone; None if it, or what it needs, is missing."""
    tool = environment / "shared" / "tools" / "make_backup.py"
    complete = tool.is_file() and all(shutil.which(program) for program in _NEEDED)
    return tool if complete else None


def scaled(size_mib: int) -> Mapping[str, tuple[int, float]]:
    """By name, MiB and fill of the volumes that make a backup of about `size_mib` MiB."""
    return {name: (max(1, round(mib * size_mib / _WHOLE)), fill) for name, mib, fill in QUBES}


def plans(qubes: Mapping[str, tuple[int, float]]) -> list[QubePlan]:
    """Qubes by name, with MiB and fill of their volume."""
    return [
        sample_qube(name, mib * MIB, fill, seed=seed)
        for seed, (name, (mib, fill)) in enumerate(qubes.items(), 1)
    ]


def _write_with_tool(
    tool: Path, target: Path, qubes: Mapping[str, tuple[int, float]], log_n: int | None
) -> None:
    command = [sys.executable, str(tool), str(target)]
    for name, (mib, fill) in qubes.items():
        command += ["--vm", f"{name}:{mib}:{fill}"]
    if log_n is not None:
        command += ["--logN", str(log_n)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _write_ourselves(target: Path, qubes: Mapping[str, tuple[int, float]], costs: Costs) -> None:
    writer = BackupWriter(plans(qubes), log_n=costs)
    writer.write(target)
    _json_of(target).write_text(json.dumps(writer.expectation(), indent=1) + "\n", encoding="utf-8")


def _json_of(backup: Path) -> Path:
    return backup.with_name(backup.name + ".json")
