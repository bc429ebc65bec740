"""A session that ends before its archive does: no process stays, and no thread."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from qubes_restore_svc.wire import messages as m

from .caller import Caller, Peer, hung_up, open_descriptors
from .storage import LOCATION, FakeStorage
from .ways import ARCHIVE, KEYS, MakeWay, Way

Reach = Callable[[Caller, Peer, Way, FakeStorage], Awaitable[None]]


async def _silent(caller: Caller, peer: Peer, way: Way, storage: FakeStorage) -> None:
    storage.behave("silent")
    peer.open(storage=LOCATION)
    await storage.wait_for(1)


async def _in_the_header(caller: Caller, peer: Peer, way: Way, storage: FakeStorage) -> None:
    storage.behave("stalls 100")
    peer.open(storage=LOCATION)
    await storage.wait_for(1, stalled=True)


async def _between_the_passes(caller: Caller, peer: Peer, way: Way, storage: FakeStorage) -> None:
    peer.open(storage=LOCATION)
    await peer.expect(m.Manifest)
    assert storage.processes() == []


async def _in_a_volume(caller: Caller, peer: Peer, way: Way, storage: FakeStorage) -> None:
    await _between_the_passes(caller, peer, way, storage)
    storage.behave("stalls 100000")
    peer.say(m.Start(mode="verify", keys=KEYS))
    await storage.wait_for(2, stalled=True)


async def _in_a_volume_that_nobody_fetches(
    caller: Caller, peer: Peer, way: Way, storage: FakeStorage
) -> None:
    await _between_the_passes(caller, peer, way, storage)
    peer.say(m.Start(mode="restore", keys=KEYS))
    await peer.expect(m.VolumeReady)


async def _after_the_end_mark(caller: Caller, peer: Peer, way: Way, storage: FakeStorage) -> None:
    await _between_the_passes(caller, peer, way, storage)
    storage.behave("lingers")
    peer.say(m.Start(mode="verify", keys=("vm10",)))
    await storage.wait_for(2)
    await peer.passing(m.VolumeDone)


PHASES: dict[str, Reach] = {
    "before the service says anything": _silent,
    "in the header": _in_the_header,
    "between the passes": _between_the_passes,
    "in a volume": _in_a_volume,
    "in a volume that nobody fetches": _in_a_volume_that_nobody_fetches,
    "after the end mark": _after_the_end_mark,
}


@pytest.mark.parametrize("ending", ["cancel", "hang up"])
@pytest.mark.parametrize("phase", PHASES)
async def test_a_cancel_leaves_no_process_and_no_thread(
    phase: str, ending: str, fetched: tuple[Way, FakeStorage]
) -> None:
    way, storage = fetched
    before = open_descriptors()
    async with way.session() as (caller, peer):
        await PHASES[phase](caller, peer, way, storage)
        if ending == "cancel":
            peer.say(m.Cancel())
        else:
            peer.writer.close()
        await caller.ended()
        assert storage.processes() == []  # at once: the worker's own end comes right after
    del caller, peer  # and on leaving it has waited for every thread
    await asyncio.sleep(0)
    assert open_descriptors() <= before + 1


@pytest.mark.parametrize("argument", [b"", b"+qfile"])
async def test_a_cancel_ends_the_reading_from_a_call_that_says_nothing(argument: bytes) -> None:
    async with Caller(None) as caller:  # on leaving it waits for every thread
        peer = await caller.session()
        peer.open()
        connection = caller.call(b"restore.Archive" + argument + b" dom0\0")
        connection.send(b"b")
        await peer.next_progress()
        peer.say(m.Cancel())
        await caller.ended()
        await caller.threads_ended()


@pytest.mark.parametrize("calls", [0, 1])
async def test_a_session_that_ends_while_it_waits_for_a_call_is_over(calls: int, make_way: MakeWay) -> None:
    way = make_way("conversed", ARCHIVE)
    async with way.session() as (caller, peer):
        if calls:
            way.before_open(caller)
        peer.open()
        if calls:
            await peer.expect(m.Manifest)
            peer.say(m.Start(mode="verify", keys=KEYS))
        await peer.next_progress()
        peer.writer.close()
        await caller.ended()


async def test_a_conversation_that_nobody_needs_any_more_is_hung_up() -> None:
    async with Caller(None) as caller:
        waiting = [caller.call(b"restore.Archive+qfile dom0\0") for _ in range(2)]
        peer = await caller.session()
        peer.writer.close()
        await caller.ended()
        for connection in waiting:
            assert await hung_up(connection)
