"""Reports: the exit status follows from them, and they reach a client whole, or as whole as there is room."""

import json
from pathlib import Path
from typing import Literal

import pytest
from pydantic import ValidationError

from qubes_restore_svc.errors import (
    Cancelled,
    NoSpace,
    ProtocolViolation,
    RestoreError,
    UsageError,
    WorkerLost,
)
from qubes_restore_svc.report_file import write_report
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.models import MAX_FRAME, ErrorInfo, encode_message
from qubes_restore_svc.wire.names import MAX_QUBES
from qubes_restore_svc.wire.report import (
    CUT,
    MAX_REMARKS,
    MAX_WARNINGS,
    QubeReport,
    Report,
    VolumeReport,
    remarks,
    warn,
)
from tests.support.reports import NOON
from tests.support.wire import from_dom0, parsed

Result = Literal["restored", "verified", "incomplete", "failed", "refused", "left out"]

ERROR = ErrorInfo(kind="no-space", reason="the pool is full", advice="Make room.", chunk=3)
WHOLE = (
    QubeReport(
        name="work1",
        name_in_backup="work",
        klass="AppVM",
        outcome="restored",
        warnings=("w",),
        settings_left_out=("property kernelopts",),
        volumes=(
            VolumeReport(name="private", outcome="ok", size=9, data_bytes=8, fsverity="a" * 64),
            VolumeReport(name="root", outcome="failed", error=ERROR),
        ),
    ),
    QubeReport(name="?!", klass="?", outcome="refused", remark="r", error=ERROR),
)


def report(*qubes: QubeReport) -> Report:
    made = Report.begun("restore", NOON)
    made.qubes = qubes
    return made


def with_outcomes(*outcomes: Result) -> Report:
    qubes = (QubeReport(name=f"q{n}", klass="AppVM", outcome=outcome) for n, outcome in enumerate(outcomes))
    return report(*qubes)


def travelled(message: Report | c.QubeFinished) -> c.BrokerAnswer:
    return parsed(from_dom0(), encode_message(message))


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
    closed = with_outcomes(*outcomes)
    assert closed.status == 1  # until it is known
    closed.close(error, NOON)
    assert closed.status == status
    assert closed.finished == NOON
    assert closed.error == (None if error is None else ErrorInfo.of(error))


def test_an_error_in_a_report_leaves_its_place_to_what_it_stands_in() -> None:
    error = WorkerLost("it ended", qube="work", volume="root", chunk=4)
    told = ErrorInfo.of(error).without_place()
    assert (told.kind, told.reason, told.advice) == ("worker-lost", "it ended", WorkerLost.default_advice)
    assert (told.qube, told.volume, told.chunk) == (None, None, 4)


def test_a_report_comes_to_a_client_as_it_is() -> None:
    whole = report(*WHOLE)
    whole.backup_id = "b-1"
    whole.close(NoSpace("the pool is full", advice="Make room."), NOON)
    message = travelled(whole)
    assert message == whole and whole.status == 3


def test_a_file_says_more_of_a_report_than_a_message(tmp_path: Path) -> None:
    whole = report(*WHOLE)
    whole.started = NOON.replace(microsecond=1500)
    whole.close(NoSpace("the pool is full", advice="Make room."), NOON)
    write_report(tmp_path / "report", whole, asked_by="sys-gui")
    text = (tmp_path / "report").read_text()
    kept = json.loads(text)
    assert text == json.dumps(kept, indent=2) + "\n"
    assert list(kept) == [
        "type", "schema_version", "tool_version", "mode", "backup_id", "started", "finished", "status",
        "error", "warnings", "qubes", "derivations", "asked_by",
    ]  # fmt: skip
    assert (kept["type"], kept["schema_version"], kept["asked_by"]) == ("report", 1, "sys-gui")
    assert (kept["started"], kept["finished"]) == ("2026-11-23T12:00:00Z", "2026-11-23T12:00:00Z")
    error: dict[str, object] = {"kind": "no-space", "reason": "the pool is full", "advice": "Make room."}
    error |= {"qube": None, "volume": None}
    assert kept["error"] == error | {"chunk": None}
    assert kept["qubes"][1]["error"] == kept["qubes"][0]["volumes"][1]["error"] == error | {"chunk": 3}


def test_only_what_a_message_can_say_can_be_reported() -> None:
    qube = QubeReport(name="work", klass="AppVM", outcome="failed")
    for field, value in {
        "outcome": "fine", "remark": "r" * 1001, "warnings": ["w"], "volumes": ("private",), "klass": "Qube",
    }.items():  # fmt: skip
        with pytest.raises(ValidationError):
            setattr(qube, field, value)
    assert qube == QubeReport(name="work", klass="AppVM", outcome="failed")


def test_what_is_remarked_is_cut_to_harmless_lines() -> None:
    assert remarks(["a\nb", "r" * 2000]) == ("a\ufffdb", "r" * 999 + "\u2026")
    many = remarks(f"n{number}" for number in range(MAX_REMARKS + 1))
    assert len(many) == MAX_REMARKS and many[-1] == CUT
    qube = QubeReport(name="a\x1b[2J", klass="AppVM", outcome="failed")
    for _ in range(MAX_WARNINGS + 1):
        warn(qube, "w" * 2000)
    assert qube.name == "a\ufffd[2J" and len(qube.warnings) == MAX_WARNINGS


#: As much as a worker can make a report say.
LONG = "\U0001f600" * 300
LONG_ERROR = ErrorInfo(kind="error", reason=LONG, advice=LONG)


def the_longest_report() -> Report:
    names: tuple[Literal["root", "private", "home"], ...] = ("root", "private", "home")
    qubes = [
        QubeReport(
            name=f"q{number}" + "q" * 26,
            name_in_backup="n" * 31,
            klass="StandaloneVM",
            outcome="failed",
            remark=LONG,
            error=LONG_ERROR,
            warnings=(LONG, LONG),
            volumes=tuple(
                VolumeReport(name=name, outcome="failed", size=1 << 62, fsverity="f" * 64, error=LONG_ERROR)
                for name in names
            ),
        )
        for number in range(MAX_QUBES)
    ]
    longest = report(*qubes)
    longest.backup_id, longest.warnings = "b" * 128, (LONG,) * 100
    longest.close(NoSpace(LONG, advice=LONG), NOON)
    return longest


def test_the_longest_report_reaches_the_client_with_all_its_outcomes() -> None:
    message = travelled(the_longest_report().fitting(MAX_FRAME))
    assert isinstance(message, Report)
    assert [qube.outcome for qube in message.qubes] == ["failed"] * MAX_QUBES
    assert all(qube.error is not None and qube.error.reason.endswith("\u2026") for qube in message.qubes)
    assert message.status == 1 and message.warnings[-1] == CUT


def test_a_qube_of_which_too_much_is_said_is_told_in_short() -> None:
    many = ("\U0001f600" * 1000,) * 700
    whole = QubeReport(name="a", klass="AppVM", outcome="restored", warnings=many, settings_left_out=many)
    message = travelled(c.QubeFinished.of(whole))
    assert isinstance(message, c.QubeFinished)
    assert message.qube.outcome == "restored" and len(message.qube.warnings) == 10


def test_a_report_too_large_for_a_message_loses_warnings_and_says_so() -> None:
    many = [
        QubeReport(name=f"q{number}", klass="AppVM", outcome="restored", warnings=("w" * 1000,) * 100)
        for number in range(100)
    ]
    large = report(*many)
    large.warnings = ("w" * 1000,) * 20
    large.close(None, NOON)
    short = large.fitting(MAX_FRAME)
    assert travelled(short) == short
    assert [qube.outcome for qube in short.qubes] == ["restored"] * 100
    assert {len(qube.warnings) for qube in short.qubes} == {10}
    assert short.warnings[-1] == CUT and len(short.warnings) == 11


@pytest.mark.parametrize("moment", ["2026-13-45T99:00:00Z", "2026-11-23T12:00:00+00:00", "now", ""])
def test_a_time_that_is_none_is_refused(moment: str) -> None:
    payload = json.loads(encode_message(report())) | {"started": moment}
    with pytest.raises(ProtocolViolation, match="no moment in UTC"):
        parsed(from_dom0(), json.dumps(payload).encode())
