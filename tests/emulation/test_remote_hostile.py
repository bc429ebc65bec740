"""A GUI domain that has been taken over: whatever it says to the service, nothing happens but a refusal."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from qubes_restore_svc.wire.models import ErrorInfo
from tests.dom0_service.support import frame
from tests.emulation.remote_bench import (
    GUI,
    LIST,
    START,
    STORAGE,
    VERIFY,
    Json,
    RawCall,
    RemoteBench,
    open_message,
    open_remote,
    two_qubes,
)

BACKUP = Path("/backup")
CONFIRM: Json = {"type": "confirm", "plan": 1}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[RemoteBench]:
    with open_remote(tmp_path) as bench:
        bench.grant(START, VERIFY, LIST)
        (bench.folder / "granted").mkdir()
        (bench.folder / "granted" / "points-away").symlink_to("/etc/passwd")
        bench.configure(f"dom0_directories: [{bench.folder / 'granted'}]")
        yield bench


def refused(bench: RemoteBench, call: RawCall) -> ErrorInfo:
    """It must be, in words that can be shown; nothing of this system may have been touched."""
    error = call.refused().error
    assert error.reason.isprintable() and error.advice.isprintable()
    bench.wait_service_ended()
    return error


UNSAYABLE = {
    "a confirmation of nothing": frame(CONFIRM),
    "a frame of 4 GiB": struct.pack("!I", 0xFFFFFFFF) + b"x" * 5_000_000,
    "no JSON": frame(b"{"),
    "no frame": b"GET / HTTP/1.1\r\n\r\n",
    "who calls": frame(open_message(BACKUP, caller="dom0")),
    "a control character": frame(open_message(BACKUP, location={"text": "/b\x1b[2J"})),
    "a second line": frame(open_message(BACKUP, location={"text": "/b\n/etc/passwd"})),
    "a path as a qube": frame(open_message(BACKUP, location={"qube": "../dom0", "text": "/b"})),
}


@pytest.mark.parametrize("data", UNSAYABLE.values(), ids=UNSAYABLE)
def test_what_cannot_be_said_first_is_refused_and_touches_nothing(bench: RemoteBench, data: bytes) -> None:
    before = bench.snapshot()
    call = bench.call()
    call.raw(data + frame(open_message(BACKUP)))
    assert refused(bench, call).kind == "protocol-violation"
    assert bench.qubes.qubesd.calls == []
    bench.check_as_before(before)


FOREIGN: dict[str, Json] = {
    "another qube": {"qube": "personal", "text": "/home/user/b"},
    "another qube's command": {"qube": STORAGE, "text": "sh -c 'touch /tmp/owned'"},
    "its own service": {"qube": GUI, "text": "qubes.VMShell", "service": True},
    "a file of dom0": {"qube": "dom0", "text": "/etc/shadow"},
    "a way up in dom0": {"qube": "dom0", "text": "{granted}/../config.yaml"},
    "a neighbour of what is granted": {"qube": "dom0", "text": "{granted}x"},
}


@pytest.mark.parametrize("location", FOREIGN.values(), ids=FOREIGN)
def test_a_place_that_is_not_its_own_is_refused_and_not_looked_at(bench: RemoteBench, location: Json) -> None:
    before = bench.snapshot()
    call = bench.call()
    granted = str(bench.folder / "granted")
    call.say(
        open_message(BACKUP, location={**location, "text": location["text"].replace("{granted}", granted)})
    )
    error = refused(bench, call)
    assert error.kind == "not-granted"
    assert f"grants.{GUI}." in error.advice
    assert bench.qubes.qubesd.calls == []
    bench.check_as_before(before)


def test_a_link_below_a_granted_directory_leads_nowhere(bench: RemoteBench) -> None:
    before = bench.snapshot()
    told = set()
    for name in ("points-away", "not-there"):
        call = bench.call()
        path = f"{bench.folder / 'granted'}/{name}"
        call.say(open_message(BACKUP, location={"qube": "dom0", "text": path}))
        told.add(refused(bench, call).reason.replace(name, "NAME"))
    assert len(told) == 1, "it says nothing on whether there is something where the link points"
    bench.check_as_before(before)


@pytest.mark.parametrize("argument", ["x", "dom0"])
def test_a_call_with_an_argument_is_not_answered(bench: RemoteBench, argument: str) -> None:
    before = bench.snapshot()
    call = bench.call(f"{START}+{argument}")
    call.say(open_message(BACKUP))
    assert call.hear() is None
    assert call.end() == 1
    assert bench.journal == f"{START}: the service takes no argument\n"
    assert bench.qubes.switchboard.calls[-1].decision == "allow"
    bench.check_as_before(before)


def test_who_calls_is_not_what_the_caller_says(bench: RemoteBench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bench.snapshot()
    environment = bench.qubes.domain_environment(GUI)
    lies = {"QREXEC_REMOTE_DOMAIN": "dom0", "QREXEC_SERVICE_FULL_NAME": "x"}
    monkeypatch.setattr(bench.qubes, "domain_environment", lambda name: environment | lies)
    call = bench.call()
    call.say(open_message(BACKUP, location={"qube": "dom0", "text": "/etc/shadow"}))
    error = refused(bench, call)
    assert error.reason == f"the qube {GUI} may not have /etc/shadow read in dom0"
    bench.check_as_before(before)


WRONG_ANSWERS = {
    "another opening": frame(open_message(BACKUP)),
    "a plan that was not told": frame({"type": "confirm", "plan": 2}),
    "dom0's home": frame({"type": "choose", "choice": {"dom0_home": True}}),
    "a qube that is not in the backup": frame({"type": "choose", "choice": {"names": ["personal"]}}),
}


@pytest.mark.parametrize("data", WRONG_ANSWERS.values(), ids=WRONG_ANSWERS)
def test_a_wrong_answer_to_the_plan_ends_all_of_it(bench: RemoteBench, tmp_path: Path, data: bytes) -> None:
    two_qubes().write(tmp_path / "backup")
    path = bench.put(tmp_path / "backup")
    before = bench.snapshot()
    call = bench.call()
    call.say(open_message(Path(path)))
    call.plan()
    call.raw(data)
    error = refused(bench, call)
    assert error.kind in ("protocol-violation", "usage", "not-granted")
    assert not bench.qubes.qubesd.calls_of("admin.vm.Create.AppVM*")
    bench.check_as_before(before)


@pytest.mark.parametrize(
    "data",
    [frame(CONFIRM), b"\xff" * 100],
    ids=["another confirmation", "garbage"],
)
def test_what_cannot_be_said_during_the_restore_undoes_it(bench: RemoteBench, data: bytes) -> None:
    sample = two_qubes()
    held = bench.held(sample, sample.middle_of("vm10/private.img.003.enc"), from_pass=2)
    before = bench.snapshot()
    call = bench.call()
    call.say(open_message(Path(held.location)))
    call.plan()
    call.say(CONFIRM)
    held.wait()
    call.raw(data)
    report = call.report()
    assert report.error is not None
    assert (report.status != 0, report.error.kind) == (True, "protocol-violation")
    assert not [qube for qube in report.qubes if qube.succeeded]
    bench.wait_service_ended()
    held.release()
    bench.check_as_before(before)
