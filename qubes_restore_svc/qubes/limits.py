"""The administrator's limits on what one restore may create, applied to the plan.

Strategy: the sizes are those that the backup records, and no volume that is written may be larger than that.
So what has no recorded size, or may exceed it, does not go together with a limit on sizes.
"""

from qubes_restore_svc.broker.plan import Plan
from qubes_restore_svc.errors import UsageError
from qubes_restore_svc.qubes.config import LimitsConfig

_ADVICE = "Restore fewer qubes at a time, or change the section `limits` of the configuration."


def check_limits(limits: LimitsConfig, plan: Plan) -> None:
    """Raises UsageError if the taken qubes exceed the limits. dom0's home has no size, and does not count."""
    taken = [planned.source for planned in plan.taken if planned.source.klass != "AdminVM"]
    if limits.qubes is not None and len(taken) > limits.qubes:
        count = f"{len(taken)} qubes are to be restored"
        raise UsageError(f"{count}, and the configuration allows {limits.qubes}", advice=_ADVICE)
    if limits.volume_bytes is None and limits.total_bytes is None:
        return
    total = 0
    for qube in taken:
        for volume in qube.volumes:
            place = f"the volume {qube.name}/{volume.name}"
            if volume.size is None:
                raise UsageError(f"{place} has no recorded size, but sizes are limited here", advice=_ADVICE)
            if limits.volume_bytes is not None and volume.size > limits.volume_bytes:
                raise UsageError(
                    f"{place} has {_gib(volume.size)} GiB, and the configuration allows {limits.volume_size}",
                    advice=_ADVICE,
                )
            total += volume.size
    if limits.total_bytes is not None and total > limits.total_bytes:
        raise UsageError(
            f"the volumes have {_gib(total)} GiB together, and the configuration allows {limits.total_size}",
            advice=_ADVICE,
        )


def check_options(limits: LimitsConfig, *, ignore_size_limit: bool) -> None:
    """Raises UsageError for the option that would make a limit on sizes void."""
    if ignore_size_limit and (limits.volume_size is not None or limits.total_size is not None):
        raise UsageError("--ignore-size-limit is not possible: the configuration limits sizes", advice="")


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f}"
