"""An extraction that was killed, cancelled or out of room, and the next one with `--skip-existing`.

Strategy: the backup comes through a pipe that the test stops filling at a chosen place; then the command is
killed. The second run reads the whole backup from a file. What it derives is counted by the worker itself,
and compared with the chunks of those qubes that were not there.
"""

import json
import os
import shutil
import signal
from functools import cache
from pathlib import Path

import pytest

from tests.support.compare import fsverity, sha256

from .support import CHUNK, Outcome, finished, offsets, passphrase_file, running, small_backup, wait_for

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

#: Where the files of each qube lie in the archive, in its order.
FOLDERS = {"work": "vm10/", "vault": "vm11/", "debian": "vm12/", "dom0": "dom0-home/"}
#: The header's copy and qubes.xml.
KEYS_OF_THE_BEGINNING = 2


@cache
def small() -> tuple[bytes, dict[str, tuple[int, int]]]:
    return small_backup().to_bytes(), offsets(small_backup())


def chunks(qube: str) -> int:
    return sum(name.startswith(FOLDERS[qube]) for name in small()[1])


def begin_of(member: str, more: int = 0) -> int:
    return small()[1][member][0] + more


def last_member(qube: str) -> str:
    return [name for name in small()[1] if name.startswith(FOLDERS[qube])][-1]


#: Moments: how much of the archive has come, which directory is there then, and which qubes are finished.
MOMENTS: dict[str, tuple[int, str | None, tuple[str, ...]]] = {
    "nothing has come": (0, None, ()),
    "within qubes.xml": (begin_of("qubes.xml.000.enc", 700), None, ()),
    "at the first volume": (begin_of("vm10/private.img.000.enc", CHUNK // 2), None, ()),
    "within the first volume": (begin_of("vm10/private.img.003.enc", 900), ".work.partial", ()),
    "before the last chunk of the first qube": (begin_of(last_member("work")), ".work.partial", ()),
    "within the second qube": (begin_of("vm11/private.img.001.enc", 900), ".vault.partial", ("work",)),
    "before the last chunk of the second qube": (begin_of(last_member("vault")), ".vault.partial", ("work",)),
    "within the third qube": (begin_of(last_member("debian"), 900), ".debian.partial", ("work", "vault")),
    "within the last file": (begin_of("dom0-home/user.000.enc", 900), ".debian.partial", ("work", "vault")),
    "when all has come but the end": (len(small()[0]), "debian", ("work", "vault", "debian")),
}


def names_in(target: Path) -> set[str]:
    return set(os.listdir(target)) if target.exists() else set()


def assert_bit_for_bit(target: Path) -> None:
    """All qubes are there as the writer of the backup made them, and nothing else is."""
    assert names_in(target) == set(FOLDERS)
    volumes = small_backup().expectation()["volumes"]
    assert isinstance(volumes, dict) and volumes
    for name, facts in volumes.items():
        assert sha256(target / f"{name}.img") == facts["sha256"]
    record = json.loads((target / "dom0/qube.json").read_text())
    assert fsverity(target / "dom0/home.tar") == record["volumes"][0]["fsverity"]


def resumed(tmp_path: Path, *options: str) -> Outcome:
    backup = tmp_path / "sample.qbackup"
    backup.write_bytes(small()[0])
    return finished(
        *("extract", backup, "--to", tmp_path / "restored", "-p", passphrase_file(tmp_path)),
        *("--skip-existing", *FOLDERS, *options),
        report=tmp_path / "second.json",
    )


def outcomes(outcome: Outcome) -> dict[str, str]:
    assert outcome.report is not None, outcome.errors
    qubes = outcome.report["qubes"]
    assert isinstance(qubes, list)
    return {qube["name"]: qube["outcome"] for qube in qubes}


def assert_goes_on_from(finished_before: tuple[str, ...], outcome: Outcome) -> None:
    assert outcome.status == 0, outcome.errors
    expected = dict.fromkeys(FOLDERS, "restored") | dict.fromkeys(finished_before, "already restored")
    assert outcomes(outcome) == expected
    missing = [qube for qube in FOLDERS if qube not in finished_before]
    assert outcome.report is not None
    assert outcome.report["derivations"] == KEYS_OF_THE_BEGINNING + sum(map(chunks, missing))


@pytest.mark.parametrize("moment", MOMENTS)
def test_after_a_kill_the_second_run_does_what_the_first_did_not(moment: str, tmp_path: Path) -> None:
    size, shown, finished_before = MOMENTS[moment]
    target = tmp_path / "restored"
    passphrase = passphrase_file(tmp_path)
    with running("extract", "-", "--to", target, "-p", passphrase, *FOLDERS, feed=True) as run:
        run.feed(small()[0][:size])
        run.worker()
        run.wait_taken()
        wait_for(lambda: shown is None or (target / shown).exists())
        run.process.send_signal(signal.SIGKILL)
        run.process.wait()
        wait_for(lambda: not run.processes())
    # It may have come further than the test has seen, but never past what it was sent.
    finished_now = tuple(name for name in FOLDERS if name in names_in(target))
    assert finished_now == finished_before
    before = {name: os.stat(target / name).st_mtime_ns for name in finished_before}
    outcome = resumed(tmp_path)
    assert_goes_on_from(finished_before, outcome)
    assert_bit_for_bit(target)
    assert {name: os.stat(target / name).st_mtime_ns for name in finished_before} == before


def test_after_a_cancel_the_second_run_does_what_the_first_did_not(tmp_path: Path) -> None:
    target, passphrase = tmp_path / "restored", passphrase_file(tmp_path)
    with running("extract", "-", "--to", target, "-p", passphrase, *FOLDERS, feed=True) as run:
        run.feed(small()[0][: begin_of("vm11/private.img.001.enc", 900)])
        wait_for((target / "work").exists)
        run.interrupt()
        assert run.outcome().status == 130
    assert_goes_on_from(("work",), resumed(tmp_path))
    assert_bit_for_bit(target)


def test_when_everything_is_there_no_volume_is_read(tmp_path: Path) -> None:
    assert_goes_on_from((), resumed(tmp_path))
    outcome = resumed(tmp_path)
    assert_goes_on_from(tuple(FOLDERS), outcome)
    assert "4 of 4 qubes restored, 4 of them by an earlier run (and not read again)." in outcome.errors
    assert_bit_for_bit(tmp_path / "restored")
