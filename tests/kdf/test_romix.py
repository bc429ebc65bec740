"""The C extension below the native engine: what its lanes and arenas refuse, and how arenas are mapped."""

import threading
import time
from pathlib import Path

import pytest

pytest.importorskip(
    "qubes_restore_svc.kdf._romix", reason="the C extension was not built", exc_type=ImportError
)
from qubes_restore_svc.kdf._romix import Arena, Lanes

MIB = 1 << 20


def test_lanes_that_a_thread_is_advancing_are_nobody_elses() -> None:
    lanes = Lanes()
    arena = Arena(64 * MIB)
    lanes.begin(bytearray(1024), 15, 8, 1, arena)
    thread = threading.Thread(target=lanes.advance, args=(1 << 20,))
    thread.start()
    time.sleep(0.005)
    if not thread.is_alive():
        pytest.skip("this machine was faster than the test")
    try:
        with pytest.raises(RuntimeError, match="another thread"):
            lanes.abandon()
        with pytest.raises(RuntimeError, match="in use"):
            arena.release()
    finally:
        thread.join()


@pytest.mark.parametrize(
    ("blocks", "log_n", "arena_size", "error"),
    [
        (bytearray(1024), 12, 1, "the arena is too small"),
        (bytearray(1023), 4, 1, "not a multiple"),
        (bytearray(), 4, 1, "not a multiple"),
        (bytearray(1024), 0, 1, "out of bounds"),
    ],
)
def test_a_lane_refuses_what_does_not_fit_together(
    blocks: bytearray, log_n: int, arena_size: int, error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        Lanes().begin(blocks, log_n, 8, 1, Arena(arena_size))


def test_an_arena_takes_one_derivation_at_a_time_and_none_once_released() -> None:
    arena, lanes, others = Arena(1), Lanes(), Lanes()
    lanes.begin(bytearray(1024), 4, 8, 1, arena)
    with pytest.raises(ValueError, match="in use"):
        others.begin(bytearray(1024), 4, 8, 1, arena)

    lanes.abandon()
    arena.release()
    arena.release()

    assert arena.size == 0
    with pytest.raises(ValueError, match="too small"):
        others.begin(bytearray(1024), 4, 8, 1, arena)


def test_a_lane_is_taken_over_with_all_that_belongs_to_it() -> None:
    arena, lanes, others, blocks = Arena(1), Lanes(), Lanes(), bytearray(1024)
    lane = others.begin(blocks, 4, 8, 1, arena)
    assert lanes.take_over(others, lane) == 0
    for nothing in (lane, -1, 99):
        with pytest.raises(ValueError, match="nothing runs"):
            lanes.take_over(others, nothing)
    with pytest.raises(TypeError):
        lanes.take_over(None, 0)  # type: ignore[arg-type]  # what C has to find out
    others.abandon()
    with pytest.raises(BufferError):
        blocks.clear()
    assert (others.advance(1000), lanes.advance(1000)) == ([], [0])
    blocks.clear()
    arena.release()


def test_an_arena_is_in_huge_pages_and_neither_dumped_nor_inherited() -> None:
    """Flags of /proc/PID/smaps: hg is MADV_HUGEPAGE, dd MADV_DONTDUMP, wf MADV_WIPEONFORK."""
    before = mappings_with("hg")
    arena = Arena(7 * MIB)

    assert mappings_with("hg") == before + 1
    assert mappings_with("hg", "dd", "wf") == mappings_with("hg")
    arena.release()
    assert mappings_with("hg") == before


def mappings_with(*flags: str) -> int:
    lines = Path("/proc/self/smaps").read_text().splitlines()
    if (
        not any(line.startswith("VmFlags:") for line in lines)
        or not Path("/sys/kernel/mm/transparent_hugepage").exists()
    ):
        pytest.skip("this kernel does not tell")
    return sum(line.startswith("VmFlags:") and set(flags) <= set(line.split()) for line in lines)


def test_blocks_cannot_be_resized_under_a_running_derivation() -> None:
    lanes, blocks = Lanes(), bytearray(1024)
    lanes.begin(blocks, 4, 8, 1, Arena(1))

    with pytest.raises(BufferError):
        blocks.clear()
