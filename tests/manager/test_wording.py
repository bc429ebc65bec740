import pytest

from qubes_restore_svc.errors import ERROR_KINDS, AuthenticationFailed, BudgetTooSmall, RestoreError
from qubes_restore_svc.manager import wording
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.report import QubeReport, Report, VolumeReport
from tests.manager.script import qube, refused, result
from tests.support.reports import NOON


def test_no_advice_names_an_option_that_the_dialog_does_not_have() -> None:
    for kind, error in ERROR_KINDS.items():
        told = wording.advice(kind, error.default_advice)
        assert "--" not in told.replace("qvm-backup-restore --mgmt-vm --", "")
        assert bool(told) == bool(error.default_advice)


@pytest.mark.parametrize("told", ["Use --yes.", "Name the qube with -d.", "Take another (-Z FILTER)."])
def test_an_advice_that_names_any_option_of_a_command_is_not_repeated(told: str) -> None:
    assert wording.advice("usage", told) == wording.advice("usage", "Use --option.")
    assert wording.advice("usage", "Re-try with worker-vm - later.") == "Re-try with worker-vm - later."


def test_an_error_says_where_why_and_what_to_do() -> None:
    assert wording.error_text(BudgetTooSmall("one key needs 4 GiB", qube="work")) == (
        "work: one key needs 4 GiB. Give the worker more memory: worker.memory in"
        " /etc/qubes-restore-svc/config.yaml in dom0."
    )


@pytest.mark.parametrize("text", ["<b>bold</b>", "<img src='file:///etc/passwd'>", "a < b > c"])
def test_nothing_that_is_quoted_can_be_taken_for_html(text: str) -> None:
    error = RestoreError(text, advice=text)
    told = [
        wording.error_text(error),
        wording.outcome(result("work", error)).explanation,
        wording.outcome(result(text, error)).name,
        wording.report_text(_report(result(text, error))),
    ]
    assert not any("<" in one or ">" in one for one in told)


def test_the_report_names_the_volume_and_the_place_in_it() -> None:
    error = AuthenticationFailed("the MAC does not match", chunk=3, advice="")
    failed = result("work").model_copy(
        update={
            "outcome": "failed",
            "volumes": (VolumeReport(name="private", outcome="failed", error=ErrorInfo.of(error)),),
        }
    )
    assert wording.outcome(failed).explanation == "Private volume, chunk 3: the MAC does not match."


def test_a_qube_that_is_there_and_lacks_something_is_not_called_not_restored() -> None:
    error = RestoreError("its firewall.xml came late", advice="It is still there.")
    found = wording.outcome(result("work", error).model_copy(update={"outcome": "incomplete"}))
    assert (found.succeeded, found.word, found.advice) == (False, "incomplete", "It is still there.")


def test_what_was_not_wanted_is_not_told() -> None:
    unwanted = result("mail").model_copy(update={"outcome": "left out"})
    report = _report(result("work"), unwanted)
    assert [one.name for one in wording.outcomes(report)] == ["work"]


def test_a_renamed_qube_is_told_with_its_old_name() -> None:
    renamed = result("work-1").model_copy(update={"name_in_backup": "work"})
    assert wording.outcome(renamed).name == "work-1 (was work)"


@pytest.mark.parametrize("outcome", ["failed", "refused"])
def test_a_qube_that_did_not_come_is_called_by_its_old_name_and_its_new_one(outcome: str) -> None:
    fields = {"name_in_backup": "work", "outcome": outcome}
    found = result("work-1", RestoreError("no")).model_copy(update=fields)
    assert wording.outcome(found).name == "work (new name work-1)"


def test_what_stays_behind_is_said_of_a_restored_qube_and_not_of_a_verified_one() -> None:
    behind = result("work").model_copy(update={"settings_left_out": ("property autostart", "device pci x")})
    assert wording.outcome(behind).explanation == (
        "These settings stay behind, as dom0's configuration says: property autostart; device pci x."
    )
    verified = behind.model_copy(update={"outcome": "verified"})
    assert wording.outcome(verified, "verify").explanation == ""


def test_a_refused_qube_is_told_with_what_settles_it_here() -> None:
    error = RestoreError("its template is nowhere", advice="Use --template work=TEMPLATE.")
    planned = refused(qube("work"), "missing-template", error)
    settled = planned.model_copy(update={"settled_by": ("template", "leave-out")})
    assert wording.problem_text(settled) == ("Its template is nowhere. Choose a template, or leave it out.")


@pytest.mark.parametrize(
    ("good", "bad", "expected"),
    [(1, 0, "The qube was restored"), (2, 0, "Both qubes were restored"),
     (3, 0, "All 3 qubes were restored"), (1, 2, "1 of 3 qubes restored"),
     (0, 2, "No qube was restored"), (0, 0, "Nothing was restored")],
)  # fmt: skip
def test_the_headline_sums_it_up(good: int, bad: int, expected: str) -> None:
    found = [result("a")] * good + [result("b", RestoreError("no"))] * bad
    assert wording.headline("restore", [wording.outcome(one) for one in found]) == expected


def _report(*qubes: QubeReport) -> Report:
    return Report(
        mode="restore",
        tool_version="1",
        started=NOON,
        finished=NOON,
        status=3,
        qubes=qubes,
    )
