"""The broker's side of a session, message by message."""

import asyncio
import json
import struct
import time
from contextlib import aclosing
from typing import get_args

import pytest

from qubes_restore_svc.broker import client as client_module
from qubes_restore_svc.broker.client import MAX_PROGRESS, SessionClient, SessionOptions, SourceClock
from qubes_restore_svc.errors import (
    BadArchive,
    ProtocolViolation,
    RestoreError,
    WorkerLost,
    WorkerStalled,
    WrongPassphrase,
)
from qubes_restore_svc.wire import messages as m
from tests.broker.fake_worker import (
    WORK,
    Die,
    FakeLink,
    HangUp,
    Hear,
    Json,
    Pause,
    Raw,
    Say,
    Step,
    honest,
    manifest,
)
from tests.broker.jobs import PASSPHRASE

from ..support.descriptors import open_descriptors, until_closed

OPTIONS = SessionOptions(
    PASSPHRASE,
    memory=1 << 30,
    jobs=3,
    compression_filter="xz",
    ignore_size_limit=True,
    ignore_cost_limit=True,
    ahead=True,
)
START = m.Start(mode="verify", keys=("vm1",))
PROGRESS: Json = {"type": "progress", "archive_bytes": 5}


async def opened(client: SessionClient) -> list[str]:
    async with aclosing(client.open(OPTIONS)) as messages:
        return [message.type async for message in messages]


async def streamed(client: SessionClient) -> list[str]:
    await opened(client)
    async with aclosing(client.start(START)) as messages:
        return [message.type async for message in messages]


async def test_a_session_yields_every_message_in_its_order() -> None:
    script = honest((WORK,), verify=True)
    log: Json = {"type": "log", "level": "info", "text": "reading"}
    link = FakeLink(script.before(1, Say(PROGRESS), Say(log)))
    async with link, SessionClient(link) as client:
        assert await opened(client) == ["progress", "log", "manifest"]
        async with aclosing(client.start(START)) as messages:
            said = [message.type async for message in messages]
        assert said == ["volume_ready", "volume_done", "qube_settings", "finished"]
    request = link.heard[0]
    assert isinstance(request, m.Open)
    assert request.passphrase.get_secret_value() == PASSPHRASE
    assert request.model_dump(exclude={"passphrase", "type", "protocol"}) == {
        "memory": 1 << 30,
        "jobs": 3,
        "storage": None,
        "compression_filter": "xz",
        "ignore_size_limit": True,
        "ignore_cost_limit": True,
        "ahead": True,
        "retry": False,
    }


async def test_a_broker_that_was_stopped_for_longer_than_a_worker_may_be_silent_goes_on() -> None:
    script = honest((WORK,), verify=True).before(1, Pause(0.1))
    async with FakeLink(script) as link, SessionClient(link, stall_s=0.3) as client:
        messages = client.open(OPTIONS)
        waiting = asyncio.ensure_future(anext(messages))
        await asyncio.sleep(0.05)
        time.sleep(0.6)  # as Ctrl-Z does: the worker speaks meanwhile, and our clock runs on
        assert (await waiting).type == "manifest"
        await messages.aclose()


async def test_messages_that_come_in_one_piece_or_byte_by_byte_are_the_same() -> None:
    data = b"".join(
        struct.pack("!I", len(payload)) + payload
        for payload in (json.dumps(message).encode() for message in (PROGRESS, PROGRESS, manifest([WORK])))
    )
    pieces = [Raw(data)], [Raw(data[n : n + 1]) for n in range(len(data))]
    for steps in pieces:
        link = FakeLink([Hear("open"), *steps])
        async with link, SessionClient(link) as client:
            assert await opened(client) == ["progress", "progress", "manifest"]


async def test_what_came_with_the_manifest_is_not_lost() -> None:
    both = [json.dumps(message).encode() for message in (manifest([WORK]), PROGRESS)]
    data = b"".join(struct.pack("!I", len(payload)) + payload for payload in both)
    finished: Json = {"type": "failed", "error": {"kind": "bad-archive", "reason": "no"}}
    link = FakeLink([Hear("open"), Raw(data), Hear("start"), Say(finished)])
    async with link, SessionClient(link) as client:
        assert await opened(client) == ["manifest"]
        seen = []
        with pytest.raises(BadArchive):
            async with aclosing(client.start(START)) as messages:
                async for message in messages:
                    seen.append(message.type)
        assert seen == ["progress"]


@pytest.mark.parametrize(
    ("steps", "error", "reason"),
    [
        ([HangUp()], WorkerLost, "the worker hung up"),
        ([Die()], WorkerLost, "the worker was killed (SIGKILL)"),
        ([Raw(b"\0\0\0\x10{"), HangUp()], WorkerLost, "the worker hung up"),
        ([Pause(9)], WorkerStalled, "the worker has said nothing for 0 seconds"),
        ([Raw(b"\0\0\0\x10{"), Pause(9)], WorkerStalled, "the worker has said nothing for 0 seconds"),
        (
            [Say({"type": "failed", "error": {"kind": "wrong-passphrase", "reason": "no"}})],
            WrongPassphrase,
            "no",
        ),
        ([Say({"type": "failed", "error": {"kind": "unheard-of", "reason": "no"}})], RestoreError, "no"),
        ([Raw(b"\xff\xff\xff\xff")], ProtocolViolation, "a frame of 4294967295 bytes"),
        ([Say({"type": "finished", "archive_bytes": 0})], ProtocolViolation, "'finished' while"),
    ],
)
async def test_every_other_end_is_an_error(steps: list[Say], error: type[RestoreError], reason: str) -> None:
    link = FakeLink([Hear("open"), *steps])
    async with link, SessionClient(link, 0.2) as client:
        with pytest.raises(error) as caught:
            await opened(client)
    assert type(caught.value) is error
    assert caught.value.reason.startswith(reason)


async def test_signs_of_life_keep_a_session_alive() -> None:
    beats: list[Step] = [Pause(0.1), Say(PROGRESS)] * 5
    link = FakeLink(honest((WORK,), verify=True).before(1, *beats))
    async with link, SessionClient(link, 0.3) as client:
        assert await opened(client) == ["progress"] * 5 + ["manifest"]


async def test_a_worker_that_floods_with_progress_is_made_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "PACE_S", 0.1)
    flood: list[Step] = [Say(PROGRESS)] * (3 * MAX_PROGRESS)
    link = FakeLink(honest((WORK,), verify=True).before(1, *flood))
    began = time.monotonic()
    async with link, SessionClient(link, 0.3) as client:
        assert await opened(client) == ["progress"] * (3 * MAX_PROGRESS) + ["manifest"]
    assert time.monotonic() - began >= 0.2


async def test_a_session_that_is_failed_from_here_gives_that_error_to_who_waits() -> None:
    link = FakeLink(honest((WORK,), verify=True).until(3))
    async with link, SessionClient(link) as client:
        asyncio.get_running_loop().call_later(0.05, client.fail, ProtocolViolation("a bad stream"))
        with pytest.raises(ProtocolViolation, match="a bad stream"):
            await streamed(client)
        with pytest.raises(ProtocolViolation, match="a bad stream"):
            await client.skip_qube("vm1")


async def test_skips_and_cancels_are_sent_while_there_is_somebody_to_hear_them() -> None:
    link = FakeLink(honest((WORK,), verify=True))
    async with link, SessionClient(link) as client:
        client.cancel()  # before anything was said: not sent
        await opened(client)
        async with aclosing(client.start(START)) as messages:
            async for message in messages:
                if message.type == "volume_ready":
                    await client.skip_qube("vm1")
        await client.skip_qube("vm1")  # too late, and harmless
        client.cancel()
    assert [message.type for message in link.heard] == ["open", "start", "skip_qube"]
    link = FakeLink(honest((WORK,), verify=True).until(2))
    async with link, SessionClient(link) as client:
        await opened(client)
        client.cancel()
    assert [message.type for message in link.heard] == ["open", "cancel"]


async def test_leaving_does_not_wait_for_a_worker_that_takes_nothing() -> None:
    keys = tuple(f"{n:064}" for n in range(4000))
    link = FakeLink(honest((WORK,)).until(2), deaf=True)
    async with asyncio.timeout(30), link:
        async with SessionClient(link, 0.1) as client:
            await opened(client)
            with pytest.raises(WorkerStalled, match="takes no messages"):
                async with aclosing(client.start(m.Start(mode="verify", keys=keys))) as messages:
                    await anext(messages)
        assert not link.left


async def test_a_session_that_cannot_begin_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(**_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(asyncio, "open_connection", fail)
    before = open_descriptors()
    link = FakeLink([])
    with pytest.raises(OSError, match="no"):
        async with link, SessionClient(link):
            pass
    await until_closed(before)


def test_the_passphrase_is_not_in_the_options_representation() -> None:
    assert PASSPHRASE not in repr(OPTIONS)


def test_a_worker_is_told_only_the_name_of_the_qube_that_holds_the_backup() -> None:
    """All that it can ever be told: a new field here is a new line in the threat model."""
    said = {
        f"{kind.__name__}.{field}"
        for kind in (*get_args(m.BrokerMessage), m.Storage)
        for field in kind.model_fields
        if field not in ("type", "protocol")
    }
    # Keys as the worker itself has named them, and what it has brought of their qubes.
    of_the_archive = {"Start.keys", "Start.here", "SkipQube.key"}
    of_the_person = {"Start.only"} | {
        f"Open.{field}"
        for field in (
            *("passphrase", "memory", "jobs", "compression_filter", "ahead", "retry"),
            *("ignore_size_limit", "ignore_cost_limit"),
        )
    }
    of_the_storage = {"Open.storage", "Storage.qube", "Storage.location_id"}
    assert said == of_the_archive | of_the_person | of_the_storage | {"Start.mode", "Start.digest"}


# --- A source that stalls ------------------------------------------------------------------------------


def stalled_s(*heard: tuple[float, int, bool]) -> float:
    clock = SourceClock()
    for now, received, waiting in heard:
        clock.heard(m.Progress(archive_bytes=0, received=received, waiting_for_source=waiting), now)
    return clock.stalled_s


SIGNS = [index / 2 for index in range(121)]


def test_a_silent_source_has_stalled_after_its_time() -> None:
    assert stalled_s(*((now, 0, True) for now in SIGNS)) == 60


def test_a_source_that_brings_a_byte_now_and_then_has_stalled_all_the_same() -> None:
    assert stalled_s(*((now, int(now / 5), True) for now in SIGNS)) == 60


def test_a_slow_source_that_makes_progress_has_not_stalled() -> None:
    assert stalled_s(*((now, int(now * 4096), True) for now in SIGNS)) < 20


def test_time_in_which_something_else_is_done_is_not_blamed_on_the_source() -> None:
    assert stalled_s(*((now, 0, False) for now in SIGNS)) == 0


def test_time_in_which_nobody_listened_is_not_blamed_on_the_source() -> None:
    assert stalled_s((0, 0, True), (600, 0, True)) == 1


def test_a_second_pass_over_the_archive_begins_to_count_anew() -> None:
    assert stalled_s((0, 1 << 20, True), (0.5, 1 << 20, True), (1, 0, True)) == 0
