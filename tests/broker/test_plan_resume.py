"""The plan when qubes of the backup are here, because an earlier restore has finished them."""

import pytest

from qubes_restore_svc.broker.interfaces import HostQube, RestoredQube
from qubes_restore_svc.broker.plan import Planned, make_plan
from qubes_restore_svc.wire.messages import ManifestQube
from qubes_restore_svc.wire.report import VolumeReport
from qubes_restore_svc.wire.restore_call import Choice, QubeChoice
from tests.broker.planning import DISP, NET, AllowAll, by_name, manifest, qube, system

TAG = frozenset({"restored-from-backup-b"})
PRIVATE = (VolumeReport(name="private", outcome="ok", size=1, fsverity="f" * 64),)


def here(name: str, name_in_backup: str | None = None) -> RestoredQube:
    return RestoredQube(name, name_in_backup or name, PRIVATE, has_firewall=True)


def there(name: str, klass: str = "AppVM", **fields: bool) -> HostQube:
    return HostQube(name, klass, restored_tags=TAG, **fields)


def resumed(
    listed: list[ManifestQube], hosts: list[HostQube], restored: list[RestoredQube], **choice: object
) -> Planned:
    wanted = Choice.asked(resume=True, **choice)
    return make_plan(manifest(*listed), wanted, system(*hosts), allow=AllowAll(), restored=restored)


def test_what_is_finished_is_left_alone_and_the_others_are_taken() -> None:
    planned = resumed([qube("work"), qube("mail")], [there("work")], [here("work")])
    found = by_name(planned)
    assert (found["work"].decision, found["work"].problem) == ("leave-out", "already-restored")
    assert found["mail"].decision == "take"
    assert list(planned.sources) == ["key-mail"] and list(planned.here) == ["key-work"]


def test_it_is_known_by_its_name_in_the_backup() -> None:
    planned = resumed([qube("work")], [there("work-1"), HostQube("work", "AppVM")], [here("work-1", "work")])
    found = by_name(planned)["work"]
    assert (found.problem, found.name) == ("already-restored", "work-1")


@pytest.mark.parametrize(("new_name", "is_here"), [(None, True), ("job", True), ("copy", False)])
def test_a_name_that_the_person_chose_must_be_the_one_that_it_has(
    new_name: str | None, is_here: bool
) -> None:
    chosen = (QubeChoice(name="work", new_name=new_name),)
    planned = resumed([qube("work")], [there("job")], [here("job", "work")], qubes=chosen)
    assert bool(planned.here) is is_here
    assert by_name(planned)["work"].name == ("job" if is_here else new_name)


def test_of_several_the_first_by_name_counts() -> None:
    planned = resumed([qube("work")], [], [here("work-2", "work"), here("work-1", "work")])
    assert planned.here["key-work"].name == "work-1"


def test_references_lead_to_what_is_finished_under_whatever_name() -> None:
    """Also past a qube of this system that has the name, and one that an earlier restore has numbered."""
    qubes = [
        qube("base", "TemplateVM"),
        qube("gate", properties=NET),
        qube("work", template="base", netvm="gate"),
    ]
    hosts = [
        there("own", "TemplateVM"),
        there("base-1", "TemplateVM"),
        HostQube("base", "TemplateVM"),
        there("door", provides_network=True),
    ]
    work = by_name(resumed(qubes, hosts, [here("own", "base"), here("door", "gate")]))["work"]
    assert work.definition is not None
    assert (work.definition.template, work.definition.netvm) == ("own", "door")
    assert work.template_key is None and work.netvm_key is None
    assert any("'own', which was restored from this backup before" in note for note in work.notes)


def test_a_finished_qube_says_how_it_gets_a_disposable_template_that_comes_only_now() -> None:
    qubes = [qube("work", properties={"default_dispvm": "dvm"}), qube("dvm", properties=DISP)]
    found = by_name(resumed(qubes, [there("job")], [here("job", "work")]))
    (note,) = found["work"].notes
    assert note.endswith("(afterwards: qvm-prefs job default_dispvm dvm)")
    found = by_name(resumed(qubes, [there("job"), there("dvm")], [here("job", "work"), here("dvm")]))
    assert found["work"].notes == ()


def test_a_name_that_is_taken_by_something_else_is_refused_and_why() -> None:
    found = by_name(resumed([qube("plain")], [], []))["plain"]
    assert (found.decision, found.problem) == ("refuse", "already-exists")
    assert found.error is not None and found.error.reason.endswith("of this backup has finished it")


@pytest.mark.parametrize(("name", "is_told"), [("work", True), ("job", False)])
def test_who_does_not_go_on_is_told_that_it_is_possible(name: str, is_told: bool) -> None:
    view = system(there("work"), there("job"))
    restored = [here(name, "work")]
    found = make_plan(manifest(qube("work")), Choice(), view, allow=AllowAll(), restored=restored)
    assert not found.here
    error = by_name(found)["work"].error
    assert error is not None and ("--resume" in error.advice) is is_told
    assert "--rename-conflicting" in error.advice


def test_what_is_excluded_is_excluded_although_it_is_finished() -> None:
    planned = resumed([qube("work"), qube("mail")], [there("work")], [here("work")], exclude=("work",))
    assert by_name(planned)["work"].problem == "excluded" and not planned.here
