"""Chunks that are opened ahead of their turn: in order, within the budget, and to the same end as without."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_restore_svc.archive.container import HEAD_SIZE, OVERHEAD
from qubes_restore_svc.errors import ArchiveTruncated, AuthenticationFailed
from qubes_restore_svc.worker import chunk as chunk_module
from qubes_restore_svc.worker.chunk import Chunk

from ..support.backup_writer import RawMember, join_members
from .support import MIB, file_with, in_thread, join, pipe_with, wait_until
from .test_intake import Bench, chunk, failed

SIZE = 1000


class Taken:
    """Chunks that an intake has brought, whose keys are there, and for which nobody has asked yet."""

    def __init__(self, bench: Bench, descriptor: int, count: int) -> None:
        self.bench, self.descriptor = bench, descriptor
        bench.start()
        events = [bench.next() for _ in range(count + 1)]
        self.chunks = [event for event in events if isinstance(event, Chunk)]
        assert len(self.chunks) == count
        assert not any(failed(one) for one in self.chunks)

    @property
    def opened(self) -> list[int | None]:
        """The numbers of those that were opened ahead, or could not be."""
        return [one.name.number for one in self.chunks if one._content is not None or one._error is not None]

    @property
    def begun(self) -> list[int | None]:
        return [one.name.number for one in self.chunks if one._begun]

    def open_ahead(self, expected: Sequence[int], threads: int = 2) -> None:
        self.bench.store.open_ahead(threads)
        wait_until(lambda: self.opened == expected, f"the opening of {expected} ahead")


@contextmanager
def taken(
    sizes: Sequence[int],
    *,
    memory: int = 64 * MIB,
    pipe: bool = False,
    changed: tuple[int, int] | None = None,
) -> Iterator[Taken]:
    """Chunks with contents of `sizes`; of number `changed[0]`, the byte at `changed[1]` is wrong."""
    members: list[RawMember] = [chunk("vm1/private.img", number, size) for number, size in enumerate(sizes)]
    if changed is not None:
        number, place = changed
        data = bytearray(members[number].data)
        data[place] ^= 1
        members[number] = replace(members[number], data=bytes(data))
    with (pipe_with if pipe else file_with)(join_members(members)) as descriptor:
        bench = Bench(descriptor, memory=memory, jobs=4)
        try:
            yield Taken(bench, descriptor, len(members))
        finally:
            end(bench)


def end(bench: Bench) -> None:
    """Let all its threads end, so that they keep nothing."""
    bench.stop.say()
    bench.store.close()
    bench.scheduler.close()


def take_content(one: Chunk) -> int:
    """Open and release a chunk of the file; how many bytes it had."""
    content = bytes(one.open(print))
    one.release()
    assert content == f"vm1/private.img.{one.name.number:03d}".encode().ljust(len(content), b".")
    return len(content)


@pytest.mark.parametrize("pipe", [False, True])
def test_as_many_chunks_are_opened_ahead_as_there_are_threads(pipe: bool) -> None:
    with taken([SIZE] * 6, pipe=pipe) as run:
        run.open_ahead([0, 1, 2])  # the first of them is the one whose turn it is
        assert run.begun == [0, 1, 2]
        assert [take_content(one) for one in run.chunks] == [SIZE] * 6
        wait_until(lambda: run.bench.budget.used == 0, "the release of all memory")


def test_what_is_opened_ahead_takes_a_fifth_of_the_memory_at_most() -> None:
    with taken([MIB] * 3, memory=9 * MIB) as run:
        run.open_ahead([0])
        assert run.begun == [0]
        assert [take_content(one) for one in run.chunks] == [MIB] * 3


def test_a_chunk_whose_key_does_not_fit_is_left_to_who_asks_for_it() -> None:
    """To derive a key once more takes long, and may be for nothing when something before it is wrong."""
    with taken([SIZE] * 3, changed=(1, HEAD_SIZE - 1)) as run:
        run.open_ahead([0])
        assert take_content(run.chunks[0]) == SIZE
        assert run.opened == []
        with pytest.raises(AuthenticationFailed, match="does not belong"):
            run.chunks[1].open(print)
        run.chunks[1].release()
        assert take_content(run.chunks[2]) == SIZE


@pytest.mark.parametrize("place", [HEAD_SIZE, -1])
def test_a_fault_of_a_chunk_that_was_opened_ahead_is_raised_when_it_is_asked_for(place: int) -> None:
    with taken([SIZE] * 3, changed=(1, place)) as run:
        run.open_ahead([0, 1, 2])
        assert run.chunks[1]._content is None
        assert take_content(run.chunks[0]) == SIZE
        with pytest.raises(AuthenticationFailed, match="wrong MAC") as caught:
            run.chunks[1].open(print)
        assert caught.value.chunk == 1
        run.chunks[1].release()
        assert take_content(run.chunks[2]) == SIZE


def test_an_archive_that_shrinks_while_chunks_are_opened_ahead_is_truncated() -> None:
    with taken([SIZE] * 2) as run:
        os.ftruncate(run.descriptor, run.chunks[1].end - 1)
        run.open_ahead([0, 1])
        assert take_content(run.chunks[0]) == SIZE
        with pytest.raises(ArchiveTruncated, match="became shorter"):
            run.chunks[1].open(print)


def test_a_chunk_for_which_the_system_has_no_memory_is_left_to_who_asks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = 0

    def scarce(size: int = 0) -> bytearray:
        nonlocal asked
        asked += size > 0
        if asked == 1 and size:
            raise MemoryError
        return bytearray(size)

    with taken([SIZE] * 4) as run:
        monkeypatch.setattr(chunk_module, "bytearray", scarce, raising=False)
        run.bench.store.open_ahead(1)
        wait_until(lambda: asked == 1, "the attempt")
        assert take_content(run.chunks[0]) == SIZE
        wait_until(lambda: run.opened == [1, 2], "the opening of others ahead")
        assert [take_content(one) for one in run.chunks[1:]] == [SIZE] * 3
        wait_until(lambda: run.bench.budget.used == 0, "the release of all memory")


def test_memory_of_chunks_is_used_again() -> None:
    with taken([SIZE] * 6) as run:
        run.open_ahead([0, 1, 2])
        before = [id(one._memory) for one in run.chunks[:3]]
        take_content(run.chunks[0])
        wait_until(lambda: run.chunks[3]._begun, "the opening of the next one")
        assert id(run.chunks[3]._memory) == before[0]


def test_a_chunk_that_is_given_back_before_its_turn_leaves_nothing_behind() -> None:
    with taken([SIZE] * 4) as run:
        run.open_ahead([0, 1, 2])
        for one in run.chunks:
            one.release()
        assert run.opened == []
        wait_until(lambda: run.bench.budget.used == 0, "the release of all memory")


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3 * MIB >> 4), min_size=1, max_size=12),
    memory=st.integers(6 * MIB, 12 * MIB),
    threads=st.integers(1, 3),
)
def test_chunks_of_any_sizes_and_derivations_stay_within_the_memory(
    sizes: list[int], memory: int, threads: int
) -> None:
    """Counted anew here: all that chunks are held in, what is kept for the next one, and all arenas."""
    members = [chunk("vm1/private.img", number, size * 16, log_n=11) for number, size in enumerate(sizes)]
    with file_with(join_members(members)) as descriptor:
        bench = Bench(descriptor, memory=memory)
        known: list[Chunk] = []
        exceeded: list[int] = []

        def count(_: object = None) -> None:
            with bench.budget.lock:
                chunks = [len(one._memory) for one in known if one._memory is not None]
                total = sum(chunks) + len(bench.store._spare) + bench.engine.memory_held
                if total > memory:
                    exceeded.append(total)

        bench.engine.gate = count
        bench.store.open_ahead(threads)
        bench.start()
        bench.next()

        def bring() -> None:
            for _ in members:
                event = bench.next()
                assert isinstance(event, Chunk)
                known.append(event)

        bringing = in_thread(bring)
        for number, size in enumerate(sizes):
            wait_until(lambda number=number: len(known) > number, "the next chunk")  # type: ignore[misc]
            content = known[number].open(print)
            count()
            assert len(content) == size * 16 == known[number].size - OVERHEAD or size * 16 < 30
            known[number].release()
            count()
        join(bringing)
        end(bench)
        assert not exceeded
