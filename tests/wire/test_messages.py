"""Messages: what validates travels unchanged; all else is one ProtocolViolation that quotes nothing."""

import copy
import json
import re
import traceback
import tracemalloc
from typing import get_args

import pytest
from pydantic import SecretStr, ValidationError

from qubes_restore_svc.errors import ERROR_KINDS, BadImage, NoSpace, ProtocolViolation, RestoreError
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.connection import MAX_MEMBERS
from qubes_restore_svc.wire.names import MAX_QUBES
from tests.support.wire import from_broker, from_worker, parsed

from .alterations import Json, Path, at, changed, dotted, names_in_json, places

PASSPHRASE = "hunter2 hunter2"
OURS: tuple[type[m.Message], ...] = (*get_args(m.BrokerMessage), *get_args(m.WorkerMessage))
BROKER = {"open", "start", "skip_qube", "cancel"}
ERROR: Json = {"kind": "bad-image", "reason": "r", "qube": "q", "volume": "v", "chunk": 3, "advice": "a"}
QUBE: Json = {
    "key": "vm10", "name": "work", "class": "AppVM", "label": "red", "template": "debian-12",
    "netvm": "sys-firewall", "home_user": None, "backup_size": 10,
    "volumes": [{"name": "private", "size": 5}],
    "properties": {"memory": "400"}, "features": {"service.cups": "1"}, "tags": ["created-by-dom0"],
    "devices": [{
        "bus": "pci", "backend": "dom0", "port": "00_14.0", "identity": "0x8086:0x1e31::p0c0330",
        "required": True,
        "options": {"no-strict-reset": "True"},
    }],
}  # fmt: skip
STORAGE: Json = {"qube": "sys-usb", "location_id": "aB3xY7zQ"}
RULE: Json = {
    "action": "accept", "proto": "tcp", "dsthost": "example.org", "dst4": "10.0.0.0/8", "dst6": "fe80::/10",
    "dstports": "80-443", "icmptype": "8", "specialtarget": "dns", "expire": "1700000000", "comment": "a, b",
}  # fmt: skip

#: Every message with all of its keys …
FULL: dict[str, Json] = {
    "open": {
        "type": "open", "protocol": 1, "passphrase": PASSPHRASE, "memory": 1, "jobs": 2,
        "compression_filter": "gzip", "ignore_size_limit": True, "ignore_cost_limit": True,
        "storage": STORAGE, "ahead": True, "retry": True,
    },
    "start": {
        "type": "start", "mode": "verify", "keys": ["vm10", "vm11"], "digest": "sha256",
        "only": "private",
        "here": [{"key": "vm12", "volumes": ["private"], "firewall": True}],
    },
    "skip_qube": {"type": "skip_qube", "key": "vm10"},
    "cancel": {"type": "cancel"},
    "manifest": {
        "type": "manifest", "backup_id": "20260101T010203-1234", "format": 4, "compression_filter": "zstd",
        "qubes": [QUBE], "refused": [{"name": "bad\u00e9", "error": ERROR}],
    },
    "volume_ready": {"type": "volume_ready", "key": "vm10", "volume": "private", "image_size": 7},
    "volume_done": {
        "type": "volume_done", "key": "vm10", "volume": "root", "outcome": "failed", "image_size": 9,
        "data_bytes": 8, "fsverity": None, "sha256": None, "error": ERROR,
    },
    "qube_settings": {
        "type": "qube_settings", "key": "vm10", "firewall": [RULE], "notes": "one\n\ttwo",
        "appmenus": ["org.gnome.Terminal.desktop"], "error": ERROR,
    },
    "qube_incomplete": {"type": "qube_incomplete", "key": "vm10", "error": ERROR},
    "progress": {
        "type": "progress", "archive_bytes": 1, "image_bytes": 2, "done": 4, "received": 3,
        "waiting_for_source": True,
    },
    "log": {"type": "log", "level": "warning", "text": "t", "key": "vm10"},
    "failed": {"type": "failed", "error": ERROR},
    "finished": {"type": "finished", "archive_bytes": 5, "derivations": 3},
}  # fmt: skip

#: … and the keys that may be left out, with their places.
OPTIONAL: dict[str, set[str]] = {
    "open": {
        "protocol", "memory", "jobs", "compression_filter", "ignore_size_limit", "ignore_cost_limit",
        "storage", "ahead", "retry",
    },
    "start": {"digest", "here", "only"},
    "skip_qube": set(),
    "cancel": set(),
    "manifest": {
        "refused", "refused.0.error.qube", "refused.0.error.volume", "refused.0.error.chunk",
        "refused.0.error.advice", "qubes.0.template", "qubes.0.netvm", "qubes.0.home_user",
        "qubes.0.backup_size", "qubes.0.volumes", "qubes.0.volumes.0.size", "qubes.0.properties",
        "qubes.0.features", "qubes.0.tags", "qubes.0.properties.memory",
        "qubes.0.features.service.cups", "qubes.0.devices", "qubes.0.devices.0.identity",
        "qubes.0.devices.0.required", "qubes.0.devices.0.options",
        "qubes.0.devices.0.options.no-strict-reset",
    },
    "volume_ready": set(),
    "volume_done": {
        "data_bytes", "fsverity", "sha256", "error.qube", "error.volume", "error.chunk", "error.advice",
    },
    "qube_settings": {
        "firewall", "notes", "appmenus", "error", "error.qube", "error.volume", "error.chunk", "error.advice",
        *(f"firewall.0.{key}" for key in RULE if key != "action"),
    },
    "qube_incomplete": {"error.qube", "error.volume", "error.chunk", "error.advice"},
    "progress": {"image_bytes", "done", "received", "waiting_for_source"},
    "log": {"key"},
    "failed": {"error.qube", "error.volume", "error.chunk", "error.advice"},
    "finished": {"derivations"},
}  # fmt: skip

#: The keys that may be null.
NULLABLE = {
    "open": {"memory", "jobs", "compression_filter", "storage"},
    "start": {"only"},
    "manifest": {
        "qubes.0.template", "qubes.0.netvm", "qubes.0.home_user", "qubes.0.volumes.0.size",
        "qubes.0.devices.0.identity",
        "refused.0.error.qube", "refused.0.error.volume", "refused.0.error.chunk",
    },
    "volume_done": {"fsverity", "sha256", "error.qube", "error.volume", "error.chunk"},
    "qube_settings": {
        "firewall", "notes", "appmenus", "error", "error.qube", "error.volume", "error.chunk",
        *(f"firewall.0.{key}" for key in RULE if key != "action"),
    },
    "qube_incomplete": {"error.qube", "error.volume", "error.chunk"},
    "progress": {"done"},
    "log": {"key"},
    "failed": {"error.qube", "error.volume", "error.chunk"},
}  # fmt: skip

#: What is no model, but a mapping with the other side's own keys.
FREE_KEYS = [("properties",), ("features",), ("options",)]

EACH = pytest.mark.parametrize("kind", FULL)


def parse(payload: bytes | Json, kind: str = "") -> m.Message:
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    is_broker = (kind or (payload["type"] if isinstance(payload, dict) else "")) in BROKER
    return parsed(from_broker(), data) if is_broker else parsed(from_worker(), data)


def refusal(payload: bytes | Json, kind: str = "") -> str:
    """The text of the violation that `payload` causes; fails when it is taken, or anything else is raised."""
    with pytest.raises(ProtocolViolation) as caught:
        parse(payload, kind)
    assert caught.value.reason.isprintable()
    assert len(caught.value.reason) < 600
    return "".join(traceback.format_exception(caught.value))


def is_taken(payload: Json) -> bool:
    try:
        parse(payload)
    except ProtocolViolation:
        return False
    return True


EVERY_PLACE = [
    pytest.param(kind, path, id=f"{kind}:{dotted(path)}") for kind in FULL for path in places(FULL[kind])
]
EVERYWHERE = pytest.mark.parametrize(("kind", "path"), EVERY_PLACE)


# --- What is taken -------------------------------------------------------------------------------


def test_the_tests_know_every_message_and_every_field() -> None:
    assert set(FULL) == {cls.model_fields["type"].default for cls in OURS}
    for kind, message in FULL.items():
        assert set(message) == names_in_json(type(parse(message, kind)))
    for cls, sample in (
        (m.ManifestQube, QUBE),
        (m.DeviceInfo, QUBE["devices"][0]),
        (m.FirewallRule, RULE),
        (m.ErrorInfo, ERROR),
        (m.Storage, STORAGE),
    ):
        assert names_in_json(cls) == set(sample)


@EACH
def test_a_message_survives_the_way(kind: str) -> None:
    message = parse(FULL[kind])
    payload = m.encode_message(message)
    assert json.loads(payload) == FULL[kind]
    assert parse(payload, kind) == message


@EACH
def test_each_side_takes_only_the_other_sides_messages(kind: str) -> None:
    payload = json.dumps(FULL[kind]).encode()
    with pytest.raises(ProtocolViolation, match="unknown type"):
        parsed(from_worker(), payload) if kind in BROKER else parsed(from_broker(), payload)


def test_a_volume_that_is_ok_travels() -> None:
    done = m.VolumeDone(
        key="vm1", volume="root", outcome="ok", image_size=9, data_bytes=9, sha256="0123456789abcdef" * 4
    )
    assert parsed(from_worker(), m.encode_message(done)) == done


@EACH
def test_messages_cannot_be_changed(kind: str) -> None:
    message = parse(FULL[kind])
    with pytest.raises(ValidationError):
        message.type = "other"  # type: ignore[attr-defined]  # the attribute is there; assigning it is the test


# --- What is refused -----------------------------------------------------------------------------


@EVERYWHERE
def test_a_key_may_be_left_out_only_where_it_is_optional(kind: str, path: Path) -> None:
    without = copy.deepcopy(FULL[kind])
    del at(without, path[:-1])[path[-1]]
    if isinstance(path[-1], int) or dotted(path) in OPTIONAL[kind]:
        parse(without, kind)
    else:
        refusal(without, kind)


@EVERYWHERE
def test_an_unknown_key_is_refused_everywhere(kind: str, path: Path) -> None:
    if isinstance(at(FULL[kind], path[:-1]), dict) and path[-2:-1] not in FREE_KEYS:
        for name in (
            "evil",
            "Type",
            path[-1].upper() if isinstance(path[-1], str) else "",
            "model_config",
            "__class__",
        ):
            refusal(changed(FULL[kind], (*path[:-1], name), 1), kind)


@EVERYWHERE
def test_nothing_is_converted(kind: str, path: Path) -> None:
    value = at(FULL[kind], path)
    wrong: list[object] = [1.0, 1.5, ["x", 1], {"x": 1}, {"": []}]
    if not (isinstance(value, int) and not isinstance(value, bool)):
        wrong += [1, 0, -1]
    if not isinstance(value, bool):
        wrong += [True, False]
    if not isinstance(value, str):
        wrong += ["1", "true", "x", ""]
    if dotted(path) not in NULLABLE.get(kind, set()):
        wrong += [None]
    for bad in wrong:
        refusal(changed(FULL[kind], path, bad), kind)


@EVERYWHERE
def test_null_is_taken_only_where_it_means_something(kind: str, path: Path) -> None:
    message = changed(FULL[kind], path, None)
    if path != ("type",) and (kind, dotted(path)) != ("volume_done", "error"):
        assert is_taken(message) == (dotted(path) in NULLABLE.get(kind, set()))


@EVERYWHERE
def test_an_escaped_control_character_is_refused_or_cleaned(kind: str, path: Path) -> None:
    if isinstance(at(FULL[kind], path), str) and path != ("passphrase",):
        message = changed(FULL[kind], path, "a\x1b[2J\x00\u202e\u2028\r\x9b")
        try:
            taken = parse(message, kind)
        except ProtocolViolation as error:
            assert error.reason.isprintable()
        else:
            assert "\x1b" not in str(taken)
            strings = [str(at(json.loads(m.encode_message(taken)), path))]
            assert all(text.isprintable() for text in strings)


@EVERYWHERE
def test_an_error_never_quotes_what_it_refuses(kind: str, path: Path) -> None:
    secret = "hunter2 \x1b[31m\u202e"
    bad: list[object] = [
        secret,
        {secret: secret},
        [secret],
        {"type": secret},
        secret * 1000,
        {"a": {secret: 1}},
    ]
    for value in bad:
        message = changed(FULL[kind], path, value)
        try:
            parse(message, kind)
        except ProtocolViolation as error:
            text = "".join(traceback.format_exception(error))
            assert "hunter2" not in text
            assert "\x1b" not in text
    if isinstance(at(FULL[kind], path[:-1]), dict):
        assert "hunter2" not in refusal(changed(FULL[kind], (*path[:-1], secret), secret), kind)


def blank(letter: str, count: int) -> dict[str, str]:
    return {f"{letter}{number}": "" for number in range(count)}


LONGEST: list[tuple[str, Path, object, object]] = [
    ("open", ("passphrase",), "é" * 4096, "é" * 4097),
    ("open", ("memory",), 2**63 - 1, 2**63),
    ("open", ("memory",), 0, -1),
    ("open", ("jobs",), 1024, 1025),
    ("open", ("jobs",), 1, 0),
    ("open", ("compression_filter",), "g" * 32, "g" * 33),
    ("start", ("keys",), [f"q{i}" for i in range(MAX_QUBES)], [f"q{i}" for i in range(MAX_QUBES + 1)]),
    ("open", ("storage", "qube"), "n" * 31, "n" * 32),
    ("open", ("storage", "location_id"), "i" * 64, "i" * 65),
    ("open", ("storage", "location_id"), "i", ""),
    ("start", ("keys",), [], ["vm12"]),
    ("start", ("here",), [], [{"key": "vm10", "volumes": [], "firewall": True}]),
    ("start", ("here", 0, "volumes"), ["root", "private"], ["volatile"]),
    ("start", ("here", 0, "volumes"), [], ["root", "private", "home", "root"]),
    ("start", ("keys", 0), "k" * 64, "k" * 65),
    ("start", ("only",), "root", "volatile"),
    ("skip_qube", ("key",), "k" * 64, "k" * 65),
    ("manifest", ("backup_id",), "b" * 128, "b" * 129),
    ("manifest", ("compression_filter",), "g" * 32, "g" * 33),
    ("manifest", ("qubes",), [{**QUBE, "key": f"vm{i}", "name": f"n{i}"} for i in range(MAX_QUBES - 1)],
     [{**QUBE, "key": f"vm{i}", "name": f"n{i}"} for i in range(MAX_QUBES)]),
    ("manifest", ("refused",), [{"name": "n", "error": ERROR}] * (MAX_QUBES - 1),
     [{"name": "n", "error": ERROR}] * MAX_QUBES),
    ("manifest", ("refused", 0, "name"), "n" * 1000, "n" * 1001),
    ("manifest", ("qubes", 0, "key"), "k" * 64, "k" * 65),
    ("manifest", ("qubes", 0, "name"), "n" * 31, "n" * 32),
    ("manifest", ("qubes", 0, "label"), "l" * 64, "l" * 65),
    ("manifest", ("qubes", 0, "template"), "n" * 31, "n" * 32),
    ("manifest", ("qubes", 0, "netvm"), "n" * 31, "n" * 32),
    ("manifest", ("qubes", 0, "backup_size"), 2**63 - 1, 2**63),
    ("manifest", ("qubes", 0, "volumes", 0, "size"), 2**63 - 1, 2**63),
    ("manifest", ("qubes", 0, "volumes"), [{"name": "root"}, {"name": "private"}], [{"name": "root"}] * 2),
    ("manifest", ("qubes", 0, "properties"), blank("p", 512), blank("p", 513)),
    ("manifest", ("qubes", 0, "properties"), {"p" * 64: ""}, {"p" * 65: ""}),
    ("manifest", ("qubes", 0, "properties"), {"p": "v" * 65_000}, {"p": "v" * 65_001}),
    ("manifest", ("qubes", 0, "features"), blank("f", 4096), blank("f", 4097)),
    ("manifest", ("qubes", 0, "features"), {"f" * 255: ""}, {"f" * 256: ""}),
    ("manifest", ("qubes", 0, "features"), {"f": "v" * 65_000}, {"f": "v" * 65_001}),
    ("manifest", ("qubes", 0, "tags"), ["t"] * 1024, ["t"] * 1025),
    ("manifest", ("qubes", 0, "tags", 0), "t" * 255, "t" * 256),
    ("manifest", ("qubes", 0, "devices"), QUBE["devices"] * 256, QUBE["devices"] * 257),
    ("manifest", ("qubes", 0, "devices", 0, "bus"), "b" * 16, "b" * 17),
    ("manifest", ("qubes", 0, "devices", 0, "backend"), "n" * 31, "n" * 32),
    ("manifest", ("qubes", 0, "devices", 0, "port"), "p" * 128, "p" * 129),
    ("manifest", ("qubes", 0, "devices", 0, "identity"), "i" * 128, "i" * 129),
    ("manifest", ("qubes", 0, "devices", 0, "options"), blank("o", 16), blank("o", 17)),
    ("manifest", ("qubes", 0, "devices", 0, "options"), {"o": "v" * 65_000}, {"o": "v" * 65_001}),
    ("volume_ready", ("key",), "k" * 64, "k" * 65),
    ("volume_ready", ("image_size",), 2**63 - 1, 2**63),
    ("volume_done", ("image_size",), 2**63 - 1, 2**63),
    ("volume_done", ("data_bytes",), 9, 10),
    ("volume_done", ("key",), "k" * 64, "k" * 65),
    ("volume_done", ("error", "kind"), "k" * 64, "k" * 65),
    ("volume_done", ("error", "reason"), "r" * 1000, "r" * 1001),
    ("volume_done", ("error", "qube"), "q" * 1000, "q" * 1001),
    ("volume_done", ("error", "volume"), "v" * 1000, "v" * 1001),
    ("volume_done", ("error", "advice"), "a" * 1000, "a" * 1001),
    ("volume_done", ("error", "chunk"), 2**31, 2**31 + 1),
    ("qube_settings", ("key",), "k" * 64, "k" * 65),
    ("qube_settings", ("firewall",), [{"action": "drop"}] * 4096, [{"action": "drop"}] * 4097),
    ("qube_settings", ("firewall", 0, "dsthost"), "h" * 255, "h" * 256),
    ("qube_settings", ("firewall", 0, "dst4"), "1" * 32, "1" * 33),
    ("qube_settings", ("firewall", 0, "dst6"), "1" * 64, "1" * 65),
    ("qube_settings", ("firewall", 0, "dstports"), "12345-12345", "123456"),
    ("qube_settings", ("firewall", 0, "icmptype"), "255", "2550"),
    ("qube_settings", ("firewall", 0, "expire"), "1" * 20, "1" * 21),
    ("qube_settings", ("firewall", 0, "comment"), "c" * 255, "c" * 256),
    ("qube_settings", ("notes",), "n" * 256_000, "n" * 256_001),
    ("qube_settings", ("appmenus",), ["a"] * 4096, ["a"] * 4097),
    ("qube_settings", ("appmenus", 0), "a" * 255, "a" * 256),
    ("progress", ("archive_bytes",), 2**63 - 1, 2**63),
    ("progress", ("image_bytes",), 2**63 - 1, 2**63),
    ("progress", ("received",), 2**63 - 1, 2**63),
    ("progress", ("done",), 1_000_000, 1_000_001),
    ("log", ("text",), "t" * 1000, "t" * 1001),
    ("log", ("key",), "k" * 64, "k" * 65),
    ("finished", ("archive_bytes",), 2**63 - 1, 2**63),
    ("finished", ("archive_bytes",), 0, -1),
    ("finished", ("derivations",), 2**31 - 1, -1),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "path", "longest", "longer"), LONGEST, ids=lambda value: repr(value)[:40])
def test_every_field_is_bounded(kind: str, path: Path, longest: object, longer: object) -> None:
    assert is_taken(changed(FULL[kind], path, longest))
    refusal(changed(FULL[kind], path, longer), kind)


@pytest.mark.parametrize(("path", "bad"), [
    *((("firewall", 0, "action"), bad) for bad in ["", "ACCEPT", "reject", "accept\n"]),
    *((("firewall", 0, "proto"), bad) for bad in ["", "any", "TCP", "sctp"]),
    *((("firewall", 0, "dsthost"), bad) for bad in ["", "a b", "a\n", "a'", "\u0430.org", "a$b", "a=b", "*"]),
    *((("firewall", 0, "dst4"), bad) for bad in ["", "a", "1.1.1.1 ", "١.1.1.1", "1.1.1.1\n"]),
    *((("firewall", 0, "dst6"), bad) for bad in ["", "g::", "::1%eth0", "::1\n"]),
    *((("firewall", 0, "dstports"), bad) for bad in ["", "-1", "1-", "1-2-3", "1,2", "1\n", "٣", "0x1"]),
    *((("firewall", 0, "icmptype"), bad) for bad in ["", "-1", "a", "1\n", "٣"]),
    *((("firewall", 0, "expire"), bad) for bad in ["", "-1", "1.5", "1\n", "never"]),
    *((("firewall", 0, "specialtarget"), bad) for bad in ["", "DNS", "dns\n", "ntp"]),
    *((("firewall", 0, "comment"), bad) for bad in ["a\n", "a=b", "é", "a\tb", "`a`"]),
    *((("appmenus", 0), bad) for bad in ["", "a/b", "a\n", "a\tb", "é", "../../x", "$x"]),
])  # fmt: skip
def test_settings_hold_no_more_than_qubesd_takes(path: Path, bad: str) -> None:
    refusal(changed(FULL["qube_settings"], path, bad))


@pytest.mark.parametrize(("path", "bad"), [
    *((("qube",), bad) for bad in ["", "-x", "@dispvm", "$default", "a b", "a+b", "a\n", "none", "1a", "é"]),
    *((("location_id",), bad) for bad in ["", "a b", "a+b", "../x", "a\n", "a.b", "a-b", "é", "$(x)"]),
])  # fmt: skip
def test_a_storage_is_one_qube_and_one_argument(path: Path, bad: str) -> None:
    refusal(changed(FULL["open"], ("storage", *path), bad))


@pytest.mark.parametrize(("path", "bad"), [
    *((("bus",), bad) for bad in ["", "PCI", "pci ", "1pci", "p_c", "pci\n", "*"]),
    *((("backend",), bad) for bad in ["", "a b", "none", "*", "a:b", "1a"]),
    *((("port",), bad) for bad in ["", "*", "a/b", "00 14", "x\n", "é", "a+b"]),
    *((("options",), {bad: "1"}) for bad in ["", "a b", "a=b", "é"]),
    *((("options",), {"a": bad}) for bad in ["\n", "é", "\x1b"]),
])  # fmt: skip
def test_a_device_is_one_port_of_one_qube(path: Path, bad: object) -> None:
    refusal(changed(FULL["manifest"], ("qubes", 0, "devices", 0, *path), bad))


@pytest.mark.parametrize("port", ["00_14.0", "00_1c.0-00_00.0", "1-1.2", "sda1", "0000:00:14.0", "mic"])
def test_the_usual_ports_are_taken(port: str) -> None:
    assert is_taken(changed(FULL["manifest"], ("qubes", 0, "devices", 0, "port"), port))


@pytest.mark.parametrize(
    ("path", "bad"),
    [
        (("format",), 2),
        (("format",), 5),
        (("qubes", 0, "class"), "AdminVM"),
        (("qubes", 0, "klass"), "AppVM"),  # beside "class"
        (("qubes", 0, "name"), "dom0"),
        (("qubes", 0, "volumes"), [{"name": "home"}]),
        (("qubes", 0, "home_user"), "user"),
        (("qubes", 0, "volumes"), [{"name": "private"}, {"name": "private"}]),
        (("qubes", 0, "volumes"), [{"name": "volatile"}]),
        (
            ("qubes", 0, "volumes"),
            [{"name": "root"}, {"name": "private"}, {"name": "root"}, {"name": "home"}],
        ),
        (("qubes",), [QUBE, {**QUBE, "name": "other"}]),
        (("qubes",), [QUBE, {**QUBE, "key": "vm11"}]),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(path: Path, bad: object) -> None:
    refusal(changed(FULL["manifest"], path, bad))


def test_dom0_is_the_one_admin_vm_and_has_a_home() -> None:
    dom0 = {**QUBE, "name": "dom0", "class": "AdminVM", "volumes": [{"name": "home"}]}
    assert is_taken(changed(FULL["manifest"], ("qubes", 0), dom0))
    assert is_taken(changed(FULL["manifest"], ("qubes", 0), {**dom0, "home_user": "user"}))
    for bad in ("", "a/b", "a b", "\u0430", 1):
        refusal(changed(FULL["manifest"], ("qubes", 0), {**dom0, "home_user": bad}))
    refusal(changed(FULL["manifest"], ("qubes", 0), {**dom0, "volumes": []}))
    refusal(changed(FULL["manifest"], ("qubes", 0), {**dom0, "name": "dom1"}))
    refusal(changed(FULL["manifest"], ("qubes", 0), {**dom0, "class": "AppVM", "volumes": []}))


@pytest.mark.parametrize(
    "fields",
    [
        {"outcome": "ok"},
        {"outcome": "ok", "sha256": "0" * 64},
        {"outcome": "ok", "error": None},
        {"error": None},
        {"sha256": "0" * 64},
        {"outcome": "skipped", "sha256": "0" * 64},
        {"fsverity": "0" * 64},
        {"outcome": "skipped", "error": None, "fsverity": "0" * 64, "sha256": "0" * 64},
        {"outcome": "ok", "error": None, "fsverity": "0" * 64, "sha256": "0" * 64},
        {"outcome": "ok", "error": None, "fsverity": "0" * 64, "sha256": "1" * 64},
        {"outcome": "ok", "error": None, "fsverity": "g" * 64},
        {"outcome": "skipped", "error": None},
        {"outcome": "ok", "error": None, "sha256": "0" * 63},
        {"image_size": 7},
    ],
)
def test_an_outcome_that_contradicts_itself_is_refused(fields: Json) -> None:
    for kind in ("fsverity", "sha256"):
        assert is_taken({**FULL["volume_done"], "outcome": "ok", "error": None, kind: "0" * 64})
    refusal({**FULL["volume_done"], **fields})


@pytest.mark.parametrize("protocol", [0, 2, -1, True, "1", 1.0, None])
def test_only_this_version_of_the_protocol_is_spoken(protocol: object) -> None:
    refusal({**FULL["open"], "protocol": protocol})


@pytest.mark.parametrize("format_", [True, 4.0, "4", 0, 2, 5])
def test_only_formats_3_and_4_are_listed(format_: object) -> None:
    refusal({**FULL["manifest"], "format": format_})


def test_numbers_that_equal_a_constant_are_not_that_constant() -> None:
    with pytest.raises(ValidationError):
        m.Open.model_validate({"passphrase": SecretStr("x"), "protocol": True})
    with pytest.raises(ValidationError):
        m.Open.model_validate({"passphrase": SecretStr("x"), "protocol": 1.0})
    manifest = {"backup_id": "b", "compression_filter": "gzip", "qubes": ()}
    assert m.Manifest.model_validate({**manifest, "format": 4})
    with pytest.raises(ValidationError):
        m.Manifest.model_validate({**manifest, "format": 4.0})


# --- JSON that is an attack ----------------------------------------------------------------------

M = 4 << 20
MANIFEST = b'{"type":"manifest","backup_id":"a","format":4,"compression_filter":"gzip","qubes":['
HEAD = b'{"type":"finished","archive_bytes":1,'
BOMBS = {
    "arrays": b"[" * M,
    "objects": b'{"a":' * (M // 5),
    "types": b'{"type":' * (M // 8),
    "closed arrays": HEAD + b'"a":' + b"[" * 900 + b"]" * 900 + b"}",
    "huge int": b'{"type":"finished","archive_bytes":' + b"9" * (M - 40) + b"}",
    "long int": b'{"type":"finished","archive_bytes":' + b"9" * 4200 + b"}",
    "ints": HEAD + b'"a":[' + b",".join([b"9" * 4000] * 1000) + b"]}",
    "many keys": HEAD + b",".join(b'"%x":1' % i for i in range(400_000)) + b"}",
    "equal keys": HEAD + b",".join([b'"":1'] * 800_000) + b"}",
    "wrong qubes": MANIFEST + b",".join([b"{}"] * 1_300_000) + b"]}",
    "wrong values": MANIFEST + b",".join([b"0"] * 2_000_000) + b"]}",
    "long key": HEAD + b'"' + b"\\u001b" * (M // 6 - 10) + b'":1}',
    "long type": b'{"type":"' + b"\\u001b" * (M // 6 - 10) + b'"}',
    "long text": b'{"type":"log","level":"info","text":"' + b"x" * (M - 50) + b'"}',
    "blank": b" " * M,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_json_bomb_is_refused(name: str) -> None:
    assert len(BOMBS[name]) <= M
    with pytest.raises(ProtocolViolation):
        parsed(from_worker(), BOMBS[name])


QUBES_OF_JUNK = [b"{" + b",".join(b'"%x":0' % i for i in range(110)) + b"}"] * 400
JUNK = {
    "qubes": MANIFEST + b",".join(QUBES_OF_JUNK) + b"]}",
    "rules": b'{"type":"qube_settings","key":"a","firewall":[' + b",".join(QUBES_OF_JUNK) + b"]}",
    "refused": MANIFEST + b'],"refused":[' + b",".join(QUBES_OF_JUNK) + b"]}",
    "too many": MANIFEST + b",".join([b"{}"] * 100_000) + b"]}",
    "numbers": MANIFEST[:-1] + b'[{"tags":[' + b",".join([b"0"] * 150_000) + b"]}]}",
}


@pytest.mark.parametrize("name", JUNK)
def test_a_message_full_of_errors_costs_memory_in_proportion_to_its_size(name: str) -> None:
    assert len(JUNK[name]) > 250_000
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolViolation):
            parsed(from_worker(), JUNK[name])
        assert tracemalloc.get_traced_memory()[1] < 40 * len(JUNK[name])
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"null", b"1", b'"x"', b"[]", b"{}", b"[{}]", b'{"type":null}', b'{"type":1}',
        b'{"type":["finished"]}', b'{"type":{}}', b'{"type":"Finished","archive_bytes":1}',
        b'{"type":"finished\\u0000","archive_bytes":1}',
        b'{"type":"finished","archive_bytes":1}x', b'{"type":"finished","archive_bytes":1',
        b'{"type":"failed","type":"finished","archive_bytes":1}',
        b'{"type":"finished","archive_bytes":2,"archive_bytes":1}',
        b'{"type":"finished","archive_bytes":2,"archive\\u005fbytes":1}',
        b'{"type":"finished","archive_bytes":NaN}', b'{"type":"finished","archive_bytes":Infinity}',
        b'{"type":"finished","archive_bytes":inf}', b'{"type":"finished","archive_bytes":1e0}',
        b'{"type":"finished","archive_bytes":1.0}', b'{"type":"finished","archive_bytes":01}',
        b'{"type":"log","level":"info","text":"\xff"}', b'{"type":"log","level":"info","text":"\xc0\x80"}',
        b'{"type":"log","level":"info","text":"\xed\xa0\x80"}',
        b'{"type":"log","level":"info","text":"\x1b"}',
        b'{"type":"log","level":"info","text":"\\ud800"}',
        b'{"type":"log","level":"info","text":"\\udc00\\ud800"}',
        b'{"type":"log","level":"info","text":"\\ud800\\u0041"}',
        '{"type":"finished","archive_bytes":1}'.encode("utf-16"),
        b'\xef\xbb\xbf{"type":"finished","archive_bytes":1}',
    ],
)  # fmt: skip
def test_json_that_can_be_read_in_two_ways_is_refused(payload: bytes) -> None:
    refusal(payload)


def test_a_pair_of_surrogates_is_one_character() -> None:
    log = parsed(from_worker(), b'{"type":"log","level":"info","text":"\\ud83d\\ude00"}')
    assert isinstance(log, m.Log)
    assert log.text == "\U0001f600"


def test_no_list_of_a_message_is_longer_than_the_check_of_its_shape_allows() -> None:
    assert MAX_QUBES <= MAX_MEMBERS
    longest = [f"k{i}" for i in range(MAX_QUBES)]
    assert is_taken({**FULL["start"], "keys": longest})


def test_a_start_asks_for_something() -> None:
    assert is_taken({**FULL["start"], "keys": []})
    assert not is_taken({**FULL["start"], "keys": [], "here": []})


# --- Sizes ---------------------------------------------------------------------------------------

SIZES = {"manifest": 4 << 20, "qube_settings": 2 << 20, "start": 1 << 20}


@EACH
def test_a_message_is_no_larger_than_its_kind_may_be(kind: str) -> None:
    payload = json.dumps(FULL[kind]).encode()
    most = SIZES.get(kind, 64 << 10)
    assert parse(payload.ljust(most), kind) == parse(payload, kind)
    text = refusal(payload.ljust(most + 1), kind)
    assert re.search(f"of {most + 1} bytes, (more than the|where 1 to) {most} ", text)


def test_a_message_that_is_too_large_is_not_encoded() -> None:
    error = m.ErrorInfo(kind="bad-image", reason="é" * 1000)
    refused = tuple(m.RefusedQube(name="é" * 1000, error=error) for _ in range(1200))
    manifest = m.Manifest(backup_id="b", format=4, compression_filter="gzip", qubes=(), refused=refused)
    with pytest.raises(ProtocolViolation, match="more than the 4194304"):
        m.encode_message(manifest)


def test_what_must_always_fit_fits() -> None:
    text = "\U0001f600" * 1000
    error = m.ErrorInfo(kind="k" * 64, reason=text, qube=text, volume=text, advice=text, chunk=1 << 31)
    for message in (
        m.Open(passphrase=SecretStr("\x01" * 4096)),
        m.Start(mode="restore", keys=tuple(f"{i:064}" for i in range(MAX_QUBES))),
        m.Start(
            mode="restore",
            keys=(),
            here=tuple(
                m.QubeHere(key=f"{i:064}", volumes=("root", "private"), firewall=False)
                for i in range(MAX_QUBES)
            ),
        ),
        m.Log(level="warning", text=text, key="k" * 64),
        m.Failed(error=error),
        m.VolumeDone(key="k" * 64, volume="private", outcome="failed", error=error),
        m.QubeSettings(key="k" * 64, notes="\n" * 256_000, error=error),
    ):
        assert parse(m.encode_message(message), type(message).model_fields["type"].default) == message


# --- The passphrase ------------------------------------------------------------------------------


def test_the_passphrase_travels_and_is_shown_nowhere() -> None:
    message = m.Open(passphrase=SecretStr(PASSPHRASE))
    assert PASSPHRASE.encode() in m.encode_message(message)
    received = parsed(from_broker(), m.encode_message(message))
    assert isinstance(received, m.Open)
    assert received.passphrase.get_secret_value() == PASSPHRASE
    for shown in (repr(message), str(message), f"{message}", repr(message.model_dump()), repr(vars(message))):
        assert "hunter2" not in shown


@pytest.mark.parametrize(
    "fields",
    [
        {"passphrase": SecretStr(PASSPHRASE * 1000)},
        {"passphrase": SecretStr(PASSPHRASE + "\udc80")},
        {"passphrase": [PASSPHRASE]},
        {"passphrase": SecretStr("x"), "memory": PASSPHRASE},
        {"passphrase": SecretStr("x"), "compression_filter": PASSPHRASE},
        {"passphrase": SecretStr("x"), "other": PASSPHRASE},
        {"passphrase": SecretStr("x"), "protocol": PASSPHRASE},
    ],
)
def test_a_passphrase_is_not_in_the_error_of_a_model(fields: Json) -> None:
    with pytest.raises(ValidationError) as caught:
        m.Open(**fields)
    for shown in (str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))):
        assert "hunter2" not in shown


@pytest.mark.parametrize(
    "payload",
    [
        f'{{"type":"open","passphrase":"{PASSPHRASE}"'.encode(),
        f'{{"type":"open","passphrase":"{PASSPHRASE}\\ud800"}}'.encode(),
        f'{{"type":"open","passphrase":"{PASSPHRASE}","passphrase":"x"}}'.encode(),
        f'{{"type":"open","passphrase":["{PASSPHRASE}"]}}'.encode(),
        f'{{"type":"open","passphrase":"{PASSPHRASE * 400}"}}'.encode(),
        f'{{"type":"{PASSPHRASE}"}}'.encode(),
        f'{{"type":"open","{PASSPHRASE}":1,"passphrase":"x"}}'.encode(),
        f'"{PASSPHRASE}"'.encode(),
        PASSPHRASE.encode(),
    ],
)
def test_a_passphrase_is_not_in_a_violation(payload: bytes) -> None:
    assert "hunter2" not in refusal(payload, "open")


def test_a_passphrase_that_no_frame_can_carry_is_refused_when_the_message_is_made() -> None:
    with pytest.raises(ValidationError):
        m.Open(passphrase=SecretStr("caf\udce9"))


# --- Errors on the wire --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ERROR_KINDS)
def test_every_kind_of_error_survives_the_way(kind: str) -> None:
    error = ERROR_KINDS[kind]("the reason", qube="work", volume="root", chunk=7)
    failed = parsed(from_worker(), m.encode_message(m.Failed(error=m.ErrorInfo.of(error))))
    assert isinstance(failed, m.Failed)
    again = failed.error.to_error()
    assert type(again) is type(error)
    assert (again.reason, again.qube, again.volume, again.chunk, again.advice) == (
        error.reason, error.qube, error.volume, error.chunk, error.advice,
    )  # fmt: skip
    assert str(again) == str(error)


def test_an_error_without_a_place_has_none_on_the_other_side() -> None:
    again = m.ErrorInfo.of(NoSpace("full", advice="")).to_error()
    assert (again.qube, again.volume, again.chunk, again.advice) == (None, None, None, "")


def test_a_kind_that_is_not_known_here_is_a_plain_error() -> None:
    again = m.ErrorInfo(kind="from-the-future", reason="r").to_error()
    assert type(again) is RestoreError


def test_an_error_is_cut_and_cleaned_before_it_travels() -> None:
    nasty = "\x1b[2J\ud800\u202e" + "é" * 2000
    info = m.ErrorInfo.of(BadImage(nasty, qube=nasty, volume=nasty, advice=nasty, chunk=1 << 31))
    for text in (info.reason, info.qube, info.volume, info.advice):
        assert text == "\ufffd[2J\ufffd\ufffd" + "é" * 993 + "\u2026"
    assert info.chunk == 1 << 31
    m.encode_message(m.Failed(error=info))


@pytest.mark.parametrize("chunk", [(1 << 31) + 1, 10**30, -1])
def test_a_chunk_number_that_cannot_travel_is_left_out(chunk: int) -> None:
    assert m.ErrorInfo.of(BadImage("r", chunk=chunk)).chunk is None
