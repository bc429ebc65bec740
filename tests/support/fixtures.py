"""Where tests find recorded backups that the stock programs wrote.

Strategy: the recordings are no part of this repository; they may lie in a folder `shared/fixtures`
beside the clone. Everything must be testable without them, so a test that wants one asks here and
is skipped, with the reason, where they are missing.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class VolumeExpectation:
    """What a restore of one volume must give: size in bytes, and in hex the SHA-256 of the whole image.

    Where that would take too long, `sha256` is empty, and `fsverity` has the digest of that name.
    """

    size: int
    sha256: str
    fsverity: str = ""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a backup holds; `volumes` by `QUBE/VOLUME`."""

    passphrase: str
    backup_id: str
    volumes: dict[str, VolumeExpectation]


def shared_fixtures() -> Path | None:
    """The folder with the recorded backups, or None where it is not there."""
    folder = REPOSITORY.parent / "shared" / "fixtures"
    return folder if folder.is_dir() else None


def shared_fixture(name: str) -> Path:
    """The recorded file `name`; skips the calling test where it is missing."""
    folder = shared_fixtures()
    if folder is None or not (folder / name).is_file():
        pytest.skip(f"the recorded backup {name} is not beside this clone (shared/fixtures)")
    return folder / name


def expectation(backup: Path) -> Expectation:
    """What the JSON beside `backup` (its name with `.json` added) says about it."""
    facts = json.loads(backup.with_name(backup.name + ".json").read_text(encoding="utf-8"))
    return Expectation(
        passphrase=facts["passphrase"],
        backup_id=facts["backup_id"],
        volumes={name: VolumeExpectation(**volume) for name, volume in facts["volumes"].items()},
    )
