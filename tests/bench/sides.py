"""The ways to restore a backup that are compared: this project, and the stock programs.

Strategy: each is a function that runs one of them once, measures it from outside, and compares what came out
with what went into the backup, bit for bit, before its time counts. Results go to a directory of their own
on the disk that all of them use, and are removed.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from qubes_restore_svc.wire.report import Report
from tests.support.compare import fsverity, sha256
from tests.support.reports import kept_report

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

#: One run of a way to restore, with files in a directory that is there.
Side = Callable[[Sample, Path], Outcome]


def extract(sample: Sample, memory_mib: int, directory: Path) -> Outcome:
    """`qubes-restore-svc extract`."""
    with tempfile.TemporaryDirectory(dir=directory) as work:
        target = Path(work) / "target"
        measured, report = _ours("extract", sample, memory_mib, Path(work), "--to", str(target))
        images = {name: target / f"{name}.img" for name in sample.expected.volumes}
        check_images(sample, images)
        _proved[sample.backup] = {name: fsverity(image) for name, image in images.items()}
        return Outcome(measured, _checked_data(sample, report), _on_disk(images.values()))


def verify(sample: Sample, memory_mib: int, directory: Path) -> Outcome:
    """`qubes-restore-svc verify`; the report's digests are those of the originals."""
    if sample.backup not in _proved:
        extract(sample, memory_mib, directory)  # what it measures is not wanted
    with tempfile.TemporaryDirectory(dir=directory) as work:
        measured, report = _ours("verify", sample, memory_mib, Path(work))
        return Outcome(measured, _checked_data(sample, report))


def manual(sample: Sample, directory: Path) -> Outcome:
    """The documented recovery procedure."""
    environment = {"BACKUP": str(sample.backup.resolve()), "PASSPHRASE": sample.expected.passphrase}
    return _stock(_RECOVER, sample, directory, environment)


def unpack(sample: Sample, streams: Path, directory: Path, *, sync: bool) -> Outcome:
    """`gzip -d | tar -x` over the decrypted streams in `streams`, one a volume, `*.gz`; with `sync` until
    the images are on the disk, which this project always waits for."""
    environment = {"SOURCE": str(streams.resolve()), "SYNC": "yes" if sync else ""}
    return _stock(_UNPACK, sample, directory, environment)


def manual_format_3(sample: Sample, directory: Path) -> Outcome:
    """The documented recovery procedure for a backup of format 3."""
    environment = {"BACKUP": str(sample.backup.resolve()), "PASSPHRASE": sample.expected.passphrase}
    return _stock(_RECOVER_3, sample, directory, environment)


def missing_programs() -> list[str]:
    """What the manual procedure needs and this machine has not got."""
    return [program for program in _PROGRAMS if shutil.which(program) is None]


def our_command(command: str, sample: Sample, memory_mib: int, work: Path) -> list[str]:
    """The command line up to the options; writes the passphrase's file into `work`."""
    passphrase = work / "passphrase"
    passphrase.write_text(sample.expected.passphrase + "\n")
    options = ["-q", "-p", str(passphrase), "--memory", str(memory_mib)]
    return [sys.executable, "-m", "qubes_restore_svc", command, str(sample.backup), *options]


def check_images(sample: Sample, images: dict[str, Path]) -> None:
    """Raise SystemExit unless every volume's image is what went into the backup."""
    for name, volume in sample.expected.volumes.items():
        image = images[name]
        if not image.is_file():
            raise SystemExit(f"{name} is missing: this run does not count")
        if image.stat().st_size != volume.size or sha256(image) != volume.sha256:
            raise SystemExit(f"{name} differs from the original: this run does not count")


def _ours(
    command: str, sample: Sample, memory_mib: int, work: Path, *options: str
) -> tuple[Measured, Report]:
    report = work / "report.json"
    arguments = [*our_command(command, sample, memory_mib, work), *options, "--report", str(report)]
    measured = run(arguments)
    return measured, kept_report(report)


def _checked_data(sample: Sample, report: Report) -> int:
    """Bytes of data of all volumes, each of which is what went into the backup."""
    volumes = {f"{qube.name}/{volume.name}": volume for qube in report.qubes for volume in qube.volumes}
    found = {name: volume.fsverity for name, volume in volumes.items() if volume.outcome == "ok"}
    if found != _proved[sample.backup]:
        raise SystemExit("the report's volumes are not those of the backup: this run does not count")
    return sum(volume.data_bytes or 0 for volume in volumes.values())


def _stock(script: str, sample: Sample, directory: Path, environment: dict[str, str]) -> Outcome:
    """Run a script that leaves its images in directories by the names that the archive has (vm10)."""
    with tempfile.TemporaryDirectory(dir=directory) as target:
        measured = run(["bash", "-c", script], {**environment, "TARGET": str(Path(target).resolve())})
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
