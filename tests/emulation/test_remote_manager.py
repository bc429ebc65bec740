"""The manager's adapter in a process of a GUI domain, as the restore dialog uses it, from end to end."""

import json
from pathlib import Path

import pytest

from tests.emulation.remote_bench import (
    GUI,
    IMAGE,
    PASSPHRASE,
    START,
    STORAGE,
    VERIFY,
    Json,
    Program,
    RemoteBench,
    two_qubes,
)


@pytest.fixture
def bench(bench: RemoteBench) -> RemoteBench:
    bench.grant(START, VERIFY)
    return bench


def dialog(bench: RemoteBench, location: str, **wanted: object) -> Program:
    program = bench.program("dialog")
    wanted = {"location": location, "qube": None, "passphrase": PASSPHRASE, **wanted}
    program.say(json.dumps(wanted))
    return program


def logged(events: list[Json]) -> str:
    return "\n".join(event["text"] for event in events if event["event"] == "log")


def test_a_backup_on_a_usb_qube_is_restored_if_that_is_granted(bench: RemoteBench, backup: str) -> None:
    path = bench.put(Path(backup), STORAGE)
    before = bench.snapshot()
    bench.configure(f"storage: [{STORAGE}]")
    events = dialog(bench, path, qube=STORAGE).rest()
    assert events[-1]["event"] == "done"
    summary = next(event for event in events if event["event"] == "summary")
    assert summary["names"] == ["first", "second"]
    assert "first |" in summary["text"]
    percents = [event["percent"] for event in events if event["event"] == "percent"]
    assert percents[-1] == 100 and percents == sorted(set(percents))
    assert "first: restored" in logged(events) and "second: restored" in logged(events)
    for name in ("first", "second"):
        assert bench.dom0.sha256(f"{name}/private") == (IMAGE.size, IMAGE.sha256())
    bench.remove("first", "second")
    bench.check_as_before(before)


def test_a_wrong_passphrase_is_an_error_in_clear_words(bench: RemoteBench, backup: str) -> None:
    before = bench.snapshot()
    told = dialog(bench, backup, passphrase="wrong").rest()[-1]
    assert (told["event"], told["kind"]) == ("failed", "QubesException")
    assert "does not open with this passphrase" in told["text"]
    assert "--" not in told["text"], "a dialog has no options of a command"
    bench.check_as_before(before)


def test_a_cancel_in_the_middle_removes_what_was_begun_and_keeps_what_was_finished(
    bench: RemoteBench,
) -> None:
    sample = two_qubes()
    held = bench.held(sample, sample.middle_of("vm11/private.img.003.enc"), from_pass=2)
    before = bench.snapshot()
    program = dialog(bench, held.location, qube=GUI)
    program.until("summary")
    held.wait()
    while "Restoring second" not in program.until("log", "cancelled", "failed", "done").get("text", ""):
        pass
    program.say("cancel")
    events = program.rest()
    assert events[-1]["event"] == "cancelled"
    assert "Restored: first." in events[-1]["text"]
    assert "second" in events[-1]["text"]
    bench.wait_service_ended()
    assert bench.new_qubes(before) == {"first"}
    held.release()
    bench.remove("first")
    bench.check_as_before(before)


def test_a_volume_that_fails_is_told_with_what_was_restored_and_what_was_not(
    bench: RemoteBench, backup: str
) -> None:
    before = bench.snapshot()
    bench.qubes.qubesd.fail("internal.vm.volume.ImportBegin*", message="no such luck", dest="second")
    events = dialog(bench, backup).rest()
    told = events[-1]
    assert (told["event"], told["kind"]) == ("failed", "QubesException")
    assert "1 of 2 qubes restored." in told["text"]
    assert "Restored: first." in told["text"]
    assert "Not restored: second." in told["text"] and "no such luck" in told["text"]
    assert "first: restored" in logged(events)
    assert bench.new_qubes(before) == {"first"}
    bench.remove("first")
    bench.check_as_before(before)


def test_what_is_not_granted_is_told_with_what_would_grant_it(bench: RemoteBench) -> None:
    before = bench.snapshot()
    told = dialog(bench, "/backup", qube=STORAGE).rest()[-1]
    assert told["event"] == "failed"
    assert f"qube {GUI} may not have a backup read from {STORAGE}." in told["text"]
    assert f"add {STORAGE} to grants.{GUI}.storage in" in told["text"]
    bench.check_as_before(before)
