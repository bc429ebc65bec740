"""A client that has been taken over: whatever it says, it is refused clearly, and nothing happens."""

import asyncio
import json
import os
import socket
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from qubes_restore_svc.dom0_service import conversation
from qubes_restore_svc.errors import ProtocolViolation
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.messages import Cancel
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.qrexec_call import LIST, VERIFY

from .parts import CALLER, STORAGE
from .support import PATIENCE_S, Bed, Client, Json, frame, open_message

#: Everything that a client can say, right in itself.
SAYABLE: dict[type[c.ClientMessage], Json] = {
    c.OpenBackup: open_message(Path("/b")),
    c.Choose: {"type": "choose", "choice": {}},
    c.Confirm: {"type": "confirm", "plan": 1},
    Cancel: {"type": "cancel"},
}
#: … and what it cannot, but dom0.
UNSAYABLE: list[Json] = [
    {"type": "refused", "error": {"kind": "x", "reason": "y"}},
    {"type": "log", "level": "info", "text": "x"},
    {"type": "progress", "archive_bytes": 1},
    {"type": "volume_started", "qube": "work", "volume": "private", "image_size": 1},
    {"type": "start", "mode": "restore", "keys": ["vm1"]},
]
WRONG = [
    (phase, message)
    for phase in (c.CallPhase.IDLE, c.CallPhase.PLANNING, c.CallPhase.PLANNED, c.CallPhase.RUNNING)
    for message in (
        *(said for kind, said in SAYABLE.items() if (phase, kind) not in c.TRANSITIONS),
        *UNSAYABLE,
    )
]


async def lead_to(phase: c.CallPhase, bed: Bed, client: Client) -> None:
    """Bring the call there, and hold it there."""
    if phase is c.CallPhase.PLANNING:
        bed.parts.check.clear()
    bed.parts.begin.clear()
    if phase is not c.CallPhase.IDLE:
        client.say(open_message(bed.backup))
    if phase in (c.CallPhase.PLANNED, c.CallPhase.RUNNING):
        await client.plan()
    if phase is c.CallPhase.RUNNING:
        client.say({"type": "confirm", "plan": 1})
        await client.started()
        await asyncio.to_thread(bed.parts.begun.wait, PATIENCE_S)


async def check_refused(bed: Bed, client: Client, running: bool = False) -> ErrorInfo:
    """It must be, as what it is, and nothing may have come of it."""
    if running:
        async with asyncio.timeout(PATIENCE_S):
            while not bed.ended:
                await asyncio.sleep(0.001)
        bed.parts.begin.set()
        report = await client.report()
        assert report.error is not None
        assert not any(qube.succeeded for qube in report.qubes)
        error = report.error
    else:
        error = (await client.refused()).error
    assert error.kind == "protocol-violation"
    return error


@pytest.mark.parametrize(("phase", "message"), WRONG, ids=lambda value: str(value)[:40])
async def test_a_message_that_may_not_come_now(bed: Bed, phase: c.CallPhase, message: Json) -> None:
    async with bed.call() as client:
        await lead_to(phase, bed, client)
        client.say(message)
        error = await check_refused(bed, client, phase is c.CallPhase.RUNNING)
        assert "worker" not in error.advice
    assert bed.restored == []
    assert bed.delivered is True


@pytest.mark.parametrize(
    "phase", [c.CallPhase.IDLE, c.CallPhase.PLANNING, c.CallPhase.PLANNED, c.CallPhase.RUNNING]
)
@pytest.mark.parametrize(
    "data",
    [
        struct.pack("!I", 0),
        struct.pack("!I", 0xFFFFFFFF) + b"x",
        struct.pack("!I", (1 << 20) + 1),
        struct.pack("!I", 4 << 20) + b"{}" * (2 << 20),
        frame(b"{"),
        frame(b"[]"),
        frame(b'"open"'),
        frame(b"\xff\xfe"),
        frame(b'{"type": "cancel", "type": "cancel"}'),
        frame(b'{"type": "cancel", "more": 1}'),
        frame(b'{"type": "confirm", "plan": 1e0}'),
        frame(b'{"type": "confirm", "plan": true}'),
        frame(b'{"type": "confirm", "plan": "1"}'),
        frame(b"{" * 60_000),
        frame(json.dumps({"type": "choose", "choice": {"names": [{}] * 20_000}}).encode()),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=range(16),
)
async def test_what_is_no_message_at_all(bed: Bed, phase: c.CallPhase, data: bytes) -> None:
    async with bed.call() as client:
        await lead_to(phase, bed, client)
        client.raw(data)
        await check_refused(bed, client, phase is c.CallPhase.RUNNING)
    assert bed.restored == []


async def test_a_large_frame_is_allowed_only_where_a_large_message_may_come(bed: Bed) -> None:
    large: Json = {"type": "choose", "choice": {"exclude": ["x" * 900] * 1000}}
    async with bed.call() as client:
        await lead_to(c.CallPhase.PLANNED, bed, client)
        client.say(large)
        assert (await client.refused()).error.kind == "usage"  # read, and there is no such qube
    async with bed.call() as client:
        await lead_to(c.CallPhase.PLANNING, bed, client)
        client.say(large)
        assert "frame of" in (await check_refused(bed, client)).reason


@pytest.mark.parametrize("plan", [0, 2, 1 << 31])
async def test_only_the_plan_that_was_told_can_be_confirmed(bed: Bed, plan: int) -> None:
    async with bed.call() as client:
        await lead_to(c.CallPhase.PLANNED, bed, client)
        client.say({"type": "confirm", "plan": plan})
        assert "the last one is 1" in (await check_refused(bed, client)).reason
    assert bed.restored == []


async def test_an_old_plan_cannot_be_confirmed(bed: Bed) -> None:
    async with bed.call() as client:
        await lead_to(c.CallPhase.PLANNED, bed, client)
        client.say({"type": "choose", "choice": {"names": ["vault"]}})
        await client.plan()
        client.say({"type": "confirm", "plan": 1})
        await check_refused(bed, client)
    assert bed.restored == []


async def test_a_confirmation_that_is_sent_before_the_plan_is_none(bed: Bed) -> None:
    async with bed.call() as client:
        client.say(open_message(bed.backup), {"type": "confirm", "plan": 1})
        await check_refused(bed, client)
    assert bed.restored == []


async def test_a_second_confirmation_undoes_the_first(bed: Bed) -> None:
    async with bed.call() as client:
        await lead_to(c.CallPhase.RUNNING, bed, client)
        client.say({"type": "confirm", "plan": 1})
        await check_refused(bed, client, running=True)
    assert bed.restored == []


async def test_what_comes_after_nonsense_is_not_looked_at(bed: Bed) -> None:
    async with bed.call() as client:
        client.raw(frame(b"{}"))
        client.say(open_message(bed.backup))
        client.raw(b"x" * 5_000_000)
        await check_refused(bed, client)
    assert bed.parts.made == []
    assert bed.delivered is True


@pytest.mark.parametrize(
    "fields",
    [
        {"protocol": 2},
        {"mode": "destroy"},
        {"mode": ["restore"]},
        {"passphrase": None},
        {"passphrase": "x" * 4097},
        {"location": {"text": "/b\n"}},
        {"location": {"text": "/b\x1b[2J"}},
        {"location": {"text": "\x00"}},
        {"location": {"text": ""}},
        {"location": {"text": "x" * 4097}},
        {"location": {"qube": "../x", "text": "/b"}},
        {"location": {"qube": "a\n", "text": "/b"}},
        {"location": {"qube": "@dispvm", "text": "/b"}},
        {"location": {"qube": "x" * 32, "text": "/b"}},
        {"location": {"qube": "dom0", "text": "x", "service": True}},
        {"location": {"text": "/b", "service": 1}},
        {"choice": {"pool": "../../etc"}},
        {"choice": {"pool": "x" * 65}},
        {"worker": {"memory": -1}},
        {"worker": {"memory": 1 << 40}},
        {"worker": {"template": "a b"}},
        {"worker": {"kernel": "x"}},
        {"choice": {"names": "work"}},
        {"choice": {"names": ["x"] * 4097}},
        {"choice": {"allow": ["*"]}},
        {"compression_filter": "sh -c x"},
        {"caller": "dom0"},
        {"client": "dom0"},
        {"ignore_size_limit": "yes"},
    ],
    ids=repr,
)
async def test_a_request_with_something_impossible_in_it(bed: Bed, fields: Json) -> None:
    async with bed.call() as client:
        client.say(open_message(bed.backup, **fields))
        error = await check_refused(bed, client)
    assert error.reason.isprintable()
    assert bed.parts.made == []
    assert not bed.parts.target.exists()


@pytest.mark.parametrize(("service", "mode"), [(VERIFY, "restore"), (LIST, "restore"), (LIST, "verify")])
async def test_each_service_does_no_more_than_its_name_says(bed: Bed, service: str, mode: str) -> None:
    async with bed.call(service) as client:
        client.say(open_message(bed.backup, mode))
        error = (await client.refused()).error
    assert (error.kind, error.reason) == ("not-granted", f"the service {service} does not {mode} backups")
    assert bed.parts.made == []


NOT_GRANTED: list[tuple[Json, str]] = [
    ({"location": {"qube": STORAGE, "text": "/b"}}, "storage"),
    ({"location": {"qube": "no-such-qube", "text": "/b"}}, "storage"),
    ({"location": {"qube": "dom0", "text": "/etc/shadow"}}, "dom0_directories"),
    ({"location": {"qube": "dom0", "text": "/no/such/file"}}, "dom0_directories"),
    ({"location": {"text": "qubes.VMShell", "service": True}}, "services"),
    ({"location": {"qube": CALLER, "text": "x", "service": True}}, "services"),
    ({"choice": {"pool": "vm-pool"}}, "pools"),
    ({"choice": {"pool": "no-such-pool"}}, "pools"),
    ({"worker": {"template": "debian-12"}}, "templates"),
    ({"worker": {"memory": 4001}}, "max_memory"),
    ({"worker": {"vcpus": 3}}, "max_vcpus"),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["restore", "verify", "list"])
@pytest.mark.parametrize(("fields", "key"), NOT_GRANTED, ids=repr)
async def test_what_is_not_granted_is_refused_with_the_key_that_grants_it(
    bed: Bed, mode: str, fields: Json, key: str
) -> None:
    async with bed.call() as client:
        client.say(open_message(bed.backup, mode, **fields))
        error = (await client.refused()).error
    assert error.kind == "not-granted"
    assert f"grants.{CALLER}.{key} " in error.advice
    assert str(bed.folder / "config.yaml") in error.advice
    assert bed.parts.made == []
    assert not bed.parts.target.exists()


@pytest.mark.parametrize("choice", [{"dom0_home": True}, {"names": ["dom0"]}, {"names": ["work", "dom0"]}])
async def test_dom0s_home_is_not_restored_for_a_qube(bed: Bed, choice: Json) -> None:
    async with bed.call() as client:
        client.say(open_message(bed.backup, choice=choice))
        assert (await client.refused()).error.kind == "not-granted"
    async with bed.call() as client:
        await lead_to(c.CallPhase.PLANNED, bed, client)
        client.say({"type": "choose", "choice": choice})
        error = (await client.refused()).error
    assert error.kind == "not-granted"
    assert "dom0's home" in error.reason
    assert bed.restored == []


async def test_who_may_only_verify_restores_nothing(bed: Bed) -> None:
    bed.configure(f"grants: {{{CALLER}: {{verify_only: true}}}}")
    async with bed.call() as client:
        client.say(open_message(bed.backup))
        error = (await client.refused()).error
    assert error.kind == "not-granted"
    assert f"set grants.{CALLER}.verify_only to false" in error.advice
    async with bed.call() as client:
        client.say(open_message(bed.backup, "verify"))
        await client.plan()
        client.say({"type": "confirm", "plan": 1})
        assert (await client.report()).status == 0


@pytest.fixture
def granted(bed: Bed) -> Path:
    """A directory of dom0 that the caller may have backups read from, with what does not belong there."""
    folder = bed.folder / "granted"
    folder.mkdir()
    (bed.folder / "secret").write_bytes(bed.backup.read_bytes())
    (folder / "in").write_bytes(bed.backup.read_bytes())
    (folder / "out").symlink_to(bed.folder / "secret")
    (folder / "nowhere").symlink_to(bed.folder / "missing")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "up").symlink_to("..")
    (folder / "process").symlink_to("/proc/self")
    (folder / "dir").mkdir()
    os.mkfifo(folder / "pipe")
    bed.configure(f"grants: {{{CALLER}: {{dom0_directories: [{folder}]}}}}")
    return folder


@pytest.mark.parametrize(
    "way",
    ["out", "nowhere", "missing", "device", "up/secret", "up/missing", "process/environ", "process/fd/0",
     "dir", "pipe", "in/x", "in\u202e", "x" * 300],
)  # fmt: skip
async def test_below_a_granted_directory_of_dom0_only_its_own_files_are_read(
    bed: Bed, granted: Path, way: str
) -> None:
    def request(path: str) -> Json:
        return open_message(bed.backup, "list", location={"qube": "dom0", "text": f"{granted}/{path}"})

    async with bed.call() as client:
        client.say(request(way))
        error = (await client.refused()).error
    shown = way.replace("\u202e", "\ufffd")
    assert error.reason == f"{granted}/{shown} in dom0 is not a file that can be read from here"
    assert error.kind == "usage"
    assert bed.parts.made == []
    async with bed.call() as client:
        client.say(request("in"))
        await client.plan()
        await client.end()


@pytest.mark.parametrize(
    "text",
    ["{}/../secret", "{}/../granted/in", "{}x/in", "{}", "{}/", "granted/in", "/proc/self/environ",
     "/dev/sda", "/{}/in", "~/in", "{}/..", "/"],
)  # fmt: skip
async def test_a_path_that_is_not_below_a_granted_directory_is_not_even_looked_up(
    bed: Bed, granted: Path, text: str
) -> None:
    location = {"qube": "dom0", "text": text.format(granted)}
    async with bed.call() as client:
        client.say(open_message(bed.backup, "list", location=location))
        error = (await client.refused()).error
    assert error.kind == "not-granted"
    assert f"grants.{CALLER}.dom0_directories" in error.advice


async def test_who_asks_for_plan_after_plan_and_reads_none_is_refused(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "MAX_WAITING", (4 << 20) // 2)  # just one that is not read
    async with bed.call(small_buffers=True) as client:
        client.say(open_message(bed.backup))
        async with asyncio.timeout(PATIENCE_S):
            while bed.notes[-1:] != ["ended: refused (protocol-violation)"]:
                if bed.phase is c.CallPhase.PLANNED:
                    client.say({"type": "choose", "choice": {}})
                    while bed.phase is c.CallPhase.PLANNED:
                        await asyncio.sleep(0)
                await asyncio.sleep(0.001)
        while not isinstance(await client.hear(), c.Refused):
            pass
        assert len([message for message in client.heard if isinstance(message, c.Plan)]) > 1


async def test_what_comes_after_nonsense_is_not_kept() -> None:
    ours, theirs = socket.socketpair()
    ends: list[str] = []
    with (
        ours,
        theirs,
        conversation.Conversation(ours.fileno(), ours.fileno(), lambda: ends.append("")) as call,
    ):
        call.received(b"\xff\xff\xff\xff")
        assert isinstance(call.ended, ProtocolViolation)
        tracemalloc.start()
        try:
            for _ in range(64):
                call.received(bytes(64 << 10))
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()
    assert len(ends) == 1


def test_the_table_of_wrong_messages_is_not_empty() -> None:
    assert len(WRONG) == 3 + 3 + 1 + 3 + 4 * len(UNSAYABLE)
    kinds: Callable[[Json], str] = lambda message: str(message["type"])  # noqa: E731 - to be short
    assert {kinds(message) for _, message in WRONG} >= {"open", "choose", "confirm", "cancel"}
