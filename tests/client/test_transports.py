"""The programs that carry a call: what is started, what their end means, and that nothing of them is left."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qubes_restore_svc.client import transports
from qubes_restore_svc.client.aio import RestoreCall
from qubes_restore_svc.client.transports import (
    Handed,
    ProgramTransport,
    QrexecTransport,
    Transport,
    system_transport,
)
from qubes_restore_svc.errors import HostFailed, NotGranted, RestoreError, UsageError
from qubes_restore_svc.wire import restore_call as c

from .fakes import PATIENCE_S, plan, report, request
from .programs import fake_program, fake_qrexec, is_gone, open_descriptors, said


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() - before == set()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


async def failure(transport: Transport) -> RestoreError:
    with pytest.raises(RestoreError) as caught:
        async with asyncio.timeout(PATIENCE_S):
            async with RestoreCall(transport, request()) as call:
                await call.confirm()
    return caught.value


async def test_a_restore_through_a_program(tmp_path: Path) -> None:
    transport = fake_program(
        tmp_path,
        ("words", "words"),
        ("note", "started"),
        ("hear", "open"),
        said(plan()),
        ("hear", "confirm"),
        said(report()),
    )
    async with RestoreCall(transport, request()) as call:
        assert await call.confirm() == report()
    assert json.loads((tmp_path / "words").read_text()) == ["restore.Start"]
    assert is_gone(tmp_path / "started")


async def test_a_program_gets_what_is_handed_over_and_no_other_descriptor(tmp_path: Path) -> None:
    (tmp_path / "backup").write_text("backup")
    with (tmp_path / "backup").open("rb") as backup, open(os.devnull) as other:
        os.set_inheritable(other.fileno(), True)
        transport = fake_program(
            tmp_path,
            ("hear", "open"),
            ("take passphrase", "taken"),
            said(plan()),
            ("hear", "confirm"),
            said(report()),
            handed=Handed(backup.fileno(), lambda: "büro" * 9000),
        )
        async with RestoreCall(transport, request()) as call:
            assert await call.confirm() == report()
        passphrase, there, handed = json.loads((tmp_path / "taken").read_text())
        assert passphrase == "büro" * 9000 + "\n"
        assert there == sorted(handed.values())
        assert handed["archive"] == backup.fileno() and handed.keys() == {"archive", "passphrase"}


async def test_a_program_that_wants_no_passphrase_is_given_none(tmp_path: Path) -> None:
    def ask() -> str:
        raise AssertionError

    steps = (("hear", "open"), said(plan(mode="verify")), ("hear end",))
    async with RestoreCall(fake_program(tmp_path, *steps, handed=Handed(None, ask)), request("verify")):
        pass


async def test_where_there_is_no_passphrase_the_program_is_told(tmp_path: Path) -> None:
    def ask() -> str:
        raise UsageError("the passphrase is empty")

    steps = (("hear", "open"), ("take passphrase", "taken"), ("exit", 3))
    error = await failure(fake_program(tmp_path, *steps, handed=Handed(None, ask)))
    assert "ended with exit code 3" in error.reason
    assert json.loads((tmp_path / "taken").read_text())[0] == ""


async def test_qrexec_is_called_as_it_wants_to_be(tmp_path: Path) -> None:
    program = fake_qrexec(tmp_path, ("words", "words"), ("hear", "open"), said(plan(mode="verify")))
    async with RestoreCall(QrexecTransport(program=program), request("verify")):
        pass
    assert json.loads((tmp_path / "words").read_text()) == ["dom0", "restore.Verify"]


# --- Why it ended --------------------------------------------------------------------------------


async def test_a_refusal_by_the_policy_names_the_line_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "sys-gui")
    program = fake_qrexec(tmp_path, ("stderr", "Request refused\n"), ("exit", 126))
    error = await failure(QrexecTransport(program=program))
    assert isinstance(error, NotGranted)
    assert "does not let this qube call restore.Start" in error.reason
    assert "/etc/qubes/policy.d/include/qubes-restore-svc in dom0:" in error.advice
    assert error.advice.endswith(" restore.Start * sys-gui @adminvm allow target=dom0")
    monkeypatch.setattr("socket.gethostname", lambda: "no name!")
    assert "restore.Start * THIS-QUBE @adminvm" in (await failure(QrexecTransport(program=program))).advice


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (127, "dom0 has no service restore.Start"),
        (125, "the call of restore.Start could not be made"),
        (255, "the connection to dom0 broke off"),
        (1, r"the call to dom0 ended with exit code 1, without an answer \(connect: No such file\)"),
        (0, r"the call to dom0 ended, without an answer \(connect: No such file\)"),
    ],
)
async def test_every_exit_code_of_qrexec_has_its_meaning(tmp_path: Path, code: int, reason: str) -> None:
    program = fake_qrexec(tmp_path, ("stderr", "one\nconnect: No such file\n"), ("exit", code))
    error = await failure(QrexecTransport(program=program))
    assert isinstance(error, HostFailed)
    with pytest.raises(HostFailed, match=reason):
        raise error


async def test_what_a_program_says_last_is_told_without_what_steers_a_terminal(tmp_path: Path) -> None:
    transport = fake_program(
        tmp_path, ("flood", 2, 1 << 20), ("stderr", "\n\x1b[2Jno \u202eroom" + "y" * 999), ("exit", 3)
    )
    error = await failure(transport)
    assert "ended with exit code 3" in error.reason and "\ufffd[2Jno \ufffdroomyyy" in error.reason
    assert len(error.reason) < 500


async def test_a_program_that_is_killed(tmp_path: Path) -> None:
    transport = fake_program(tmp_path, ("note", "started"), ("hear", "open"), said(plan()), ("stay",))
    async with RestoreCall(transport, request()) as call:
        os.kill(int((tmp_path / "started").read_text()), signal.SIGKILL)
        with pytest.raises(HostFailed, match=r"was killed by signal 9 \(SIGKILL\)"):
            await call.confirm()


@pytest.mark.parametrize("transport", [QrexecTransport(program="/nowhere/x"), ProgramTransport(["/etc"])])
async def test_a_program_that_cannot_be_started(transport: Transport) -> None:
    assert "cannot be started" in (await failure(transport)).reason


# --- Its end -------------------------------------------------------------------------------------


async def test_closing_lets_the_program_end_by_itself(tmp_path: Path) -> None:
    transport = fake_program(
        tmp_path, ("hear", "open"), said(plan()), ("hear end",), ("flood", 1, 1 << 20), ("note", "ended")
    )
    async with RestoreCall(transport, request()):
        pass
    assert is_gone(tmp_path / "ended")


async def test_one_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "_PROGRAM_PATIENCE_S", 0.01)
    monkeypatch.setattr(transports, "_KILL_TIMEOUT_S", 0.2)
    for stubborn in ((), (("stubborn",),)):
        transport = fake_program(
            tmp_path, *stubborn, ("note", "started"), ("hear", "open"), said(plan()), ("stay",)
        )
        async with RestoreCall(transport, request()):
            pass
        assert is_gone(tmp_path / "started")


async def test_a_program_that_hangs_up_and_stays_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transports, "_END_TIMEOUT_S", 0.1)
    monkeypatch.setattr(transports, "_PROGRAM_PATIENCE_S", 0.01)
    transport = fake_program(tmp_path, ("hear", "open"), said(plan()), ("close output",), ("stay",))
    assert "hung up in the middle of the call" in (await failure(transport)).reason


async def test_a_copy_of_its_streams_keeps_nobody_waiting_and_nothing_is_lost(tmp_path: Path) -> None:
    large = report().model_copy(update={"warnings": ("x" * 1000,) * 1024})
    transport = fake_program(
        tmp_path,
        ("leave a copy", "copy"),
        ("hear", "open"),
        said(plan()),
        ("hear", "confirm"),
        said(large),
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            async with RestoreCall(transport, request()) as call:
                assert await call.confirm() == large
    finally:
        os.kill(int((tmp_path / "copy").read_text()), signal.SIGKILL)


async def test_a_copy_of_its_streams_does_not_hide_that_it_ended(tmp_path: Path) -> None:
    transport = fake_program(tmp_path, ("leave a copy", "copy"), ("stderr", "oh no"), ("exit", 4))
    try:
        assert "with exit code 4, without an answer (oh no)" in (await failure(transport)).reason
    finally:
        os.kill(int((tmp_path / "copy").read_text()), signal.SIGKILL)


async def test_a_program_that_reads_nothing_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transports, "_PROGRAM_PATIENCE_S", 0.01)
    names = tuple(f"{number:0900}" for number in range(1000))
    transport = fake_program(tmp_path, ("note", "started"), ("stay",))
    call = RestoreCall(transport, request(choice=c.Choice(names=names)))
    opening = asyncio.create_task(call.__aenter__())
    async with asyncio.timeout(PATIENCE_S):
        while not (tmp_path / "started").exists():
            await asyncio.sleep(0.01)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    assert is_gone(tmp_path / "started")


@pytest.mark.parametrize("turns", range(8))
async def test_a_cancel_at_any_moment_of_the_start_leaves_nothing(tmp_path: Path, turns: int) -> None:
    transport = fake_program(tmp_path, ("hear", "open"), ("hear end",))
    opening = asyncio.create_task(RestoreCall(transport, request()).__aenter__())
    for _ in range(turns):
        await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening


# --- Which way -----------------------------------------------------------------------------------


def test_in_dom0_the_service_is_a_program_and_elsewhere_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transports, "QUBESD_SOCKET", tmp_path / "qubesd.sock")
    way = system_transport()
    assert isinstance(way, QrexecTransport) and way.program == "/usr/bin/qrexec-client-vm"
    (tmp_path / "qubesd.sock").touch()
    assert isinstance(system_transport(), ProgramTransport)


async def test_where_dom0s_service_is_not_installed_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transports, "_SERVICE_FILE", tmp_path / "nothing")
    with pytest.raises(HostFailed, match="is not installed here"):
        await ProgramTransport().connect("restore.List")


async def test_the_program_of_dom0_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "QUBESD_SOCKET", tmp_path)
    assert (Path(transports.__file__).parents[1] / "dom0_service" / "child.py").exists()
    with contextlib.suppress(RestoreError):
        connection = await system_transport().connect("restore.List")
        await connection.close()
    assert sys.executable
