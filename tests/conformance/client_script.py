"""What a client library does, as JSON: run once with the real `qubesadmin`, once with the stand-in.

Strategy: a server of its own takes down each request and gives it the next prepared answer; programs that
would
be run take down their arguments and what they are given. Usage: client_script.py DIRECTORY, which becomes the
one in which the stand-in looks for all that is at fixed places in a real dom0.
"""

import importlib
import inspect
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

MODULES = (
    "app",
    "base",
    "devices",
    "device_protocol",
    "exc",
    "features",
    "firewall",
    "label",
    "storage",
    "tags",
    "vm",
)
RECORD = """#!/bin/sh
{ echo "$QREXEC_REQUESTED_TARGET" "$@"; cat; echo "|"; } >> DIRECTORY/programs
printf "0\\0"
"""
LIST = b"""0\0dom0 class=AdminVM state=Running uuid=0
work class=AppVM state=Halted uuid=1
t class=TemplateVM state=NA
"""
RUNNING, HALTED = (f"0\0mem=0 power_state={state}".encode() for state in ("Running", "Halted"))
INFO = b"""0\0pool=lvm
vid=vm-work
size=7
usage=3
rw=True
source=
save_on_stop=True
snap_on_start=False
"""
VOLUMES = b"0\0root\nprivate\n"
REFUSAL = b"2\0QubesValueError\0\0no %s\0"
#: What a property is said to be.
VALUES = (
    b"default=True type=vm t", b"default=True type=vm ", b"default=False type=int 7",
    b"default=False type=int ",
    b"default=True type=bool True", b"default=True type=bool ", b"default=False type=str x y",
    b"default=True type=label red",
)  # fmt: skip
CREATIONS: tuple[dict[str, object], ...] = (
    {},
    {"template": "t"},
    {"template": None, "pool": "lvm"},
    {"pools": {"root": "b", "private": "a"}},
    {"pool": "a", "pools": {"root": "b"}},
)
SERVICES: tuple[tuple[dict[str, Any], bytes], ...] = (
    ({}, b"0\0"),
    ({"autostart": False}, RUNNING),
    ({"autostart": False}, HALTED),
    ({"user": "root", "connect_timeout": 9}, b"0\0"),
    ({"filter_esc": True, "prefix_data": b"x"}, b"0\0"),
    ({"wait": False}, b"0\0"),
    ({"wait": False, "localcmd": "x"}, b"0\0"),
)
RULES = (
    "action=accept", "action=maybe", "proto=tcp", "action=drop dst4=1.2.3.4", "action=accept dst4=0.0.0.0/0",
    "action=accept dsthost=x.y", "action=accept dsthost=X", "action=accept dst6=::/0 proto=udp dstports=1-2",
    "action=accept proto=tcp dstports=70000", "action=accept proto=icmp icmptype=8",
    "action=accept icmptype=8",
    "action=accept proto=icmp icmptype=256", "action=accept expire=5", "action=accept specialtarget=dns",
    "action=accept comment=x=y z", "action=accept foo=x", "action=accept dst4=1.2.3.4/33",
    "action=accept proto=tcp dstports=2-1", "action=accept proto=tcp dstports=1-2-3",
)  # fmt: skip
#: The class of a device, how it is attached, an option.
ASSIGNMENTS = (
    ("pci", "required", ""), ("usb", "auto-attach", ""), ("block", "auto-attach", "b c"),
    ("pci", "auto-attach", ""), ("mic", "required", ""), ("usb", "manual", "ü"),
)  # fmt: skip


class Server(threading.Thread):
    """qubesd's end of the socket."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.requests: list[str] = []
        self.answers: list[bytes] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()

    def run(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection, connection.makefile("rb") as request:
                self.requests.append(request.read().decode("latin-1"))
                connection.sendall(self.answers.pop(0) if self.answers else b"0\0")


def _clone(app: Any) -> None:
    app.domains["work"].volumes["private"].clone(app.domains["t"].volumes["root"])


def scenarios(admin: Any, directory: Path) -> dict[str, tuple[Callable[[Any], Any], list[bytes]]]:
    """Name: what is done with a `Qubes`, and the answers that it meets."""
    found: dict[str, tuple[Callable[[Any], Any], list[bytes]]] = {
        "names": (lambda app: sorted(map(str, app.domains)), [LIST]),
        "contains": (lambda app: ("work" in app.domains, "x" in app.domains), [LIST]),
        "missing": (lambda app: app.domains["x"], [LIST]),
        "get": (lambda app: (app.domains.get("x", 5), str(app.domains.get("work"))), [LIST]),
        "klass": (lambda app: app.domains["work"].klass, [LIST]),
        "delete": (lambda app: app.domains.__delitem__("work"), []),
        "labels": (lambda app: [str(label) for label in app.labels], [b"0\0red\nblue\n"]),
        "label": (lambda app: app.get_label("red").name, [b"0\0red\nblue\n"]),
        "no label": (lambda app: app.get_label("pink"), [b"0\0red\n"]),
        "pools": (lambda app: ("lvm" in app.pools, app.pools["lvm"].size, app.pools["lvm"].usage),
                  [b"0\0lvm\n", b"0\0data_size=9\ndata_usage=4\n", b"0\0data_size=9\ndata_usage=4\n"]),
        "pool without size": (lambda app: (app.pools["lvm"].size, app.pools["lvm"].usage), [b"0\0lvm\n"]),
        "default_template": (lambda app: str(app.default_template), [b"0\0default=False type=vm t"]),
        "default_pool": (lambda app: app.default_pool, [b"0\0default=True type=str lvm"]),
        "notes": (lambda app: app.domains["work"].get_notes(), [LIST, "0\0grüße".encode()]),
        "set notes": (lambda app: app.domains["work"].set_notes("grüße"), [LIST]),
        "tags": (lambda app: list(app.domains["work"].tags), [LIST, b"0\0a\nb\n"]),
        "has tag": (lambda app: "a" in app.domains["work"].tags, [LIST, b"0\x001"]),
        "add tag": (lambda app: app.domains["work"].tags.add("a"), [LIST]),
        "discard tag": (lambda app: app.domains["work"].tags.discard("a"),
                        [LIST, b"2\0QubesTagNotFoundError\0\0no\0"]),
        "remove tag": (lambda app: app.domains["work"].tags.remove("a"),
                       [LIST, b"2\0QubesTagNotFoundError\0\0no\0"]),
        "features": (lambda app: list(app.domains["work"].features), [LIST, b"0\0a\nb\n"]),
        "feature": (lambda app: app.domains["work"].features["a"], [LIST, b"0\x001"]),
        "no feature": (lambda app: app.domains["work"].features.get("a", "x"),
                       [LIST, b"2\0QubesFeatureNotFoundError\0\0no\0"]),
        "check feature": (lambda app: app.domains["work"].features.check_with_template("a"), [LIST,
        b"0\x001"]),
        "set firewall": (lambda app: setattr(app.domains["work"].firewall, "rules", []), [LIST]),
        "firewall": (lambda app: [rule.rule for rule in app.domains["work"].firewall.rules],
                     [LIST, b"0\0action=accept dst4=1.2.3.0/24 comment=a b=c\naction=drop\n"]),
        "volumes": (lambda app: sorted(app.domains["work"].volumes), [LIST, b"0\0root\nprivate\n"]),
        "clone": (_clone, [LIST, VOLUMES, VOLUMES, b"0\0token"]),
        "no clone": (_clone, [LIST, VOLUMES, VOLUMES, REFUSAL]),
        "revisions": (lambda app: app.domains["work"].volumes["private"].revisions,
                      [LIST, VOLUMES, b"0\x001-back\n2-back\n"]),
        "start": (lambda app: app.domains["work"].start(), [LIST]),
        "kill": (lambda app: app.domains["work"].kill(), [LIST]),
        "shutdown": (lambda app: app.domains["work"].shutdown(force=True, wait=True), [LIST]),
        "running": (lambda app: app.domains["work"].is_running(), [LIST, RUNNING]),
        "halted": (lambda app: app.domains["work"].is_running(), [LIST, HALTED]),
        "gone": (lambda app: app.domains["work"].is_running(), [LIST, b""]),
        "property list": (lambda app: app.domains["work"].property_list(), [LIST, b"0\0netvm\nlabel\n"]),
        "too long": (lambda app: app.qubesd_call("dom0", "admin.x", "y", b"z"), [b""]),
    }  # fmt: skip
    for value in VALUES:
        answers = [LIST, b"0\0" + value]
        found[f"read {value!r}"] = (lambda app: str(app.domains["work"].anything), answers)
        found[f"is default {value!r}"] = (
            lambda app: app.domains["work"].property_is_default("anything"),
            list(answers),
        )
    for written in ("x", None, True, 5, "", admin.DEFAULT):
        name = "default" if written is admin.DEFAULT else repr(written)
        found[f"write {name}"] = (partial(write, value=written), [LIST])
    for arguments in CREATIONS:
        found[f"create {arguments}"] = (partial(create, arguments=arguments), [b"0\0", LIST])
    found["create with a blank"] = (lambda app: app.add_new_vm("AppVM", "a b", "red"), [])
    for use in (look_at, grow, clear):
        found[f"volume {use.__name__}"] = (use, [LIST, b"0\0private\n", *[INFO] * 5])
    found["import"] = (partial(import_data, directory=directory), [LIST, b"0\0private\n"])
    for options, state in SERVICES:
        found[f"service {options} {state!r}"] = (partial(call_service, options=options), [LIST, state])
    kinds = [name for name in vars(admin.exc) if name.startswith(("Qubes", "Device", "Storage", "Backup"))]
    for kind in (*kinds, "ValueError", "KeyError", "SystemExit", "NobodyError", "Nobody", "OSError"):
        for text in ("no", "50% full"):
            found[f"{kind}: {text}"] = (start, [LIST, f"2\0{kind}\0\0{text}\0".encode()])
    for answer in (b"", b"1\0x\0", b"nonsense", REFUSAL + b"7\0", REFUSAL + b"x\0y\0"):
        found[f"answer {answer!r}"] = (start, [LIST, answer])
        found[f"answer {answer!r} to a property"] = (lambda app: app.domains["work"].netvm, [LIST, answer])
        found[f"answer {answer!r} to a change"] = (partial(write, value="x"), [LIST, answer])
    for rule in RULES:
        found[f"rule {rule}"] = (partial(make_rule, rule=rule), [])
    for bus, mode, option in ASSIGNMENTS:
        found[f"assign {bus} {mode} {option}"] = (partial(assign, bus=bus, mode=mode, option=option), [])
    return found


def start(app: Any) -> None:
    app.domains["work"].start()


def write(app: Any, value: object) -> None:
    app.domains["work"].anything = value


def create(app: Any, arguments: dict[str, object]) -> object:
    return app.add_new_vm("AppVM", name="work", label="red", **arguments).name


def look_at(app: Any) -> object:
    volume = app.domains["work"].volumes["private"]
    return volume.pool, volume.size, volume.save_on_stop, volume.rw, volume.source


def grow(app: Any) -> None:
    app.domains["work"].volumes["private"].resize(3)


def clear(app: Any) -> None:
    app.domains["work"].volumes["private"].clear_data()


def import_data(app: Any, directory: Path) -> object:
    (directory / "data").write_bytes(b"data")
    with (directory / "data").open("rb") as stream:
        app.domains["work"].volumes["private"].import_data_with_size(stream, 4)
        return stream.closed


def call_service(app: Any, options: dict[str, Any]) -> object:
    with app.domains["work"].run_service("a.Service+x", stderr=subprocess.DEVNULL, **options) as process:
        process.communicate(b"in")
        return process.returncode


def make_rule(_app: Any, rule: str) -> object:
    return importlib.import_module("qubesadmin.firewall").Rule(rule).rule


def assign(app: Any, bus: str, mode: str, option: str) -> None:
    make = importlib.import_module("qubesadmin.device_protocol").DeviceAssignment.new
    backend = app.domains.get_blind("sys-usb")
    options = {"option": option} if option else {}
    assignment = make(backend, "1-2.3", bus, device_id=None, options=options, mode=mode)
    app.domains.get_blind("work").devices[bus].assign(assignment)


def signatures() -> dict[str, list[list[str]]]:
    """Every public function and property of every public class: its parameters, their kinds and defaults."""
    found: dict[str, list[list[str]]] = {}
    for module in MODULES:
        loaded = importlib.import_module(f"qubesadmin.{module}")
        for name, kind in vars(loaded).items():
            if not inspect.isclass(kind) or name.startswith("_") or kind.__module__ != loaded.__name__:
                continue
            found[f"{module}.{name}"] = []
            for member in dir(kind):
                value = inspect.getattr_static(kind, member)
                if member.startswith("_") or hasattr(object, member):
                    continue
                function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
                is_ours = inspect.isfunction(function)
                parameters = inspect.signature(function).parameters.values() if is_ours else ()
                found[f"{module}.{name}.{member}"] = [
                    [parameter.name, str(parameter.kind), _default(parameter)] for parameter in parameters
                ]
    return found


def _default(parameter: inspect.Parameter) -> str:
    return (
        "none"
        if parameter.default is parameter.empty
        else str(getattr(parameter.default, "value", parameter.default))
    )


def main() -> None:
    directory = Path(sys.argv[1])
    os.environ["QUBES_EMULATION"] = str(directory)
    admin: Any = importlib.import_module("qubesadmin")
    (directory / "rpc").mkdir()
    for program in ("qrexec-client", "rpc/admin.vm.volume.ImportWithSize"):
        (directory / program).write_text(RECORD.replace("DIRECTORY", str(directory)))
        (directory / program).chmod(0o755)
    admin.config.QUBESD_SOCKET = str(directory / "qubesd.sock")
    admin.config.QREXEC_CLIENT = str(directory / "qrexec-client")
    admin.config.QREXEC_SERVICES_DIR = str(directory / "rpc")
    server = Server(directory / "qubesd.sock")
    server.start()
    outcome: dict[str, object] = {}
    for name, (action, answers) in scenarios(admin, directory).items():
        server.requests, server.answers = [], list(answers)
        (directory / "programs").write_text("")
        try:
            result: object = repr(action(admin.app.QubesLocal()))
        except BaseException as error:  # noqa: BLE001 # all of it is what is compared
            kinds = [kind.__name__ for kind in type(error).__mro__ if not kind.__name__.startswith("_")]
            result = [kinds, str(error)]
        outcome[name] = [result, server.requests, (directory / "programs").read_text()]
    print(json.dumps({"calls": outcome, "signatures": signatures()}))


if __name__ == "__main__":
    main()
