"""What a script of a person does every night, on several machines, and what is collected in the morning."""

import shutil
from pathlib import Path

import pytest

from tests.support.documents import checked

from .support import four_machines, states_in, watch

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


def test_three_machines_with_a_flipped_bit_an_old_backup_and_none(tmp_path: Path) -> None:
    machines = four_machines(tmp_path)
    statuses = {}
    for machine in machines.values():  # every night, on each
        ended = machine.watch("verify", "nas")
        assert "Traceback" not in ended.stderr
        statuses[machine.name] = ended.returncode
    assert statuses == {"desk": 1, "laptop": 1, "office": 1, "server": 0}

    collected = tmp_path / "collected"  # in the morning, on one of them
    for machine in machines.values():
        shutil.copytree(machine.reports, collected / machine.name)
    ended = watch("collect", collected, "--expect", "office", "--expect", "attic")
    assert ended.returncode == 1
    assert states_in(ended.stdout) == {
        "attic": "no report",
        "desk": "bad",
        "laptop": "too old",
        "office": "no backup",
        "server": "good",
    }
    said = ended.stderr
    assert "desk, nas: bad: work: " in said
    assert "laptop, nas: too old: it is 30 days old, and 8 are allowed" in said
    assert f"office, nas: no backup: no file in {machines['office'].backups} is called qubes-*" in said
    assert "attic, -: no report: no report has come" in said
    assert said.endswith("1 of 5 good.\n")

    report = checked((machines["server"].reports / "nas.json").read_text(), "watch")
    assert report["backup"] == str(machines["server"].backups / "qubes-2026")
    assert report["verification"]["status"] == 0
