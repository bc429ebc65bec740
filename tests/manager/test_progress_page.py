import threading
import time

import pytest

from tests.manager import qt  # first: without Qt, all of this is skipped

from PyQt6.QtCore import QThread  # isort: skip
from PyQt6.QtGui import QColor, QPalette  # isort: skip
from PyQt6.QtWidgets import QLabel  # isort: skip

from qubes_restore_svc.errors import AuthenticationFailed, Cancelled, HostFailed, RestoreError
from qubes_restore_svc.manager.progress_page import ProgressPage
from qubes_restore_svc.manager.qube_table import text_colours
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.names import VmClass
from qubes_restore_svc.wire.report import QubeReport, Report, RestoreProgress
from tests.manager.script import MIB, Script, qube, result
from tests.support.reports import NOON

QUBES = (qube("work"), qube("vault"))


def page(*qubes: c.PlanQube, mode: c.Mode = "restore") -> ProgressPage:
    """A page that has been told of the beginning."""
    qt.application()
    shown = ProgressPage()
    shown.show()
    shown.feed.started(Script(qubes or QUBES).plan(1, mode, c.Choice()))
    qt.process_events()
    return shown


def report(status: int, *qubes: QubeReport, error: RestoreError | None = None) -> Report:
    return Report(
        mode="restore",
        tool_version="1",
        started=NOON,
        finished=NOON,
        status=status,
        error=None if error is None else ErrorInfo.of(error),
        qubes=qubes,
    )


def test_the_bar_moves_with_what_is_told() -> None:
    shown = page()
    shown.feed.progress(RestoreProgress(archive_bytes=0))
    qt.process_events()
    assert (shown.bar.maximum(), shown.amount.text()) == (0, "0 B")  # nobody knows how far it is
    shown.feed.progress(
        RestoreProgress(archive_bytes=50 << 40, percent=25, per_second=5 * MIB, seconds_left=100)
    )
    qt.process_events()
    assert (shown.bar.value(), shown.bar.maximum()) == (25, 100)
    assert shown.amount.text() == "50.0 TiB, 5.0 MiB/s"
    assert shown.left.text().endswith(" so far, about 1 min 30 s left")


def test_the_bar_is_full_at_a_good_end_only() -> None:
    shown = page()
    shown.feed.progress(RestoreProgress(archive_bytes=400 * MIB, percent=99))
    qt.process_events()
    assert shown.bar.value() < shown.bar.maximum()
    shown.feed.ended(report(0, result("work"), result("vault")), None)
    qt.process_events()
    assert shown.bar.value() == shown.bar.maximum()
    assert shown.headline.text() == "Both qubes were restored"


@pytest.mark.parametrize(("klass", "told"), [("AppVM", False), ("TemplateVM", True), ("StandaloneVM", True)])
def test_updates_are_asked_for_where_old_software_has_come_back(klass: VmClass, told: bool) -> None:
    shown = page()
    restored = result("work").model_copy(update={"klass": klass})
    shown.feed.ended(report(0, restored), None)
    qt.process_events()
    assert ("Install updates" in shown.doing.text()) == told
    assert "It took" in shown.doing.text()


def test_the_qube_and_volume_under_way_are_told() -> None:
    shown = page()
    shown.feed.volume_started("vault", "private", 100 * MIB)
    qt.process_events()
    assert shown.doing.text() == "Now: vault, private volume"
    assert shown.table.as_text().splitlines() == ["work\twaiting", "vault\t▸ in progress\tprivate volume"]


def test_the_qube_under_way_comes_into_view_when_it_begins() -> None:
    shown = page(*(qube(f"number-{number}") for number in range(30)))
    shown.resize(500, 300)
    shown.show()
    qt.process_events()
    bar = shown.table.verticalScrollBar()
    assert bar is not None and bar.value() == 0
    shown.feed.volume_started("number-20", "root", 100 * MIB)
    qt.process_events()
    item, view = shown.table.item(20, 0), shown.table.viewport()
    assert item is not None and view is not None
    assert view.rect().contains(shown.table.visualItemRect(item))
    bar.setValue(0)  # a person looks elsewhere
    shown.feed.volume_started("number-20", "private", 100 * MIB)
    qt.process_events()
    assert bar.value() == 0


def test_a_partial_failure_says_which_and_why() -> None:
    shown = page()
    mac = AuthenticationFailed("the MAC does not match")
    shown.feed.ended(report(3, result("work", mac), result("vault")), None)
    qt.process_events()
    assert shown.headline.text() == "1 of 2 qubes restored"
    assert not shown.bar.isVisible()
    lines = shown.table.as_text().splitlines()
    assert lines[0].startswith("work\t✗ not restored\tThe MAC does not match. The backup was damaged")
    assert lines[1] == "vault\t✓ restored"
    shown.copy_button.click()
    clipboard = qt.application().clipboard()
    assert clipboard is not None
    assert "The MAC does not match" in clipboard.text()


def test_a_cancel_is_told_at_once_and_its_end_too() -> None:
    shown = page()
    shown.feed.volume_started("work", "private", 100 * MIB)
    shown.feed.cancelling()
    qt.process_events()
    assert shown.headline.text() == "Cancelling…"
    assert "being removed" in shown.doing.text()
    # What crosses it on the way changes nothing.
    shown.feed.progress(RestoreProgress(archive_bytes=0, percent=60))
    shown.feed.volume_started("vault", "private", 100 * MIB)
    qt.process_events()
    assert shown.headline.text() == "Cancelling…"
    assert shown.bar.maximum() == 0
    stopped = Cancelled("the restore was cancelled")
    shown.feed.ended(report(130, result("work", stopped), result("vault", stopped), error=stopped), None)
    shown.feed.cancelling()
    qt.process_events()
    assert shown.headline.text() == "Cancelled. No qube was restored"
    assert "✗" not in shown.table.as_text()


@pytest.mark.parametrize("with_report", [False, True])
def test_a_cancel_that_the_person_has_not_asked_for_is_explained(with_report: bool) -> None:
    ended = Cancelled("dom0 ended it", advice="")
    for asked in (False, True):
        shown = page()
        if asked:
            shown.feed.cancelling()
        if with_report:
            shown.feed.ended(report(130, result("work", ended), error=ended), None)
        else:
            shown.feed.ended(None, ended)
        qt.process_events()
        assert shown.headline.text().startswith("Cancelled")
        assert shown.doing.text().startswith("Dom0 ended it. ") != asked


def test_a_cancel_that_overtakes_the_beginning_stays_one() -> None:
    qt.application()
    shown = ProgressPage()
    shown.feed.cancelling()
    shown.feed.started(Script(QUBES).plan(1, "verify", c.Choice()))
    shown.feed.volume_started("work", "private", 100 * MIB)
    qt.process_events()
    assert (shown.headline.text(), shown.bar.maximum()) == ("Cancelling…", 0)
    assert shown.doing.text() == "The verification is being stopped."
    assert shown.table.as_text().splitlines() == ["work\t– not begun", "vault\t– not begun"]


@pytest.mark.parametrize(
    ("error", "headline", "row"),
    [
        (HostFailed("the call ended", advice="Look."), "The restore did not finish", "✗ not known"),
        (Cancelled("it was"), "Cancelled", "– not begun"),
    ],
)
def test_an_end_without_a_report_is_told(error: RestoreError, headline: str, row: str) -> None:
    shown = page()
    shown.feed.qube_finished(result("work"))
    shown.feed.ended(None, error)
    qt.process_events()
    assert shown.headline.text() == headline
    assert shown.is_over
    lines = shown.table.as_text().splitlines()
    assert lines[0] == "work\t✓ restored"
    assert lines[1].startswith(f"vault\t{row}")
    assert "Nothing was restored" not in shown.doing.text()


def test_verifying_is_not_called_restoring() -> None:
    shown = page(mode="verify")
    assert shown.headline.text() == "Verifying 2 qubes"
    done = report(0, result("work", mode="verify"), result("vault", mode="verify"))
    shown.feed.ended(done.model_copy(update={"mode": "verify"}), None)
    qt.process_events()
    assert shown.headline.text() == "Both qubes were verified"
    assert "Nothing was restored" in shown.doing.text()
    for error, headline in (
        (HostFailed("the call ended", advice=""), "The verification did not finish"),
        (Cancelled("it was"), "Cancelled"),
    ):
        shown = page(mode="verify")
        shown.feed.ended(None, error)
        qt.process_events()
        assert shown.headline.text() == headline
        assert "restore" not in shown.doing.text()


def test_what_is_told_in_other_threads_is_shown_in_the_windows_own() -> None:
    shown = page()
    threads: list[QThread | None] = []
    shown.finished.connect(lambda: threads.append(QThread.currentThread()))

    def tell() -> None:
        for done in range(100):
            shown.feed.progress(RestoreProgress(archive_bytes=done * MIB, percent=done))
        shown.feed.qube_finished(result("work"))
        shown.feed.ended(report(3, result("work"), result("vault", RestoreError("no"))), None)

    telling = threading.Thread(target=tell)
    telling.start()
    telling.join()
    assert not shown.is_over  # nothing is shown from there
    qt.until(lambda: shown.is_over)
    assert threads == [qt.application().thread()]


def test_a_page_that_is_gone_does_not_hurt_who_tells() -> None:
    shown = page()
    feed = shown.feed
    shown.close()
    shown.deleteLater()
    del shown
    qt.process_events()
    try:
        feed.progress(RestoreProgress(archive_bytes=MIB))
    except RuntimeError as error:  # what the events of the adapter swallow
        assert "deleted" in str(error)


def test_nothing_is_shown_as_html() -> None:
    shown = page()
    hostile = RestoreError("<h1>x</h1>", advice="<img src='/etc/passwd'>")
    shown.feed.ended(report(1, result("<b>work</b>", hostile), error=hostile), None)
    qt.process_events()
    assert all(label.textFormat().name == "PlainText" for label in shown.findChildren(QLabel))
    assert "<" not in shown.table.as_text() + shown.doing.text()


@pytest.mark.parametrize("background", ["#ffffff", "#f0f0f0", "#2b2e33", "#000000", "#31363b"])
def test_colours_can_be_read_on_light_and_dark(background: str) -> None:
    palette = QPalette()
    palette.setColor(QPalette.ColorRole.Base, QColor(background))
    colours = text_colours(palette)
    for colour in (colours.good, colours.bad, colours.quiet):
        assert _contrast(colour, QColor(background)) >= 4.5


def test_another_palette_recolours_what_is_shown() -> None:
    shown = page()
    shown.feed.ended(report(0, result("work"), result("vault")), None)
    qt.process_events()
    dark = QPalette()
    dark.setColor(QPalette.ColorRole.Base, QColor("#101010"))
    shown.setPalette(dark)
    qt.process_events()
    item = shown.table.item(0, 1)
    assert item is not None
    assert item.foreground().color() == text_colours(dark).good
    assert shown.headline.palette().color(QPalette.ColorRole.WindowText) == text_colours(dark).good


def test_time_goes_on_while_nothing_is_told() -> None:
    shown = page()
    assert "so far" in shown.left.text()
    shown._began = time.monotonic() - 61
    qt.until(lambda: "1 min" in shown.left.text())


def _contrast(one: QColor, other: QColor) -> float:
    """WCAG 2.1, "contrast ratio"."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: QColor) -> float:
    parts = [colour.redF(), colour.greenF(), colour.blueF()]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
