"""From archive bytes to events: what is read, skipped and derived, and what is never even allocated."""

import contextlib
import hashlib
import os
import queue
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest

from qubes_restore_svc.archive.container import HEAD_SIZE, OVERHEAD
from qubes_restore_svc.archive.outer_tar import OuterTarReader
from qubes_restore_svc.archive.qfile import QfileReader
from qubes_restore_svc.errors import (
    ArchiveTruncated,
    AuthenticationFailed,
    BudgetTooSmall,
    Cancelled,
    SkippedOnRequest,
)
from qubes_restore_svc.worker.chunk import Chunk, ChunkStore
from qubes_restore_svc.worker.files import (
    ArchiveEnd,
    Damaged,
    Event,
    FileEnd,
    FileStart,
    Passed,
)
from qubes_restore_svc.worker.intake import Intake
from qubes_restore_svc.worker.keys import KeyScheduler
from qubes_restore_svc.worker.memory import MAX_LOCATED, Budget
from qubes_restore_svc.worker.proofs import ContainerProof, ContainerProofs
from qubes_restore_svc.worker.selection import Wanted, might_be_wanted
from qubes_restore_svc.worker.source import ArchiveSource, MemberStream
from qubes_restore_svc.worker.threads import Stop

from ..support.backup_writer import RawMember, join_members, outer_member, qfile_stream, scrypt_container
from .support import MIB, PATIENCE_S, Engine, Hanging, file_with, in_thread, join, pipe_with, wait_until


def secret(member: str) -> bytes:
    return f"id!{member}!secret".encode()


def chunk(file: str, number: int, size: int = 1000, log_n: int = 4) -> RawMember:
    member = f"{file}.{number:03d}"
    content = member.encode().ljust(size, b".")
    return RawMember(f"{member}.enc", scrypt_container(content, secret(member), log_n, salt=bytes(32)))


class Bench:
    """An intake over a descriptor, whose events a test takes."""

    def __init__(
        self,
        descriptor: int,
        *,
        memory: int = 64 * MIB,
        jobs: int = 2,
        engine: Engine | None = None,
        qfile: bool = False,
    ) -> None:
        self.engine = Engine()
        self.stop = Stop()
        self.budget = Budget(memory, self.engine, jobs + 2, self.stop, own=0)
        self.scheduler = KeyScheduler(self.engine, self.budget, jobs)
        self.proofs = ContainerProofs(self.scheduler, secret)
        self.source = ArchiveSource(descriptor)
        self.members = MemberStream(
            self.source, QfileReader() if qfile else OuterTarReader(), self.stop.check
        )
        self.store = ChunkStore(self.members, self.budget)
        self.wanted: Callable[[str], bool] = lambda _: True
        self.intake = Intake(self.store, self.scheduler, AsTheTestSays(self))
        self.events = self.intake.events
        self.thread: threading.Thread | None = None

    def start(self, wanted: Callable[[str], bool] = lambda _: True) -> None:
        self.wanted = wanted
        self.thread = in_thread(lambda: self.intake.run(self.proofs))

    def next(self) -> Event:
        try:
            return self.events.get(timeout=PATIENCE_S)
        except queue.Empty:
            raise Hanging("no event comes") from None

    def all(self, wanted: Callable[[str], bool] = lambda _: True) -> list[Event]:
        """Every event; chunks are given back at once."""
        self.start(wanted)
        events: list[Event] = []
        while not events or not isinstance(events[-1], ArchiveEnd):
            events.append(event := self.next())
            if isinstance(event, Chunk):
                failed(event)
                event.release()
        assert self.thread is not None
        join(self.thread)
        self.scheduler.close()
        wait_until(lambda: self.budget.used == 0, "the release of all memory")
        return events


class AsTheTestSays(Wanted):
    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self._bench = bench

    def __call__(self, file: str) -> bool:
        return self._bench.wanted(file)


def failed(chunk: Chunk) -> bool:
    """Wait for the key of a chunk: could it not be derived?"""
    assert isinstance(chunk.proof, ContainerProof)
    return chunk.proof.failed()


def described(events: Iterable[Event]) -> list[str]:
    texts = []
    for event in events:
        if isinstance(event, FileStart):
            texts.append(f"start {event.name}")
        elif isinstance(event, Chunk):
            texts.append(f"chunk {event.name.number}")
        elif isinstance(event, Damaged):
            texts.append(f"damage after {event.after}")
        elif not isinstance(event, Passed):
            what = "end" if isinstance(event, FileEnd) else "over"
            texts.append(f"{what}: {event.error.kind}" if event.error else what)
    return texts


TWO_FILES = [chunk("vm1/private.img", 0), chunk("vm1/private.img", 1), chunk("vm2/private.img", 0)]


def test_each_wanted_file_is_a_run_of_events_in_archive_order() -> None:
    with file_with(join_members(TWO_FILES)) as descriptor:
        events = Bench(descriptor).all()
    assert described(events) == [
        *("start vm1/private.img", "chunk 0", "chunk 1", "end"),
        *("start vm2/private.img", "chunk 0", "end"),
        "over",
    ]


def test_a_chunk_comes_whole_with_its_key_and_its_place() -> None:
    archive = join_members(TWO_FILES)
    with file_with(archive) as descriptor:
        bench = Bench(descriptor)
        bench.start()
        assert bench.next() == FileStart("vm1/private.img")
        event = bench.next()
        assert isinstance(event, Chunk)
        container = event.untrusted_content()
        assert container == TWO_FILES[0].data
        assert not failed(event)
        assert archive[event.end - event.size : event.end] == container


def test_the_same_members_come_from_a_qfile_stream() -> None:
    with pipe_with(qfile_stream(TWO_FILES)) as descriptor:
        events = Bench(descriptor, qfile=True).all(lambda file: file.startswith("vm2"))
    assert described(events) == ["start vm2/private.img", "chunk 0", "end", "over"]


@pytest.mark.parametrize("opened", [file_with, pipe_with])
def test_what_is_not_wanted_costs_no_derivation_and_no_memory(opened: Callable[..., object]) -> None:
    large = chunk("vm1/private.img", 0, size=2 * MIB)
    with opened(join_members([large, *TWO_FILES[2:]])) as descriptor:  # type: ignore[attr-defined] # both are
        bench = Bench(descriptor, memory=MIB)
        events = bench.all(lambda file: file == "vm2/private.img")
    assert described(events) == ["start vm2/private.img", "chunk 0", "end", "over"]
    assert bench.engine.members == ["vm2/private.img.000"]


def test_what_is_not_wanted_is_seeked_over_in_a_file() -> None:
    pieces = outer_member(replace(TWO_FILES[0], data=b"", declared_size=1 << 39))
    header = pieces[: pieces.index(b"vm1/private.img", 1024) + 512]
    with file_with(header) as descriptor:
        os.truncate(descriptor, len(header) + (1 << 39))
        os.lseek(descriptor, 0, os.SEEK_END)
        os.write(descriptor, join_members(TWO_FILES[2:]))
        os.lseek(descriptor, 0, os.SEEK_SET)
        events = Bench(descriptor).all(lambda file: file == "vm2/private.img")
    assert described(events) == ["start vm2/private.img", "chunk 0", "end", "over"]


def test_what_is_no_longer_wanted_is_skipped_from_its_next_chunk_on() -> None:
    asked: list[str] = []

    def wanted(file: str) -> bool:
        if threading.current_thread().name.startswith("kdf"):  # it may be late
            return True
        asked.append(file)
        return len(asked) == 1

    with file_with(join_members(TWO_FILES)) as descriptor:
        bench = Bench(descriptor)
        events = bench.all(wanted)
    assert described(events) == ["start vm1/private.img", "chunk 0", "end", "over"]
    assert bench.engine.members == ["vm1/private.img.000"]


def test_a_chunk_that_is_not_wanted_when_its_turn_comes_is_not_derived() -> None:
    gate, still = threading.Event(), {"vm1/private.img", "vm2/private.img"}
    with file_with(join_members(TWO_FILES)) as descriptor:
        bench = Bench(descriptor, jobs=1)
        bench.engine.gate = lambda _: gate.wait(PATIENCE_S)
        bench.start(lambda file: file in still)
        chunks = [event for event in (bench.next() for _ in range(6)) if isinstance(event, Chunk)]
        wait_until(lambda: bench.engine.members == ["vm1/private.img.000"], "the first derivation")
        still.remove("vm1/private.img")
        gate.set()
        chunks[0].open(print)  # its key was being derived
        with pytest.raises(SkippedOnRequest):
            chunks[1].open(print)
        chunks[2].open(print)
    assert bench.engine.members == ["vm1/private.img.000", "vm2/private.img.000"]


def test_a_derivation_starts_when_the_head_of_its_chunk_has_come() -> None:
    archive = join_members(TWO_FILES)
    start = archive.index(b"scrypt\0")
    with pipe_with(archive[: start + HEAD_SIZE + 10], keep_open=True) as descriptor:
        bench = Bench(descriptor)
        bench.start()
        wait_until(lambda: bench.engine.members == ["vm1/private.img.000"], "the derivation")


def test_a_chunk_that_claims_a_tebibyte_is_refused_before_anything_is_allocated() -> None:
    claim = replace(chunk("vm1/private.img", 0), declared_size=1 << 40)
    archive = join_members([claim])
    with file_with(archive) as descriptor:
        bench = Bench(descriptor)
        tracemalloc.start()
        events = bench.all()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert described(events) == ["start vm1/private.img", "end: budget-too-small", "over: archive-truncated"]
    assert bench.engine.requests == []
    assert peak < 2 * MIB


def test_a_chunk_that_does_not_fit_fails_its_file_and_no_other() -> None:
    members = [TWO_FILES[0], chunk("vm1/private.img", 1, log_n=12), chunk("vm1/private.img", 2), TWO_FILES[2]]
    with file_with(join_members(members)) as descriptor:
        bench = Bench(descriptor, memory=3 * MIB)
        events = bench.all()
    assert described(events) == [
        *("start vm1/private.img", "chunk 0", "end: budget-too-small"),
        *("start vm2/private.img", "chunk 0", "end"),
        "over",
    ]
    failed = events[2]
    assert isinstance(failed, FileEnd) and isinstance(failed.error, BudgetTooSmall)
    assert failed.error.chunk == 1 and "--memory 5" in failed.error.advice
    assert bench.engine.members == ["vm1/private.img.000", "vm2/private.img.000"]


BROKEN: dict[str, tuple[list[RawMember], str]] = {
    "no container": ([replace(TWO_FILES[0], data=b"x" * 1000)], "bad-container"),
    "too short": ([replace(TWO_FILES[0], data=TWO_FILES[0].data[: OVERHEAD - 1])], "bad-container"),
    "empty": ([replace(TWO_FILES[0], data=b"")], "bad-container"),
    "excessive cost": ([chunk("vm1/private.img", 0)], "excessive-cost"),
    "first missing": ([TWO_FILES[1]], "chunk-out-of-order"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_first_chunk_fails_its_file_without_a_derivation(name: str) -> None:
    (broken,), kind = BROKEN[name]
    if kind == "excessive-cost":
        head = struct.pack(">6sBBII", b"scrypt", 0, 40, 8, 1) + bytes(32)
        broken = replace(broken, data=head + hashlib.sha256(head).digest()[:16] + broken.data[64:])
    with file_with(join_members([broken, TWO_FILES[2]])) as descriptor:
        bench = Bench(descriptor)
        events = bench.all()
    assert described(events) == [
        *("start vm1/private.img", f"end: {kind}"),
        *("start vm2/private.img", "chunk 0", "end"),
        "over",
    ]
    assert bench.engine.members == ["vm2/private.img.000"]


def test_a_repeated_chunk_fails_its_file_and_the_rest_of_it_is_not_derived() -> None:
    members = [TWO_FILES[0], TWO_FILES[0], TWO_FILES[1], TWO_FILES[2]]
    with file_with(join_members(members)) as descriptor:
        bench = Bench(descriptor)
        events = bench.all()
    assert described(events)[:3] == ["start vm1/private.img", "chunk 0", "end: chunk-out-of-order"]
    assert bench.engine.members == ["vm1/private.img.000", "vm2/private.img.000"]


@pytest.mark.parametrize(
    "cut", [1, 600, 1024 + 512 + 20, 1024 + 512 + HEAD_SIZE + 50, 1024 + 512 + 1128 + 10]
)
def test_an_archive_that_is_cut_off_ends_the_file_that_was_read_and_then_everything(cut: int) -> None:
    start = len(outer_member(TWO_FILES[0]))
    with file_with(join_members(TWO_FILES)[: start + cut]) as descriptor:
        events = Bench(descriptor).all()
    assert described(events)[:2] == ["start vm1/private.img", "chunk 0"]
    assert described(events)[-2:] == ["end: archive-truncated", "over: archive-truncated"]
    assert isinstance(events[-1], ArchiveEnd) and events[-1].last_file == "vm1/private.img"


def test_an_archive_that_is_cut_off_while_it_is_skipped_is_seen_to_be() -> None:
    start = len(outer_member(TWO_FILES[0]))
    for opened in (file_with, pipe_with):
        with opened(join_members(TWO_FILES)[: start + 2000]) as descriptor:
            events = Bench(descriptor).all(lambda _: False)
        passed, end = events
        assert passed == Passed("vm1/private.img")
        assert isinstance(end, ArchiveEnd) and isinstance(end.error, ArchiveTruncated)
        assert end.last_file == "vm1/private.img"


def test_a_member_that_no_backup_holds_is_damage_and_costs_nothing_else() -> None:
    members = [TWO_FILES[0], RawMember("vm1/link", b"", b"2", link_target="/etc/shadow"), TWO_FILES[2]]
    with file_with(join_members(members)) as descriptor:
        events = Bench(descriptor).all()
    assert described(events) == [
        *("start vm1/private.img", "chunk 0", "end", "damage after vm1/private.img"),
        *("start vm2/private.img", "chunk 0", "end", "over"),
    ]


@pytest.mark.parametrize("error", [ValueError("a secret"), MemoryError(), RecursionError()])
def test_even_a_mistake_of_ours_ends_with_the_end_of_the_archive(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def wanted(file: str) -> bool:
        if file.startswith("vm2"):
            raise error
        return True

    with file_with(join_members(TWO_FILES)) as descriptor:
        events = Bench(descriptor).all(wanted)
    end = events[-1]
    assert isinstance(end, ArchiveEnd) and end.error is not None
    assert end.error.kind == ("budget-too-small" if isinstance(error, MemoryError) else "error")
    assert "a secret" not in str(end.error) + capsys.readouterr().err


def test_memory_that_the_system_refuses_is_given_back_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = MemberStream.read_into

    def refuse_containers(self: MemberStream, target: memoryview) -> None:
        if len(target) != HEAD_SIZE:
            raise MemoryError
        honest(self, target)

    monkeypatch.setattr(MemberStream, "read_into", refuse_containers)
    with pipe_with(join_members(TWO_FILES)) as descriptor:
        events = Bench(descriptor).all()
    assert described(events) == ["start vm1/private.img", "end: budget-too-small", "over: budget-too-small"]


@pytest.mark.parametrize(("opened", "most"), [(pipe_with, 4), (file_with, MAX_LOCATED)])
def test_the_intake_waits_when_nobody_takes_its_chunks(
    opened: Callable[[bytes], AbstractContextManager[int]], most: int
) -> None:
    members = [chunk("vm1/private.img", number) for number in range(MAX_LOCATED + 12)]
    with opened(join_members(members)) as descriptor:
        bench = Bench(descriptor, jobs=2)
        bench.start()
        wait_until(lambda: len(bench.budget._buffers) + len(bench.budget._located) == most)
        assert bench.thread is not None
        bench.thread.join(0.1)
        assert bench.thread.is_alive()
        assert bench.source.position < (most + 2) * len(outer_member(members[0]))
        bench.stop.say()
        join(bench.thread)


def test_files_without_any_chunk_are_bounded_as_well() -> None:
    """An enemy's archive of nothing but broken files makes events that no budget counts."""
    empty = [RawMember(f"vm{number}/private.img.000.enc", b"") for number in range(2000)]
    archive = join_members(empty)
    with file_with(archive) as descriptor:
        bench = Bench(descriptor)
        bench.start()
        assert bench.thread is not None
        bench.thread.join(0.5)
        assert bench.thread.is_alive()
        assert bench.source.position < len(archive) / 10
        while not isinstance(bench.next(), ArchiveEnd):
            pass
        join(bench.thread)


def test_a_cancel_ends_the_wait_for_memory() -> None:
    members = [chunk("vm1/private.img", number) for number in range(9)]
    with pipe_with(join_members(members)) as descriptor:
        bench = Bench(descriptor, jobs=1)
        bench.start()
        wait_until(lambda: len(bench.budget._buffers) == 3)
        bench.stop.say()
        events = [bench.next() for _ in range(6)]
    assert described(events)[-2:] == ["end: cancelled", "over: cancelled"]


def test_a_cancel_ends_the_skipping_of_a_tebibyte() -> None:
    claim = outer_member(replace(TWO_FILES[0], data=b"", declared_size=1 << 40))
    header = claim[: claim.index(b"vm1/private.img", 1024) + 512]
    reader, writer = os.pipe()
    os.write(writer, header)

    def feed() -> None:
        with contextlib.suppress(OSError):
            while True:
                os.write(writer, bytes(1 << 16))

    feeder = in_thread(feed)
    bench = Bench(reader)
    bench.start(lambda _: False)
    wait_until(lambda: bench.source.position > 5 * MIB)
    bench.stop.say()
    assert bench.next() == Passed("vm1/private.img")
    end = bench.next()
    assert isinstance(end, ArchiveEnd) and isinstance(end.error, Cancelled)
    os.close(reader)
    join(feeder)
    os.close(writer)


def test_first_members_can_be_taken_one_by_one() -> None:
    with file_with(join_members(TWO_FILES)) as descriptor:
        bench = Bench(descriptor)
        member = bench.members.next_member()
        assert member is not None and member.name == "vm1/private.img.000.enc"
        bench.members.skip_content(member.size)
        following = bench.members.next_member()
        assert following is not None
        bench.members.push_back(following)
        assert bench.members.next_member() is following
        bench.members.skip_content(following.size)
        last = bench.members.next_member()
        assert last is not None
        assert bench.members.read_content(last.size) == TWO_FILES[2].data
        assert bench.members.next_member() is None


def test_content_that_is_cut_off_is_an_error() -> None:
    with file_with(join_members(TWO_FILES)[:2000]) as descriptor:
        bench = Bench(descriptor)
        member = bench.members.next_member()
        assert member is not None
        with pytest.raises(ArchiveTruncated):
            bench.members.read_content(member.size)


# --- Chunks that stay in the archive ------------------------------------------------------------------


@pytest.mark.parametrize(("opened", "held"), [(file_with, False), (pipe_with, True)])
def test_a_chunk_has_the_same_bytes_wherever_it_waited(
    opened: Callable[[bytes], AbstractContextManager[int]], held: bool
) -> None:
    """Where the archive can seek, they are not in memory before somebody asks for them."""
    members = [chunk("vm1/private.img", number, size=size) for number, size in enumerate([5, 70_000, 300])]
    with opened(join_members(members)) as descriptor:
        bench = Bench(descriptor)
        bench.start()
        bench.next()
        chunks = [event for event in (bench.next() for _ in members) if isinstance(event, Chunk)]
        assert [event._memory is not None for event in chunks] == [held] * 3
        if not held:
            assert bench.budget.largest_located == chunks[1].size
        for event, member in zip(chunks, members, strict=True):
            assert bytes(event.untrusted_content()) == member.data
            failed(event)
            event.release()
        assert len(bench.store._spare) == 0  # no longer counted, so not there


def test_the_buffer_of_a_chunk_is_used_again_while_one_as_large_is_to_come() -> None:
    members = [chunk("vm1/private.img", number, size=size) for number, size in enumerate([1000, 1000, 10])]
    with file_with(join_members(members)) as descriptor:
        bench = Bench(descriptor)
        bench.start()
        bench.next()
        chunks = [event for event in (bench.next() for _ in members) if isinstance(event, Chunk)]
        sizes = []
        for event in chunks:
            event.untrusted_content()
            event.release()
            sizes.append(len(bench.store._spare))
        assert sizes == [chunks[0].size, 0, 0]


def test_a_file_that_shrinks_before_its_chunk_is_fetched_is_truncated() -> None:
    archive = join_members(TWO_FILES)
    with file_with(archive) as descriptor:
        bench = Bench(descriptor)
        bench.start()
        bench.next()
        event = bench.next()
        assert isinstance(event, Chunk)
        os.ftruncate(descriptor, event.end - 1)
        with pytest.raises(ArchiveTruncated, match="became shorter"):
            event.open(print)
        event.release()


@pytest.mark.parametrize("place", [48, 70, HEAD_SIZE, -1])
def test_content_that_changes_before_it_is_fetched_is_not_authentic(place: int) -> None:
    """Salt and cost were read with the head and are not read again; all the rest has to have its MAC."""
    archive = join_members(TWO_FILES)
    with file_with(archive) as descriptor:
        bench = Bench(descriptor)
        bench.start()
        bench.next()
        event = bench.next()
        assert isinstance(event, Chunk)
        at = event.end - event.size + place if place >= 0 else event.end + place
        os.pwrite(descriptor, bytes([archive[at] ^ 1]), at)
        with pytest.raises(AuthenticationFailed, match="wrong MAC"):
            event.open(print)
        event.release()


def test_an_archive_that_is_read_from_its_middle_is_fetched_from_there() -> None:
    with file_with(bytes(12345) + join_members(TWO_FILES)) as descriptor:
        os.lseek(descriptor, 12345, os.SEEK_SET)
        bench = Bench(descriptor)
        bench.start()
        bench.next()
        event = bench.next()
        assert isinstance(event, Chunk)
        assert bytes(event.untrusted_content()) == TWO_FILES[0].data


def test_until_it_is_known_what_is_wanted_only_what_might_be_is_taken() -> None:
    files = ["vm1/private.img", "vm1/firewall.xml", "vm1/icon.png", "dom0-home/user"]
    with file_with(join_members([chunk(file, 0) for file in files])) as descriptor:
        bench = Bench(descriptor)
        bench.wanted = might_be_wanted
        bench.intake.start(bench.proofs)
        bench.intake.start(bench.proofs)  # as if it were not said again
        events = [bench.next() for _ in range(11)]
        wait_until(lambda: bench.events.empty())
    assert [event.name for event in events if isinstance(event, FileStart)] == [
        "vm1/private.img",
        "vm1/firewall.xml",
        "dom0-home/user",
    ]
    assert [event.name for event in events if isinstance(event, Passed)] == ["vm1/icon.png"]
    assert events[-1] == ArchiveEnd(None, "dom0-home/user", position=bench.source.position)
