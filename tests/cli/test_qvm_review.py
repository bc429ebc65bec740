"""What is said about a plan, what is refused, and who is asked."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qubes_restore_svc.cli import qvm_review
from qubes_restore_svc.cli.displays import QuietDisplay
from qubes_restore_svc.cli.qvm_arguments import parse_restore_arguments
from qubes_restore_svc.cli.qvm_review import PlanReview
from qubes_restore_svc.errors import Cancelled, MissingDependency, QubeExists, RestoreError, UsageError
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.restore_call import Choice, Offers, Plan, QubeChoice

from .plans import conflicting, lacking, not_wanted, plan, source, taken

MISSING = "its template 'arch' is nowhere to be found"
QUESTION = "Do you want to proceed?"


class Display(QuietDisplay):
    """Knows whether it is paused."""

    pauses = 0
    is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.pauses += 1
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False


class Reviewing:
    """A review of a plan under some options; the question is answered with `answer` and kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: bool = True) -> None:
        self.questions: list[str] = []
        self.display = Display()

        self.answers: list[str | None] = []
        self.choice: Choice | None = None

        async def ask(question: str) -> bool:
            assert self.display.is_paused
            self.questions.append(question)
            return answer

        async def answered(question: str) -> str | None:
            assert self.display.is_paused
            self.questions.append(question)
            return self.answers.pop(0) if self.answers else None

        monkeypatch.setattr(qvm_review, "ask", ask)
        monkeypatch.setattr(qvm_review, "answer", answered)

    def __call__(self, found: Plan, options: str = "", choice: Choice | None = None) -> PlanReview:
        arguments = parse_restore_arguments(["--mgmt-vm", "backup", *options.split()])
        self.review = PlanReview("program", arguments, self.display, choice)
        self.choice = asyncio.run(self.review(found))
        return self.review


@pytest.fixture
def reviewing(monkeypatch: pytest.MonkeyPatch) -> Reviewing:
    return Reviewing(monkeypatch)


@pytest.fixture
def saying_no(monkeypatch: pytest.MonkeyPatch) -> Reviewing:
    return Reviewing(monkeypatch, answer=False)


FITTING = plan(taken(source("work")), taken(source("vault")))


def test_the_table_is_shown_and_the_person_asked(
    reviewing: Reviewing, capsys: pytest.CaptureFixture[str]
) -> None:
    review = reviewing(FITTING)
    assert review.seen and review.accepted
    assert reviewing.questions == [QUESTION]
    assert reviewing.display.pauses == 1 and not reviewing.display.is_paused
    said = capsys.readouterr()
    assert said.out.startswith("The following qubes are in the backup:\n")
    assert said.out.endswith("|\n\n")
    assert (
        said.err
        == "The above qubes will be added to your system. No qube that is here is removed or changed.\n"
    )


def test_a_no_ends_the_restore(saying_no: Reviewing) -> None:
    with pytest.raises(Cancelled, match="the answer was no"):
        saying_no(FITTING)
    assert saying_no.review.seen and not saying_no.review.accepted


@pytest.mark.parametrize("options", ["--yes", "-p pw", "--verify-only"])
def test_without_a_question_the_table_is_shown_all_the_same(
    options: str, saying_no: Reviewing, capsys: pytest.CaptureFixture[str]
) -> None:
    assert saying_no(FITTING, options).accepted
    assert saying_no.questions == []
    assert "work" in capsys.readouterr().out


def test_quiet_is_quiet_unless_somebody_is_asked(
    reviewing: Reviewing, capsys: pytest.CaptureFixture[str]
) -> None:
    reviewing(FITTING, "-q --yes")
    assert capsys.readouterr() == ("", "")
    reviewing(FITTING, "-q")
    assert "work" in capsys.readouterr().out
    assert reviewing.questions == [QUESTION]


def test_a_verify_says_that_nothing_is_changed(
    reviewing: Reviewing, capsys: pytest.CaptureFixture[str]
) -> None:
    reviewing(plan(taken(source("dom0", "AdminVM", None))), "--verify-only")
    assert capsys.readouterr().err == "These qubes will be verified. Nothing is created or changed.\n"


def test_where_nothing_is_left_nobody_is_asked(
    saying_no: Reviewing, capsys: pytest.CaptureFixture[str]
) -> None:
    assert saying_no(plan(not_wanted(source("work"), "excluded"))).accepted
    assert saying_no.questions == []
    assert "will be added" not in capsys.readouterr().err


def test_what_will_be_is_told_with_what_stays_behind_and_where_the_home_goes(
    reviewing: Reviewing, capsys: pytest.CaptureFixture[str]
) -> None:
    reviewing(
        plan(
            taken(source("work"), "", (), "property kernelopts"),
            taken(source("dom0", "AdminVM", None)),
            not_wanted(source("mail"), "excluded"),
        )
    )
    said = capsys.readouterr().err
    assert "stay behind" in said and "  property kernelopts: work\n" in said
    assert "NOTE: dom0's home comes as one archive file" in said and "not unpacked" in said
    assert "1 of them will be added to your system." in said


CONFLICT = plan(taken(source("work")), conflicting("vault"), conflicting("mail"))
SKIPPED = plan(taken(source("work")), not_wanted(source("vault"), "already-exists"))
NO_TEMPLATE_SKIPPED = plan(taken(source("work")), not_wanted(source("lab"), "missing-template"))
NO_TEMPLATE = plan(taken(source("work")), lacking("lab", "missing-template", MISSING))
NO_NETVM = plan(taken(source("work")), lacking("lab", "missing-netvm", MISSING))
NO_USER = plan(taken(source("work")), lacking("dom0", "username-mismatch", "it is another user's"))


@pytest.mark.parametrize(
    ("found", "kind", "statement", "options"),
    [
        (CONFLICT, QubeExists, "*** There are qubes of the same names here: vault, mail ***",
         ["--skip-conflicting", "--rename-conflicting", "--name QUBE=NEW"]),
        (NO_TEMPLATE, MissingDependency, "*** There is no matching template for: lab ***",
         ["--skip-broken", "--ignore-missing"]),
        (NO_NETVM, MissingDependency, "*** There is no matching netvm for: lab ***",
         ["--skip-broken", "--ignore-missing"]),
        (NO_USER, MissingDependency, "*** The user name in the backup is not the one here!",
         ["--ignore-username-mismatch"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["", "--yes", "--yes -q"])
def test_what_does_not_fit_ends_the_whole_restore_and_says_which_option_settles_it(
    found: Plan,
    kind: type[RestoreError],
    statement: str,
    options: list[str],
    way: str,
    reviewing: Reviewing,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(kind, match="nothing was restored"):
        reviewing(found, way)
    assert QUESTION not in reviewing.questions and not reviewing.review.accepted
    assert bool(reviewing.questions) is (not way)
    said = capsys.readouterr().err
    assert statement in said
    assert all(option in said for option in options)


def test_all_that_does_not_fit_is_told_at_once(
    reviewing: Reviewing, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(conflicting("vault"), lacking("lab", "missing-template", MISSING))
    with pytest.raises(QubeExists):
        reviewing(found)
    said = capsys.readouterr().err
    assert "--rename-conflicting" in said and "--ignore-missing" in said


@pytest.mark.parametrize(
    ("found", "options"),
    [
        (SKIPPED, "--skip-conflicting"),
        (NO_TEMPLATE_SKIPPED, "--skip-broken"),
        (NO_TEMPLATE, "--ignore-missing"),
        (NO_NETVM, "--skip-broken --ignore-missing"),
    ],
)
def test_with_its_option_the_others_are_restored(
    found: Plan, options: str, reviewing: Reviewing, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reviewing(found, options).accepted
    assert reviewing.questions == [QUESTION]
    assert "will not be restored" in capsys.readouterr().err


def test_dom0s_home_is_no_qube_that_is_added(
    reviewing: Reviewing, capsys: pytest.CaptureFixture[str]
) -> None:
    reviewing(plan(taken(source("dom0", "AdminVM", None)), not_wanted(source("work"), "not-selected")))
    said = capsys.readouterr().err
    assert "NOTE: dom0's home" in said and "will be added" not in said
    assert reviewing.questions == [QUESTION]


@pytest.mark.parametrize("way", ["", "-q --yes"])
def test_where_everything_is_skipped_it_is_said_why(
    way: str, reviewing: Reviewing, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RestoreError, match="nothing is left"):
        reviewing(
            plan(not_wanted(source("work"), "already-exists"), not_wanted(source("mail"), "excluded")),
            f"--skip-conflicting {way}",
        )
    assert "There are qubes of the same names here: work" in capsys.readouterr().err
    assert reviewing.questions == []


@pytest.mark.parametrize(
    ("found", "options"),
    [
        (CONFLICT, "--rename-conflicting"),  # no number was free
        (CONFLICT, "--skip-broken --ignore-missing"),
        (NO_TEMPLATE, "--skip-conflicting"),
        (NO_USER, "--skip-broken --skip-conflicting"),
    ],
)
def test_an_option_for_something_else_settles_nothing(
    found: Plan, options: str, reviewing: Reviewing
) -> None:
    with pytest.raises(RestoreError, match="does not fit"):
        reviewing(found, options)


def test_a_choice_that_cannot_be_is_not_passed_over_for_the_default(reviewing: Reviewing) -> None:
    with pytest.raises(MissingDependency, match="does not fit"):
        reviewing(NO_TEMPLATE, "--yes --ignore-missing --template slip", Choice(template="slip"))


@pytest.mark.parametrize(
    ("found", "answers", "fields"),
    [
        (CONFLICT, ["safe", "skip"], {"qubes": (QubeChoice(name="vault", new_name="safe"),),
                                      "exclude": ("mail",)}),
        (CONFLICT, ["number"], {"conflicts": "rename"}),
        (NO_TEMPLATE, ["debian-13"], {"qubes": (QubeChoice(name="lab", template="debian-13"),)}),
        (NO_TEMPLATE, ["~", "none", "default"], {"missing": "default"}),
        (NO_NETVM, ["none"], {"qubes": (QubeChoice(name="lab", netvm=""),)}),
        (NO_NETVM, ["number", "sys-net"], {"qubes": (QubeChoice(name="lab", netvm="sys-net"),)}),
        (NO_USER, ["debian", "ignore"], {"ignore_username_mismatch": True}),
        (CONFLICT, ["safe", ""], None),
        (NO_USER, [None], None),
    ],
)  # fmt: skip
def test_who_is_asked_anyway_says_what_is_to_become_of_what_does_not_fit(
    found: Plan, answers: list[str | None], fields: dict[str, object] | None, reviewing: Reviewing
) -> None:
    reviewing.answers = answers
    before = Choice(names=("work", "lab"))
    if fields is None:
        with pytest.raises(RestoreError, match="does not fit"):
            reviewing(found, choice=before)
    else:
        assert not reviewing(found, choice=before).accepted
        assert reviewing.choice == before.model_copy(update=fields)
    assert reviewing.answers == []


def test_qubes_that_miss_the_same_template_are_asked_about_once(
    reviewing: Reviewing, capsys: pytest.CaptureFixture[str]
) -> None:
    reviewing.answers = ["debian-13"]
    found = plan(lacking("lab", "missing-template", MISSING), lacking("old", "missing-template", MISSING))
    offers = Offers(templates=("debian-13", "fedora-42"))
    reviewing(found.model_copy(update={"offers": offers}))
    assert reviewing.questions == ["What is to become of it? "]
    assert reviewing.choice is not None
    assert [one.name for one in reviewing.choice.qubes] == ["lab", "old"]
    said = capsys.readouterr().err
    assert f"lab, old: {MISSING}.\nHere are: debian-13, fedora-42.\n" in said
    assert (
        "the name of a template, 'default' (the system's), 'skip' (leave it out), or nothing to end." in said
    )


def test_a_plan_beyond_the_limits_is_refused_unasked_and_may_be_verified(
    reviewing: Reviewing,
) -> None:
    past = FITTING.model_copy(update={"excess": ErrorInfo.of(UsageError("too many"))})
    for options in ("", "-q --yes"):
        with pytest.raises(UsageError, match="too many"):
            reviewing(past, options)
    reviewing(past, "--verify-only")
    reviewing(past, "--compare")
    assert reviewing.questions == []


def test_nobody_agrees_to_what_he_has_not_seen(
    reviewing: Reviewing, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(qvm_review, "print_result", lambda *_: False)
    reviewing(FITTING, "--yes")
    assert "The following" not in capsys.readouterr().err
    reviewing(FITTING)
    assert capsys.readouterr().err.startswith("The following qubes are in the backup:")
