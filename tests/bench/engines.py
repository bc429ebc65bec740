"""Derivations per second and core: this project's engine beside OpenSSL's, in one thread.

Strategy: four derivations wait, or one for every lane, arenas are warm, and the engines take turns; all must
find the same keys. The cost is CPU time of the thread, so what else runs on the machine matters little.
"""

from qubes_restore_svc.errors import BudgetTooSmall
from qubes_restore_svc.kdf.engine import KdfEngine, KdfParameters, OpensslEngine

from .bench import Bench, Section, median, say
from .derivations import Derived, Job, derive_side_by_side, sample_requests
from .tables import Table, ratio, seconds

_LEAST_WAITING = 4
_SETS = ("AVX-512", "AVX2", "SSE2")


def engines(bench: Bench) -> Section:
    """One row an engine, a group of columns a cost."""
    candidates = available_engines()
    columns, data = [""], []
    cells: dict[str, list[str]] = {name: [] for name in candidates}
    for log_n in bench.options.derivation_log_n:
        costs = {
            name: _costs(runs) for name, runs in _alternate(candidates, log_n, bench.options.rounds).items()
        }
        reference = costs[OpensslEngine().name]
        columns += [f"N = 2^{log_n}, CPU s each", "per second", "× OpenSSL"]
        for name, cost in costs.items():
            times = None if cost is None or reference is None else reference / cost
            cells[name] += ["–", "–", "–"] if cost is None else [seconds(cost), ratio(1 / cost), ratio(times)]
            data.append({"engine": name, "log_n": log_n, "cpu_s": cost, "times_as_fast_as_openssl": times})
    table = Table(
        f"Derivations on one core ({_LEAST_WAITING} waiting, or one for each lane,"
        f" r = 8, medians of {bench.options.rounds})",
        columns,
        [[name, *row] for name, row in cells.items()],
        ["–: there is not enough memory for this one."] if None in [row["cpu_s"] for row in data] else [],
    )
    return Section("derivations", [table], {"engines": data})


def available_engines() -> dict[str, KdfEngine]:
    """OpenSSL, and the native engine with every instruction set that this machine has, by name."""
    openssl = OpensslEngine()
    found: dict[str, KdfEngine] = {openssl.name: openssl}
    try:
        from qubes_restore_svc.kdf.native import NativeEngine
    except ImportError:  # it was not built
        return found
    for instruction_set in _SETS:
        try:
            engine = NativeEngine(instruction_set)
        except ValueError:
            continue
        found[engine.name] = engine
    return found


def _alternate(candidates: dict[str, KdfEngine], log_n: int, rounds: int) -> dict[str, list[Derived] | None]:
    """The rounds of each engine; None where the memory cannot be had."""
    most = max(_LEAST_WAITING, *(engine.lanes for engine in candidates.values()))
    all_jobs = [Job(request) for request in sample_requests(KdfParameters(log_n, 8, 1), most)]
    runs: dict[str, list[Derived] | None] = {name: [] for name in candidates}
    keys: set[bytes] = set()
    for number in range(rounds):
        for name, engine in candidates.items():
            jobs = all_jobs[: max(_LEAST_WAITING, engine.lanes)]
            try:
                derive_side_by_side(engine, jobs)  # the arenas are warm after it
                derived = derive_side_by_side(engine, jobs)
                engine.trim()  # they are not to be in the way of the next engine
            except BudgetTooSmall:
                runs[name] = None
                continue
            keys.add(b"".join(derived.keys[:_LEAST_WAITING]))
            taken = runs[name]
            if taken is not None:
                taken.append(derived)
            say(f"round {number + 1}, {name}, N = 2^{log_n}: {seconds(derived.cpu_s / len(jobs))} s each")
    if len(keys) > 1:
        raise SystemExit("the engines derive different keys: no time counts")
    return runs


def _costs(runs: list[Derived] | None) -> float | None:
    return median(run.cpu_s / len(run.keys) for run in runs) if runs else None
