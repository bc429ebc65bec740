"""What a GUI domain may not: policy, a person or dom0's configuration say no, or another one restores."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qubes_restore_svc.wire import restore_call as c
from tests.emulation.remote_bench import (
    GUI,
    LIST,
    LONG_S,
    PASSPHRASE,
    START,
    STORAGE,
    VERIFY,
    Json,
    RemoteBench,
    open_message,
    two_qubes,
)
from tests.emulation.switchboard import Question, say_no, say_yes

SERVICES: dict[str, str] = {"restore": START, "verify": VERIFY, "list": LIST}
SINCE = r"has been restoring since [0-9]{2}:[0-9]{2} on [0-9]{4}-[0-9]{2}-[0-9]{2} \(process [0-9]+ of "


def request(path: str, mode: str = "restore", **fields: object) -> Json:
    return open_message(Path(path), mode, **fields)


def asked(bench: RemoteBench, request: Json) -> Json:
    """What the program over the client library is told, in one event."""
    (event,) = bench.client(request).rest()
    return event


# --- The policy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", SERVICES)
def test_without_a_grant_every_call_is_refused_with_the_line_that_is_missing(
    bench: RemoteBench, backup: str, mode: str
) -> None:
    before = bench.snapshot()
    event = asked(bench, request(backup, mode))
    assert (event["event"], event["kind"]) == ("error", "not-granted")
    assert f"does not let this qube call {SERVICES[mode]}" in event["reason"]
    assert "/etc/qubes/policy.d/include/qubes-restore-svc" in event["advice"]
    assert re.search(rf" {SERVICES[mode]} \* \S+ @adminvm allow target=dom0$", event["advice"])
    bench.check_as_before(before)
    assert bench.journal == "", "the service has not even been started"


def test_the_line_that_is_told_to_be_missing_is_what_grants_it(bench: RemoteBench, backup: str) -> None:
    line = asked(bench, request(backup, "list"))["advice"].partition("in dom0: ")[2]
    service, argument, _host_name, *rest = line.split()
    include = bench.qubes.policy / "include" / "qubes-restore-svc"
    with include.open("a") as file:
        file.write(" ".join([service, argument, GUI, *rest]) + "\n")
    assert asked(bench, request(backup, "list"))["event"] == "plan"


def test_who_may_only_verify_is_told_that_it_is_the_restoring_that_is_missing(
    bench: RemoteBench, backup: str
) -> None:
    bench.grant(VERIFY)
    before = bench.snapshot()
    event = asked(bench, request(backup))
    assert event["kind"] == "not-granted"
    assert START in event["reason"] and START in event["advice"]
    call = bench.call(VERIFY)
    call.say(request(backup))
    error = call.refused().error
    assert (error.kind, error.reason) == ("not-granted", f"the service {VERIFY} does not restore backups")
    assert START in error.advice
    bench.check_as_before(before)


def test_a_grant_is_for_the_qube_that_it_names_and_for_no_other(bench: RemoteBench, backup: str) -> None:
    bench.grant(START)
    call = bench.call(START, source=STORAGE)
    assert call.hear() is None
    assert call.end() == 126
    assert bench.journal == ""


@pytest.mark.parametrize(("answer", "event"), [(say_no, "error"), (say_yes, "plan")])
def test_a_person_is_asked_and_no_means_no(
    bench: RemoteBench, backup: str, answer: Callable[[Question], str | None], event: str
) -> None:
    bench.qubes.grant(LIST, GUI, "ask")
    questions: list[Question] = []

    def person(question: Question) -> str | None:
        questions.append(question)
        return answer(question)

    bench.qubes.when_asked(person)
    before = bench.snapshot()
    told = asked(bench, request(backup, "list"))
    assert told["event"] == event
    if event == "error":
        assert told["kind"] == "not-granted"
        assert "or somebody there said no" in told["reason"]
    assert [(question.source, question.service) for question in questions] == [(GUI, LIST)]
    bench.check_as_before(before)


# --- The configuration ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Beyond:
    """Something that was not granted: `fields` of a request ask for `value`, which would stand at `key`.

    `other` asks for something of the kind that does not exist.
    """

    key: str
    value: str
    fields: Json
    other: tuple[str, Json] | None = None

    def __str__(self) -> str:
        return self.key


def _location(**fields: object) -> Json:
    return {"location": {"text": "/backup", **fields}}


BEYOND = [
    Beyond("verify_only", "false", {}),
    Beyond("storage", STORAGE, _location(qube=STORAGE), ("nas", _location(qube="nas"))),
    Beyond(
        "services",
        "qubes.Restore",
        _location(text="qubes.Restore", service=True),
        ("my.Backup", _location(text="my.Backup", service=True)),
    ),
    Beyond(
        "dom0_directories",
        "/etc/passwd",
        _location(qube="dom0", text="/etc/passwd"),
        ("/no/such/file", _location(qube="dom0", text="/no/such/file")),
    ),
    Beyond("pools", "lvm", {"choice": {"pool": "lvm"}}, ("nowhere", {"choice": {"pool": "nowhere"}})),
    Beyond(
        "templates",
        "default-dvm",
        {"worker": {"template": "default-dvm"}},
        ("nothing", {"worker": {"template": "nothing"}}),
    ),
    Beyond("max_memory", "1501", {"worker": {"memory": 1501}}),
    Beyond("max_vcpus", "3", {"worker": {"vcpus": 3}}),
]


def refused(bench: RemoteBench, message: Json) -> tuple[str, str]:
    """What is said, beside that it is not granted."""
    call = bench.call()
    call.say(message)
    error = call.refused().error
    assert error.kind == "not-granted", error
    return error.reason, error.advice


@pytest.mark.parametrize("beyond", BEYOND, ids=str)
def test_what_the_configuration_does_not_grant_is_refused_with_key_and_value(
    bench: RemoteBench, backup: str, beyond: Beyond
) -> None:
    bench.grant(START)
    if beyond.key == "verify_only":
        bench.configure("verify_only: true")
    before = bench.snapshot()
    reason, advice = refused(bench, request(backup, **beyond.fields))
    assert f"grants.{GUI}.{beyond.key}" in advice
    assert str(bench.folder / "config.yaml") in advice
    if beyond.key != "dom0_directories":
        assert beyond.value in advice
    else:
        assert beyond.value in reason
    if beyond.other is not None:
        other, fields = beyond.other
        told = refused(bench, request(backup, **fields))
        assert told == (reason.replace(beyond.value, other), advice.replace(beyond.value, other))
    bench.check_as_before(before)
    assert bench.qubes.qubesd.calls == [], "nothing has been looked up"


@pytest.mark.parametrize("choice", [{"dom0_home": True}, {"names": ["dom0"]}], ids=str)
def test_dom0s_home_is_restored_for_no_qube(bench: RemoteBench, backup: str, choice: Json) -> None:
    bench.grant(START)
    before = bench.snapshot()
    reason, advice = refused(bench, request(backup, choice=choice))
    assert reason == f"dom0's home is not restored for the qube {GUI}, nor for any other"
    assert "in dom0 itself" in advice
    bench.check_as_before(before)
    assert list((bench.folder / "home").iterdir()) == []


@pytest.mark.parametrize(
    ("grant", "fields", "words"),
    [
        ("storage: [nas]", _location(qube="nas"), "there is no qube nas"),
        ("pools: [nowhere]", {"choice": {"pool": "nowhere"}}, "there is no storage pool 'nowhere'"),
    ],
    ids=str,
)
def test_what_is_granted_is_looked_for(
    bench: RemoteBench, backup: str, grant: str, fields: Json, words: str
) -> None:
    bench.grant(START)
    bench.configure(grant)
    before = bench.snapshot()
    call = bench.call()
    call.say(request(backup, **fields))
    error = call.refused().error
    assert error.kind in ("usage", "host-failed")
    assert words in error.reason
    bench.check_as_before(before)


def test_a_mistake_in_the_configuration_refuses_everybody_and_is_told_in_dom0_only(
    bench: RemoteBench, backup: str
) -> None:
    bench.grant(START)
    bench.configure("storage: [sys-usb], stowage: [secret-name]")
    before = bench.snapshot()
    call = bench.call()
    call.say(request(backup, "list"))
    error = call.refused().error
    assert error.kind == "bad-configuration"
    assert "stowage" not in error.reason + error.advice
    assert "stowage" in bench.journal
    bench.check_as_before(before)


# --- One at a time -------------------------------------------------------------------------------


def test_who_comes_second_is_told_that_a_qube_restores_and_since_when(
    bench: RemoteBench, backup: str
) -> None:
    bench.grant(START, VERIFY)
    before = bench.snapshot()
    first = bench.call()
    first.say(request(backup))
    plan = first.plan()
    for mode in ("restore", "verify"):
        second = bench.call(SERVICES[mode])
        second.say(request(backup, mode))
        error = second.refused().error
        assert error.kind == "restore-in-progress"
        assert re.match(f"{GUI} {SINCE}", error.reason), error.reason
    done = bench.dom0.restore(["-d", GUI, backup], PASSPHRASE, 1)
    assert re.search(f"{GUI} {SINCE}", " ".join(done.stderr.split())), done.stderr
    first.say({"type": "confirm", "plan": plan.number})
    assert first.report().status == 0, "the first one has not noticed"
    assert bench.new_qubes(before) == {"first", "second"}
    bench.remove("first", "second")
    bench.check_as_before(before)


def test_a_qube_is_told_that_dom0_restores_and_since_when(bench: RemoteBench) -> None:
    bench.grant(START, VERIFY)
    held = bench.held(two_qubes(), 0)
    before = bench.snapshot()
    words = ["--mgmt-vm", "--force-root", "-d", GUI, held.location]
    process = bench.dom0.start(words, PASSPHRASE)
    held.wait()
    for mode in ("restore", "verify", "list"):
        if mode == "list":
            bench.grant(LIST)
        call = bench.call(SERVICES[mode])
        call.say(request("/backup", mode))
        error = call.refused().error
        assert error.kind == "restore-in-progress"
        assert re.match(f"dom0 {SINCE}", error.reason), error.reason
    held.release()
    _, errors = process.communicate(timeout=LONG_S)
    assert process.returncode == 0, errors
    bench.remove("first", "second")
    bench.check_as_before(before)


def test_of_many_at_once_one_restores_and_the_others_are_refused(bench: RemoteBench, backup: str) -> None:
    bench.grant(START)
    before = bench.snapshot()
    calls = [bench.call() for _ in range(3)]
    for call in calls:
        call.say(request(backup))
    answers: list[c.BrokerAnswer] = []
    for call in calls:
        while not isinstance(message := call.hear(), c.Plan | c.Refused):
            assert message is not None
        answers.append(message)
    (winner,) = [call for call, answer in zip(calls, answers, strict=True) if isinstance(answer, c.Plan)]
    kinds = {answer.error.kind for answer in answers if isinstance(answer, c.Refused)}
    assert kinds == {"restore-in-progress"}
    winner.hang_up()
    for call in calls:
        call.end()
    bench.wait_service_ended()
    bench.check_as_before(before)
