"""What a person reads at the end: sizes, times, tables in both widths, and every reason once."""

from typing import Literal

import pytest

from qubes_restore_svc.cli.report_output import show_report
from qubes_restore_svc.cli.tables import (
    duration_text,
    failures,
    left_out,
    manifest_table,
    report_table,
)
from qubes_restore_svc.errors import BadCompression, RestoreError, WorkerLost
from qubes_restore_svc.wire.messages import Manifest, ManifestQube, VolumeInfo
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.names import VolumeName
from qubes_restore_svc.wire.report import QubeReport, Report, VolumeReport

SUM = "7e7b63cea770d086620b587a5453df0b0aae573d51a99fd04a17a64027e109ff"
GIB = 1 << 30


def test_times() -> None:
    assert [duration_text(seconds) for seconds in (0, 59.9, 60, 250, 3900)] == [
        "0 s", "59 s", "1 min", "4 min 10 s", "1 h 05 min",
    ]  # fmt: skip


def test_the_list_of_qubes() -> None:
    volumes = (VolumeInfo(name="private", size=GIB),)
    qubes = (
        ManifestQube(
            key="vm1",
            name="work",
            klass="AppVM",
            label="red",
            template="fedora-41",
            netvm="sys-firewall",
            backup_size=3 * GIB // 2,
            volumes=volumes,
        ),
        ManifestQube(
            key="vm2",
            name="vault",
            klass="AppVM",
            label="black",
            template="fedora-41",
            netvm="",
            backup_size=5,
            volumes=volumes,
        ),
        ManifestQube(
            key="vm3", name="fedora-41", klass="TemplateVM", label="black", backup_size=0, volumes=volumes
        ),
    )
    manifest = Manifest(backup_id="1", format=4, compression_filter="gzip", qubes=qubes)
    assert manifest_table(manifest).splitlines() == [
        "NAME       CLASS       TEMPLATE   NETVM         LABEL  SIZE",
        "work       AppVM       fedora-41  sys-firewall  red    1.5 GiB",
        "vault      AppVM       fedora-41  -             black  5 B",
        "fedora-41  TemplateVM  -          default       black  0 B",
    ]


def volume(
    name: VolumeName = "private", error: RestoreError | None = None, outcome: str = "ok"
) -> VolumeReport:
    if error is not None:
        return VolumeReport(name=name, outcome="failed", error=ErrorInfo.of(error).without_place())
    if outcome == "not reached":
        return VolumeReport(name=name, outcome="not reached")
    return VolumeReport(name=name, outcome="ok", size=8 << 20, data_bytes=5, fsverity=SUM)


def report(
    *qubes: QubeReport, mode: Literal["restore", "verify"], error: RestoreError | None = None
) -> Report:
    made = Report.begun(mode)
    made.qubes = qubes
    made.close(error)
    return made


def qube(
    name: str, outcome: str, *volumes: VolumeReport, error: RestoreError | None = None, remark: str = ""
) -> QubeReport:
    made = QubeReport(name=name, klass="AppVM", outcome="failed", volumes=volumes, remark=remark)
    made.outcome = outcome  # type: ignore[assignment]  # one word of a literal
    made.error = None if error is None else ErrorInfo.of(error).without_place()
    return made


def test_where_there_is_room_a_volume_is_one_line() -> None:
    found = report(qube("work", "verified", volume("root"), volume()), mode="verify")
    expected = [
        "QUBE  VOLUME   SIZE     RESULT    DIGEST (fsverity digest FILE)",
        f"work  root     8.0 MiB  verified  {SUM}",
        f"work  private  8.0 MiB  verified  {SUM}",
    ]
    assert report_table(found).splitlines() == expected
    assert report_table(found, max(map(len, expected))).splitlines() == expected


def test_a_table_says_when_its_digests_are_plain_sha_256() -> None:
    plain = volume().model_copy(update={"fsverity": None, "sha256": SUM})
    found = report(qube("work", "verified", plain), mode="verify")
    assert report_table(found).splitlines() == [
        "QUBE  VOLUME   SIZE     RESULT    DIGEST (sha256sum FILE)",
        f"work  private  8.0 MiB  verified  {SUM}",
    ]


def test_on_a_narrow_terminal_a_verified_sum_has_a_line_of_its_own() -> None:
    found = report(
        qube("work", "verified", volume()),
        qube("a-name-of-exactly-31-characters", "failed", volume(outcome="not reached")),
        mode="verify",
    )
    lines = report_table(found, 80).splitlines()
    assert lines == [
        "QUBE                             VOLUME   SIZE     RESULT",
        "  DIGEST (fsverity digest FILE)",
        "work                             private  8.0 MiB  verified",
        f"  {SUM}",
        "a-name-of-exactly-31-characters  private  -        not reached",
    ]
    assert max(map(len, lines)) < 80


def test_on_a_narrow_terminal_a_restored_volume_is_one_short_line() -> None:
    found = report(qube("work", "restored", volume()), mode="restore")
    assert report_table(found, 80).splitlines() == [
        "QUBE  VOLUME   SIZE     RESULT",
        "work  private  8.0 MiB  restored",
    ]


def test_what_was_not_wanted_has_no_row_but_a_line_for_its_reason() -> None:
    found = report(
        qube("work", "restored", volume()),
        *(qube(f"other{number}", "left out", remark="not selected") for number in range(10)),
        qube("vault", "left out", remark="excluded"),
        mode="restore",
    )
    assert len(report_table(found).splitlines()) == 2
    assert left_out(found) == [
        "left out (not selected): other0, other1, other2, other3, other4, other5, other6, other7 and 2 more",
        "left out (excluded): vault",
    ]


def test_a_qube_without_volumes_has_a_row() -> None:
    found = report(
        qube("scratch", "restored"), qube("old", "refused", volume(outcome="not reached")), mode="restore"
    )
    assert [line.split() for line in report_table(found).splitlines()[1:]] == [
        ["scratch", "-", "-", "restored"],
        ["old", "private", "-", "not", "reached"],
    ]


def test_a_volume_that_came_whole_with_a_qube_that_failed_was_rolled_back() -> None:
    bad = qube("work", "failed", volume("root"), volume(error=BadCompression("it is malformed")))
    rows = [line.split()[:5] for line in report_table(report(bad, mode="restore")).splitlines()[1:]]
    assert rows == [["work", "root", "8.0", "MiB", "rolled"], ["work", "private", "-", "failed"]]


def test_a_verified_volume_of_a_failed_qube_stays_verified_and_the_failure_shows() -> None:
    bad = qube("work", "failed", volume(), error=BadCompression("firewall.xml is malformed"))
    found = report(bad, mode="verify")
    rows = [line.split()[:5] for line in report_table(found).splitlines()[1:]]
    assert rows == [["work", "private", "8.0", "MiB", "verified"], ["work", "-", "-", "failed"]]


def test_an_incomplete_qube_is_there_with_its_volumes_and_what_it_lacks_shows() -> None:
    bad = qube("work", "incomplete", volume(), error=BadCompression("its firewall.xml came late"))
    rows = [line.split()[:5] for line in report_table(report(bad, mode="restore")).splitlines()[1:]]
    assert rows == [["work", "private", "8.0", "MiB", "restored"], ["work", "-", "-", "incomplete"]]


def test_every_failure_says_where_why_and_what_to_do() -> None:
    error = BadCompression("it is malformed", chunk=3)
    # The qube fails for the same reason as its volume, which is said once.
    found = report(qube("work", "failed", volume(error=error), error=error), mode="restore")
    assert failures(found) == [f"work/private, chunk 3: it is malformed. {error.advice}"]


def test_a_reason_that_many_share_is_said_once_and_wrapped() -> None:
    error = RestoreError("a qube of this name is there already", advice="Move it away.")
    found = report(*(qube(f"qube{number}", "refused", error=error) for number in range(4)), mode="restore")
    assert failures(found) == [
        "qube0, qube1, qube2, qube3: a qube of this name is there already. Move it away."
    ]
    assert failures(found, 60) == [
        "qube0, qube1, qube2, qube3: a qube of this name is there\n  already. Move it away."
    ]


def test_what_ended_the_run_is_not_repeated_for_every_qube() -> None:
    lost = WorkerLost("the worker is gone")
    found = report(
        qube("one", "failed", volume(outcome="not reached"), error=lost),
        qube("two", "failed", volume(error=BadCompression("malformed"))),
        mode="restore",
        error=lost,
    )
    assert [line.split(":")[0] for line in failures(found)] == ["two/private"]


def test_the_last_line_counts_the_qubes_with_warnings_and_points_to_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    warned = qube("work", "restored", volume())
    warned.warnings = ("it has no netvm",)
    found = report(warned, qube("vault", "restored", volume()), mode="restore")
    assert show_report("program", found, quiet=False, what_next=["Look."])
    assert capsys.readouterr().err == "2 of 2 qubes restored, 1 with warnings.\nLook.\n"
    assert found.status == 0
    for warnings, said in ((("it was damaged",), "the warning"), (("a", "b"), "the 2 warnings")):
        found.warnings = warnings
        assert show_report("program", found, quiet=False)
        assert capsys.readouterr().err == f"2 of 2 qubes restored, 1 with warnings. See {said} above.\n"
    assert show_report("program", found, quiet=True, what_next=["Look."])
    assert capsys.readouterr() == ("", "")
