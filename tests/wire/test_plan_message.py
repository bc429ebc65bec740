"""A plan on its way to a client: what does not fit into a message is shortened, and what is said stays."""

from collections.abc import Collection
from typing import get_args

import pytest

from qubes_restore_svc.broker.allowlist import AllowedSettings
from qubes_restore_svc.broker.plan import _REMARKS, make_plan
from qubes_restore_svc.errors import BadMetadata, ProtocolViolation, QubeExists, UsageError
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.messages import ManifestQube
from qubes_restore_svc.wire.models import ErrorInfo, encode_message
from qubes_restore_svc.wire.names import MAX_QUBES
from qubes_restore_svc.wire.report import CUT
from tests.broker.planning import AllowAll, manifest, qube, system
from tests.cli.plans import ONE_OF_EACH, conflicting, not_wanted, plan, taken
from tests.support.wire import from_dom0, parsed


def travelled(message: c.Plan) -> c.BrokerAnswer:
    return parsed(from_dom0(), encode_message(message))


def with_qubes(*qubes: c.PlanQube) -> c.Plan:
    return c.Plan(number=1, mode="restore", backup_id="b" * 128, qubes=qubes)


def test_a_plan_comes_to_a_client_as_it_is() -> None:
    assert travelled(ONE_OF_EACH) == ONE_OF_EACH == ONE_OF_EACH.fitting()


def test_a_client_is_told_which_template_and_netvm_a_qube_will_get() -> None:
    wanted = (qube("work", template="gone", netvm="tpl"), qube("plain"))
    made = make_plan(manifest(*wanted), c.Choice(missing="default", conflicts="rename"), system())
    work, plain = made.plan.qubes
    assert (work.new_name, work.new_template, work.new_netvm) == ("work", "default-tpl", None)
    assert (plain.new_name, plain.new_template, plain.new_netvm) == ("plain-1", "tpl", "")
    (refused,) = make_plan(manifest(qube("plain")), c.Choice(), system()).plan.qubes
    assert (refused.new_name, refused.new_template, refused.new_netvm) == ("plain", None, None)


def test_every_problem_has_words_for_a_person() -> None:
    both = [*get_args(c.Problem)]
    assert both == [*_REMARKS] and all(_REMARKS.values())


def test_a_plan_with_a_qube_that_cannot_be_is_refused() -> None:
    possible = plan(conflicting("work"))
    impossible = possible.qubes[0].model_copy(update={"klass": "AdminVM"})
    with pytest.raises(ProtocolViolation, match="only dom0 is an AdminVM"):
        travelled(possible.model_copy(update={"qubes": (impossible,)}))


def test_what_is_said_of_a_qube_until_more_is_known_follows_from_the_plan() -> None:
    renamed = taken(qube("work"), "work-1", ("will be renamed", "and more"), "property kernelopts")
    mail = not_wanted(qube("mail"), "excluded")
    found = plan(renamed, mail, conflicting("vault"), unlisted=("b\u00e4d",)).reports()
    assert [
        (one.name, one.name_in_backup, one.klass, one.outcome, one.remark, one.settings_left_out)
        for one in found
    ] == [
        ("work-1", "work", "AppVM", "failed", "will be renamed; and more", ("property kernelopts",)),
        ("mail", None, "AppVM", "left out", "", ()),
        ("vault", None, "AppVM", "refused", "", ()),
        ("b\u00e4d", None, "?", "refused", "", ()),
    ]
    work, left_out, vault, bad = found
    assert [volume.outcome for volume in work.volumes] == ["not reached"] and left_out.volumes == ()
    assert work.error is None and vault.error is not None and bad.error is not None
    assert (vault.error.kind, vault.error.qube) == (QubeExists.kind, None)


#: As much as a worker can make a plan say.
LONG = "\U0001f600" * 300


def test_the_longest_plan_reaches_the_client_with_all_its_decisions() -> None:
    error = ErrorInfo.of(BadMetadata(LONG, qube="q", advice=LONG))
    said = {"decision": "refuse", "new_name": "n" * 31, "remark": LONG, "error": error}
    qubes = (
        c.PlanQube.taken(qube(f"q{number}" + "q" * 26, "StandaloneVM", None)) for number in range(MAX_QUBES)
    )
    longest = with_qubes(
        *(one.model_copy(update={**said, "problem": "already-exists", "notes": (LONG,)}) for one in qubes)
    )
    message = travelled(longest.fitting())
    assert isinstance(message, c.Plan)
    assert [qube.decision for qube in message.qubes] == ["refuse"] * MAX_QUBES


def test_a_plan_too_large_for_a_message_loses_the_settings_and_says_so() -> None:
    many = tuple(f"property {'p' * 900}{number}" for number in range(1000))
    large = with_qubes(*(taken(qube(f"q{number}"), "", (), *many) for number in range(10)))
    message = large.fitting()
    assert travelled(message) == message
    assert {one.settings_left_out for one in message.qubes} == {(CUT,)}


def test_of_thousands_of_settings_that_stay_behind_the_plan_tells_some() -> None:
    class Strict(AllowAll):
        def check(self, also: Collection[str]) -> None:
            pass

        def let_through(self, qube: ManifestQube, also: Collection[str] = ()) -> AllowedSettings:
            return AllowedSettings(left_out=tuple(f"feature {number}" for number in range(4096)))

    (work,) = make_plan(manifest(qube("work")), c.Choice(), system(), allow=Strict()).plan.qubes
    assert len(work.settings_left_out) == 1024 and work.settings_left_out[-1] == CUT


@pytest.mark.parametrize("names", [("x" * 1001,), ("x",) * (MAX_QUBES + 1), (1,), ["x"]])
def test_a_choice_that_no_message_can_tell_is_a_usage_error(names: object) -> None:
    with pytest.raises(UsageError, match="a list of qubes"):
        c.Choice.asked(names=names)
