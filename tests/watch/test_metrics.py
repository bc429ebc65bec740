"""The metrics, as Prometheus' own parser reads them."""

from datetime import UTC, datetime, timedelta

from prometheus_client.parser import text_string_to_metric_families

from qubes_restore_svc.watch.metrics import metrics

from .reports import NOW, watch_report


def samples(text: str) -> dict[tuple[str, str | None], float]:
    """The values by name and state; each has the label of the place, and a help text."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.type == "gauge" and family.documentation.endswith(".")
        for sample in family.samples:
            assert sample.labels["place"] == 'a"b\\c\nd'
            found[sample.name, sample.labels.get("state")] = sample.value
    return found


def test_the_metrics_say_what_the_report_says() -> None:
    report = watch_report("bad", made=NOW - timedelta(days=3)).model_copy(update={"place": 'a"b\\c\nd'})
    assert samples(metrics(report)) == {
        ("qubes_backup_good", None): 0,
        ("qubes_backup_checked_timestamp_seconds", None): NOW.timestamp(),
        ("qubes_backup_check_duration_seconds", None): 90,
        ("qubes_backup_max_age_seconds", None): 8 * 86_400,
        ("qubes_backup_timestamp_seconds", None): (NOW - timedelta(days=3)).timestamp(),
        ("qubes_backup_image_bytes", None): 4096,
        ("qubes_backup_qubes", None): 2,
        ("qubes_backup_failed_qubes", None): 1,
        ("qubes_backup_state", "good"): 0,
        ("qubes_backup_state", "no backup"): 0,
        ("qubes_backup_state", "bad"): 1,
        ("qubes_backup_state", "not verified"): 0,
        ("qubes_backup_state", "too old"): 0,
    }


def test_what_is_not_known_has_no_metric() -> None:
    report = watch_report("no backup", made=None).model_copy(
        update={"place": 'a"b\\c\nd', "verification": None}
    )
    found = samples(metrics(report))
    assert ("qubes_backup_timestamp_seconds", None) not in found
    assert ("qubes_backup_qubes", None) not in found
    assert found["qubes_backup_state", "no backup"] == 1
    assert datetime.fromtimestamp(found["qubes_backup_checked_timestamp_seconds", None], UTC) == NOW
