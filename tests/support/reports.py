"""Reports of a run as they are kept in files."""

from datetime import UTC, datetime
from pathlib import Path

from qubes_restore_svc.report_file import KeptReport
from qubes_restore_svc.wire.report import Report

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


def kept_report(path: Path) -> Report:
    """The report in a file, which tells a little more than a message."""
    return read_report(path.read_text())


def read_report(text: str) -> Report:
    """The same from the file's content."""
    kept = dict(KeptReport.model_validate_json(text))
    return Report.model_validate({name: kept[name] for name in Report.model_fields})
