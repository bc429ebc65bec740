"""How much of the work is done, keys included."""

from dataclasses import replace

from qubes_restore_svc.worker.meter import ALL, Meter, Seen

MIB = 1 << 20
BEGIN = Seen(
    now=0.0,
    archive_size=1000 * MIB,
    position=0,
    unpacked=0,
    ahead=0.0,
    data=0.0,
    expected=2000 * MIB,
    deriving=True,
    unpacking=False,
)


def test_without_keys_it_is_how_much_of_the_archive_is_dealt_with() -> None:
    meter = Meter()
    seen = replace(BEGIN, deriving=False, unpacking=True)
    for second in range(1, 11):
        done = meter.done(replace(seen, now=second, position=second * 100 * MIB, unpacked=second * 100 * MIB))
        assert done == second * ALL // 10


def test_keys_that_wait_for_the_unpacking_count_as_much_as_they_cost() -> None:
    """100 MiB of keys a second; to unpack the same takes a third of that."""
    meter = Meter()
    found: list[int] = []
    for step in range(1, 11):
        found.append(meter.done(replace(BEGIN, now=float(step), ahead=step * 100.0 * MIB)) or 0)
    assert found == sorted(found)
    assert 0.6 * ALL < found[-1] < 0.75 * ALL  # what the unpacking costs is not known yet
    for step in range(1, 11):
        at = step * 100 * MIB
        seen = replace(
            BEGIN, position=at, unpacked=at, ahead=1000.0 * MIB - at, unpacking=True, deriving=False
        )
        last = meter.done(replace(seen, now=10 + step / 3))
        assert last is not None and last >= found[-1]
    assert last == ALL


def test_where_the_size_is_not_known_it_is_learned_from_the_data() -> None:
    meter = Meter()
    seen = replace(BEGIN, archive_size=0, deriving=False, unpacking=True)
    for step in range(1, 11):
        at = step * 50 * MIB  # a quarter of the data that it holds
        done = meter.done(replace(seen, now=float(step), unpacked=at, data=4.0 * at))
        assert done is not None and abs(done - step * ALL / 10) < 0.03 * ALL
    assert done == ALL


def test_nothing_is_said_where_nothing_is_known() -> None:
    assert Meter().done(replace(BEGIN, archive_size=0, expected=0)) is None


def test_it_neither_falls_nor_passes_the_end() -> None:
    meter = Meter()
    assert meter.done(replace(BEGIN, position=2000 * MIB)) == ALL
    assert meter.done(BEGIN) == ALL
