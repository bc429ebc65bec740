"""Whoever asked dom0 for a restore is gone, in any state and in any way: nothing is left, the next one works.

Strategy: a state is where the backup stands still and what the client has said by then; a way is how it goes.
The backup stays held until dom0 has cleared up, so that nothing but the end of the client can be the reason.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qubes_restore_svc.qubes.locks import read_holder
from tests.emulation.dom0 import wait_until
from tests.emulation.remote_bench import (
    GUI,
    IMAGE,
    START,
    VERIFY,
    HeldBackup,
    Json,
    Program,
    RawCall,
    RemoteBench,
    SampleBackup,
    open_message,
    two_qubes,
)

BOTH = {"first", "second"}


@pytest.fixture
def bench(bench: RemoteBench) -> RemoteBench:
    bench.grant(START, VERIFY)
    return bench


@dataclass(frozen=True)
class State:
    """Where the restore stands. `begun`, `told`, `confirmed`: what the client has said, and heard, by then.

    The backup stands at the byte `offset`, from its pass `number` on; None: it runs through. The first pass
    is for the plan, the second one for the volumes.
    """

    name: str
    begun: bool = True
    told: bool = False
    confirmed: bool = False
    offset: Callable[[SampleBackup], int] | None = None
    number: int = 1
    restored: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.name


NOT_ASKED = State("nothing is asked for yet", begun=False)
PLANNING = State("the plan is being made", offset=lambda sample: 0)
PLANNED = State("the plan is shown", told=True)
CONFIRMED = State(
    "it is confirmed, and no volume has come",
    told=True,
    confirmed=True,
    offset=lambda sample: sample.beginning_of("vm10/private.img.000.enc"),
    number=2,
)
FIRST_VOLUME = State(
    "in the middle of the first volume",
    told=True,
    confirmed=True,
    offset=lambda sample: sample.middle_of("vm10/private.img.003.enc"),
    number=2,
)
SECOND_VOLUME = State(
    "in the middle of the second volume",
    told=True,
    confirmed=True,
    offset=lambda sample: sample.middle_of("vm11/private.img.003.enc"),
    number=2,
    restored=frozenset({"first"}),
)
REPORTED = State("the report is there, and not read", told=True, confirmed=True, restored=frozenset(BOTH))

PROGRAM_STATES = (PLANNING, PLANNED, CONFIRMED, FIRST_VOLUME, SECOND_VOLUME, REPORTED)


def request(held: HeldBackup, mode: str = "restore") -> Json:
    return open_message(Path("/"), mode, location={"text": held.location})


def held(bench: RemoteBench, state: State) -> HeldBackup:
    """The backup as the state needs it."""
    sample = two_qubes()
    offset = 0 if state.offset is None else state.offset(sample)
    backup = bench.held(sample, offset, state.number)
    if state.offset is None:
        backup.release()
    return backup


def stands(bench: RemoteBench, state: State, backup: HeldBackup) -> None:
    """Return when it is so far."""
    if state.offset is not None:
        backup.wait()
    calls = bench.qubes.qubesd.calls_of
    volume_of = {FIRST_VOLUME: "first", SECOND_VOLUME: "second"}.get(state)
    if volume_of is not None:
        wait_until(lambda: bool(calls("internal.vm.volume.ImportBegin*", volume_of)), "the volume to begin")
    if state is SECOND_VOLUME:
        wait_until(lambda: not _is_unfinished(bench, "first"), "the first qube to be finished")
    if state is CONFIRMED:
        assert len(backup.passes) == 2 and not calls("admin.vm.Create.AppVM*")
    if state is REPORTED:
        wait_until(lambda: bool(reports(bench)), "the report")


def _is_unfinished(bench: RemoteBench, name: str) -> bool:
    return bool(bench.qubes.qubesd.tags(name) & {"backup-restore-in-progress", "restore-svc-unfinished"})


def reports(bench: RemoteBench) -> list[Path]:
    return list((bench.folder / "reports").glob("*.json"))


def client_in(bench: RemoteBench, state: State, backup: HeldBackup) -> Program:
    """The program over the client library, in that state."""
    client = bench.client(request(backup))
    if state.told:
        client.until("plan")
    if state.confirmed:
        if state is REPORTED:  # it reads no more from here on
            client.say("confirm")
            client.until("volume")
            os.kill(client.process.pid, signal.SIGSTOP)
        else:
            client.say("confirm")
    stands(bench, state, backup)
    return client


def call_in(bench: RemoteBench, state: State, backup: HeldBackup, mode: str = "restore") -> RawCall:
    """A bare call in that state."""
    call = bench.call(START if mode == "restore" else VERIFY)
    if not state.begun:
        wait_until(bench.service_runs, "the service to run")
        return call
    call.say(request(backup, mode))
    if state.told:
        plan = call.plan()
        if state.confirmed:
            call.say({"type": "confirm", "plan": plan.number})
    stands(bench, state, backup)
    return call


def check_nothing_is_left(
    bench: RemoteBench, state: State, backup: HeldBackup, before: dict[str, object]
) -> None:
    """dom0 clears up by itself; what was restored by then, and only that, is there, complete."""
    bench.wait_service_ended()
    assert bench.new_qubes(before) == state.restored
    assert bench.dom0.locks() == []
    backup.release()
    for name in state.restored:
        assert bench.dom0.sha256(f"{name}/private") == (IMAGE.size, IMAGE.sha256())
        assert not _is_unfinished(bench, name)
    bench.remove(*state.restored)
    bench.check_as_before(before)


def check_next_restore_works(bench: RemoteBench, backup: HeldBackup, before: dict[str, object]) -> None:
    call = bench.call()
    call.say(request(backup))
    call.say({"type": "confirm", "plan": call.plan().number})
    assert call.report().status == 0
    assert bench.new_qubes(before) == BOTH


@pytest.mark.parametrize("state", PROGRAM_STATES, ids=str)
def test_a_client_that_is_killed_leaves_nothing(bench: RemoteBench, state: State) -> None:
    backup = held(bench, state)
    before = bench.snapshot()
    client = client_in(bench, state, backup)
    client.kill()
    client.end()
    check_nothing_is_left(bench, state, backup, before)
    if state in (FIRST_VOLUME, REPORTED):  # elsewhere the equal state has to do: it takes seconds
        check_next_restore_works(bench, backup, before)


@pytest.mark.parametrize("state", PROGRAM_STATES, ids=str)
def test_a_client_whose_qube_dies_leaves_nothing(bench: RemoteBench, state: State) -> None:
    backup = held(bench, state)
    before = bench.snapshot()
    go(bench, call_in(bench, state, backup), "its qube dies")
    check_nothing_is_left(bench, state, backup, before)


@pytest.mark.parametrize("state", (PLANNING, FIRST_VOLUME, REPORTED), ids=str)
def test_a_call_that_is_closed_leaves_nothing(bench: RemoteBench, state: State) -> None:
    backup = held(bench, state)
    before = bench.snapshot()
    call = call_in(bench, state, backup)
    call.hang_up()
    last = None
    while (message := call.hear()) is not None:
        last = message
    assert last is not None
    told = last.model_dump()
    assert told["type"] == ("report" if state.confirmed else "refused")
    if state is not REPORTED:
        assert told["error"]["kind"] == "cancelled"
        assert told["error"]["reason"] == "the call was closed"
    call.end()
    check_nothing_is_left(bench, state, backup, before)


@pytest.mark.parametrize("way", ["killed", "closed", "its qube dies"])
def test_before_anything_was_asked_for_nothing_is_left(bench: RemoteBench, way: str) -> None:
    backup = held(bench, NOT_ASKED)
    before = bench.snapshot()
    call = call_in(bench, NOT_ASKED, backup)
    go(bench, call, way)
    check_nothing_is_left(bench, NOT_ASKED, backup, before)
    assert reports(bench) == []


def test_a_verification_whose_client_is_gone_leaves_nothing(bench: RemoteBench) -> None:
    backup = held(bench, FIRST_VOLUME)
    before = bench.snapshot()
    call = call_in_verification(bench, backup)
    go(bench, call, "killed")
    check_nothing_is_left(bench, PLANNED, backup, before)


def test_if_it_is_the_service_that_is_killed_its_client_is_told_and_nothing_is_left(
    bench: RemoteBench,
) -> None:
    backup = held(bench, SECOND_VOLUME)
    before = bench.snapshot()
    client = client_in(bench, SECOND_VOLUME, backup)
    holder = read_holder(bench.folder / "restore.lock")
    assert holder is not None and holder.client == GUI
    os.kill(holder.pid, signal.SIGKILL)
    told = client.rest()[-1]
    assert (told["event"], told["kind"]) == ("error", "host-failed")
    assert "ended with exit code 137" in told["reason"]
    assert "what was finished stays" in told["advice"]
    check_nothing_is_left(bench, SECOND_VOLUME, backup, before)


def call_in_verification(bench: RemoteBench, backup: HeldBackup) -> RawCall:
    call = bench.call(VERIFY)
    call.say(request(backup, "verify"))
    call.say({"type": "confirm", "plan": call.plan().number})
    backup.wait()
    return call


def go(bench: RemoteBench, call: RawCall, way: str) -> None:
    """End the client in that way, and have its qube again."""
    if way == "killed":
        call.kill()
    elif way == "closed":
        call.hang_up()
    else:
        bench.qubes.kill_domain(GUI)
    call.end()
    if way == "its qube dies":
        bench.wait_service_ended()
        bench.qubes.start_domain(GUI)
