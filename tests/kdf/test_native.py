"""Native scrypt derivations: what they derive, beside each other, and what becomes of their memory."""

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_restore_svc.errors import BudgetTooSmall, ExcessiveCost
from qubes_restore_svc.kdf.engine import KdfParameters, KdfRequest, OpensslEngine

native_kdf = pytest.importorskip(
    "qubes_restore_svc.kdf.native", reason="the C extension was not built", exc_type=ImportError
)
from qubes_restore_svc.kdf._romix import Arena, Lanes  # noqa: E402
from qubes_restore_svc.kdf.native import STRIDE_WORK, NativeEngine  # noqa: E402

MIB = 1 << 20


def instruction_sets() -> list[str]:
    sets = []
    for name in ("portable", "SSE2", "AVX2", "AVX-512"):
        try:
            Lanes(name)
        except ValueError:
            continue
        sets.append(name)
    return sets


def request_for(
    log_n: int, r: int = 8, p: int = 1, salt: bytes = b"salt", passphrase: bytes = b"passphrase"
) -> KdfRequest:
    return KdfRequest(KdfParameters(log_n=log_n, r=r, p=p), salt=salt, passphrase=passphrase)


@pytest.fixture
def engine() -> Iterator[NativeEngine]:
    with NativeEngine() as engine:
        yield engine


@pytest.fixture(scope="module", params=instruction_sets())
def engine_of_each_set(request: pytest.FixtureRequest) -> Iterator[NativeEngine]:
    with NativeEngine(request.param) as engine:
        yield engine


# RFC 7914 section 12: parameters, passphrase, salt, key.
RFC_VECTORS = [
    (
        request_for(4, 1, 1, b"", b""),
        "77d6576238657b203b19ca42c18a0497f16b4844e3074ae8dfdffa3fede21442"
        "fcd0069ded0948f8326a753a0fc81f17e8d3e0fb2e0d3628cf35e20c38d18906",
    ),
    (
        request_for(10, 8, 16, b"NaCl", b"password"),
        "fdbabe1c9d3472007856e7190d01e9fe7c6ad7cbc8237830e77376634b373162"
        "2eaf30d92e22a3886ff109279d9830dac727afb94a83ee6d8360cbdfa2cc0640",
    ),
    (
        request_for(14, 8, 1, b"SodiumChloride", b"pleaseletmein"),
        "7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2"
        "d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887",
    ),
]
RFC_LARGE_VECTOR = (
    request_for(20, 8, 1, b"SodiumChloride", b"pleaseletmein"),
    "2101cb9b6a511aaeaddbbe09cf70f881ec568d574a2ffd4dabe5ee9820adaa47"
    "8e56fd8f4ba5d09ffa1c6d927c40f4c337304049e8a952fbcbf45c6fa77a41a4",
)


def test_the_vectors_of_the_rfc_are_derived_side_by_side(engine_of_each_set: NativeEngine) -> None:
    requests = [request for request, _ in RFC_VECTORS]

    assert [key.hex() for key in engine_of_each_set.derive(requests)] == [key for _, key in RFC_VECTORS]


def test_the_large_vector_of_the_rfc_is_derived_in_a_quarter_of_its_memory(engine: NativeEngine) -> None:
    request, key = RFC_LARGE_VECTOR

    assert engine.derive([request], stride=4)[0].hex() == key
    assert engine.memory_held <= (256 + 2) * MIB


requests_of_any_kind = st.builds(
    request_for,
    log_n=st.integers(1, 10),
    r=st.sampled_from([1, 2, 3, 8, 8, 8, 11]),
    p=st.integers(1, 3),
    salt=st.binary(max_size=40),
    passphrase=st.binary(max_size=80),
)


@settings(max_examples=60, deadline=None)
@given(requests=st.lists(requests_of_any_kind, max_size=9), stride=st.sampled_from(sorted(STRIDE_WORK)))
def test_any_mixture_of_requests_gives_the_keys_that_openssl_gives(
    engine_of_each_set: NativeEngine, requests: list[KdfRequest], stride: int
) -> None:
    assert engine_of_each_set.derive(requests, stride) == OpensslEngine().derive(requests)


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(requests_of_any_kind, min_size=1, max_size=12),
    steps=st.lists(st.integers(0, 900), min_size=1),
)
def test_requests_that_join_while_others_run_give_the_same_keys(
    engine_of_each_set: NativeEngine, requests: list[KdfRequest], steps: list[int]
) -> None:
    keys: dict[int, bytes] = {}
    tickets: list[int] = []
    with engine_of_each_set.open_lanes() as lanes:
        for request, some_steps in zip(requests, steps * len(requests), strict=False):
            while not lanes.free:
                keys.update(lanes.advance())
            ticket = lanes.begin(request)
            assert ticket is not None
            tickets.append(ticket)
            keys.update(lanes.advance(some_steps))
        while lanes.running:
            keys.update(lanes.advance())

    assert [keys[ticket] for ticket in tickets] == OpensslEngine().derive(requests)


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(requests_of_any_kind, min_size=2, max_size=8),
    steps=st.lists(st.integers(0, 900), min_size=1),
)
def test_derivations_that_change_over_to_other_lanes_give_the_same_keys(
    engine_of_each_set: NativeEngine, requests: list[KdfRequest], steps: list[int]
) -> None:
    keys: dict[int, bytes] = {}
    number_of: dict[int, int] = {}
    with engine_of_each_set.open_lanes() as first, engine_of_each_set.open_lanes() as second:
        here, there = first, second
        for number, (request, some_steps) in enumerate(zip(requests, steps * len(requests), strict=False)):
            while not here.free:
                keys |= {number_of.pop(ticket): key for ticket, key in here.advance()}
            ticket = here.begin(request)
            assert ticket is not None
            number_of[ticket] = number
            if some_steps % 3:  # some change over before they have a lane
                keys |= {number_of.pop(ticket): key for ticket, key in here.advance(some_steps)}
            moved = {there.take_over(here, ticket): number for ticket, number in number_of.items()}
            assert (here.running, there.running) == (0, len(moved))
            here, there, number_of = there, here, moved
        while here.running:
            keys |= {number_of.pop(ticket): key for ticket, key in here.advance()}

    assert [keys[number] for number in range(len(requests))] == OpensslEngine().derive(requests)


def test_only_what_runs_there_changes_over_and_only_into_a_free_lane(engine: NativeEngine) -> None:
    with engine.open_lanes() as lanes, engine.open_lanes() as others:
        with pytest.raises(KeyError):
            lanes.take_over(others, 1)
        ticket = others.begin(request_for(10))
        assert ticket is not None
        others.advance(1)
        while lanes.free:
            lanes.begin(request_for(10))
        with pytest.raises(RuntimeError, match="no lane is free"):
            lanes.take_over(others, ticket)
        assert others.running == 1


def test_the_fastest_set_of_this_machine_is_taken_and_named(engine: NativeEngine) -> None:
    assert engine.name == f"native ({instruction_sets()[-1]})"
    assert engine.lanes >= 1


def test_a_set_that_the_machine_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot run NEON"):
        NativeEngine("NEON")


@pytest.mark.parametrize(
    "parameters",
    [
        KdfParameters(0, 8, 1),
        KdfParameters(-1, 8, 1),
        KdfParameters(33, 8, 1),
        KdfParameters(1 << 40, 8, 1),
        KdfParameters(16, 1, 1),
        KdfParameters(10, 0, 1),
        KdfParameters(10, -8, 1),
        KdfParameters(10, 1 << 17, 1),
        KdfParameters(10, 8, 0),
        KdfParameters(10, 8, 1 << 27),
    ],
)
def test_impossible_scrypt_parameters_are_refused_before_anything_is_allocated(
    engine: NativeEngine, parameters: KdfParameters
) -> None:
    with pytest.raises((ValueError, ExcessiveCost)):
        engine.derive([request_for(4), KdfRequest(parameters, b"", b"")])
    assert engine.memory_held == 0


def test_a_stride_that_there_is_not_is_refused(engine: NativeEngine) -> None:
    with pytest.raises(ValueError, match="the stride is one of 1, 2, 3, 4, "):
        engine.derive([request_for(4)], stride=17)
    with engine.open_lanes() as lanes, pytest.raises(ValueError, match="the stride is one of"):
        lanes.begin(request_for(4), stride=0)


def test_a_derivation_takes_the_memory_that_was_said_beforehand(engine: NativeEngine) -> None:
    for stride in STRIDE_WORK:
        needed = engine.memory(KdfParameters(16, 8, 1), stride)
        assert 64 * MIB // stride < needed <= 64 * MIB // stride + 2 * MIB
        engine.derive([request_for(16)], stride)
        assert engine.memory_held == engine.memory_idle == needed
        engine.trim()


def test_arenas_are_kept_for_the_next_derivations(engine: NativeEngine) -> None:
    engine.derive([request_for(16)] * engine.lanes, stride=5)
    held = engine.memory_held
    assert held == engine.lanes * engine.memory(KdfParameters(16, 8, 1), 5)

    engine.derive([request_for(16)] * engine.lanes, stride=6)
    engine.derive([request_for(16)] * (2 * engine.lanes), stride=5)

    assert engine.memory_held == held


def test_an_arena_that_is_much_too_large_is_not_taken_for_a_small_derivation(engine: NativeEngine) -> None:
    """Else it takes the memory of several: with little of it, hardly any would run at once."""
    large, small = engine.memory(KdfParameters(15, 8, 1)), engine.memory(KdfParameters(13, 8, 1))
    engine.derive([request_for(15)])
    limit = large + small - 1
    with engine.open_lanes() as lanes:
        assert lanes.begin(request_for(13), 1, limit) is not None
        assert (engine.memory_held, engine.memory_idle) == (small, 0)
        while lanes.running:
            lanes.advance()
    engine.derive([request_for(16)], stride=5)
    held = engine.memory_held
    with engine.open_lanes() as lanes:  # a sixth more than it needs is not too much
        assert lanes.begin(request_for(16), 6, None) is not None
        assert engine.memory_held == held


def test_the_largest_arena_that_is_idle_is_known(engine: NativeEngine) -> None:
    assert engine.largest_idle == 0
    engine.derive([request_for(10), request_for(15)])
    assert engine.largest_idle == engine.memory(KdfParameters(15, 8, 1))


def test_trim_gives_back_the_largest_arenas_until_little_enough_is_held(engine: NativeEngine) -> None:
    with engine.open_lanes() as lanes:
        if lanes.free < 2:
            pytest.skip("this machine has one lane")
        lanes.begin(request_for(14))
        lanes.begin(request_for(10))
    large, small = engine.memory(KdfParameters(14, 8, 1)), engine.memory(KdfParameters(10, 8, 1))
    assert engine.memory_held == large + small

    assert engine.trim(keep=large) == large
    assert engine.memory_held == small
    assert engine.trim() == small
    assert engine.memory_held == 0


def test_memory_in_use_is_not_trimmed(engine: NativeEngine) -> None:
    with engine.open_lanes() as lanes:
        lanes.begin(request_for(12))
        assert engine.trim() == 0
        assert engine.memory_held > engine.memory_idle == 0


def test_without_memory_for_all_lanes_fewer_run_at_a_time(
    engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request_for(8, salt=bytes([number])) for number in range(5)]
    allow_arenas(monkeypatch, 1)

    assert engine.derive(requests) == OpensslEngine().derive(requests)
    assert engine.memory_held == engine.memory(requests[0].parameters)


def test_without_memory_for_one_derivation_it_is_an_error_that_says_so(
    engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_arenas(monkeypatch, 0)
    with pytest.raises(BudgetTooSmall, match="could not be had"):
        engine.derive([request_for(10)])
    assert engine.memory_held == 0


def test_what_a_large_p_takes_beside_the_table_is_counted(engine: NativeEngine) -> None:
    cost = KdfParameters(1, 8, 1 << 13)  # a table of 2 KiB, and 8 MiB of blocks
    assert engine.memory(cost) > 2 * (8 << 20)
    with engine.open_lanes() as lanes:
        assert lanes.begin(KdfRequest(cost, b"", b""), 1, limit=16 << 20) is None
    assert engine.memory_held == 0


def test_all_arenas_together_stay_under_the_limit(engine: NativeEngine) -> None:
    size = engine.memory(KdfParameters(14, 8, 1))
    engine.derive([request_for(15)])
    with engine.open_lanes() as lanes:
        assert lanes.begin(request_for(14), 1, limit=size) == 1
        assert engine.memory_held == size  # the larger one, which was idle, had to go
        assert lanes.begin(request_for(10), 1, limit=size) is None
        with engine.open_lanes() as others:
            assert others.begin(request_for(10), 16, limit=size) is None
        assert engine.memory_held == size


def allow_arenas(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let only so many arenas be made."""
    left = [count]

    def make(size: int) -> Arena:
        if left[0] == 0:
            raise MemoryError
        left[0] -= 1
        return Arena(size)

    monkeypatch.setattr("qubes_restore_svc.kdf.arenas.Arena", make)


def test_other_threads_run_while_keys_are_derived(engine: NativeEngine) -> None:
    thread = threading.Thread(target=engine.derive, args=([request_for(15)] * engine.lanes,))
    turns = 0
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1

    assert turns > 3


def test_several_threads_derive_at_once_with_one_engine(engine: NativeEngine) -> None:
    requests = [request_for(11, salt=bytes([number])) for number in range(8)]
    expected = OpensslEngine().derive(requests)
    results: list[list[bytes]] = []
    threads = [threading.Thread(target=lambda: results.append(engine.derive(requests))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert results == [expected] * 3


def test_what_is_given_up_leaves_its_memory_to_others(engine: NativeEngine) -> None:
    with engine.open_lanes() as lanes:
        while lanes.free:
            lanes.begin(request_for(12))
        lanes.advance(100)
        with pytest.raises(RuntimeError, match="no lane is free"):
            lanes.begin(request_for(4))

    assert engine.memory_idle == engine.memory_held
    assert engine.derive([request_for(12)]) == OpensslEngine().derive([request_for(12)])


def test_a_forged_r_neither_holds_up_the_other_lanes_nor_makes_a_turn_longer(engine: NativeEngine) -> None:
    with engine.open_lanes() as lanes:
        lanes.begin(request_for(12, r=1 << 10), 1, 1 << 40)
        usual = lanes.begin(request_for(12), 1, 1 << 40)
        turns = [[ticket for ticket, _ in lanes.advance(1 << 10)] for _ in range(2 * 8 + 2)]
        # 8 turns of 2^10 steps; the other lane has as many between them, and needs 2^10.
        assert [usual] in turns
        assert all(turn in ([], [usual]) for turn in turns)
