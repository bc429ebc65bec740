"""What is made of the reports of other machines, whatever has come from there."""

import io
import json
import os
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from qubes_restore_svc.errors import UsageError
from qubes_restore_svc.watch import collected
from qubes_restore_svc.watch.collected import (
    Row,
    from_stream,
    in_directory,
    of_places,
    rows,
    text_of,
)

from .reports import NOW, watch_report


def report(state: str = "good", made: datetime | None = NOW, checked: datetime = NOW) -> bytes:
    text = watch_report("good", made, checked).text()
    return (text if state == "good" else text.replace('"good"', f'"{state}"')).encode()


FINDINGS = collected._findings(collected._parsed(report()))


def row(untrusted_report: bytes, now: datetime = NOW) -> Row:
    (found,) = rows({"desk": {"nas": collected._findings(collected._parsed(untrusted_report))}}, now, 2)
    return found


def test_a_good_report_stays_good_as_long_as_backup_and_report_are_new() -> None:
    assert row(report()).is_good
    assert row(report(made=NOW - timedelta(days=7)), NOW + timedelta(hours=23)).is_good
    late = row(report(made=NOW - timedelta(days=7)), NOW + timedelta(hours=25))
    assert (late.state, late.reason) == ("too old", "it is 8 days old, and 8 are allowed")
    stale = row(report(), NOW + timedelta(days=3))
    assert (stale.state, stale.reason) == ("old report", "the last check was 3 days ago, and found: good")


def test_a_report_or_a_backup_from_the_future_is_not_good() -> None:
    assert row(report(checked=NOW + timedelta(days=3))).state == "old report"
    assert row(report(made=NOW + timedelta(days=2))).state == "too old"


def test_of_a_machine_without_a_report_that_is_said() -> None:
    found = rows({"desk": {}, "office": {"nas": "no report"}}, NOW, 2)
    assert [(one.machine, one.place, one.state) for one in found] == [
        ("desk", "-", "no report"), ("office", "nas", "no report"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "untrusted_report",
    [
        b"",
        b"{}",
        b"null",
        b"\xff",
        b"[" * 100_000,
        report("splendid"),
        report().replace(b'"max_age_days": 8', b'"max_age_days": 1e9'),
        report().replace(b'"backup_time": "2026', b'"backup_time": "9999999'),
        report().replace(b'"reason": "', b'"reason": ["'),
        report().replace(b"the reason", b"x" * 2000),
        report().replace(b'"place"', b'"state": "good",\n  "place"'),
        report().replace(b'"place"', b'"seconds": 1.5,\n  "place"'),
        report() + b" " * (9 << 20),
    ],
)
def test_what_is_no_report_is_told_and_ends_nothing(untrusted_report: bytes) -> None:
    assert row(untrusted_report).state == "bad report"


def test_a_report_of_a_later_version_may_say_more() -> None:
    assert row(report().replace(b'"place"', b'"colour": "red",\n  "place"')).is_good


def test_no_text_of_another_machine_steers_the_terminal() -> None:
    found = row(report("bad").replace(b"the reason", rb"\u001b[2Jreason").replace(b"/media", rb"\u202e"))
    assert found.reason == "\ufffd[2Jreason"
    assert "\u202e" not in text_of([found]) and "\ufffd/qubes-1" in text_of([found])


def test_reports_lie_in_directories_of_machines(tmp_path: Path) -> None:
    for name in ("desk/nas.json", "desk/usb.json", "desk/nas.prom", "desk/.x.json", "office/x", "-x/a.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(report() if "nas" in name else b"{}")
    (tmp_path / "file").touch()
    found = in_directory(tmp_path, ["attic", "desk"])
    assert found == {
        "-x": {"a": "bad report"},
        "attic": {},
        "desk": {"nas": FINDINGS, "usb": "bad report"},
        "office": {},
    }
    with pytest.raises(UsageError, match="none cannot be read: No such file"):
        in_directory(tmp_path / "none", [])


def test_nothing_odd_of_one_machine_hides_the_others(tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    for name in ("odd", "good", "bü\x1bro"):
        (tmp_path / name).mkdir()
    (tmp_path / "good" / "nas.json").write_bytes(report())
    os.mkfifo(odd / "fifo.json")
    writer = os.open(odd / "fifo.json", os.O_RDWR | os.O_NONBLOCK)
    os.write(writer, report())
    (odd / "directory.json").mkdir()
    (odd / "link.json").symlink_to(tmp_path / "good" / "nas.json")
    (odd / "loop.json").symlink_to("loop.json")
    (odd / "device.json").symlink_to("/dev/zero")
    (odd / "-x.json").write_bytes(report())
    found = rows(in_directory(tmp_path, []), NOW, 2)
    os.close(writer)
    assert [(one.machine, one.place, one.state) for one in found] == [
        ("bü\ufffdro", "-", "bad report"),
        ("good", "nas", "good"),
        *(("odd", name, "bad report") for name in ("-x", "device", "directory", "fifo", "link", "loop")),
    ]


def test_of_this_machine_every_place_must_have_one(tmp_path: Path) -> None:
    for name in ("nas", "old"):
        (tmp_path / f"{name}.json").write_bytes(report())
    found = of_places(tmp_path, [], ["nas", "usb"])
    assert found == {"nas": FINDINGS, "old": FINDINGS, "usb": "no report"}
    assert of_places(tmp_path, ["usb"], ["nas", "usb"]) == {"usb": "no report"}
    assert of_places(tmp_path / "none", [], ["nas"]) == {"nas": "no report"}


def streamed(monkeypatch: pytest.MonkeyPatch, *lines: bytes) -> collected.Untrusted:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"".join(lines))))
    return from_stream(["attic"])


def test_what_salt_prints_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = {"nas": json.loads(report()), "odd": {"a": 1}, "new": None}
    answers = {"desk": desk, "gone": False, "broken": "Minion did not return."}
    lines = [json.dumps({name: answer}).encode() + b"\n" for name, answer in answers.items()]
    assert streamed(monkeypatch, *lines) == {
        "attic": {}, "gone": {}, "broken": {},
        "desk": {"nas": FINDINGS, "odd": "bad report", "new": "no report"},
    }  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [b"[]", b'{"a"', b"[" * 100_000, b'{"a": {"b": 1.5}}', b"\xff", b'{"a": 1, "a": 2}', b" " * (20 << 20)],
)
def test_a_line_that_is_no_json_of_a_machine_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, line: bytes
) -> None:
    good = b'{"desk": {"nas": ' + json.dumps(json.loads(report())).encode() + b"}}"
    found = rows(streamed(monkeypatch, line, b"\n", good, b"\n\n"), NOW, 2)
    assert [(one.machine, one.state) for one in found] == [
        ("attic", "no report"), ("desk", "good"), ("line 1", "bad report"),
    ]  # fmt: skip


def test_a_name_that_salt_does_not_give_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows(streamed(monkeypatch, b'{"-x": {}}\n{"desk": {"../x": {}}}\n'), NOW, 2)
    assert [(one.machine, one.place, one.state) for one in found] == [
        ("-x", "-", "bad report"), ("attic", "-", "no report"), ("desk", "../x", "bad report"),
    ]  # fmt: skip


def test_json_over_several_lines_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--out-indent=-1"):
        streamed(monkeypatch, b'{\n    "desk": {}\n}\n')
