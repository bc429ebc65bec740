"""The rights of a caller: what each key grants, and that a refusal names it and tells nothing else."""

import itertools
import re
import time
from pathlib import Path

import pytest

from qubes_restore_svc.broker.plan import make_plan
from qubes_restore_svc.errors import NotGranted
from qubes_restore_svc.qubes.config import GrantConfig, parse_config
from qubes_restore_svc.qubes.grants import MODES, Rights
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.qrexec_call import LIST, START, VERIFY
from qubes_restore_svc.wire.restore_call import Choice
from tests.broker.planning import manifest, qube

FILE = Path("/etc/x/config.yaml")
ALL_MODES: tuple[c.Mode, ...] = ("restore", "verify", "list")  #: that others than dom0 may ask for


def request(mode: str = "restore", /, **fields: object) -> c.OpenBackup:
    whole = {"type": "open", "mode": mode, "location": {"text": "/b"}, "passphrase": "p", **fields}
    return c.OpenBackup.model_validate(whole)


def rights(grants: str = "", caller: str = "sys-gui", more: str = "") -> Rights:
    """Of `caller`, when its own section has these keys."""
    own = f"grants: {{sys-gui: {{{grants}}}}}\n" if grants else ""
    return Rights(caller, parse_config(own + more), FILE)


def refusal(found: Rights, asked: c.OpenBackup, service: str = START) -> NotGranted:
    with pytest.raises(NotGranted) as caught:
        found.check_request(service, asked)
    return caught.value


def at(qube: str | None, text: str = "/b", service: bool = False) -> dict[str, object]:
    """A request for a backup there."""
    return {"location": {"qube": qube, "text": text, "service": service}}


#: What is asked for; the grant that allows it, and one that does not quite.
CASES: list[tuple[dict[str, object], str, str]] = [
    (at("sys-usb"), "storage: [sys-usb]", "storage: [sys-us, usb, SYS-USB]"),
    (at("nas-1"), "storage: ['nas-*']", "storage: ['nas-?-*', 'nas']"),
    (at("nas-1"), "storage: ['*']", "storage: ['?']"),
    (at("n.s"), "storage: ['n?s']", "storage: ['n.', 'n..s']"),
    (at(None, "my.Backup+x", service=True), "services: [my.Backup+x]", "services: [my.Backup]"),
    (at(None, "my.Backup+x", service=True), "services: ['my.Backup+*']", "services: [myxBackup+x]"),
    (at("dom0", "/srv/b"), "dom0_directories: [/srv]", "dom0_directories: [/sr, /srv/b]"),
    (at("dom0", "/srv/a/b"), "dom0_directories: [/x, /srv]", "storage: [dom0, '*']"),
    ({"choice": {"pool": "slow"}}, "pools: [slow]", "pools: [slower]"),
    ({"choice": {"allow": ("property:debug",)}}, "choosable: ['property:*']", "choosable: ['tag:debug']"),
    ({"worker": {"template": "dvm"}}, "templates: ['d*m']", "templates: [d]"),
    ({"worker": {"memory": 5000}}, "max_memory: 5000", "max_memory: 4999"),
    ({"worker": {"vcpus": 3}}, "max_vcpus: 3", "max_vcpus: 2"),
]


def test_there_is_a_case_for_every_field_of_a_grant() -> None:
    covered = {allowing.partition(":")[0] for _, allowing, _ in CASES}
    assert covered | {"verify_only"} == GrantConfig.model_fields.keys()  # that one takes away


@pytest.mark.parametrize(("fields", "allowing", "other"), CASES, ids=repr)
def test_each_key_grants_what_it_names_and_nothing_else(
    fields: dict[str, object], allowing: str, other: str
) -> None:
    key = allowing.partition(":")[0]
    for mode in ALL_MODES:
        asked = request(mode, **fields)
        rights(allowing).check_request(START, asked)
        for grants in ("", "verify_only: false", other):
            error = refusal(rights(grants), asked)
            assert re.search(rf"(add .* to|set) grants\.sys-gui\.{key}\b", error.advice)
            assert error.advice.endswith(f" in {FILE}.")
            assert "sys-gui" in error.reason
        refusal(rights(allowing, caller="another"), asked)  # it is somebody else's
    default = f"grants: {{default: {{{allowing}}}}}"
    Rights("sys-gui", parse_config(default), FILE).check_request(START, request(**fields))
    own = f"grants: {{default: {{{allowing}}}, sys-gui: {{verify_only: false}}}}"
    refusal(Rights("sys-gui", parse_config(own), FILE), request(**fields))


@pytest.mark.parametrize(("fields", "_allowing", "_other"), CASES, ids=repr)
def test_dom0_may_ask_for_everything(fields: dict[str, object], _allowing: str, _other: str) -> None:
    found = Rights("dom0", parse_config("grants: {default: {verify_only: true}}"), FILE)
    for mode in ALL_MODES:
        found.check_request(START, request(mode, **{"choice": {"dom0_home": True}, **fields}))
    assert found.unlimited
    assert not rights().unlimited


def test_without_any_grant_a_caller_restores_its_own_backups() -> None:
    for location in ({"text": "/b"}, {"qube": "sys-gui", "text": "/b"}):
        rights().check_request(START, request(location=location))
    rights(more="worker: {template: dvm, memory: 8000, vcpus: 4}\nrestore: {pool: slow}").check_request(
        START, request(choice={"pool": "slow"}, worker={"template": "dvm", "memory": 8000, "vcpus": 4})
    )
    rights("max_memory: 300").check_request(START, request(worker={"memory": 4000}))


def test_the_size_of_the_worker_follows_the_machine_only_where_it_was_configured_so() -> None:
    asked = request(worker={"memory": "auto", "vcpus": "auto"})
    rights().check_request(START, asked)
    for configured in ("memory: 3000", "vcpus: 1"):
        more = f"worker: {{{configured}}}"
        with pytest.raises(NotGranted, match="are a number here"):
            rights("max_memory: 90000, max_vcpus: 9", more=more).check_request(START, asked)
        rights(caller="dom0", more=more).check_request(START, asked)


@pytest.mark.parametrize(("service", "mode"), list(itertools.product((START, VERIFY, LIST), ALL_MODES)))
def test_what_each_service_does(service: str, mode: c.Mode) -> None:
    allowed = {START: ALL_MODES, VERIFY: ("verify", "list"), LIST: ("list",)}[service]
    assert MODES[service] == (*allowed, *(("compare",) if service == START else ()))
    for found in (rights(), rights(caller="dom0")):
        if mode in allowed:
            found.check_request(service, request(mode))
        else:
            assert "dom0's policy" in refusal(found, request(mode), service).advice


def test_only_dom0_compares_with_the_qubes_that_are_here() -> None:
    rights(caller="dom0").check_request(START, request("compare"))
    everything = rights("storage: ['*'], services: ['*'], dom0_directories: [/], choosable: ['*']")
    assert "for dom0 alone, not for sys-gui" in refusal(everything, request("compare")).reason
    for found in (everything, rights(caller="dom0")):
        for service in (VERIFY, LIST):
            assert "does not compare backups" in refusal(found, request("compare"), service).reason


def test_verify_only_does_not_restore() -> None:
    found = rights("verify_only: true")
    found.check_request(START, request("verify"))
    found.check_request(START, request("list"))
    assert "set grants.sys-gui.verify_only to false" in refusal(found, request()).advice


@pytest.mark.parametrize("choice", [{"dom0_home": True}, {"names": ("work", "dom0")}])
def test_dom0s_home_is_for_dom0(choice: dict[str, object]) -> None:
    wanted = c.Choice.model_validate(choice)
    refusal(rights("storage: ['*'], dom0_directories: [/]"), request(choice=choice))
    with pytest.raises(NotGranted, match="dom0's home"):
        rights().check_choice("restore", wanted)
    rights().check_choice("verify", wanted)
    rights().check_choice("list", wanted)
    rights(caller="dom0").check_choice("restore", wanted)
    rights().check_choice("restore", c.Choice(exclude=("dom0",)))


def test_a_plan_with_dom0s_home_is_not_carried_out_however_it_came_about() -> None:
    plan = make_plan(manifest(qube("dom0", "AdminVM"), qube("work")), Choice(), None).plan
    with pytest.raises(NotGranted, match="dom0's home"):
        rights().check_plan("restore", plan)
    rights().check_plan("verify", plan)
    rights(caller="dom0").check_plan("restore", plan)
    rights().check_plan("restore", make_plan(manifest(qube("work")), Choice(), None).plan)


def test_what_is_here_is_offered_to_nobody_outside_dom0() -> None:
    offers = c.Offers(templates=("debian",), netvms=("sys-net",), settings=("tag:a", "device:pci"))
    plan = make_plan(manifest(qube("work")), Choice(), None).plan.model_copy(update={"offers": offers})
    assert rights(caller="dom0").narrowed(plan) == plan
    assert rights().narrowed(plan).offers == c.Offers()
    assert rights("choosable: ['device:*']").narrowed(plan).offers == c.Offers(settings=("device:pci",))


@pytest.mark.parametrize("limits", ["volume_size: 5", "total_size: 5"])
def test_limits_on_sizes_cannot_be_ignored(limits: str) -> None:
    error = refusal(rights(more=f"limits: {{{limits}}}"), request(ignore_size_limit=True))
    assert "limits.volume_size and limits.total_size in /etc/x/config.yaml" in error.advice
    rights(more=f"limits: {{{limits}}}").check_request(START, request())
    rights(more="limits: {qubes: 5}").check_request(START, request(ignore_size_limit=True))


@pytest.mark.parametrize(
    "text",
    ["/srv/../etc/shadow", "/srv/a/../../x", "srv/b", "/srv", "/srv/", "//srv/b", "/srvx/b", "/SRV/b", "~/b",
     "/etc/shadow", "/srv/..", "."],
)  # fmt: skip
def test_a_path_of_dom0_is_judged_by_its_words(text: str) -> None:
    asked = request(location={"qube": "dom0", "text": text})
    assert "dom0_directories" in refusal(rights("dom0_directories: [/srv]"), asked).advice


def test_what_a_client_calls_things_cannot_steer_a_terminal() -> None:
    asked = request(location={"qube": "dom0", "text": "/b\u202e\u200b"})
    assert refusal(rights(), asked).reason.isprintable()


def test_a_pattern_takes_no_time_however_it_is_made() -> None:
    stars = "*a" * 100
    begun = time.process_time()
    refusal(rights(f"services: ['{stars}']"), request(location={"text": "a" * 4000 + "b", "service": True}))
    assert time.process_time() - begun < 5
