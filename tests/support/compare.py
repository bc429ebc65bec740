"""Compare restored disk images with what the backup's JSON says went into it.

    python -m tests.support.compare EXPECTED.json DIRECTORY

Exits with 1 and a line for each difference.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from qubes_restore_svc.worker.output import FsVerityDigest

from .plans import data_of

_PIECE = 1 << 20


def differences(expected: Path, directory: Path) -> list[str]:
    """What is missing, too much or different in `directory`."""
    volumes: dict[str, dict[str, int | str]] = json.loads(expected.read_text())["volumes"]
    found = {path.relative_to(directory).with_suffix("").as_posix() for path in directory.glob("*/*.img")}
    problems = [f"{name}: not in the backup" for name in sorted(found - volumes.keys())]
    for name, volume in volumes.items():
        image = directory / f"{name}.img"
        if name not in found:
            problems.append(f"{name}: missing")
        elif image.stat().st_size != volume["size"]:
            problems.append(f"{name}: {image.stat().st_size} bytes, not {volume['size']}")
        elif sha256(image) != volume["sha256"]:
            problems.append(f"{name}: other content")
    return problems


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsverity(path: Path) -> str:
    """The fs-verity digest of a file, in hexadecimal; its holes are not read."""
    digest, position = FsVerityDigest(), 0
    with path.open("rb") as file:
        for start, end in data_of(file.fileno()):
            digest.skip(start - position)
            for offset in range(start, end, _PIECE):
                digest.update(os.pread(file.fileno(), min(_PIECE, end - offset), offset))
            position = end
        digest.skip(os.fstat(file.fileno()).st_size - position)
    return digest.hexdigest()


def main() -> None:
    """The command."""
    expected, directory = Path(sys.argv[1]), Path(sys.argv[2])
    problems = differences(expected, directory)
    for problem in problems:
        print(problem)
    if problems:
        sys.exit(1)
    count = len(json.loads(expected.read_text())["volumes"])
    print(f"All {count} disk images are identical to the originals.")


if __name__ == "__main__":
    main()
