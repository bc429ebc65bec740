"""Two passes over a storage service: what is asked for and answered, and who may bring the archive."""

import io
from pathlib import Path

import pytest
from pydantic import SecretStr

from qubes_restore_svc.wire import messages as m

from ..support.backup_writer import PASSPHRASE
from . import stock_storage
from .caller import Caller, hung_up
from .storage import LOCATION, FakeStorage, Served, fake_storage
from .support import MIB, file_with
from .ways import ARCHIVE, BEGINNING, KEYS, MakeWay, Way, run

# --- What is asked for, and answered -----------------------------------------------------------------


async def test_each_pass_asks_for_its_part_and_gives_the_right_answer(
    fetched: tuple[Way, FakeStorage],
) -> None:
    way, storage = fetched
    outcome = await run(way, ["vm11", "vm13"])
    assert set(outcome.kinds) == {"vm11.private", "vm13.root", "vm13.private"}
    assert [call["arguments"] for call in storage.calls] == [["sys-usb", "qubes.RestoreById+aB3xY7zQ"]] * 2
    assert [call["paths"] for call in storage.calls] == [BEGINNING, ["vm11/", "vm13/"]]
    assert [call["answer"] for call in storage.calls] == ["right", "right"]


async def test_if_everything_is_here_already_there_is_no_second_pass(
    fetched: tuple[Way, FakeStorage],
) -> None:
    way, storage = fetched
    here = m.QubeHere(key="vm10", volumes=(), firewall=False)
    async with way.session() as (_, peer):
        peer.open(storage=LOCATION)
        await peer.expect(m.Manifest)
        peer.say(m.Start(mode="verify", keys=(), here=(here,)))
        (finished,) = [message for message in await peer.rest() if not isinstance(message, m.Progress)]
    assert isinstance(finished, m.Finished) and finished.derivations == 2
    assert [call["paths"] for call in storage.calls] == [BEGINNING]


async def test_a_service_that_dom0_calls_is_asked_and_answered_in_the_same_way(make_way: MakeWay) -> None:
    way = make_way("conversed", ARCHIVE)
    await run(way, ["vm10"])
    assert way.served == [Served(BEGINNING, answered=True), Served(["vm10/"], answered=True)]


async def test_progress_goes_on_from_one_pass_to_the_other(fetched: tuple[Way, FakeStorage]) -> None:
    way, _ = fetched
    async with way.session() as (_, peer):
        peer.open(storage=LOCATION)
        await peer.expect(m.Manifest)
        header = (await peer.next_progress()).archive_bytes
        peer.say(m.Start(mode="verify", keys=KEYS))
        (finished,) = [message for message in await peer.rest() if isinstance(message, m.Finished)]
    passes: list[bytes] = []
    for paths in (BEGINNING, [f"{key}/" for key in KEYS]):
        stock_storage.tar2qfile(io.BytesIO(ARCHIVE), paths, passes.append)
        if paths == BEGINNING:
            assert header == sum(map(len, passes))
    assert finished.archive_bytes == sum(map(len, passes))


async def test_no_key_of_a_volume_is_derived_ahead_of_the_second_pass(
    fetched: tuple[Way, FakeStorage],
) -> None:
    way, _ = fetched
    async with way.session() as (caller, peer):
        peer.say(m.Open(passphrase=SecretStr(PASSPHRASE), storage=LOCATION, ahead=True))
        await peer.expect(m.Manifest)
        assert caller.engine.members == ["backup-header", "qubes.xml.000"]
        peer.say(m.Start(mode="verify", keys=KEYS))
        messages = await peer.rest()
        outcomes = [message.outcome for message in messages if isinstance(message, m.VolumeDone)]
        assert outcomes == ["ok"] * 4 and isinstance(messages[-1], m.Finished)


@pytest.mark.parametrize("name", ["conversed", "fetched"])
async def test_memory_for_one_chunk_is_enough_in_each_pass(name: str, make_way: MakeWay) -> None:
    outcome = await run(make_way(name, ARCHIVE), memory=2 * MIB)
    assert set(outcome.kinds.values()) == {"ok"}


async def test_a_qube_that_is_skipped_before_the_second_pass_begins_is_not_read(make_way: MakeWay) -> None:
    way = make_way("conversed", ARCHIVE)
    async with way.session() as (caller, peer):
        way.before_open(caller)
        peer.open()
        await peer.expect(m.Manifest)
        peer.say(m.Start(mode="verify", keys=("vm10", "vm11")))
        peer.say(m.SkipQube(key="vm10"))
        await peer.next_progress()
        way.before_start(caller)
        done = {
            f"{message.key}.{message.volume}": message.outcome
            for message in await peer.rest()
            if isinstance(message, m.VolumeDone)
        }
        assert done == {"vm10.private": "skipped", "vm11.private": "ok"}
        assert not any("vm10" in member for member in caller.engine.members)


async def test_calls_may_come_before_the_messages_and_after_them(make_way: MakeWay) -> None:
    way = make_way("conversed", ARCHIVE)
    async with way.session() as (caller, peer):
        way.before_open(caller)
        way.before_start(caller)  # both at once
        peer.open()
        await peer.expect(m.Manifest)
        peer.say(m.Start(mode="verify", keys=KEYS))
        assert isinstance((await peer.rest())[-1], m.Finished)
    way = make_way("conversed", ARCHIVE)
    async with way.session() as (caller, peer):
        peer.open()
        await peer.next_progress()
        way.before_open(caller)
        await peer.expect(m.Manifest)
        peer.say(m.Start(mode="verify", keys=KEYS))
        await peer.next_progress()
        way.before_start(caller)
        assert isinstance((await peer.rest())[-1], m.Finished)


# --- Who may bring it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [b"restore.Archive", b"restore.Archive+", b"restore.Archive+qfile"])
@pytest.mark.parametrize("second", [b"restore.Archive", b"restore.Archive+", b"restore.Archive+qfile"])
async def test_the_first_call_decides_how_the_archive_comes(first: bytes, second: bytes) -> None:
    async with Caller(None) as caller:
        taken = caller.call(first + b" dom0\0")
        assert not await hung_up(taken, 0.05)
        again = caller.call(second + b" dom0\0")
        if b"qfile" in first and b"qfile" in second:
            assert not await hung_up(again, 0.05)
            assert await hung_up(caller.call(second + b" dom0\0"))  # there are two passes, and no third
        else:
            assert await hung_up(again)


@pytest.mark.parametrize(
    "descriptor",
    [
        b"restore.Archive+qfile work\0",
        b"restore.Archive+qfile sys-usb\0",
        b"restore.Archive+qfile+x dom0\0",
        b"restore.Archive+QFILE dom0\0",
        b"restore.Archive+tar dom0\0",
        b"restore.Archive+qfile dom0x\0",
    ],
)
async def test_an_archive_of_another_kind_or_of_another_caller_is_hung_up(
    descriptor: bytes, make_way: MakeWay
) -> None:
    way = make_way("conversed", ARCHIVE)
    async with way.session() as (caller, peer):
        assert await hung_up(caller.call(descriptor))
        way.before_open(caller)
        peer.open()
        await peer.expect(m.Manifest)


async def test_an_archive_that_was_passed_admits_no_conversation() -> None:
    with file_with(ARCHIVE) as descriptor:
        async with Caller(descriptor) as caller:
            assert await hung_up(caller.call(b"restore.Archive+qfile dom0\0"))


@pytest.mark.parametrize("name", ["passed", "called", "conversed"])
async def test_an_open_that_names_a_storage_qube_beside_an_archive_ends_the_session(
    name: str, make_way: MakeWay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = make_way(name, ARCHIVE)
    with fake_storage(tmp_path, ARCHIVE, monkeypatch) as storage:
        async with way.session() as (caller, peer):
            way.before_open(caller)
            assert await hung_up(caller.call(b"restore.Nothing dom0\0"))  # it comes after those before it
            peer.open(storage=LOCATION)
            assert await peer.rest() == []
            await caller.ended()
        assert storage.calls == []


async def test_a_storage_qube_that_was_named_admits_no_call(fetched: tuple[Way, FakeStorage]) -> None:
    way, storage = fetched
    storage.behave("silent")
    async with way.session() as (caller, peer):
        peer.open(storage=LOCATION)
        await storage.wait_for(1)
        for argument in (b"", b"+qfile"):
            assert await hung_up(caller.call(b"restore.Archive" + argument + b" dom0\0"))
