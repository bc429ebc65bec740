"""The exit status follows from the report, and is 0 only if everything that was wanted is there."""

import json
from datetime import UTC, datetime
from typing import Literal

import pytest
from pydantic import ValidationError

from qubes_restore_svc.broker.report import ErrorReport, QubeReport, Report, VolumeReport
from qubes_restore_svc.errors import Cancelled, ProtocolViolation, RestoreError, UsageError, WorkerLost

Result = Literal["restored", "verified", "incomplete", "failed", "refused", "left out"]

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def report(*outcomes: Result) -> Report:
    qubes = [QubeReport(name=f"q{n}", klass="AppVM", outcome=outcome) for n, outcome in enumerate(outcomes)]
    return Report(mode="restore", started=NOW, qubes=qubes)


@pytest.mark.parametrize(
    ("outcomes", "error", "status"),
    [
        (["restored", "restored"], None, 0),
        (["verified"], None, 0),
        (["restored", "left out"], None, 0),
        (["restored", "failed"], None, 3),
        (["restored", "refused"], None, 3),
        (["verified", "failed"], None, 3),
        (["restored"], WorkerLost("gone"), 3),
        (["restored"], ProtocolViolation("lies"), 3),
        (["restored", "incomplete"], None, 3),
        (["incomplete"], None, 3),
        (["failed"], None, 1),
        (["refused", "left out"], None, 1),
        (["left out"], None, 1),
        ([], None, 1),
        ([], RestoreError("no backup"), 1),
        (["failed", "failed"], WorkerLost("gone"), 1),
        ([], UsageError("no such qube"), 2),
        (["restored"], Cancelled("it was cancelled"), 130),
        ([], Cancelled("it was cancelled"), 130),
    ],
)
def test_the_status_says_what_became_of_what_was_wanted(
    outcomes: list[Result], error: RestoreError | None, status: int
) -> None:
    closed = report(*outcomes)
    assert closed.status == 1  # until it is known
    closed.close(NOW, error)
    assert closed.status == status
    assert closed.finished == NOW
    assert closed.error == (None if error is None else ErrorReport.of(error))


def test_a_qube_and_a_volume_are_failed_until_proven_otherwise() -> None:
    qube = QubeReport(name="work", klass="AppVM", volumes=[VolumeReport(name="root")])
    assert not qube.succeeded
    assert qube.volumes[0].outcome == "not reached"


def test_an_error_keeps_its_kind_reason_advice_and_chunk() -> None:
    error = WorkerLost("it ended", qube="work", volume="root", chunk=4)
    assert ErrorReport.of(error).model_dump() == {
        "kind": "worker-lost",
        "reason": "it ended",
        "advice": WorkerLost.default_advice,
        "chunk": 4,
    }


def test_a_report_is_json_and_can_be_read_again() -> None:
    closed = report("restored", "failed")
    closed.close(NOW)
    text = closed.model_dump_json()
    assert json.loads(text)["started"] == "2026-01-01T00:00:00Z"
    assert Report.model_validate_json(text) == closed


def test_only_known_outcomes_can_be_reported() -> None:
    qube = QubeReport(name="work", klass="AppVM")
    with pytest.raises(ValidationError):
        qube.outcome = "fine"  # type: ignore[assignment]  # what is to be refused
