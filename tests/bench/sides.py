"""The ways to restore a backup that are compared: this project, and the stock programs.

Strategy: each is a function that runs one of them once, measures it from outside, and compares what came out
with what went into the backup, bit for bit, before its time counts. Results go to a directory of their own
on the disk that all of them use, and are removed.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.compare import fsverity, sha256
from tests.support.reports import kept_report

from . import stock_restorer
from .processes import Measured, run
from .samples import Sample

#: The procedure of the Qubes documentation for format 4, with the stock programs.
_RECOVER = """
set -euo pipefail
cd "$TARGET"
tar -i -xf "$BACKUP"
id=$(sed -n 's/^backup-id=//p' backup-header)
for directory in vm*/; do
    for first in "$directory"*.img.000.enc; do
        file=${first%.000.enc}
        find "$directory" -name "${file##*/}.*.enc" | sort -V | while read -r chunk; do
            echo "$id!${chunk%.enc}!$PASSPHRASE" | scrypt dec -f -P "$chunk"
        done | gzip -d | tar -xf -
        find "$directory" -name '*.enc' -path "$file.*" -delete
    done
done
"""

#: Nothing but what the stock programs do after the decryption.
_UNPACK = """
set -euo pipefail
for file in "$SOURCE"/*.gz; do
    gzip -dc "$file" | tar -xf - -C "$TARGET"
done
if [ "$SYNC" ]; then sync "$TARGET"/*/*.img; fi
"""

#: The procedure of the Qubes documentation for format 3: each piece is authenticated, each file unpacked.
_RECOVER_3 = """
set -euo pipefail
cd "$TARGET"
tar -i -xf "$BACKUP"
for first in vm*/*.img.000; do
    file=${first%.000}
    find "${file%/*}" -name "${file##*/}.*[0-9]" | sort -V > pieces
    while read -r piece; do
        made=$(openssl dgst -sha512 -hmac "$PASSPHRASE" < "$piece")
        [ "${made##* }" = "$(sed 's/.* //' "$piece.hmac")" ]
    done < pieces
    xargs cat < pieces | openssl enc -d -aes-256-cbc -md MD5 -pass env:PASSPHRASE 2> /dev/null |
        gzip -d | tar -xPf -
    find "${file%/*}" -path "$file.*" -delete
done
"""

_PROGRAMS = ("bash", "tar", "scrypt", "gzip", "find", "sort", "sed")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run; `data` are the bytes of data that crossed the boundary, `on_disk` those that the result takes
    on the disk (holes take none)."""

    measured: Measured
    data: int = 0
    on_disk: int = 0


#: The fs-verity digests of images that were compared with the originals, by backup and volume.
_proved: dict[Path, dict[str, str]] = {}


def _proven(sample: Sample) -> dict[str, str]:
    known = {name: volume.fsverity for name, volume in sample.expected.volumes.items() if volume.fsverity}
    return _proved.setdefault(sample.backup, known) if known else _proved.get(sample.backup, {})


#: One run of a way to restore, with files in a directory that is there.
Side = Callable[[Sample, Path], Outcome]


def extract(sample: Sample, memory_mib: int, directory: Path, before: Path | None = None) -> Outcome:
    """`qubes-restore-svc extract`; with `before`, that of another checkout."""
    with tempfile.TemporaryDirectory(dir=directory) as work:
        target = Path(work) / "target"
        command = our_command("extract", sample, memory_mib, Path(work), before)
        measured, report = _reported([*command, "--to", str(target)], Path(work))
        images = {name: target / f"{name}.img" for name in sample.expected.volumes}
        check_images(sample, images)
        if before is not None:
            return Outcome(measured, on_disk=_on_disk(images.values()))
        _proved[sample.backup] = {name: fsverity(image) for name, image in images.items()}
        return Outcome(measured, _checked_data(sample, report), _on_disk(images.values()))


def verify(sample: Sample, memory_mib: int, directory: Path, before: Path | None = None) -> Outcome:
    """`qubes-restore-svc verify`; the report's digests are those of the originals. With `before`, that of
    another checkout, whose report may say it in other words: its exit status has to do."""
    if before is None and not _proven(sample):
        extract(sample, memory_mib, directory)  # what it measures is not wanted
    with tempfile.TemporaryDirectory(dir=directory) as work:
        command = our_command("verify", sample, memory_mib, Path(work), before)
        measured, report = _reported(command, Path(work))
        return Outcome(measured, 0 if before is not None else _checked_data(sample, report))


def manual(sample: Sample, directory: Path) -> Outcome:
    """The documented recovery procedure."""
    environment = {"BACKUP": str(sample.backup.resolve()), "PASSPHRASE": sample.expected.passphrase}
    return _by_others(["bash", "-c", _RECOVER], sample, directory, environment)


def stock(sample: Sample, sources: Path, directory: Path) -> Outcome:
    """The stock restorer, from a checkout of qubes-core-admin-client."""
    environment = {
        "BACKUP": str(sample.backup.resolve()),
        "PASSPHRASE": sample.expected.passphrase,
        "PYTHONPATH": str(sources.resolve()),
    }
    return _by_others([sys.executable, "-B", stock_restorer.__file__], sample, directory, environment)


def unpack(sample: Sample, streams: Path, directory: Path, *, sync: bool) -> Outcome:
    """`gzip -d | tar -x` over the decrypted streams in `streams`, one a volume, `*.gz`; with `sync` until
    the images are on the disk, which this project always waits for."""
    environment = {"SOURCE": str(streams.resolve()), "SYNC": "yes" if sync else ""}
    return _by_others(["bash", "-c", _UNPACK], sample, directory, environment)


def manual_format_3(sample: Sample, directory: Path) -> Outcome:
    """The documented recovery procedure for a backup of format 3."""
    environment = {"BACKUP": str(sample.backup.resolve()), "PASSPHRASE": sample.expected.passphrase}
    return _by_others(["bash", "-c", _RECOVER_3], sample, directory, environment)


def missing_programs() -> list[str]:
    """What the manual procedure needs and this machine has not got."""
    return [program for program in _PROGRAMS if shutil.which(program) is None]


def our_command(
    command: str, sample: Sample, memory_mib: int, work: Path, checkout: Path | None = None
) -> list[str]:
    """The command line up to the options, of this checkout or another that has its own virtual environment;
    writes the passphrase's file into `work`."""
    python = sys.executable if checkout is None else str(checkout / ".venv" / "bin" / "python")
    passphrase = work / "passphrase"
    passphrase.write_text(sample.expected.passphrase + "\n")
    options = ["-q", "-p", str(passphrase), "--memory", str(memory_mib)]
    return [python, "-P", "-m", "qubes_restore_svc", command, str(sample.backup.resolve()), *options]


def check_images(sample: Sample, images: dict[str, Path]) -> None:
    """Raise SystemExit unless every volume's image is what went into the backup."""
    for name, volume in sample.expected.volumes.items():
        image = images[name]
        if not image.is_file():
            raise SystemExit(f"{name} is missing: this run does not count")
        same = fsverity(image) == volume.fsverity if volume.fsverity else sha256(image) == volume.sha256
        if image.stat().st_size != volume.size or not same:
            raise SystemExit(f"{name} differs from the original: this run does not count")


def _reported(command: Sequence[str], work: Path) -> tuple[Measured, Path]:
    report = work / "report.json"
    return run([*command, "--report", str(report)]), report


def _checked_data(sample: Sample, path: Path) -> int:
    """Bytes of data of all volumes, each of which is what went into the backup."""
    report = kept_report(path)
    volumes = {f"{qube.name}/{volume.name}": volume for qube in report.qubes for volume in qube.volumes}
    found = {name: volume.fsverity for name, volume in volumes.items() if volume.outcome == "ok"}
    if found != _proven(sample):
        raise SystemExit("the report's volumes are not those of the backup: this run does not count")
    return sum(volume.data_bytes or 0 for volume in volumes.values())


def _by_others(
    command: Sequence[str], sample: Sample, directory: Path, environment: dict[str, str]
) -> Outcome:
    """Run what leaves its images in directories by the names that the archive has (vm10)."""
    with tempfile.TemporaryDirectory(dir=directory) as target:
        measured = run(command, {**environment, "TARGET": str(Path(target).resolve())})
        found = sorted(Path(target).glob("vm*/*.img"), key=_place)
        # The qubes stand in the archive in the order of the expectation, but the volumes of one need not.
        names = list(dict.fromkeys(name.split("/")[0] for name in sample.expected.volumes))
        folders = list(dict.fromkeys(path.parent for path in found))
        if len(folders) != len(names):
            raise SystemExit(f"{len(folders)} qubes instead of {len(names)}: this run does not count")
        folder_of = dict(zip(names, folders, strict=True))
        images = {
            name: folder_of[name.split("/")[0]] / f"{name.split('/')[1]}.img"
            for name in sample.expected.volumes
        }
        check_images(sample, images)
        return Outcome(measured, on_disk=_on_disk(images.values()))


def _place(image: Path) -> tuple[int, str]:
    return int(image.parent.name.removeprefix("vm")), image.name


def _on_disk(files: Iterable[Path]) -> int:
    return sum(path.stat().st_blocks * 512 for path in files)
