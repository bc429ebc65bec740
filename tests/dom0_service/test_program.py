"""The program itself: who calls, what it says where, signals, exit statuses."""

import contextlib
import inspect
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from qubes_restore_svc.dom0_service.program import caller_of, main
from qubes_restore_svc.errors import UsageError
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.report import Report
from tests.support.backup_writer import PASSPHRASE
from tests.support.fixtures import REPOSITORY
from tests.support.wire import from_dom0, parsed

from .parts import NO_WORKER
from .support import Bed, Json, frame, open_message

REMOTE = {"QREXEC_REMOTE_DOMAIN": "sys-gui", "QREXEC_SERVICE_FULL_NAME": "restore.Start+"}


@pytest.mark.parametrize(
    "environment",
    [
        {"QREXEC_REMOTE_DOMAIN": "sys-gui"},
        {"QREXEC_REMOTE_DOMAIN": "sys-gui", "QREXEC_SERVICE_FULL_NAME": "restore.Start"},
        {**REMOTE, "QREXEC_SERVICE_ARGUMENT": ""},
    ],
)
def test_who_calls_is_what_qrexec_says(environment: dict[str, str]) -> None:
    assert caller_of(environment) == "sys-gui"


@pytest.mark.parametrize(
    "name", ["", "dom0", "default", "none", "Domain-0", "../x", "a b", "x\n", "1", "x" * 32]
)
def test_without_the_name_of_a_qube_nothing_is_done(name: str) -> None:
    with pytest.raises(UsageError):
        caller_of({"QREXEC_REMOTE_DOMAIN": name})
    with pytest.raises(UsageError):
        caller_of({})


def test_an_argument_is_refused() -> None:
    for more in ({"QREXEC_SERVICE_ARGUMENT": "x"}, {"QREXEC_SERVICE_FULL_NAME": "restore.Start+x"}):
        with pytest.raises(UsageError, match="no argument"):
            caller_of({**REMOTE, **more})


def start(
    bed: Bed, words: Sequence[str], environment: dict[str, str], fds: Sequence[int] = ()
) -> "subprocess.Popen[bytes]":
    bare = {name: value for name, value in os.environ.items() if not name.startswith("QREXEC_")}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.dom0_service.driver", str(bed.folder), "threads", *words],
        env={**bare, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
        pass_fds=fds,
    )


def hear(process: "subprocess.Popen[bytes]") -> c.BrokerAnswer:
    assert process.stdout is not None
    size = struct.unpack("!I", process.stdout.read(4))[0]
    return parsed(from_dom0(), process.stdout.read(size))


def say(process: "subprocess.Popen[bytes]", message: Json) -> None:
    assert process.stdin is not None
    process.stdin.write(frame(message))
    process.stdin.flush()


def hear_plan(process: "subprocess.Popen[bytes]") -> None:
    while not isinstance(hear(process), c.Plan):
        pass


def test_a_verification_from_a_qube(bed: Bed) -> None:
    process = start(bed, ["remote", "restore.Verify"], REMOTE)
    say(process, open_message(bed.backup, "verify"))
    hear_plan(process)
    say(process, {"type": "confirm", "plan": 1})
    answers = [hear(process)]
    while not isinstance(answers[-1], Report):
        answers.append(hear(process))
    assert answers[-1].status == 0
    rest, errors = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, b"")
    assert errors.decode().splitlines() == [
        "restore.Verify for sys-gui: verify of a backup in sys-gui",
        "restore.Verify for sys-gui: ended: status 0",
    ]
    bed.check_nothing_is_left()


@pytest.mark.parametrize(
    ("words", "environment", "status", "line"),
    [
        (["remote", "restore.Start"], {}, 1, "restore.Start: qrexec does not say which qube calls"),
        (["remote", "restore.Start"], {"QREXEC_REMOTE_DOMAIN": "\x1b[2J"}, 1,
         "restore.Start: qrexec does not say which qube calls"),
        (["remote", "restore.Start"], {**REMOTE, "QREXEC_SERVICE_ARGUMENT": "x"}, 1,
         "restore.Start: the service takes no argument"),
        (["remote", "restore.Session"], REMOTE, 2,
         "expected one of restore.Start, restore.Verify, restore.List"),
        (["local"], {}, 2, "expected one of restore.Start, restore.Verify, restore.List"),
        *((["local", "restore.Start", word], {}, 2, "expected archive=DESCRIPTOR or passphrase=DESCRIPTOR")
          for word in ("more", "archive=", "archive=1", "passphrase=-3", "archive=999", "config=5")),
        (["remote", "restore.Start", "archive=0"], REMOTE, 2,
         "expected one of restore.Start, restore.Verify, restore.List"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_call_ends_with_a_line(
    bed: Bed, words: list[str], environment: dict[str, str], status: int, line: str
) -> None:
    process = start(bed, words, environment)
    answer, errors = process.communicate(frame(open_message(bed.backup)), timeout=60)
    assert (process.returncode, answer, errors.decode()) == (status, b"", f"{line}\n")
    assert not bed.parts.target.exists()


def test_a_program_of_dom0_has_all_rights_whatever_the_environment_says(bed: Bed) -> None:
    bed.configure("grants: {default: {verify_only: true}}")
    process = start(bed, ["local", "restore.Start"], REMOTE)
    say(process, open_message(bed.backup, choice={"names": ["vault"]}, location={"text": str(bed.backup)}))
    hear_plan(process)
    say(process, {"type": "confirm", "plan": 1})
    while not isinstance(answer := hear(process), Report):
        pass
    assert answer.status == 0
    _, errors = process.communicate(timeout=60)
    assert "restore of a backup in dom0" in errors.decode()
    assert bed.restored == ["vault"]


@contextlib.contextmanager
def handing_over(bed: Bed) -> "Iterator[tuple[subprocess.Popen[bytes], socket.socket]]":
    """The program with the backup and the socket for the passphrase, of which this is the other end."""
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    with bed.backup.open("rb") as backup, ours, theirs:
        fds = (backup.fileno(), theirs.fileno())
        words = ["local", "restore.Verify", f"archive={fds[0]}", f"passphrase={fds[1]}"]
        process = start(bed, words, {}, fds)
        theirs.close()
        # Where it waits for what never comes, the test fails and does not wait for it.
        patience = threading.Timer(15, process.kill)
        patience.start()
        try:
            yield process, ours
            process.communicate(timeout=60)
        finally:
            patience.cancel()
            process.kill()
    assert process.returncode == 0
    bed.check_nothing_is_left()


HANDED = {"passphrase": "not this one", "location": {"qube": "dom0", "text": "-"}}


def test_a_backup_and_a_passphrase_can_be_handed_over(bed: Bed) -> None:
    with handing_over(bed) as (process, passphrase):
        say(process, open_message(Path("-"), "verify", **HANDED))
        assert passphrase.recv(9) == b"?"
        passphrase.sendall(PASSPHRASE.encode())
        passphrase.shutdown(socket.SHUT_WR)
        hear_plan(process)
        say(process, {"type": "confirm", "plan": 1})
        while not isinstance(answer := hear(process), Report):
            pass
        assert answer.status == 0


@pytest.mark.parametrize(
    ("given", "kind"),
    [(b"", "cancelled"), (b"\xff", "usage"), (b"x" * 40_000, "usage"), (b"x", "wrong-passphrase")],
)
def test_a_passphrase_that_is_none_ends_the_call(bed: Bed, given: bytes, kind: str) -> None:
    with handing_over(bed) as (process, passphrase):
        say(process, open_message(Path("-"), "verify", **HANDED))
        assert passphrase.recv(9) == b"?"
        with contextlib.suppress(OSError):
            passphrase.sendall(given)
            passphrase.shutdown(socket.SHUT_WR)
        while not isinstance(answer := hear(process), c.Refused):
            pass
        assert answer.error.kind == kind


def test_whatever_can_be_refused_is_refused_before_the_passphrase_is_wanted(bed: Bed) -> None:
    (bed.folder / NO_WORKER).touch()
    with handing_over(bed) as (process, passphrase):
        say(process, open_message(Path("-"), "verify", **HANDED))
        answer = hear(process)
        assert isinstance(answer, c.Refused) and answer.error.kind == "worker-missing"
        assert passphrase.recv(9) == b""


def test_a_service_that_waits_for_the_passphrase_ends_with_its_client(bed: Bed) -> None:
    with handing_over(bed) as (process, passphrase):
        say(process, open_message(Path("-"), "verify", **HANDED))
        assert passphrase.recv(9) == b"?"
        assert process.stdin is not None
        process.stdin.close()
        answer = hear(process)
        assert isinstance(answer, c.Refused) and answer.error.kind == "cancelled"
        process.stdin = None


async def test_what_stands_for_the_backup_that_is_handed_over_is_nothing_to_a_qube(bed: Bed) -> None:
    """No argument of a qrexec call, and nothing in a message, leads to a descriptor."""
    async with bed.call() as client:
        client.say(open_message(Path("-"), "verify", location={"qube": "dom0", "text": "-"}))
        assert (await client.refused()).error.kind == "not-granted"


def test_no_service_of_qrexec_starts_the_program_with_all_rights() -> None:
    for path in (REPOSITORY / "qubes-rpc").iterdir():
        (line,) = [line for line in path.read_text().splitlines() if line.startswith("exec")]
        assert line == f"exec /usr/bin/python3 -I -m qubes_restore_svc.dom0_service {path.name}"
    entry = (REPOSITORY / "qubes_restore_svc" / "dom0_service" / "__main__.py").read_text()
    assert "import main\n    main(sys.argv[1:])" in entry
    assert not re.search(r"child|handed|DOM0", entry + inspect.getsource(main))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_call_in_good_order(bed: Bed, number: signal.Signals) -> None:
    process = start(bed, ["remote", "restore.Start"], REMOTE)
    say(process, open_message(bed.backup))
    hear_plan(process)
    process.send_signal(number)
    while not isinstance(answer := hear(process), c.Refused):
        pass
    assert answer.error.reason == "dom0 ended it"
    process.communicate(timeout=60)
    assert process.returncode == 0
    bed.check_nothing_is_left()


def test_a_client_that_is_gone_leaves_status_1_and_no_traceback(bed: Bed) -> None:
    process = start(bed, ["remote", "restore.Start"], REMOTE)
    say(process, open_message(bed.backup))
    hear_plan(process)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stdin.close()
    errors = process.stderr.read().decode()
    assert process.wait(15) == 1
    assert errors.splitlines()[-1] == "restore.Start for sys-gui: ended: refused (cancelled)"
    assert "Traceback" not in errors
    process.stderr.close()
    bed.check_nothing_is_left()


def test_a_file_for_standard_input_is_no_call(bed: Bed) -> None:
    with open(os.devnull, "r+b") as nothing:
        done = subprocess.run(
            [sys.executable, "-m", "tests.dom0_service.driver", str(bed.folder), "local", "restore.List"],
            stdin=nothing, stdout=nothing, stderr=subprocess.PIPE, cwd=REPOSITORY, check=False, timeout=30,
        )  # fmt: skip
    assert done.returncode == 1
    assert b"pipe or a socket" in done.stderr
    assert b"Traceback" not in done.stderr


_CHATTERBOX = """
import os, subprocess, sys
from pathlib import Path
from qubes_restore_svc.dom0_service.program import carry_out
from tests.dom0_service.parts import Parts, places

class Loud(Parts):
    def __call__(self, *arguments, **keywords):
        print("from the interpreter", flush=True)
        os.write(1, b"from below")
        subprocess.run(["echo", "from a child"], check=True)
        assert sys.stdin.read() == ""
        return super().__call__(*arguments, **keywords)

folder = Path(sys.argv[1])
carry_out("restore.List", "sys-gui", places(folder), Loud(folder))
"""


def test_nothing_but_the_protocol_is_on_standard_output_or_read_from_standard_input(bed: Bed) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _CHATTERBOX, str(bed.folder)],
            stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.PIPE, cwd=REPOSITORY,
        )  # fmt: skip
        theirs.close()
        ours.sendall(frame(open_message(bed.backup, "list")))
        with ours.makefile("rb") as stream:
            said = stream.read()
        _, errors = process.communicate(timeout=60)
    assert b"from " not in said
    for words in (b"from the interpreter", b"from below", b"from a child"):
        assert words in errors
    assert process.returncode == 0


def test_the_passphrase_is_in_no_command_line_and_no_core_dump(bed: Bed) -> None:
    process = start(bed, ["remote", "restore.Start"], REMOTE)
    say(process, open_message(bed.backup))
    hear_plan(process)
    folder = Path(f"/proc/{process.pid}")
    for name in ("cmdline", "environ"):
        assert PASSPHRASE.encode() not in (folder / name).read_bytes()
    limits = (folder / "limits").read_text().splitlines()
    assert any(line.split()[:6] == ["Max", "core", "file", "size", "1", "1"] for line in limits) or any(
        line.split()[:6] == ["Max", "core", "file", "size", "0", "0"] for line in limits
    )
    say(process, {"type": "cancel"})
    _, errors = process.communicate(timeout=60)
    assert PASSPHRASE not in errors.decode()
    assert PASSPHRASE not in json.dumps(bed.reports)
