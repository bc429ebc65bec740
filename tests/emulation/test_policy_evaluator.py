"""The policy evaluator decides as qrexec does: order, tokens, redirection, and what is no valid policy."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from .policy import DOM0_UUID, Decision, Policy, Qube, answer, requested_target
from .policy_files import PolicyError

QUBES: Mapping[str, Qube] = {
    "dom0": Qube("AdminVM", uuid=DOM0_UUID),
    "work": Qube(tags={"red"}, default_dispvm="dvm", uuid="11111111-1111-1111-1111-111111111111"),
    "vault": Qube(tags={"blue"}, uuid="22222222-2222-2222-2222-222222222222"),
    "asleep": Qube(tags={"blue"}, running=False),
    "dvm": Qube(tags={"green"}, template_for_dispvms=True, uuid="33333333-3333-3333-3333-333333333333"),
    "other-dvm": Qube(template_for_dispvms=True),
    "disp1": Qube("DispVM", default_dispvm="other-dvm"),
}
#: All that a caller can name.
TARGETS = (
    "vault", "asleep", "dvm", "dom0", "@adminvm", "@default", "", "@dispvm", "@dispvm:dvm",
    "@dispvm:other-dvm", "no-such-qube", "uuid:22222222-2222-2222-2222-222222222222",
    f"uuid:{DOM0_UUID}",
)  # fmt: skip
DOM0 = {"dom0", "@adminvm", f"uuid:{DOM0_UUID}"}


def policy_of(folder: Path, text: str, **includes: str) -> Policy:
    """The policy with one file, and files beside it that it may include."""
    (folder / "include").mkdir(exist_ok=True)
    (folder / "50-test.policy").write_text(text)
    for name, included in includes.items():
        (folder / "include" / name).write_text(included)
    return Policy.load(folder)


def judge(
    folder: Path, text: str, source: str = "work", target: str = "vault", call: str = "a.Service+arg"
) -> Decision:
    service, _, argument = call.partition("+")
    return policy_of(folder, text).judge(source, target, service, argument, QUBES)


def test_the_first_rule_that_matches_decides_and_none_denies(tmp_path: Path) -> None:
    rules = "a.Service * work vault deny\na.Service * work @anyvm ask\n* * work dvm allow\n"
    assert judge(tmp_path, rules).action == "deny"
    assert judge(tmp_path, rules, target="asleep").action == "ask"
    assert judge(tmp_path, rules, target="dvm").action == "ask"
    assert judge(tmp_path, rules, target="dvm", call="b.Service").action == "allow"
    assert judge(tmp_path, rules, source="vault", target="dvm").action == "deny"


def test_the_default_disposable_counts_for_its_tag_only_if_it_is_a_template(tmp_path: Path) -> None:
    policy = policy_of(tmp_path, "* * @anyvm @dispvm:@tag:blue ask")
    for is_template, action in ((True, "ask"), (False, "deny")):
        dvm = Qube(tags={"blue"}, template_for_dispvms=is_template)
        qubes = {"work": Qube(default_dispvm="dvm"), "dvm": dvm}
        assert policy.judge("work", "@dispvm", "any", "", qubes).action == action


def test_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    later = [(f"{number}-x", "deny") for number in (90, 40, 85, 35, 60, 50, 99)]
    for name, action in (("9-z", "deny"), ("31-b", "ask"), *later, ("30-a", "allow")):
        (tmp_path / f"{name}.policy").write_text(f"# as a comment\n\n  * * work vault {action}\n")
    (tmp_path / "10-not-read.policy.bak").write_text("* * @anyvm @anyvm deny")
    (tmp_path / ".hidden.policy").write_text("nonsense")
    decision = Policy.load(tmp_path).judge("work", "vault", "any", "", QUBES)
    assert (decision.action, decision.rule and decision.rule.place) == ("allow", "30-a.policy:3")


@pytest.mark.parametrize(
    ("argument", "calls"),
    [
        ("*", {"a.Service", "a.Service+", "a.Service+arg", "a.Service+arg+b"}),
        ("+arg", {"a.Service+arg"}),
        ("+", {"a.Service", "a.Service+"}),
    ],
)
def test_an_argument_matches_as_a_whole(tmp_path: Path, argument: str, calls: set[str]) -> None:
    rule = f"a.Service {argument} work vault allow"
    tried = ("a.Service", "a.Service+", "a.Service+arg", "a.Service+arg+b", "b.Service+arg")
    assert {call for call in tried if judge(tmp_path, rule, call=call).action == "allow"} == calls


@pytest.mark.parametrize(
    ("token", "matched"),
    [
        ("*", set(TARGETS)),
        ("@anyvm", set(TARGETS) - DOM0),
        ("@adminvm", DOM0),
        ("dom0", DOM0),
        ("@default", {"@default", "", "no-such-qube"}),
        ("vault", {"vault", "uuid:22222222-2222-2222-2222-222222222222"}),
        ("uuid:22222222-2222-2222-2222-222222222222", {"vault", "uuid:22222222-2222-2222-2222-222222222222"}),
        ("@tag:blue", {"vault", "asleep", "uuid:22222222-2222-2222-2222-222222222222"}),
        ("@tag:none", set()),
        ("@type:AdminVM", {"dom0", f"uuid:{DOM0_UUID}"}),
        ("@dispvm", {"@dispvm"}),
        ("@dispvm:dvm", {"@dispvm", "@dispvm:dvm"}),
        ("@dispvm:@tag:green", {"@dispvm", "@dispvm:dvm"}),
        ("@dispvm:@tag:blue", set()),
    ],
)
def test_what_a_token_matches_as_a_target(tmp_path: Path, token: str, matched: set[str]) -> None:
    rule = f"* * work {token} ask"
    assert {target for target in TARGETS if judge(tmp_path, rule, target=target).action == "ask"} == matched


@pytest.mark.parametrize(
    ("token", "matched"),
    [
        ("*", set(QUBES)),
        ("@anyvm", set(QUBES) - {"dom0"}),
        ("@type:DispVM", {"disp1"}),
        ("@tag:red", {"work"}),
        ("vault", {"vault"}),
        ("@dispvm:dvm", set()),
    ],
)
def test_what_a_token_matches_as_a_source(tmp_path: Path, token: str, matched: set[str]) -> None:
    rule = f"* * {token} @default ask"
    asked = {source for source in QUBES if judge(tmp_path, rule, source, "@default").action == "ask"}
    assert asked == matched


@pytest.mark.parametrize(
    "target", ["@anyvm", "*", "@tag:blue", "@type:AppVM", "@dispvm:", "@dispvm:vault", "@x"]
)
def test_what_a_caller_may_not_name_is_denied_whatever_is_allowed(tmp_path: Path, target: str) -> None:
    decision = judge(tmp_path, "* * * * allow target=vault", target=target)
    assert (decision.action, decision.rule) == ("deny", None)


@pytest.mark.parametrize(
    ("rule", "target", "connected"),
    [
        ("* * work vault allow", "vault", "vault"),
        ("* * work vault allow", "uuid:22222222-2222-2222-2222-222222222222", "vault"),
        ("* * work @anyvm allow target=uuid:22222222-2222-2222-2222-222222222222", "dvm", "vault"),
        (f"* * work @anyvm allow target=uuid:{DOM0_UUID}", "vault", "dom0"),
        # It looks for a call that comes back to its caller by the spelling only.
        ("* * work @anyvm allow", "uuid:11111111-1111-1111-1111-111111111111", "work"),
        ("* * work @anyvm allow target=dom0", "vault", "dom0"),
        ("* * work dom0 allow", "@adminvm", "dom0"),
        ("* * work @default allow target=vault", "", "vault"),
        ("* * work @dispvm allow", "@dispvm", "@dispvm:dvm"),
        ("* * work @anyvm allow target=@dispvm:other-dvm", "vault", "@dispvm:other-dvm"),
        ("* * work @anyvm allow autostart=no", "vault", "vault"),
        ("* * work @anyvm allow autostart=yes user=root notify=yes", "asleep", "asleep"),
    ],
)
def test_where_an_allowed_call_goes(tmp_path: Path, rule: str, target: str, connected: str) -> None:
    assert judge(tmp_path, rule, target=target).target == connected


@pytest.mark.parametrize(
    ("rule", "source", "target"),
    [
        ("* * work @anyvm allow", "work", "@default"),  # nobody says where to
        ("* * work @anyvm allow", "work", "no-such-qube"),
        ("* * work @anyvm allow target=no-such-qube", "work", "vault"),
        ("* * work @anyvm allow target=@dispvm:vault", "work", "vault"),
        ("* * work @anyvm allow", "work", "work"),  # no call comes back to its caller
        ("* * vault @dispvm allow", "vault", "@dispvm"),  # which has no template for it
        ("* * work @anyvm allow autostart=no", "work", "asleep"),
        ("* * work @anyvm allow autostart=no", "work", "@dispvm"),
    ],
)
def test_what_is_denied_although_a_rule_allows_it(
    tmp_path: Path, rule: str, source: str, target: str
) -> None:
    decision = judge(tmp_path, rule, source, target)
    assert decision.action == "deny" and decision.rule is not None


def test_includes_stand_where_they_are_written(tmp_path: Path) -> None:
    text = "!include include/first\n* * work vault deny\n!include include/late\n"
    late = {"late": "* * work dvm allow\n"}
    assert (
        policy_of(tmp_path, text, first="# nothing\n", **late).judge("work", "vault", "s", "", QUBES).action
        == "deny"
    )
    granted = policy_of(tmp_path, text, first="* * work vault allow\n", **late)
    assert granted.judge("work", "vault", "s", "", QUBES).action == "allow"
    assert granted.judge("work", "dvm", "s", "", QUBES).action == "allow"


def test_a_file_for_one_service_is_in_the_older_form(tmp_path: Path) -> None:
    older = "$anyvm $default allow,target=vault\n# comment\n!include include/more\n"
    policy = policy_of(
        tmp_path, "!include-service a.Service +x include/old\n", old=older, more="@anyvm dvm ask\n"
    )
    assert policy.judge("work", "", "a.Service", "x", QUBES).target == "vault"
    assert policy.judge("work", "dvm", "a.Service", "x", QUBES).action == "ask"
    assert policy.judge("work", "", "a.Service", "y", QUBES).action == "deny"


@pytest.mark.parametrize(
    "line",
    [
        "a.Service * work vault",  # wrong number of fields
        "a.Service * work vault permit",
        "a.Ser/vice * work vault allow",
        "a.Service+x * work vault allow",
        "a.Service arg work vault allow",  # no plus
        "* +arg work vault allow",
        "* * @default vault allow",  # no source
        "* * @dispvm vault allow",
        "* * work @any allow",
        "* * work @tag: allow",
        "* * work @default allow",  # to whom?
        "* * work vault allow target=@anyvm",
        "* * work vault allow target=",
        "* * work vault deny target=dom0",
        "* * work vault allow default_target=dom0",
        "* * work vault allow notify=maybe",
        "* * work vault allow user=a user=b",
        "* * work vault allow root",
        "!include include/not-there",
        "!include",
        "!else",
    ],
)
def test_what_is_no_valid_policy_is_refused_as_a_whole(tmp_path: Path, line: str) -> None:
    with pytest.raises(PolicyError, match=r"^50-test\.policy:2: "):
        policy_of(tmp_path, f"* * work vault allow\n{line}\n")


def test_a_file_whose_name_qrexec_does_not_take_spoils_the_policy(tmp_path: Path) -> None:
    (tmp_path / "30-User.policy").write_text("")
    with pytest.raises(PolicyError, match="30-User"):
        Policy.load(tmp_path)


# --- Asking --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "choices"),
    [
        ("* * work @adminvm ask", {"dom0"}),
        ("* * work dom0 ask\n* * work @adminvm deny", {"dom0"}),
        ("* * work vault deny\n* * work dom0 ask\n* * work @tag:blue ask", {"dom0", "asleep"}),
        (
            "* * work dom0 ask\n* * work vault ask\n* * work @adminvm allow target=asleep",
            {"dom0", "vault", "asleep"},
        ),
        ("* * work dom0 ask target=vault\n* * work asleep allow", {"vault"}),
        ("* * work dom0 ask target=@adminvm", {"dom0"}),
        ("* * work dom0 ask autostart=no\n* * work @tag:blue ask", {"dom0", "vault"}),
        ("* * work dom0 ask\nb.Other * work vault ask\n* * disp1 vault ask", {"dom0"}),
        ("* * work dom0 ask\n* * work @type:DispVM ask", {"dom0", "disp1"}),
        ("* * work dom0 ask\n* * work @dispvm ask", {"dom0", "@dispvm:dvm"}),
        ("* * work dom0 ask\n* * work @dispvm:@tag:green ask", {"dom0", "@dispvm:dvm"}),
        ("* * work dom0 ask\n* * work @dispvm:other-dvm ask", {"dom0", "@dispvm:other-dvm"}),
        ("* * work dom0 ask\n* * work @dispvm:vault ask", {"dom0"}),
        ("* * work dom0 ask\n* * work no-such-qube ask", {"dom0"}),
        ("* * work dom0 ask target=uuid:22222222-2222-2222-2222-222222222222", {"vault"}),
        (f"* * work dom0 ask target=uuid:{DOM0_UUID}", {"dom0"}),
        ("* * work dom0 ask autostart=no target=uuid:22222222-2222-2222-2222-222222222222", {"vault"}),
        (
            "* * work * ask",
            {*QUBES, "@dispvm:dvm", "@dispvm:other-dvm"} - {"work"},
        ),
        (
            "* * work dom0 ask\n* * work dom0 deny\n* * work @anyvm ask",
            {*QUBES, "@dispvm:dvm", "@dispvm:other-dvm"} - {"work"},
        ),
    ],
)  # fmt: skip
def test_a_question_offers_what_the_rules_leave(tmp_path: Path, rules: str, choices: set[str]) -> None:
    decision = judge(tmp_path, rules, target="dom0")
    assert decision.action == "ask"
    assert decision.choices == choices


def test_a_question_that_would_offer_a_disposable_that_is_not_there_is_denied(tmp_path: Path) -> None:
    rules = "* * work dom0 ask\n* * work @dispvm:no-such-qube ask"
    assert judge(tmp_path, rules, target="dom0").action == "deny"


def test_what_is_preselected_must_be_a_choice(tmp_path: Path) -> None:
    preselected = {
        target: judge(tmp_path, f"* * work * ask default_target={target}").preselected
        for target in ("vault", "@adminvm", "@dispvm", "@dispvm:other-dvm", "work", "no-such-qube")
    }
    assert preselected == {
        "vault": "vault", "@adminvm": "dom0", "@dispvm": "@dispvm:dvm",
        "@dispvm:other-dvm": "@dispvm:other-dvm", "work": None, "no-such-qube": None,
    }  # fmt: skip


def test_an_answer_is_one_of_the_choices_or_the_call_is_denied(tmp_path: Path) -> None:
    question = judge(tmp_path, "* * work @tag:blue ask")
    assert answer(question, "asleep") == Decision("allow", "asleep", question.rule, "50-test.policy:1")
    for chosen in (None, "dom0", "@dispvm", ""):
        denied = answer(question, chosen)
        assert (denied.action, denied.target, denied.rule) == ("deny", None, question.rule)


def test_a_service_of_dom0_is_told_the_target_as_it_was_named() -> None:
    told = {target: requested_target(target, QUBES) for target in ("dom0", "vault", f"uuid:{DOM0_UUID}")}
    assert told == {target: ("name", target) for target in told}
    for target in ("@adminvm", "@dispvm", "@dispvm:dvm"):
        assert requested_target(target, QUBES) == ("keyword", target[1:])
    for target in ("", "@default", "no-such-qube"):
        assert requested_target(target, QUBES) == ("keyword", "default")
