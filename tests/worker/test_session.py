"""The worker's side of a session: every ending has its message, and a broker that errs gets none."""

import asyncio
import contextlib
import os
import random
import struct
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest
from pydantic import SecretStr

from qubes_restore_svc.kdf.engine import KdfRequest
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.worker import session, work
from qubes_restore_svc.worker.memory import MAX_LOCATED
from qubes_restore_svc.worker.session import Outbox
from tests.support.wire import frame

from ..support.backup_writer import (
    PASSPHRASE,
    BackupWriter,
    QubePlan,
    join_members,
    sample_image,
    sample_qube,
)
from ..support.damage import DAMAGES, edited, flip_bit, sample_backup
from .caller import Caller, Peer
from .support import MIB, PATIENCE_S, Engine, file_with, in_thread, join, pipe_with, wait_until

WRITER = sample_backup(log_n=2)
ARCHIVE = WRITER.to_bytes()
ALL_KEYS = ("vm10", "vm11", "vm12", "vm13")


@contextlib.asynccontextmanager
async def session_over(archive: bytes, engine: Engine | None = None) -> AsyncIterator[tuple[Caller, Peer]]:
    with file_with(archive) as descriptor:
        async with Caller(descriptor, engine=engine) as caller:
            yield caller, await caller.session()


# --- A whole session -------------------------------------------------------------------------------


async def test_a_session_from_open_to_finished() -> None:
    async with session_over(ARCHIVE) as (caller, peer):
        peer.open()
        manifest = await peer.expect(m.Manifest)
        assert [qube.name for qube in manifest.qubes] == ["work", "vault", "scratch", "custom-template"]
        assert (manifest.backup_id, manifest.compression_filter) == (WRITER.backup_id, "gzip")
        peer.say(m.Start(mode="verify", keys=ALL_KEYS))
        messages = await peer.rest()
        done = [message for message in messages if isinstance(message, m.VolumeDone)]
        assert len(done) == 4 and all(one.outcome == "ok" for one in done)
        chunks = [member.name for member in WRITER.members() if member.name.endswith((".enc", ".hmac"))]
        derivations = sum("/empty." not in name for name in chunks)
        assert messages[-1] == m.Finished(archive_bytes=len(ARCHIVE), derivations=derivations)
        peer.writer.close()
        await caller.ended()


HERE = m.QubeHere(key="vm10", volumes=("private",), firewall=True)


async def said_with_here(here: m.QubeHere, archive: bytes, *keys: str) -> list[m.Message]:
    """What the worker says, of `keys` alone, when `here` is there already."""
    async with session_over(archive) as (_, peer):
        peer.open()
        await peer.expect(m.Manifest)
        peer.say(m.Start(mode="restore", keys=keys, here=(here,)))
        return [message for message in await peer.rest() if not isinstance(message, m.Progress)]


def with_the_firewall_last() -> bytes:
    members = list(WRITER.members())
    return join_members(sorted(members, key=lambda member: "vm10/firewall" in member.name))


@pytest.mark.parametrize("archive", [ARCHIVE, with_the_firewall_last()], ids=["in order", "firewall last"])
async def test_of_what_is_here_already_no_key_is_derived(archive: bytes) -> None:
    said = await said_with_here(HERE, archive)
    assert said == [m.Finished(archive_bytes=len(archive), derivations=2)]


@pytest.mark.parametrize(
    ("file", "here"),
    [
        ("firewall.xml", HERE.model_copy(update={"firewall": False})),
        ("private.img", HERE.model_copy(update={"volumes": ()})),
    ],
)
async def test_what_a_qube_lacks_that_is_here_already_is_told(file: str, here: m.QubeHere) -> None:
    incomplete, finished = await said_with_here(here, ARCHIVE)
    assert isinstance(incomplete, m.QubeIncomplete) and incomplete.key == "vm10"
    assert incomplete.error.reason.startswith(f"its {file} ")
    assert isinstance(finished, m.Finished)


async def test_warnings_about_the_metadata_come_before_the_manifest() -> None:
    odd = replace(WRITER.qubes[0], features={"bad feature name": "1"})
    async with session_over(replace(WRITER, qubes=[odd]).to_bytes()) as (_, peer):
        peer.open()
        assert "bad feature name" in (await peer.expect(m.Log)).text
        await peer.expect(m.Manifest)


async def test_the_number_of_jobs_is_the_brokers_to_choose() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def count(_: KdfRequest) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.01)
        with lock:
            running -= 1

    for jobs in (1, 3):
        running = most = 0
        async with session_over(ARCHIVE, Engine(count)) as (_, peer):
            peer.open(jobs=jobs)
            await peer.expect(m.Manifest)
            peer.say(m.Start(mode="verify", keys=ALL_KEYS))
            assert isinstance((await peer.rest())[-1], m.Finished)
        assert most == jobs


async def test_want_of_threads_is_told_and_no_mistake_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    async with session_over(ARCHIVE) as (_, peer):
        monkeypatch.setattr(work, "KeyScheduler", refuse)
        peer.open()
        failed = await peer.expect(m.Failed)
    assert failed.error.kind == "resources-exhausted"
    assert failed.error.reason == "no more processes or threads can be started in the worker"


# --- What ends it with Failed --------------------------------------------------------------------------

FAILURES = {
    "wrong-passphrase": ("wrong-passphrase", "stapler"),
    "some-other-file": ("not-a-backup", PASSPHRASE),
    "some-other-tar": ("not-a-backup", PASSPHRASE),
    "empty-file": ("empty-input", PASSPHRASE),
    "format-1": ("unsupported-format", PASSPHRASE),
    "format-2": ("unsupported-format", PASSPHRASE),
    "format-5": ("unsupported-format", PASSPHRASE),
    "unknown-compression-filter": ("unknown-filter", PASSPHRASE),
    "header-copy-asks-for-n-of-2-to-the-40": ("excessive-cost", PASSPHRASE),
    "header-differs-from-its-copy": ("bad-header", PASSPHRASE),
    "copy-differs-from-the-header": ("bad-header", PASSPHRASE),
    "entity-bomb": ("bad-metadata", PASSPHRASE),
    "bit-flipped-in-qubes-xml": ("authentication-failed", PASSPHRASE),
    "cut-off-in-the-metadata": ("archive-truncated", PASSPHRASE),
}


@pytest.mark.parametrize("damage", FAILURES)
async def test_a_backup_that_cannot_be_opened_fails_the_session_with_the_right_kind(damage: str) -> None:
    kind, passphrase = FAILURES[damage]
    async with session_over(DAMAGES[damage].apply(WRITER)) as (caller, peer):
        peer.open(passphrase)
        (failed,) = await peer.rest()
        assert isinstance(failed, m.Failed) and failed.error.kind == kind
        assert PASSPHRASE not in repr(failed)
        peer.writer.close()
        await caller.ended()


async def test_another_passphrase_may_be_tried_only_if_one_was_wrong() -> None:
    async with session_over(ARCHIVE) as (caller, peer):
        peer.open("wrong", retry=True)
        assert (await peer.expect(m.Failed)).error.kind == "wrong-passphrase"
        peer.open("wrong, too")
        assert (await peer.expect(m.Failed)).error.kind == "wrong-passphrase"
        peer.open()
        await peer.expect(m.Manifest)
        peer.writer.close()
        await caller.ended()
    async with session_over(DAMAGES["some-other-file"].apply(WRITER)) as (caller, peer):
        peer.open()
        assert (await peer.expect(m.Failed)).error.kind == "not-a-backup"
        await caller.ended()


async def test_keys_are_derived_ahead_once_another_passphrase_was_right() -> None:
    async with session_over(ARCHIVE) as (caller, peer):
        peer.say(m.Open(passphrase=SecretStr("wrong"), ahead=True, retry=True))
        await peer.expect(m.Failed)
        assert not any("/" in member for member in caller.engine.members)
        peer.open()
        await peer.expect(m.Manifest)
        await asyncio.to_thread(wait_until, lambda: any("/" in member for member in caller.engine.members))


async def test_a_session_that_waits_for_another_passphrase_ends_with_the_broker() -> None:
    async with session_over(ARCHIVE) as (caller, peer):
        peer.open("wrong", retry=True)
        await peer.expect(m.Failed)
        peer.writer.close()
        await caller.ended()


async def test_a_wrong_passphrase_is_said_without_waiting_for_the_keys_of_volumes() -> None:
    gate = threading.Event()
    engine = Engine(lambda request: b"/" not in request.passphrase or gate.wait(PATIENCE_S))
    async with session_over(ARCHIVE, engine) as (_, peer):
        peer.say(m.Open(passphrase=SecretStr("wrong"), ahead=True))
        assert (await peer.expect(m.Failed)).error.kind == "wrong-passphrase"
        assert not gate.is_set()
        assert set(engine.members) >= {"backup-header", "qubes.xml.000"}
        gate.set()


async def test_what_came_ahead_of_a_wrong_passphrase_is_given_back_and_no_thread_stays() -> None:
    """More events than may wait, and nobody who takes them."""
    qubes = [sample_qube(f"qube{number}", 4096, 1) for number in range(80)]
    async with session_over(BackupWriter(qubes, log_n=1).to_bytes()) as (_, peer):
        peer.say(m.Open(passphrase=SecretStr("wrong"), ahead=True))
        assert (await peer.expect(m.Failed)).error.kind == "wrong-passphrase"


async def test_a_budget_that_is_too_small_names_the_number_before_anything_is_derived() -> None:
    async with session_over(BackupWriter([sample_qube("work", 4096, 1)], log_n=12).to_bytes()) as (
        caller,
        peer,
    ):
        peer.open(memory=3 * MIB)
        failed = await peer.expect(m.Failed)
        assert failed.error.kind == "budget-too-small" and "--memory 85" in failed.error.advice
        assert caller.engine.requests == []


async def test_a_mistake_of_ours_is_told_and_not_hung_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError(PASSPHRASE)

    monkeypatch.setattr(work, "open_backup", fail)
    async with session_over(ARCHIVE) as (_, peer):
        peer.open()
        failed = await peer.expect(m.Failed)
        assert failed.error.kind == "error" and PASSPHRASE not in repr(failed)


async def test_a_descriptor_that_cannot_be_read_is_told() -> None:
    descriptor = os.open("/", os.O_RDONLY)
    async with Caller(descriptor) as caller:
        peer = await caller.session()
        peer.open()
        assert (await peer.expect(m.Failed)).error.kind == "archive-unreadable"
    os.close(descriptor)


# --- A broker that breaks the protocol ---------------------------------------------------------------------

OPEN = m.encode_message(m.Open(passphrase=SecretStr(PASSPHRASE)))
START = m.encode_message(m.Start(mode="verify", keys=("vm10",)))


VIOLATIONS: dict[str, bytes] = {
    "start before open": frame(START),
    "skip before start": frame(OPEN) + frame(m.encode_message(m.SkipQube(key="vm10"))),
    "two opens": frame(OPEN) * 2,
    "start before the manifest": frame(OPEN) + frame(START),
    "a message of the worker": frame(m.encode_message(m.Finished(archive_bytes=0))),
    "no JSON": frame(b"garbage"),
    "no object": frame(b"[]"),
    "an unknown type": frame(b'{"type":"reboot"}'),
    "an unknown key": frame(OPEN[:-1] + b',"x":1}'),
    "a key twice": frame(OPEN[:-1] + b',"jobs":1,"jobs":2}'),
    "a number as text": frame(OPEN[:-1] + b',"memory":"1"}')
    if b'"memory":null' not in OPEN
    else frame(b"{}"),
    "no passphrase": frame(b'{"type":"open","protocol":1}'),
    "another protocol": frame(OPEN.replace(b'"protocol":1', b'"protocol":2')),
    "an empty frame": frame(b""),
    "a frame of 4 GiB": b"\xff\xff\xff\xff",
    "a frame of a mebibyte": struct.pack("!I", MIB),
    "an open of 100 KiB": frame(OPEN.replace(b"correct", b"\\u0041" * 20_000)),
    "a long passphrase": frame(OPEN.replace(b"correct", b"c" * 5000)),
    "half a surrogate": frame(OPEN.replace(b"correct", b"\\ud800")),
    "deep nesting": frame(b'{"type":' + b'{"a":' * 2000 + b"1" + b"}" * 2000 + b"}"),
}


@pytest.mark.parametrize("name", VIOLATIONS)
async def test_a_broker_that_breaks_the_protocol_is_hung_up_and_told_nothing(name: str) -> None:
    gate = threading.Event()
    async with session_over(ARCHIVE, Engine(lambda _: gate.wait(PATIENCE_S))) as (caller, peer):
        peer.writer.write(VIOLATIONS[name])
        assert await peer.rest() == []
        await caller.ended()
        gate.set()


async def test_a_second_start_is_a_violation_too() -> None:
    async with session_over(ARCHIVE) as (caller, peer):
        peer.open()
        await peer.expect(m.Manifest)
        peer.say(m.Start(mode="restore", keys=("vm10",)))
        peer.say(m.Start(mode="restore", keys=("vm10",)))
        assert not any(isinstance(message, m.Finished | m.Failed) for message in await peer.rest())
        await caller.ended()


async def test_a_start_with_a_qube_that_the_backup_does_not_hold_is_a_violation() -> None:
    async with session_over(ARCHIVE) as (caller, peer):
        peer.open()
        await peer.expect(m.Manifest)
        peer.say(m.Start(mode="verify", keys=("vm10", "vm99")))
        assert await peer.rest() == []
        await caller.ended()


@pytest.mark.parametrize("seed", range(30))
async def test_noise_ends_the_session(seed: int) -> None:
    source = random.Random(seed)
    async with session_over(ARCHIVE) as (caller, peer):
        noise = source.randbytes(source.randint(1, 300))
        peer.writer.write(frame(noise) if seed % 2 else noise)
        peer.writer.write_eof()
        assert await peer.rest() == []
        await caller.ended()


# --- Signs of life, hanging up, cancelling -------------------------------------------------------


async def test_signs_of_life_come_while_a_key_is_being_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "HEARTBEAT_S", 0.02)
    gate = threading.Event()
    async with session_over(ARCHIVE, Engine(lambda _: gate.wait(PATIENCE_S))) as (_, peer):
        peer.open()
        for _ in range(5):
            await peer.next_progress()
        gate.set()
        await peer.expect(m.Manifest)
        for _ in range(3):
            await peer.next_progress()
        gate.clear()
        peer.say(m.Start(mode="verify", keys=("vm11",)))
        for _ in range(5):
            progress = await peer.next_progress()
        assert 0 < progress.archive_bytes < len(ARCHIVE)
        gate.set()
        assert isinstance((await peer.rest())[-1], m.Finished)


async def test_the_source_is_waited_for_only_while_nothing_else_is_to_be_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "HEARTBEAT_S", 0.02)
    gate, asked, silence = threading.Event(), threading.Event(), threading.Event()
    begin = ARCHIVE[: ARCHIVE.index(b"vm11/private.img.000") + 1024]  # half a kilobyte of a chunk
    reader, writer = os.pipe()

    def feed() -> None:
        with open(writer, "wb") as pipe:
            pipe.write(begin)
            pipe.flush()
            silence.wait(PATIENCE_S)

    def hold_back(_: KdfRequest) -> None:
        asked.set()
        gate.wait(PATIENCE_S)

    feeder = in_thread(feed)
    async with Caller(reader, engine=Engine(hold_back)) as caller:
        peer = await caller.session()
        peer.open()
        for _ in range(5):
            assert not (await peer.next_progress()).waiting_for_source  # the header's key is being derived
        gate.set()
        await peer.passing(m.Manifest)
        gate.clear()
        asked.clear()
        peer.say(m.Start(mode="verify", keys=("vm11",)))
        while not asked.is_set():
            await peer.next_progress()
        for _ in range(3):  # they may have been on their way when the key was asked for
            await peer.next_progress()
        for _ in range(5):
            progress = await peer.next_progress()
            # The rest of the chunk is missing, but its key is being derived.
            assert (progress.received, progress.waiting_for_source) == (len(begin), False)
        gate.set()
        while not (progress := await peer.next_progress()).waiting_for_source:
            pass
        assert progress.received == len(begin)
        silence.set()
        await peer.rest()
    os.close(reader)
    join(feeder)


async def test_nothing_is_said_before_the_first_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "HEARTBEAT_S", 0.01)
    async with session_over(ARCHIVE) as (_, peer):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await peer.reader.read(1)


def large() -> bytes:
    first = QubePlan("work", volumes={"private": sample_image(4 * MIB, 1, 3)})
    return BackupWriter(
        [first, sample_qube("vault", 1 << 16, 1, seed=9)], chunk_size=1 << 18, log_n=2
    ).to_bytes()


@pytest.mark.parametrize("how", ["hang up", "cancel"])
@pytest.mark.parametrize(
    "stage", ["opening", "listed", "deriving", "announced", "streaming", "silent archive"]
)
async def test_the_session_ends_at_once_whenever_the_broker_wants(stage: str, how: str) -> None:
    gate = threading.Event()

    def hold(request: KdfRequest) -> None:
        wanted = b"backup-header" if stage == "opening" else b"vm10"
        if stage in ("opening", "deriving") and wanted in request.passphrase:
            gate.wait(PATIENCE_S)

    archive = large()
    opened = (
        pipe_with(archive[: len(archive) // 3], keep_open=True)
        if stage == "silent archive"
        else file_with(archive)
    )
    with opened as descriptor:
        silent = stage == "silent archive"
        async with Caller(descriptor, engine=Engine(hold), silent=silent) as caller:
            peer = await caller.session()
            peer.open()
            if stage != "opening":
                await peer.expect(m.Manifest)
            if stage not in ("opening", "listed"):
                mode = "verify" if stage in ("deriving", "silent archive") else "restore"
                peer.say(m.Start(mode=mode, keys=("vm10", "vm11")))  # type: ignore[arg-type] # a literal
            if stage in ("announced", "streaming"):
                await peer.expect(m.VolumeReady)
            if stage == "streaming":
                volume = caller.call(b"restore.Volume+vm10.private dom0\0")
                await asyncio.sleep(0.05)
                assert await asyncio.get_running_loop().sock_recv(volume, 8) == b"QRSVOLUM"
            await asyncio.sleep(0.02)
            if how == "hang up":
                peer.writer.close()
            else:
                peer.say(m.Cancel())
            async with asyncio.timeout(PATIENCE_S / 4):
                await caller.ended()
            if how == "cancel":
                messages = await peer.rest()
                assert not any(isinstance(one, m.Finished | m.Failed) for one in messages)
            gate.set()
            if not silent:
                await caller.threads_ended()


async def test_a_broker_that_does_not_read_and_cancels_is_not_waited_for() -> None:
    async with session_over(ARCHIVE) as (caller, peer):
        peer.open()
        await peer.expect(m.Manifest)
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined] # of every stream's transport
        peer.say(m.Start(mode="verify", keys=ALL_KEYS))
        await asyncio.sleep(0.1)
        peer.say(m.Cancel())
        peer.writer.transport.abort()  # as the broker does right after it
        async with asyncio.timeout(PATIENCE_S / 4):
            await caller.ended()


async def stuck(engine: Engine) -> int:
    """Wait until no more keys are asked for; how many there were."""
    count = -1
    while count != len(engine.requests):
        count = len(engine.requests)
        await asyncio.sleep(0.4)
    return count


async def test_a_broker_that_has_much_to_read_and_does_not_is_not_waited_for_either() -> None:
    qubes = [QubePlan(f"qube{number}", notes="n" * 200_000) for number in range(30)]
    async with session_over(BackupWriter(qubes, log_n=1).to_bytes()) as (caller, peer):
        peer.open()
        await peer.passing(m.Manifest)
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined] # of every stream's transport
        peer.say(m.Start(mode="verify", keys=tuple(f"vm{number}" for number in range(10, 40))))
        await stuck(caller.engine)
        peer.say(m.Cancel())
        async with asyncio.timeout(PATIENCE_S / 4):
            await caller.ended()


async def test_what_the_broker_says_after_the_last_word_does_not_take_that_word_from_it() -> None:
    """A broken connection would make the broker's system drop what it has not read yet."""
    async with session_over(ARCHIVE) as (caller, peer):
        peer.open()
        await peer.expect(m.Manifest)
        peer.say(m.Start(mode="verify", keys=("vm12",)))
        await asyncio.sleep(0.3)  # everything has been said, and nothing of it read
        for _ in range(3):
            peer.say(m.SkipQube(key="vm12"))
            await peer.writer.drain()
            await asyncio.sleep(0.01)
        assert isinstance((await peer.rest())[-1], m.Finished)
        assert not caller.serving.done()
        peer.writer.close()
        await caller.ended()


async def test_a_broker_that_never_hangs_up_is_left_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "LINGER_S", 0.1)
    async with session_over(ARCHIVE) as (caller, peer):
        peer.open("wrong")
        await peer.expect(m.Failed)
        await caller.ended()


async def test_a_skipped_qube_is_answered_and_the_others_go_on() -> None:
    async with session_over(large()) as (caller, peer):
        peer.open()
        await peer.expect(m.Manifest)
        peer.say(m.Start(mode="restore", keys=("vm10", "vm11")))
        await peer.expect(m.VolumeReady)
        peer.say(m.SkipQube(key="vm10"))
        done = await peer.expect(m.VolumeDone)
        assert (done.key, done.outcome) == ("vm10", "skipped")
        assert (await peer.expect(m.QubeSettings)).error is not None
        assert (await peer.expect(m.VolumeReady)).key == "vm11"
        peer.say(m.SkipQube(key="vm11"))
        peer.say(m.SkipQube(key="vm11"))
        assert isinstance((await peer.rest())[-1], m.Finished)
        del caller


async def test_one_bad_chunk_fails_one_qube_and_the_session_goes_on() -> None:
    members = edited(WRITER.members(), "vm10/private.img.001.enc", lambda data: flip_bit(data, -1))
    async with session_over(join_members(members)) as (_, peer):
        peer.open()
        await peer.expect(m.Manifest)
        peer.say(m.Start(mode="verify", keys=("vm10", "vm11")))
        messages = await peer.rest()
        outcomes = [message.outcome for message in messages if isinstance(message, m.VolumeDone)]
        assert outcomes == ["failed", "ok"] and isinstance(messages[-1], m.Finished)


# --- The outbox ----------------------------------------------------------------------------------


def say_all(outbox: Outbox, messages: Sequence[m.Message]) -> None:
    for message in messages:
        outbox.put(message)


async def test_who_says_more_than_the_broker_reads_has_to_wait() -> None:
    outbox = Outbox(asyncio.get_running_loop())
    messages = [m.Log(level="info", text=str(number)) for number in range(100)]
    speaker = in_thread(lambda: say_all(outbox, messages))
    await asyncio.to_thread(speaker.join, 0.1)
    assert speaker.is_alive() and outbox._messages.qsize() < 20
    received = []
    for _ in messages:
        received.append(await outbox.get())
        outbox.sent()
    await asyncio.to_thread(join, speaker)
    assert received == messages


async def test_settings_wait_in_the_outbox_only_up_to_their_bytes() -> None:
    outbox = Outbox(asyncio.get_running_loop())
    large = m.QubeSettings(key="vm10", appmenus=(f"{'x' * 200}.desktop",) * 4000)
    speaker = in_thread(lambda: say_all(outbox, [large] * 5))
    for left in (4, 3, 2, 1, 0):
        assert await outbox.get() == large
        await asyncio.to_thread(speaker.join, 0.05)
        assert outbox._messages.qsize() == 0
        assert speaker.is_alive() == (left > 0)
        outbox.sent()
    await asyncio.to_thread(join, speaker)


async def test_closing_the_outbox_frees_who_waits_and_drops_what_comes() -> None:
    outbox = Outbox(asyncio.get_running_loop())
    speaker = in_thread(lambda: say_all(outbox, [m.Log(level="info", text="x")] * 100))
    await asyncio.to_thread(speaker.join, 0.05)
    outbox.close()
    await asyncio.to_thread(join, speaker)
    await asyncio.sleep(0)
    assert outbox._messages.qsize() < 20


async def test_a_sign_of_life_is_only_given_when_nothing_else_waits() -> None:
    outbox = Outbox(asyncio.get_running_loop())
    for number in range(3):
        outbox.put_if_idle(m.Progress(archive_bytes=number))
    assert await outbox.get() == m.Progress(archive_bytes=0)
    outbox.put_if_idle(m.Progress(archive_bytes=7))
    outbox.sent()
    outbox.put_if_idle(m.Progress(archive_bytes=8))
    assert await outbox.get() == m.Progress(archive_bytes=8)


async def test_a_broker_that_does_not_read_the_session_stops_the_pipeline() -> None:
    qubes = [QubePlan(f"qube{number}", notes="n" * 200_000) for number in range(2 * MAX_LOCATED)]
    engine = Engine()
    async with session_over(BackupWriter(qubes, log_n=1).to_bytes(), engine) as (_, peer):
        peer.open()
        await peer.passing(m.Manifest)
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined] # of every stream's transport
        peer.say(
            m.Start(mode="verify", keys=tuple(f"vm{number}" for number in range(10, 10 + 2 * MAX_LOCATED)))
        )
        # As many messages as wait for the broker, and as many chunks as the intake may be ahead.
        assert await stuck(engine) < 30 + MAX_LOCATED
        peer.writer.transport.resume_reading()  # type: ignore[attr-defined] # of every stream's transport
        assert isinstance((await peer.rest())[-1], m.Finished)
