"""What the last checks of several machines found, in one table.

Strategy: reports come from other machines. Each is bounded and held against a strict model before anything in
it is believed. Which machine a report is of says the one that brought it here, never the report. How old a
backup is, and its report, is computed again, because reports lie around.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qubes_restore_svc.cli.tables import table
from qubes_restore_svc.errors import UsageError
from qubes_restore_svc.report_file import MAX_REPORT
from qubes_restore_svc.watch.check import too_old
from qubes_restore_svc.watch.documents import Findings, MachineName, PlaceName
from qubes_restore_svc.wire.names import shortened, strip_control

_MAX_STREAM = 256 << 20  #: bytes of all reports together
_MACHINE: TypeAdapter[str] = TypeAdapter(MachineName)
_PLACE: TypeAdapter[str] = TypeAdapter(PlaceName)

#: The reports of each machine by place, as they came; None: there is none.
Untrusted = Mapping[str, Mapping[str, bytes | None]]


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
        for place, untrusted_report in sorted(reports.items()):
            found.append(_row(machine, place, untrusted_report, now, timedelta(days=stale_after_days)))
        if not reports:
            found.append(_row(machine, "-", None, now, timedelta()))
    return found


def _row(
    machine: str, place: str, untrusted_report: bytes | None, now: datetime, stale_after: timedelta
) -> Row:
    if untrusted_report is None:
        return Row(machine, place, "no report", "no report has come")
    try:
        found = _Findings.model_validate_json(untrusted_report)
    except ValidationError:
        return Row(machine, place, "bad report", "what has come is no report")
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
    machines: dict[str, dict[str, bytes | None]] = {name: {} for name in expected}
    try:
        for entry in os.scandir(directory):
            if entry.is_dir() and _is_name(_MACHINE, entry.name):
                machines[entry.name] = dict(_of_machine(Path(entry.path)))
    except OSError as error:
        shown = strip_control(str(error.filename))
        raise UsageError(f"{shown} cannot be read: {error.strerror}", advice="") from None
    return machines


def of_places(state: Path, wanted: Sequence[str], known: Iterable[str]) -> Mapping[str, bytes | None]:
    """Those of this machine, of all places or of those `wanted`. Those `known` must be there.

    Raises UsageError.
    """
    kept = {**dict.fromkeys(known), **(dict(_of_machine(state)) if state.is_dir() else {})}
    return {name: kept.get(name) for name in wanted} if wanted else kept


def _of_machine(directory: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(directory.glob("*.json")):
        if _is_name(_PLACE, path.stem):
            try:
                with path.open("rb") as file:
                    yield path.stem, file.read(MAX_REPORT + (1 << 20))
            except OSError as error:
                shown = strip_control(str(path))
                raise UsageError(f"{shown} cannot be read: {error.strerror}", advice="") from None


def from_stream(expected: Iterable[str]) -> Untrusted:
    """Those that `salt --static --out=json` writes: an object of machines, of objects of places.

    A machine with anything else did not answer. Raises UsageError.
    """
    untrusted_text = sys.stdin.buffer.read(_MAX_STREAM + 1)
    try:
        if len(untrusted_text) > _MAX_STREAM:
            raise ValueError
        untrusted_machines = json.loads(untrusted_text)
        if not isinstance(untrusted_machines, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise UsageError("standard input is no JSON object of machines", advice="") from None
    machines: dict[str, dict[str, bytes | None]] = {name: {} for name in expected}
    for untrusted_name, untrusted_places in untrusted_machines.items():
        if not _is_name(_MACHINE, untrusted_name):
            raise UsageError(f"{shortened(untrusted_name, 60)!r} cannot be the name of a machine", advice="")
        answered = untrusted_places if isinstance(untrusted_places, dict) else {}
        machines[untrusted_name] = {
            untrusted_place: json.dumps(untrusted_report).encode()
            for untrusted_place, untrusted_report in answered.items()
            if _is_name(_PLACE, untrusted_place)
        }
    return machines


def _is_name(kind: TypeAdapter[str], untrusted_name: str) -> bool:
    try:
        kind.validate_python(untrusted_name)
    except ValidationError:
        return False
    return True
