"""What a client and dom0's broker say to each other: what validates travels, and only in its order."""

import copy
import itertools
import json
import traceback
from typing import get_args

import pytest

from qubes_restore_svc.errors import ProtocolViolation, UsageError
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.connection import Connection
from qubes_restore_svc.wire.messages import Cancel, Log
from qubes_restore_svc.wire.models import Message, encode_message
from qubes_restore_svc.wire.names import MAX_QUBES
from qubes_restore_svc.wire.report import Difference, Place, QubeReport, RestoreProgress, VolumeReport
from qubes_restore_svc.wire.restore_call import QubePath, QubeService
from tests.support.wire import from_client, from_dom0, parsed

from .alterations import Json, Path, at, changed, dotted, names_in_json, places

PASSPHRASE = "hunter2 hunter2"
ERROR: Json = {"kind": "bad-image", "reason": "r", "qube": "q", "volume": "v", "chunk": 3, "advice": "a"}
CHOICE: Json = {
    "names": ["work"], "exclude": ["vault"], "conflicts": "rename", "missing": "default", "dom0_home": True,
    "ignore_username_mismatch": True,
    "qubes": [{"name": "work", "new_name": "work-2", "template": "debian-13", "netvm": "sys-firewall"}],
    "template": "debian-13", "netvm": "", "pool": "vm-pool", "allow": ["property:autostart"],
    "resume": True,
}  # fmt: skip
OFFERS: Json = {
    "templates": ["debian-13"], "disposable_templates": ["dvm"], "netvms": ["sys-net"],
    "settings": ["device:pci"],
}  # fmt: skip
QUBE: Json = {
    "key": "dom0-home", "name": "dom0", "class": "AdminVM", "label": "red", "template": "debian-12",
    "netvm": "sys-firewall", "home_user": "user", "backup_size": 10,
    "volumes": [{"name": "home", "size": 5}], "decision": "refuse", "new_name": "work1",
    "new_template": "debian-13", "new_netvm": "", "problem": "already-exists", "remark": "m",
    "error": ERROR, "settled_by": ["new-name"], "notes": ["n"], "settings_left_out": ["s"],
}  # fmt: skip
DIFFERENCE: Json = {
    "size": 5, "different_bytes": 4, "places": [{"offset": 1, "length": 2}], "more_places": 3,
}  # fmt: skip
RESULT: Json = {
    "name": "work1", "name_in_backup": "work", "class": "AppVM", "outcome": "restored", "remark": "m",
    "error": ERROR, "warnings": ["w"], "settings_left_out": ["s"],
    "volumes": [
        {
            "name": "private", "outcome": "ok", "size": 5, "data_bytes": 4, "fsverity": "a" * 64,
            "sha256": None, "error": ERROR, "difference": DIFFERENCE,
        }
    ],
}  # fmt: skip

#: Every message with all of its keys.
FULL: dict[str, Json] = {
    "open": {
        "type": "open", "protocol": 1, "mode": "restore", "passphrase": PASSPHRASE,
        "location": {"qube": "sys-usb", "text": "/media/usb/a b.qbackup", "service": True},
        "choice": CHOICE, "compression_filter": "gzip", "ignore_size_limit": True, "ignore_cost_limit": True,
        "digest": "sha256",
        "stall_timeout": 600, "worker": {"template": "my-dvm", "memory": 4000, "vcpus": 2},
    },
    "choose": {"type": "choose", "choice": CHOICE},
    "confirm": {"type": "confirm", "plan": 1},
    "cancel": {"type": "cancel"},
    "log": {"type": "log", "level": "warning", "text": "t", "key": "vm10"},
    "progress": {
        "type": "progress", "archive_bytes": 1, "image_bytes": 2, "percent": 3, "per_second": 4,
        "seconds_left": 5,
    },
    "plan": {
        "type": "plan", "number": 1, "mode": "restore", "backup_id": "20260101T010203-1234",
        "archive_size": 7, "qubes": [QUBE], "unlisted": [{"name": "bad\u00e9", "error": ERROR}],
        "offers": OFFERS, "excess": ERROR,
    },
    "volume_started": {"type": "volume_started", "qube": "work", "volume": "private", "image_size": 5},
    "qube_finished": {"type": "qube_finished", "qube": RESULT},
    "report": {
        "type": "report", "mode": "restore", "tool_version": "1.0", "backup_id": "b",
        "started": "2026-11-23T14:00:00Z", "finished": "2026-11-23T15:00:00Z", "status": 3, "error": ERROR,
        "warnings": ["w"], "qubes": [RESULT], "derivations": 3,
    },
    "refused": {"type": "refused", "error": ERROR},
}  # fmt: skip
CLIENT = {"open", "choose", "confirm", "cancel"}

EACH = pytest.mark.parametrize("kind", FULL)
EVERYWHERE = pytest.mark.parametrize(
    ("kind", "path"),
    [pytest.param(kind, path, id=f"{kind}:{dotted(path)}") for kind in FULL for path in places(FULL[kind])],
)


def parse(payload: bytes | Json, kind: str) -> Message:
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return parsed(from_client(), data) if kind in CLIENT else parsed(from_dom0(), data)


def refusal(payload: Json, kind: str) -> str:
    with pytest.raises(ProtocolViolation) as caught:
        parse(payload, kind)
    assert caught.value.reason.isprintable()
    assert len(caught.value.reason) < 600
    return "".join(traceback.format_exception(caught.value))


def test_the_tests_know_every_message_and_every_field() -> None:
    models = {*get_args(c.ClientMessage), *get_args(c.BrokerAnswer)}
    assert set(FULL) == {cls.model_fields["type"].default for cls in models}
    for kind, message in FULL.items():
        assert set(message) == names_in_json(type(parse(message, kind)))
    for cls, sample in (
        (c.BackupLocation, FULL["open"]["location"]),
        (c.WorkerWishes, FULL["open"]["worker"]),
        (c.Choice, CHOICE),
        (c.QubeChoice, CHOICE["qubes"][0]),
        (c.Offers, OFFERS),
        (c.PlanQube, QUBE),
        (QubeReport, RESULT),
        (VolumeReport, RESULT["volumes"][0]),
        (Difference, DIFFERENCE),
        (Place, DIFFERENCE["places"][0]),
    ):
        assert names_in_json(cls) == set(sample)


@EACH
def test_a_message_survives_the_way(kind: str) -> None:
    message = parse(FULL[kind], kind)
    payload = encode_message(message)
    assert json.loads(payload) == FULL[kind]
    assert parse(payload, kind) == message


@EACH
def test_each_side_takes_only_the_other_sides_messages(kind: str) -> None:
    with pytest.raises(ProtocolViolation, match="unknown type"):
        parse(FULL[kind], "log" if kind in CLIENT else "open")


@EVERYWHERE
def test_an_unknown_key_is_refused_everywhere(kind: str, path: Path) -> None:
    if isinstance(at(FULL[kind], path[:-1]), dict):
        for name in ("evil", str(path[-1]).upper(), "model_config", "__class__"):
            refusal(changed(FULL[kind], (*path[:-1], name), 1), kind)


@EVERYWHERE
def test_nothing_is_converted(kind: str, path: Path) -> None:
    value = at(FULL[kind], path)
    wrong: list[object] = [1.0, ["x", 1], {"x": 1}]
    if not (isinstance(value, int) and not isinstance(value, bool)):
        wrong += [1, 0, -1]
    if not isinstance(value, bool):
        wrong += [True, False]
    if not isinstance(value, str):
        wrong += ["1", "true", ""]
    for bad in wrong:
        refusal(changed(FULL[kind], path, bad), kind)


@EVERYWHERE
def test_control_characters_are_refused_or_cleaned(kind: str, path: Path) -> None:
    if isinstance(at(FULL[kind], path), str) and path != ("passphrase",):
        for text in ("a\x1b[2J", "a\x00b", "a\u202eb", "a\nb", "\x9b", "a\ud800"):
            try:
                taken = parse(changed(FULL[kind], path, text), kind)
            except ProtocolViolation as error:
                assert error.reason.isprintable()
            else:
                told = str(at(json.loads(encode_message(taken)), path))
                # What is shown is cleaned; a location is used, and passes as it is or not at all.
                assert told.isprintable() or (path[-1] == "text" and kind == "open" and told == text)
                assert "\x1b" not in told and "\n" not in told and "\x00" not in told


@EVERYWHERE
def test_an_error_never_quotes_what_it_refuses(kind: str, path: Path) -> None:
    secret = "hunter2 \x1b[31m\u202e"
    for value in (secret, {secret: secret}, [secret], {"type": secret}, secret * 1000):
        try:
            parse(changed(FULL[kind], path, value), kind)
        except ProtocolViolation as error:
            text = "".join(traceback.format_exception(error))
            assert "hunter2" not in text
            assert "\x1b" not in text


BOUNDS: list[tuple[str, Path, object, object]] = [
    ("open", ("passphrase",), "é" * 4096, "é" * 4097),
    ("open", ("mode",), "list", "everything"),
    ("open", ("location", "text"), "/" + "é" * 4095, "/" + "é" * 4096),
    ("open", ("location", "text"), "ls", " "),
    ("open", ("location", "qube"), "n" * 31, "n" * 32),
    ("open", ("location", "qube"), "n", "@dispvm"),
    ("open", ("location", "qube"), None, "Domain-0"),
    ("open", ("location", "qube"), "work-2", "dom0"),  # which has no service that brings one
    ("open", ("compression_filter",), "g" * 32, "g" * 33),
    ("open", ("choice", "pool"), "p" * 64, "p" * 65),
    ("open", ("choice", "pool"), "p", "p q"),
    ("open", ("choice", "qubes"), [{"name": "a"}, {"name": "b"}], [{"name": "a"}, {"name": "a"}]),
    ("open", ("choice", "qubes", 0, "new_name"), "n" * 31, "n" * 32),
    ("open", ("choice", "qubes", 0, "new_name"), "work-3", "Domain-0"),
    ("open", ("choice", "qubes", 0, "netvm"), "", "a b"),
    ("open", ("choice", "template"), "debian.13", ""),
    ("open", ("choice", "allow"), ["tag:t"] * c.MAX_OFFERED, ["tag:t"] * (c.MAX_OFFERED + 1)),
    ("open", ("choice", "allow", 0), "feature:a.b-c_D", "feature:*"),
    ("open", ("choice", "allow", 0), "device:pci", "label:red"),
    ("plan", ("offers", "templates"), ["t"] * c.MAX_OFFERED, ["t"] * (c.MAX_OFFERED + 1)),
    ("plan", ("qubes", 0, "settled_by"), ["leave-out"] * 8, ["leave-out"] * 9),
    ("open", ("worker", "template"), "n" * 31, "n" * 32),
    ("open", ("worker", "memory"), 1 << 24, (1 << 24) + 1),
    ("open", ("worker", "memory"), 1, 0),
    ("open", ("worker", "vcpus"), 1024, 1025),
    ("progress", ("percent",), 100, 101),
    ("progress", ("seconds_left",), 2**31, 2**31 + 1),
    ("open", ("choice", "names"), ["n"] * MAX_QUBES, ["n"] * (MAX_QUBES + 1)),
    ("open", ("choice", "names", 0), "n" * 1000, "n" * 1001),
    ("open", ("choice", "exclude"), ["n"] * MAX_QUBES, ["n"] * (MAX_QUBES + 1)),
    ("open", ("choice", "conflicts"), "skip", "overwrite"),
    ("open", ("choice", "missing"), "skip", "ignore"),
    ("open", ("protocol",), 1, 2),
    ("confirm", ("plan",), 1 << 31, (1 << 31) + 1),
    ("plan", ("qubes",), [QUBE] * MAX_QUBES, [QUBE] * (MAX_QUBES + 1)),
    ("plan", ("qubes", 0, "notes"), ["n"] * 1024, ["n"] * 1025),
    ("plan", ("qubes", 0, "settings_left_out"), ["n"] * 1024, ["n"] * 1025),
    ("plan", ("qubes", 0, "problem"), "excluded", "bored"),
    ("plan", ("archive_size",), (1 << 63) - 1, 1 << 63),
    ("volume_started", ("image_size",), (1 << 63) - 1, 1 << 63),
    ("report", ("status",), 255, 256),
    ("report", ("status",), 0, -1),
    ("report", ("started",), "2026-11-23T14:00:00Z", "2026-11-23 14:00:00"),
    ("report", ("warnings",), ["n"] * 1024, ["n"] * 1025),
    ("report", ("qubes", 0, "class"), "?", "RootVM"),
    ("report", ("qubes", 0, "outcome"), "left out", "fine"),
    ("report", ("qubes", 0, "volumes", 0, "sha256"), "0" * 64, "0" * 63),
    ("report", ("qubes", 0, "volumes", 0, "fsverity"), "0" * 64, "g" * 64),
    (
        "report",
        ("qubes", 0, "volumes", 0, "difference", "places"),
        [{"offset": 0, "length": 1}] * 8,
        [{"offset": 0, "length": 1}] * 9,
    ),
]


@pytest.mark.parametrize(("kind", "path", "taken", "refused"), BOUNDS, ids=lambda value: repr(value)[:40])
def test_every_field_is_bounded(kind: str, path: Path, taken: object, refused: object) -> None:
    parse(changed(FULL[kind], path, taken), kind)
    refusal(changed(FULL[kind], path, refused), kind)


def test_the_passphrase_travels_and_is_shown_nowhere() -> None:
    message = parse(FULL["open"], "open")
    assert PASSPHRASE.encode() in encode_message(message)
    assert PASSPHRASE not in f"{message} {message!r} {message.model_dump()}"


def test_a_key_may_be_left_out_only_where_it_has_a_default() -> None:
    least = {"type": "open", "mode": "list", "passphrase": "x", "location": {"text": "/b"}}
    assert parse(least, "open")
    for key in least:
        without = copy.deepcopy(least)
        del without[key]
        refusal(without, "open")


# --- The order -------------------------------------------------------------------------------------


def message(kind: str) -> Message:
    return parse(FULL[kind], kind)


#: State: message: next state. What does not stand here is a violation.
TABLE: dict[str, dict[str, str]] = {
    "idle": {"open": "planning", "refused": "closed"},
    "planning": {
        "plan": "planned", "log": "planning", "progress": "planning", "report": "closed",
        "refused": "closed", "cancel": "ending",
    },
    "planned": {
        "choose": "planning", "confirm": "running", "log": "planned", "progress": "planned",
        "report": "closed", "refused": "closed", "cancel": "ending",
    },
    "running": {
        "volume_started": "running", "qube_finished": "running", "log": "running", "progress": "running",
        "report": "closed", "refused": "closed", "cancel": "ending",
    },
    "ending": {
        "plan": "ending", "volume_started": "ending", "qube_finished": "ending", "log": "ending",
        "progress": "ending", "report": "closed", "refused": "closed",
    },
    "closed": {},
}  # fmt: skip
PATHS: dict[str, list[str]] = {
    "idle": [],
    "planning": ["open"],
    "planned": ["open", "plan"],
    "running": ["open", "plan", "confirm"],
    "ending": ["open", "cancel"],
    "closed": ["open", "refused"],
}


def call_in(phase: str) -> Connection[c.CallPhase, c.BrokerAnswer]:
    call = c.client_end()
    for kind in PATHS[phase]:
        call.advance(message(kind))
    assert call.state.value == phase
    return call


def test_the_table_here_knows_every_phase() -> None:
    assert set(TABLE) == {phase.value for phase in c.CallPhase}


@pytest.mark.parametrize(("phase", "kind"), list(itertools.product(TABLE, FULL)))
def test_each_message_in_each_phase_follows_the_table_or_is_refused(phase: str, kind: str) -> None:
    call = call_in(phase)
    following = TABLE[phase].get(kind)
    if following is None:
        with pytest.raises(ProtocolViolation, match=f"'{kind}' while the call is {phase}"):
            call.advance(message(kind))
        assert call.state.value == phase
    else:
        call.advance(message(kind))
        assert call.state.value == following


def plan(number: int, mode: str = "restore") -> Message:
    return parse(changed(changed(FULL["plan"], ("number",), number), ("mode",), mode), "plan")


def test_only_the_last_plan_can_be_confirmed() -> None:
    call = call_in("planned")
    call.advance(message("choose"))
    call.advance(plan(2))
    for number in (0, 1, 3):
        with pytest.raises(ProtocolViolation, match=f"'confirm' of plan {number}, and the last one is 2"):
            call.advance(c.Confirm(plan=number))
    call.advance(c.Confirm(plan=2))
    assert call.state is c.CallPhase.RUNNING


def test_a_plan_has_a_new_number_and_the_mode_that_was_asked_for() -> None:
    call = call_in("planned")
    call.advance(message("choose"))
    for bad in (plan(1), plan(0), plan(2, "verify")):
        with pytest.raises(ProtocolViolation, match="'plan' of another mode, or one that has been before"):
            call.advance(bad)


def test_a_call_that_only_lists_is_over_with_its_plan() -> None:
    call = c.client_end()
    call.advance(parse(changed(FULL["open"], ("mode",), "list"), "open"))
    call.advance(plan(1, "list"))
    assert call.state is c.CallPhase.CLOSED


def test_a_cancel_can_cross_everything_that_the_broker_says() -> None:
    for phase, kinds in (("planning", ["plan"]), ("running", ["volume_started", "qube_finished", "report"])):
        call = call_in(phase)
        call.advance(Cancel())
        for kind in kinds:
            call.advance(message(kind))
        call = call_in(phase)
        call.advance(Cancel())
        with pytest.raises(ProtocolViolation):
            call.advance(Cancel())
        call.advance(Log(level="info", text="x"))
        call.advance(RestoreProgress(archive_bytes=1))


STORAGE = "sys-usb"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("/backups/qubes backup", b"/backups/qubes backup\n"),
        ("/with\nline\r\nends", b"/withlineends\n"),
        ("ssh host 'cat \"/x\"' | gpg -d", b"ssh host 'cat \"/x\"' | gpg -d\n"),
        ("/büro", "/büro\n".encode()),
        ("/not-utf8-\udcff", b"/not-utf8-\xff\n"),
        ("x" * 16383, b"x" * 16383 + b"\n"),
    ],
)
def test_a_path_or_command_is_one_line_as_it_stands(text: str, line: bytes) -> None:
    assert QubePath(STORAGE, text).line == line


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("\r\n", "empty"),
        ("  ", "empty"),
        ("/a\x00b", "control character"),
        ("/a\tb", "control character"),
        ("/a\x1b[2J", "control character"),
        ("/a\x85b", "control character"),
        ("/a\ud800", "UTF-8"),
        ("x" * 16384, "longer"),
    ],
)
def test_what_is_no_path_and_no_command_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        QubePath(STORAGE, text)


@pytest.mark.parametrize("service", ["x", "my.Backup", "my.Backup+", "my.Backup+arg.1_2-3+4"])
def test_a_service_is_a_name_perhaps_with_an_argument(service: str) -> None:
    assert QubeService(STORAGE, service).service == service


@pytest.mark.parametrize(
    "service", ["", "+arg", "a b", "a\n", "a;b", "../a", "a+b c", "a+/b", "ä", "DEFAULT:x", "x" * 201]
)
def test_what_is_no_service_is_refused(service: str) -> None:
    with pytest.raises(UsageError, match="not the name of a qrexec service"):
        QubeService(STORAGE, service)


@pytest.mark.parametrize("qube", ["", "dom0", "@dispvm", "a b", "-d", "sys-usb\n", "x" * 32])
def test_a_backup_lies_in_a_qube(qube: str) -> None:
    with pytest.raises(UsageError):
        QubePath(qube, "/x")
    with pytest.raises(UsageError):
        QubeService(qube, "x")
