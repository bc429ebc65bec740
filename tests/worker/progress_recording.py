"""Records of how real verifications went, for the tests of what is said of the time left.

python -m tests.worker.progress_recording NAME BACKUP MIB [pipe]     writes recordings/NAME.json

A record has a row for every half second, with what the worker saw then (`Seen`), and the second in which the
verification ended.
"""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from unittest import mock

from pydantic import SecretStr

from qubes_restore_svc.kdf.native import NativeEngine
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.worker import pipeline
from qubes_restore_svc.worker.archive_access import ArchiveAccess
from qubes_restore_svc.worker.meter import Meter, Seen
from qubes_restore_svc.worker.work import Resources, Work
from tests.support.backup_writer import PASSPHRASE

FOLDER = Path(__file__).with_name("recordings")
_STEP_S = 0.5


@dataclass(frozen=True)
class Recording:
    """What was seen of one verification, and when it ended: seconds from its begin."""

    seen: tuple[Seen, ...]
    ended: float


def load(name: str) -> Recording:
    """The record of that name."""
    found = json.loads((FOLDER / f"{name}.json").read_text())
    return Recording(tuple(Seen(*row) for row in found["seen"]), found["ended"])


class _Noting(Meter):
    def __init__(self, rows: list[Seen]) -> None:
        super().__init__()
        self._rows = rows

    def done(self, seen: Seen) -> int | None:
        self._rows.append(seen)
        return super().done(seen)


def record(name: str, backup: Path, mib: int, *, pipe: bool) -> None:
    """Verify the backup, with so much memory, and write what was seen."""
    rows: list[Seen] = []
    over = threading.Event()
    manifests: list[m.Manifest] = []
    listed = threading.Event()

    def emit(message: m.Message) -> None:
        if isinstance(message, m.Manifest):
            manifests.append(message)
            listed.set()
        elif isinstance(message, m.Finished | m.Failed):
            over.set()

    if pipe:
        process = subprocess.Popen(["cat", str(backup)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        descriptor = os.dup(process.stdout.fileno())
        process.stdout.close()
    else:
        descriptor = os.open(backup, os.O_RDONLY)
    jobs = len(os.sched_getaffinity(0))
    resources = Resources(NativeEngine(), mib << 20, jobs, ArchiveAccess(descriptor), lambda need: "")
    with mock.patch.object(pipeline, "Meter", lambda: _Noting(rows)):
        request = m.Open(passphrase=SecretStr(PASSPHRASE), ahead=True)
        work = Work(request, resources, emit, lambda ready: (_ for _ in ()).throw(AssertionError))
        listed.wait()
        began = time.monotonic()
        work.start(m.Start(mode="verify", keys=tuple(qube.key for qube in manifests[0].qubes)))
        while not over.wait(_STEP_S):
            work.progress()
    ended = time.monotonic() - began
    table = [[*astuple(seen)] for seen in rows]
    for row in table:
        row[0] = round(row[0] - began, 2)
        row[4:6] = [round(row[4]), round(row[5])]
    FOLDER.mkdir(exist_ok=True)
    text = ",\n".join(json.dumps(row) for row in table)
    (FOLDER / f"{name}.json").write_text(f'{{"ended": {ended:.2f}, "seen": [\n{text}\n]}}\n')


if __name__ == "__main__":
    record(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), pipe="pipe" in sys.argv[4:])
