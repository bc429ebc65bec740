"""scrypt: the right keys, bounded cost, honest memory."""

import subprocess
import sys
import threading
import time

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import qubes_restore_svc.kdf
from qubes_restore_svc.errors import BudgetTooSmall, ExcessiveCost, size_text
from qubes_restore_svc.kdf.engine import (
    KEYS_SIZE,
    MAX_BLOCKS,
    MAX_LOG_N,
    KdfEngine,
    KdfParameters,
    KdfRequest,
    OpensslEngine,
    best_engine,
    check_cost,
)

# RFC 7914, section 12, without the one that needs a gigabyte.
RFC_7914_VECTORS = [
    (
        KdfRequest(KdfParameters(log_n=4, r=1, p=1), b"", b""),
        "77d6576238657b203b19ca42c18a0497f16b4844e3074ae8dfdffa3fede21442"
        "fcd0069ded0948f8326a753a0fc81f17e8d3e0fb2e0d3628cf35e20c38d18906",
    ),
    (
        KdfRequest(KdfParameters(log_n=10, r=8, p=16), b"NaCl", b"password"),
        "fdbabe1c9d3472007856e7190d01e9fe7c6ad7cbc8237830e77376634b373162"
        "2eaf30d92e22a3886ff109279d9830dac727afb94a83ee6d8360cbdfa2cc0640",
    ),
    (
        KdfRequest(KdfParameters(log_n=14, r=8, p=1), b"SodiumChloride", b"pleaseletmein"),
        "7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2"
        "d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887",
    ),
]

#: Every engine that there is here, once.
ENGINES: list[KdfEngine] = [OpensslEngine(), best_engine()]

#: Small and large values of r and p, and those beside the bounds.
SIZES = st.sampled_from([0, 1, 2, 3, 7, 8, 16, 255, 1 << 15, MAX_BLOCKS, 1 << 20, 1 << 24]) | st.integers(
    0, MAX_BLOCKS + 1
)


def test_the_keys_are_those_of_rfc_7914_in_the_order_of_the_requests() -> None:
    engine: KdfEngine = OpensslEngine()
    keys = engine.derive([request for request, _ in RFC_7914_VECTORS])
    assert [key.hex() for key in keys] == [expected for _, expected in RFC_7914_VECTORS]
    assert all(len(key) == KEYS_SIZE for key in keys)


def test_the_engine_tells_what_it_is() -> None:
    engine = OpensslEngine()
    assert engine.lanes == 1
    assert engine.name.split()[0] == "OpenSSL"
    assert len(engine.name.split()) == 2


def test_no_request_gives_no_keys() -> None:
    assert OpensslEngine().derive([]) == []


def test_a_request_does_not_show_its_passphrase() -> None:
    request = KdfRequest(KdfParameters(10, 8, 1), b"salt", b"correct horse")
    assert "correct" not in repr(request)


@pytest.mark.parametrize(
    "parameters",
    [
        *(KdfParameters(log_n, 8, 1) for log_n in (10, 19, 20, 21, 24)),
        # What the scrypt program takes where it has 512 MiB, 128 MiB, or the least, 1 MiB.
        *(KdfParameters(*cost) for cost in ((19, 8, 16), (17, 8, 64), (10, 8, 8192))),
    ],
)
def test_what_a_qubes_system_writes_is_within_the_ceiling(parameters: KdfParameters) -> None:
    check_cost(parameters)


@pytest.mark.parametrize("parameters", [KdfParameters(25, 8, 1), KdfParameters(14, 8, 1537)])
def test_too_much_work_is_refused_with_what_it_asks_for_unless_that_is_ignored(
    parameters: KdfParameters,
) -> None:
    with pytest.raises(ExcessiveCost, match=f"2 times the most .* {size_text(parameters.memory)}") as caught:
        check_cost(parameters)
    assert "--ignore-cost-limit" in caught.value.advice
    check_cost(parameters, ignore_cost_limit=True)


#: Heads that anybody can forge without the passphrase; some of them have killed an engine.
IMPOSSIBLE = [
    KdfParameters(1, 1, 1 << 24),
    KdfParameters(1, 8, 1 << 24),
    KdfParameters(1, 1 << 20, 1),
    KdfParameters(1, 1, (1 << 30) - 1),
    KdfParameters(1, (1 << 30) - 1, 1),
    KdfParameters(33, 8, 1),
    KdfParameters(63, 1 << 29, 1),
]


@pytest.mark.parametrize("parameters", IMPOSSIBLE)
def test_what_no_engine_can_do_is_refused_whatever_is_ignored(parameters: KdfParameters) -> None:
    for ignored in (False, True):
        with pytest.raises(ExcessiveCost, match="is not possible here") as caught:
            check_cost(parameters, ignore_cost_limit=ignored)
        assert "--ignore-cost-limit" not in caught.value.advice


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize("parameters", IMPOSSIBLE)
def test_an_engine_refuses_the_impossible_before_it_derives_anything(
    engine: KdfEngine, parameters: KdfParameters
) -> None:
    fine = KdfRequest(KdfParameters(17, 8, 1), b"", b"")
    started = time.process_time()
    with pytest.raises(ExcessiveCost):
        engine.derive([fine, KdfRequest(parameters, b"", b"")])
    with engine.open_lanes() as lanes, pytest.raises(ExcessiveCost):
        lanes.begin(KdfRequest(parameters, b"", b""), 1, 1 << 62)
    assert time.process_time() - started < 0.2
    assert engine.memory_held == 0


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 64), SIZES, SIZES)
@example(*(1, 1, MAX_BLOCKS))
@example(*(1, MAX_BLOCKS, 1))
@example(*(MAX_LOG_N, MAX_BLOCKS, 1))
def test_what_the_head_may_ask_for_every_engine_begins(log_n: int, r: int, p: int) -> None:
    parameters = KdfParameters(log_n, r, p)
    try:
        check_cost(parameters, ignore_cost_limit=True)
    except (ExcessiveCost, ValueError):
        return
    for engine in ENGINES:
        for stride in engine.strides:
            need = engine.memory(parameters, stride)
            assert need >= 128 * r * p
            with engine.open_lanes() as lanes:
                # As far as it goes without the memory being there: the limit is the only objection.
                assert lanes.begin(KdfRequest(parameters, b"", b""), stride, need - 1) is None
        assert engine.memory_held == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 32), st.integers(1, 32))
@example(*(1, 1, MAX_BLOCKS))
@example(*(1, MAX_BLOCKS, 1))
def test_engines_agree_on_the_keys_of_whatever_is_accepted(log_n: int, r: int, p: int) -> None:
    parameters = KdfParameters(log_n, r, p)
    assume(parameters.valid)
    check_cost(parameters)
    request = KdfRequest(parameters, b"salt", b"passphrase")
    assert len({engine.derive([request])[0] for engine in ENGINES}) == 1


@pytest.mark.parametrize(
    "parameters",
    [
        KdfParameters(0, 8, 1),
        KdfParameters(64, 8, 1),
        KdfParameters(16, 1, 1),
        KdfParameters(10, 0, 1),
        KdfParameters(10, 8, 0),
        KdfParameters(1, 1 << 15, 1 << 15),
    ],
)
def test_parameters_outside_rfc_7914_are_not_valid(parameters: KdfParameters) -> None:
    assert not parameters.valid
    with pytest.raises(ValueError, match="no scrypt parameters"):
        OpensslEngine().derive([KdfRequest(parameters, b"", b"")])


@pytest.mark.parametrize(
    "parameters", [KdfParameters(1, 1, 1), KdfParameters(15, 1, 1), KdfParameters(63, 8, 1)]
)
def test_the_edges_of_rfc_7914_are_valid(parameters: KdfParameters) -> None:
    assert parameters.valid


def test_other_threads_run_during_a_derivation() -> None:
    thread = threading.Thread(
        target=OpensslEngine().derive, args=([KdfRequest(KdfParameters(15, 8, 1), b"", b"")],)
    )
    thread.start()
    ticks = 0
    while thread.is_alive():
        time.sleep(0.002)
        ticks += 1
    assert ticks > 5


# The peak of the process itself, in KiB; getrusage would count the parent's in, from before the exec.
_PEAK = """
from pathlib import Path
from qubes_restore_svc.kdf.engine import KdfParameters, KdfRequest, OpensslEngine

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

engine, cost = OpensslEngine(), KdfParameters(16, 8, 1)
engine.derive([KdfRequest(KdfParameters(4, 1, 1), b"", b"")])
before = peak()
engine.derive([KdfRequest(cost, b"", b"")])
print(peak() - before, cost.memory)
"""

_NO_MEMORY = """
import resource
from qubes_restore_svc.kdf.engine import KdfParameters, KdfRequest, OpensslEngine
from qubes_restore_svc.errors import BudgetTooSmall
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
try:
    OpensslEngine().derive([KdfRequest(KdfParameters(20, 8, 1), b"", b"")])
except BudgetTooSmall as error:
    print(error.reason)
"""


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_the_memory_of_a_derivation_is_what_it_takes() -> None:
    taken, said = map(int, run(_PEAK).split())
    assert said * 0.9 <= taken <= said + (4 << 20)


def test_memory_that_cannot_be_had_is_an_error_that_names_it() -> None:
    assert BudgetTooSmall.kind == "budget-too-small"
    assert run(_NO_MEMORY) == "the 1.0 GiB of memory that a key derivation needs could not be had\n"


@pytest.mark.parametrize("missing", ["_romix", "native"])
def test_where_the_extension_cannot_be_loaded_openssl_derives(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_romix", "native", "arenas"):
        monkeypatch.delitem(sys.modules, f"qubes_restore_svc.kdf.{name}", raising=False)
        monkeypatch.delattr(qubes_restore_svc.kdf, name, raising=False)
    monkeypatch.setitem(sys.modules, f"qubes_restore_svc.kdf.{missing}", None)
    assert isinstance(best_engine(), OpensslEngine)


def test_a_lane_counts_its_memory_from_its_beginning_to_its_end() -> None:
    engine, request = OpensslEngine(), RFC_7914_VECTORS[0][0]
    need = engine.memory(request.parameters)
    with engine.open_lanes() as lanes:
        assert lanes.begin(request, 1, need - 1) is None
        assert (engine.memory_held, lanes.free) == (0, 1)
        ticket = lanes.begin(request, 1, need)
        assert (engine.memory_held, lanes.free) == (need, 0)
        with engine.open_lanes() as others:
            assert others.begin(request, 1, 2 * need - 1) is None
        assert [(ticket, RFC_7914_VECTORS[0][1])] == [(done, key.hex()) for done, key in lanes.advance()]
        assert (engine.memory_held, lanes.free, lanes.advance()) == (0, 1, [])
        lanes.begin(request, 1, need)
    assert engine.memory_held == 0
