"""Reports of a run as they are kept in files."""

import json
from datetime import UTC, datetime
from pathlib import Path

from qubes_restore_svc.wire.report import Report

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


def kept_report(path: Path) -> Report:
    """The report in a file, which tells a little more than a message, and its times more exactly."""
    return read_report(path.read_text())


def read_report(text: str) -> Report:
    """The same from the file's content."""
    fields = json.loads(text)
    assert fields.pop("tool") == "qubes-restore-svc"
    assert {"asked_by", "version"} <= fields.keys()
    del fields["asked_by"]
    for key in ("started", "finished"):
        fields[key] = f"{fields[key][:19]}Z"
    return Report.model_validate_json(json.dumps(fields))
