"""How much one restore may create, whatever the backup says."""

import pytest

from qubes_restore_svc.errors import UsageError
from qubes_restore_svc.qubes.config import LimitsConfig
from qubes_restore_svc.qubes.grants import check_limits, check_options
from qubes_restore_svc.wire.messages import ManifestQube, VolumeInfo
from qubes_restore_svc.wire.names import VolumeName
from qubes_restore_svc.wire.restore_call import Plan
from tests.cli.plans import not_wanted, plan, source, taken

GIB = 1 << 30


def sized(name: str, *sizes: int | None) -> ManifestQube:
    names: tuple[VolumeName, ...] = ("private", "root")
    volumes = tuple(VolumeInfo(name=volume, size=size) for volume, size in zip(names, sizes, strict=False))
    return source(name).model_copy(update={"volumes": volumes})


def of(*qubes: ManifestQube) -> Plan:
    return plan(*map(taken, qubes), not_wanted(sized("big", 99 * GIB), "excluded"))


@pytest.mark.parametrize(
    ("limits", "fits", "exceeds", "reason"),
    [
        (LimitsConfig(qubes=2), [sized("a", 1), sized("b", 1)], sized("c", 1), "3 qubes are to be restored"),
        (LimitsConfig(volume_size=2), [sized("a", 2 * GIB, 2 * GIB)], sized("b", 0, 2 * GIB + 1),
         "the volume b/root has 2.0 GiB, and the configuration allows 2"),
        (LimitsConfig(total_size=3), [sized("a", GIB, GIB), sized("b", GIB)], sized("c", 1),
         "3.0 GiB together, and the configuration allows 3"),
        (LimitsConfig(volume_size=2), [sized("a", 0)], sized("b", None), "b/private has no recorded size"),
        (LimitsConfig(total_size=2), [sized("a", 0)], sized("b", None), "b/private has no recorded size"),
    ],
)  # fmt: skip
def test_a_limit_is_kept_to_the_last_byte(
    limits: LimitsConfig, fits: list[ManifestQube], exceeds: ManifestQube, reason: str
) -> None:
    check_limits(limits, of(*fits))
    with pytest.raises(UsageError, match=reason):
        check_limits(limits, of(*fits, exceeds))


def test_without_limits_everything_fits() -> None:
    check_limits(LimitsConfig(), of(sized("a", None), sized("b", 1 << 60)))


def test_dom0s_home_does_not_count() -> None:
    home = taken(source("dom0", "AdminVM", None))
    check_limits(LimitsConfig(qubes=1, volume_size=1, total_size=1), plan(home, taken(sized("a", GIB))))


@pytest.mark.parametrize("limits", [LimitsConfig(volume_size=1), LimitsConfig(total_size=1)])
def test_sizes_that_nobody_checks_do_not_go_with_a_limit(limits: LimitsConfig) -> None:
    check_options(limits, ignore_size_limit=False)
    check_options(LimitsConfig(qubes=1), ignore_size_limit=True)
    with pytest.raises(UsageError, match="--ignore-size-limit is not possible"):
        check_options(limits, ignore_size_limit=True)
