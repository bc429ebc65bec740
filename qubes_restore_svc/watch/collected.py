"""What the last checks of several machines found, in one table.

Strategy: reports come from other machines. Each is bounded and held against a strict model before anything in
it is believed. Which machine a report is of says the one that brought it here, never the report. How old a
backup is, and its report, is computed again, because reports lie around.
"""

import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from operator import itemgetter
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qubes_restore_svc.cli.tables import table
from qubes_restore_svc.errors import ProtocolViolation, UsageError
from qubes_restore_svc.report_file import MAX_REPORT
from qubes_restore_svc.watch.check import too_old
from qubes_restore_svc.watch.documents import Findings, MachineName, PlaceName
from qubes_restore_svc.wire.connection import parse_object
from qubes_restore_svc.wire.names import shortened, strip_control

_MAX_FILE = MAX_REPORT + (1 << 20)  #: bytes of a report, or of all reports of a machine in a line
_MAX_LINES = 100_000
_MACHINE: TypeAdapter[str] = TypeAdapter(MachineName)
_PLACE: TypeAdapter[str] = TypeAdapter(PlaceName)

#: What a report says, or why nothing is known.
Known = Findings | Literal["no report", "bad report"]

#: That of each machine by place. Names are as they came.
Untrusted = Mapping[str, Mapping[str, Known]]


class _Findings(Findings):
    """A report of a later version may say more."""

    model_config = ConfigDict(extra="ignore")


@dataclass(frozen=True)
class Row:
    """What is known of one place of a machine."""

    machine: str
    place: str
    state: str  #: that of the report; or `no report`, `old report`, `bad report`
    reason: str
    backup: str = "-"
    made: str = "-"
    checked: str = "-"

    @property
    def is_good(self) -> bool:
        """Is there nothing to do?"""
        return self.state == "good"


def rows(untrusted: Untrusted, now: datetime, stale_after_days: int) -> list[Row]:
    """A row for each place of each machine, and for each machine without any."""
    found = []
    for machine, reports in sorted(untrusted.items()):
        if not _is_name(_MACHINE, machine):
            found.append(Row(_shown(machine), "-", "bad report", "what has come has no name of a machine"))
            continue
        for place, known in sorted(reports.items(), key=itemgetter(0)):
            found.append(_row(machine, place, known, now, timedelta(days=stale_after_days)))
        if not reports:
            found.append(_row(machine, "-", "no report", now, timedelta()))
    return found


def _row(machine: str, place: str, found: Known, now: datetime, stale_after: timedelta) -> Row:
    if place != "-" and not _is_name(_PLACE, place):
        return Row(machine, _shown(place), "bad report", "what has come has no name of a place")
    if found == "no report":
        return Row(machine, place, found, "no report has come")
    if found == "bad report":
        return Row(machine, place, found, "what has come is no report")
    state, reason = str(found.state), found.reason
    if state == "good" and (why := too_old(found.backup_time, found.max_age_days, now)):
        state, reason = "too old", why
    age = now - found.finished
    if age > stale_after or age < -stale_after:
        state, reason = "old report", f"the last check was {abs(age.days)} days ago, and found: {state}"
    return Row(
        machine,
        place,
        state,
        reason,
        found.backup or "-",
        "-" if found.backup_time is None else f"{found.backup_time:%Y-%m-%d}",
        f"{found.finished:%Y-%m-%d}",
    )


def text_of(found: Iterable[Row]) -> str:
    """The table."""
    lines = [(row.machine, row.place, row.state, row.made, row.checked, row.backup) for row in found]
    return table(("MACHINE", "PLACE", "STATE", "MADE", "CHECKED", "BACKUP"), lines)


# --- Where reports are -----------------------------------------------------------------------------


def in_directory(directory: Path, expected: Iterable[str]) -> Untrusted:
    """Those in `directory/MACHINE/PLACE.json`; a machine whose directory is empty has none.

    `expected` are machines that must be there. Raises UsageError.
    """
    machines: dict[str, Mapping[str, Known]] = {name: {} for name in expected}
    try:
        for entry in os.scandir(directory):
            if os.path.isdir(entry.path) and not entry.name.startswith("."):
                machines[entry.name] = dict(_of_machine(Path(entry.path)))
    except OSError as error:
        shown = strip_control(str(error.filename))
        raise UsageError(f"{shown} cannot be read: {error.strerror}", advice="") from None
    return machines


def of_places(state: Path, wanted: Sequence[str], known: Iterable[str]) -> Mapping[str, Known]:
    """Those of this machine, of all places or of those `wanted`. Those `known` must be there."""
    kept: dict[str, Known] = {
        **dict.fromkeys(known, "no report"),
        **(dict(_of_machine(state)) if state.is_dir() else {}),
    }
    return {name: kept.get(name, "no report") for name in wanted} if wanted else kept


def _of_machine(directory: Path) -> Iterator[tuple[str, Known]]:
    """Each by its place. Files that are not complete yet have names that begin with a dot."""
    for path in directory.glob("*.json"):
        if not path.name.startswith("."):
            yield path.stem, _read(path)


def _read(path: Path) -> Known:
    """What is in a file, whatever is there in its place: nothing of one machine ends the table of all."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return "bad report"
            return _findings(_parsed(file.read(_MAX_FILE + 1)))
    except OSError:
        return "bad report"


def _parsed(untrusted_text: bytes) -> dict[str, object]:
    """The JSON object; an empty one if it is none."""
    if len(untrusted_text) > _MAX_FILE:
        return {}
    try:
        return parse_object(untrusted_text)
    except ProtocolViolation:
        return {}


def _findings(untrusted_report: object) -> Known:
    """What of a report is kept in memory, which is little."""
    try:
        return "no report" if untrusted_report is None else _Findings.model_validate(untrusted_report)
    except ValidationError:
        return "bad report"


def from_stream(expected: Iterable[str]) -> Untrusted:
    """Those that `salt --out=json --out-indent=-1` writes: in each line an object of machines, of places.

    A machine with anything else did not answer. A line that is no object has no name of a machine, and what
    it is called instead says where it is. Raises UsageError.
    """
    machines: dict[str, Mapping[str, Known]] = {name: {} for name in expected}
    for number, untrusted_line in enumerate(_lines(), 1):
        if number > _MAX_LINES:
            raise UsageError(f"standard input has more than {_MAX_LINES} lines", advice="")
        if untrusted_line == b"\n":
            continue
        if untrusted_line == b"{\n":
            raise UsageError(
                "the JSON of each machine must be in one line", advice="Give salt the option --out-indent=-1."
            )
        untrusted_machines = _parsed(untrusted_line) or {f"line {number}": None}
        for untrusted_name, untrusted_places in untrusted_machines.items():
            answered = untrusted_places if isinstance(untrusted_places, dict) else {}
            machines[untrusted_name] = {place: _findings(report) for place, report in answered.items()}
    return machines


def _lines() -> Iterator[bytes]:
    """Those of standard input. Of one that is too long comes the beginning, which is too long as well."""
    while line := sys.stdin.buffer.readline(_MAX_FILE + 2):
        yield line
        while len(line) == _MAX_FILE + 2 and not line.endswith(b"\n"):
            line = sys.stdin.buffer.readline(_MAX_FILE + 2)


def _shown(untrusted_name: str) -> str:
    return shortened(strip_control(untrusted_name), 60)


def _is_name(kind: TypeAdapter[str], untrusted_name: str) -> bool:
    try:
        kind.validate_python(untrusted_name)
    except ValidationError:
        return False
    return True
