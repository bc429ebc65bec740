"""The stages of a restore as a table, and the CPU-bound limits that follow from them."""

from .bench import Bench, Section
from .processes import cores
from .samples import MIB
from .stages import STAGES, StageCosts
from .tables import Table, mib, seconds


def stage_table(bench: Bench) -> Section:
    """What each stage costs on one core over the backup, then the derivations by budget."""
    costs, budgets = bench.costs, bench.options.memory
    amounts = costs.amounts
    stages = Table(
        f"Stages on one core ({mib(amounts.archive)} MiB of archive, {mib(amounts.data)} MiB of data"
        f" in {mib(amounts.images)} MiB of images, {amounts.records} records over the boundary)",
        ["stage", "what", "CPU, s", "ms per MiB of archive"],
        [
            [stage, what, seconds(costs.seconds[stage]), _per_mib(costs.seconds[stage], amounts.archive)]
            for stage, what in STAGES.items()
        ],
    )
    limits = Table(
        f"CPU-bound limits ({_mix(costs)}; {cores()} cores)",
        ["budget", "stride, and derivations a core", "derivations, CPU s", "extract, s", "verify, s"],
        [
            [
                f"{budget} MiB",
                _loads(costs, budget * MIB),
                seconds(costs.derivation_s(budget * MIB, cores())),
                seconds(costs.limit_s(budget * MIB, cores())),
                seconds(costs.limit_s(budget * MIB, cores(), verify_only=True)),
            ]
            for budget in budgets
        ],
        [
            "A limit is the sum of all stages, each measured on one core that does nothing else, divided by"
            " the cores."
        ],
    )
    data = {
        "cpu_s": dict(costs.seconds),
        "archive_bytes": amounts.archive,
        "data_bytes": amounts.data,
        "image_bytes": amounts.images,
        "records": amounts.records,
        "containers": {f"2^{parameters.log_n}": count for parameters, count in costs.mix.items()},
        "limits": {
            str(budget): {
                "derivations_cpu_s": costs.derivation_s(budget * MIB, cores()),
                "extract_s": costs.limit_s(budget * MIB, cores()),
                "verify_s": costs.limit_s(budget * MIB, cores(), verify_only=True),
            }
            for budget in budgets
        },
        "derivations": derivation_data(costs),
    }
    return Section("stages", [stages, limits], data)


def derivation_data(costs: StageCosts) -> list[dict[str, object]]:
    """Every derivation cost that has been measured, for JSON."""
    return [
        {
            "log_n": parameters.log_n,
            "stride": load.stride,
            "side_by_side": load.beside,
            "cpu_s": cost.cpu_s,
            "reckoned": cost.reckoned,
        }
        for (parameters, load), cost in costs.derivations.known.items()
    ]


def _per_mib(cost_s: float, size: int) -> str:
    return f"{cost_s / (size / MIB) * 1000:.2f}"


def _mix(costs: StageCosts) -> str:
    counts = sorted((parameters.log_n, count) for parameters, count in costs.mix.items())
    return ", ".join(f"{count} containers of N = 2^{log_n}" for log_n, count in counts)


def _loads(costs: StageCosts, memory: int) -> str:
    """`2^19: 1 (4), 2^20: 2 (4)`."""
    loads = {parameters.log_n: costs.load(parameters, memory, cores()) for parameters in costs.mix}
    return ", ".join(f"2^{log_n}: {load.stride} ({load.beside})" for log_n, load in sorted(loads.items()))
