"""Qubes that need other qubes of the same restore, in whichever order the archive holds them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

from qubes_restore_svc.broker import restore_run as restore_module
from qubes_restore_svc.broker.allowlist import AllowedSettings
from qubes_restore_svc.broker.interfaces import Definition, HostQube, HostView, NewQube, QubesView
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.report import VolumeReport
from qubes_restore_svc.wire.restore_call import Choice
from tests.broker.fake_worker import BACKUP_ID, BackupQube, Die, FakeLink, Image, Say, honest
from tests.broker.jobs import Outcome, check_restored, run
from tests.broker.troubled_host import Trouble, TroubledHost, TroubledQube

IMAGE = Image(1000, ((0, b"x" * 1000),))


def qube(key: str, name: str, klass: str = "AppVM", **fields: object) -> BackupQube:
    volume = "root" if klass == "TemplateVM" else "private"
    return BackupQube(key, name, {volume: IMAGE}, klass, fields)


TEMPLATE = qube("vm5", "mine", "TemplateVM")
APP = qube("vm6", "app", template="mine")
NETVM = qube("vm7", "net", template="fedora", properties={"provides_network": "True"}, netvm="")
BEHIND = qube("vm8", "behind", template="fedora", netvm="net")
DISPOSABLE = qube("vm9", "disp-tpl", template="mine", properties={"template_for_dispvms": "True"})
USER = qube("vm10", "user", template="fedora", properties={"default_dispvm": "disp-tpl"})


@dataclass
class SystemHost(TroubledHost):
    """A host that has a system, and remembers how its qubes were defined when they were committed."""

    definitions: dict[str, Definition] = field(default_factory=dict)

    def __init__(self, target: Path, trouble: Trouble) -> None:
        super().__init__(target, trouble)
        self.definitions = {}

    def view(self) -> HostView:
        there = HostQube("fedora", "TemplateVM")
        system = QubesView({"fedora": there}, "fedora", None, frozenset({"red"}))
        return HostView(super().view().names | {"fedora"}, system)

    def begin(self, qube: NewQube) -> TroubledQube:
        transaction = super().begin(qube)
        return _RememberingQube(self, transaction.name, transaction.qube)


class _RememberingQube(TroubledQube):
    def commit(
        self,
        settings: m.QubeSettings,
        definition: Definition | None,
        volumes: Sequence[VolumeReport] = (),
    ) -> Sequence[str]:
        remarks = super().commit(settings, definition, volumes)
        assert isinstance(self.host, SystemHost) and definition is not None
        self.host.definitions[self.name] = definition
        return remarks


class _AllowAll:
    def check(self, also: Collection[str]) -> None:
        pass

    def let_through(self, qube: m.ManifestQube, also: Collection[str] = ()) -> AllowedSettings:
        return AllowedSettings(properties=qube.properties)


def fails() -> NoReturn:
    raise HostFailed("no such luck")


@dataclass
class Run:
    """A restore of `qubes` and all that came of it."""

    outcome: Outcome
    host: SystemHost

    def calls(self, *kinds: str) -> list[str]:
        return [call for call in self.host.calls if call.split()[0] in kinds]


@pytest.fixture
def restore(tmp_path: Path) -> Callable[..., Run]:
    def restored(
        *qubes: BackupQube,
        trouble: Trouble | None = None,
        default: bool = False,
        dies_after: str | None = None,
        taken_back: str | None = None,
    ) -> Run:
        hosts: list[SystemHost] = []

        def host(_: FakeLink) -> SystemHost:
            hosts.append(SystemHost(tmp_path / "restored", trouble or {}))
            return hosts[0]

        script = honest(qubes)
        if dies_after is not None:
            script = script.until(script.find("qube_settings", dies_after) + 1, Die())
        if taken_back is not None:
            error = {"kind": "bad-archive", "reason": "its firewall.xml stands behind the files of others"}
            back = Say({"type": "qube_incomplete", "key": taken_back, "error": error})
            script = script.before(script.find("finished"), back)
        choice = Choice(missing="default" if default else "refuse")
        outcome = run(script, tmp_path / "restored", host=host, choice=choice, allow=_AllowAll())
        return Run(outcome, hosts[0])

    return restored


def test_a_template_that_comes_later_begins_and_is_committed_before_its_qube(
    restore: Callable[..., Run], tmp_path: Path
) -> None:
    done = restore(APP, TEMPLATE)
    assert done.outcome.status == 0
    assert done.calls("begin", "commit") == ["begin mine", "begin app", "commit mine", "commit app"]
    assert done.host.definitions["app"].template == "mine"
    check_restored(tmp_path / "restored", APP, TEMPLATE)


def test_a_template_that_comes_first_is_committed_when_it_is_complete(restore: Callable[..., Run]) -> None:
    done = restore(TEMPLATE, APP)
    assert done.calls("begin", "commit") == ["begin mine", "commit mine", "begin app", "commit app"]


def test_settings_that_wait_for_a_template_are_bounded_in_bytes(
    restore: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    apps = [qube(f"vm2{number}", f"app{number}", template="mine") for number in range(4)]
    monkeypatch.setattr(restore_module, "MAX_WAITING_SETTINGS", 2 * len('{"key":"vm20"}'))
    done = restore(*apps, TEMPLATE)
    assert done.outcome.outcomes == {
        **dict.fromkeys(("app0", "app1", "mine"), "restored"),
        **dict.fromkeys(("app2", "app3"), "failed"),
    }
    for name in ("app2", "app3"):
        error = done.outcome.qube(name).error
        assert error is not None and "of settings wait already" in error.reason


def test_settings_that_need_not_wait_or_were_applied_do_not_count_as_waiting(
    restore: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    apps = [qube(f"vm2{number}", f"app{number}", template="mine") for number in range(4)]
    late, its_template = qube("vm30", "late", template="other"), qube("vm31", "other", "TemplateVM")
    monkeypatch.setattr(restore_module, "MAX_WAITING_SETTINGS", len('{"key":"vm20"}'))
    done = restore(TEMPLATE, *apps, late, its_template)
    assert set(done.outcome.outcomes.values()) == {"restored"}


@pytest.mark.parametrize("call", ["begin mine", "create mine/root", "write mine/root 1", "commit mine"])
@pytest.mark.parametrize("order", [(APP, TEMPLATE), (TEMPLATE, APP)], ids=["after", "before"])
def test_a_qube_whose_template_fails_is_not_restored(
    restore: Callable[..., Run], call: str, order: Sequence[BackupQube], tmp_path: Path
) -> None:
    done = restore(*order, trouble={call: fails})
    assert done.outcome.outcomes == {"app": "failed", "mine": "failed"}
    error = done.outcome.qube("app").error
    assert error is not None and error.kind == "missing-dependency"
    assert error.reason == "its template mine could not be restored"
    assert done.outcome.observer.finished.count("app: failed") == 1
    begun = [call.split()[1] for call in done.calls("begin")]
    rolled_back = [call.split()[1] for call in done.calls("rollback")]
    if {"app", "mine"} <= set(begun) and "app" in rolled_back and "mine" in rolled_back:
        assert rolled_back.index("app") < rolled_back.index("mine")


@pytest.mark.parametrize("call", ["begin mine", "write mine/root 1", "commit mine"])
@pytest.mark.parametrize("order", [(APP, TEMPLATE), (TEMPLATE, APP)], ids=["after", "before"])
def test_a_qube_whose_template_fails_gets_the_default_where_that_was_asked_for(
    restore: Callable[..., Run], call: str, order: Sequence[BackupQube]
) -> None:
    done = restore(*order, trouble={call: fails}, default=True)
    assert done.outcome.outcomes == {"app": "restored", "mine": "failed"}
    assert done.host.definitions["app"].template == "fedora"
    assert done.outcome.qube("app").warnings == ("its template is fedora now: mine could not be restored",)
    if order[0] is APP and call != "begin mine":  # it was there already, with the template that failed
        changed = done.host.calls.index("template app fedora")
        assert changed < done.host.calls.index("rollback mine")


def test_a_netvm_that_comes_later_is_committed_before_the_qubes_behind_it(
    restore: Callable[..., Run],
) -> None:
    done = restore(BEHIND, NETVM)
    assert done.calls("begin", "commit") == ["begin behind", "begin net", "commit net", "commit behind"]
    assert done.host.definitions["behind"].netvm == "net"


def test_a_qube_whose_netvm_fails_comes_without_one(restore: Callable[..., Run]) -> None:
    done = restore(BEHIND, NETVM, trouble={"write net/private 1": fails})
    assert done.outcome.outcomes == {"behind": "restored", "net": "failed"}
    assert done.host.definitions["behind"].netvm == ""
    assert done.outcome.qube("behind").warnings == ("it has no netvm now: net could not be restored",)


def test_a_default_dispvm_that_comes_later_is_set_when_it_is_there(restore: Callable[..., Run]) -> None:
    done = restore(USER, TEMPLATE, DISPOSABLE)
    assert done.outcome.status == 0
    assert done.host.definitions["user"].default_dispvm == ""
    assert done.host.calls.index("commit disp-tpl") < done.host.calls.index("default_dispvm user disp-tpl")


def test_a_default_dispvm_that_came_before_is_set_with_the_rest(restore: Callable[..., Run]) -> None:
    done = restore(TEMPLATE, DISPOSABLE, USER)
    assert done.host.definitions["user"].default_dispvm == "disp-tpl"
    assert done.calls("default_dispvm") == []


def test_a_qube_can_be_its_own_default_dispvm(restore: Callable[..., Run]) -> None:
    own = qube(
        "vm9",
        "own",
        template="fedora",
        properties={"template_for_dispvms": "True", "default_dispvm": "own"},
    )
    done = restore(own)
    assert done.outcome.status == 0
    assert done.calls("default_dispvm") == ["default_dispvm own own"]


def test_a_default_dispvm_that_fails_is_told(restore: Callable[..., Run]) -> None:
    done = restore(USER, TEMPLATE, DISPOSABLE, trouble={"commit disp-tpl": fails})
    assert done.outcome.outcomes == {"user": "restored", "mine": "restored", "disp-tpl": "failed"}
    expected = "it has no default disposable template now: disp-tpl could not be restored"
    assert done.outcome.qube("user").warnings == (expected,)
    done = restore(TEMPLATE, USER, trouble={"default_dispvm user disp-tpl": fails})
    assert done.outcome.qube("user").warnings == ()


def test_a_default_dispvm_that_does_not_come_any_more_is_told(restore: Callable[..., Run]) -> None:
    done = restore(USER, TEMPLATE, DISPOSABLE, dies_after="vm10")
    assert done.outcome.outcomes["user"] == "restored"
    assert done.host.definitions["user"].default_dispvm == ""
    expected = "it has no default disposable template now: disp-tpl could not be restored"
    assert done.outcome.qube("user").warnings == (expected,)


@pytest.mark.parametrize("default", [False, True])
def test_a_qube_without_volumes_whose_template_cannot_even_begin(
    restore: Callable[..., Run], default: bool
) -> None:
    empty = BackupQube("vm6", "app", {}, "AppVM", {"template": "mine"})
    done = restore(empty, TEMPLATE, trouble={"begin mine": fails}, default=default)
    assert done.outcome.outcomes == {"app": "restored" if default else "failed", "mine": "failed"}
    assert len(done.outcome.observer.finished) == 2
    assert done.calls("begin") == ["begin mine", *(["begin app"] if default else [])]


def test_a_chain_fails_from_its_end(restore: Callable[..., Run]) -> None:
    named = qube("vm11", "named", "DispVM", template="disp-tpl")
    done = restore(named, DISPOSABLE, TEMPLATE, trouble={"commit mine": fails})
    assert set(done.outcome.outcomes.values()) == {"failed"}
    rolled_back = [call.split()[1] for call in done.calls("rollback")]
    assert [name for name in rolled_back if name in ("named", "disp-tpl", "mine")][-3:] == [
        "named",
        "disp-tpl",
        "mine",
    ]


def test_when_the_worker_dies_a_waiting_qube_is_rolled_back_before_its_template(
    restore: Callable[..., Run],
) -> None:
    done = restore(APP, TEMPLATE, dies_after="vm6")
    assert done.outcome.outcomes == {"app": "failed", "mine": "failed"}
    assert done.calls("rollback") == ["rollback app", "rollback mine"]


# --- What came too late ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "advice", "warnings"),
    [
        ({}, "still there, without a netvm now. Look", []),
        ({f"take_back app {BACKUP_ID}": fails}, "still there. Look", ["away: no such luck"]),
    ],
)
def test_a_committed_qube_whose_firewall_comes_late_loses_its_network(
    restore: Callable[..., Run], trouble: Trouble, advice: str, warnings: list[str]
) -> None:
    done = restore(TEMPLATE, APP, trouble=trouble, taken_back=APP.key)
    assert done.calls("take_back") == [f"take_back app {BACKUP_ID}"]
    report = done.outcome.qube("app")
    assert report.outcome == "incomplete" and report.error is not None and advice in report.error.advice
    assert [warning.partition("taken ")[2] for warning in report.warnings] == warnings


def test_the_host_learns_of_every_qube_that_is_taken_back(restore: Callable[..., Run]) -> None:
    """Also of one without a network: it does not count as restored any more."""
    calls = restore(NETVM, taken_back=NETVM.key).calls("take_back")
    assert calls == [f"take_back {NETVM.name} {BACKUP_ID}"]
