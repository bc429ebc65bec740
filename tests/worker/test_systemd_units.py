"""The worker's units: systemd understands them, they promise what they should, and a worker can live so."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..support.fixtures import REPOSITORY
from ..support.systemd import started_systemd

UNITS = REPOSITORY / "systemd"
SOCKET = UNITS / "qubes-restore-worker.socket"
SERVICE = UNITS / "qubes-restore-worker.service"

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def options(unit: Path, section: str) -> dict[str, list[str]]:
    """The options of a section, each with all of its values, which an empty one takes back."""
    found: dict[str, list[str]] = {}
    current = ""
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            current = line.strip("[]")
        elif line and not line.startswith("#") and current == section:
            name, _, value = line.partition("=")
            found[name] = [*found.get(name, []), value] if value else []
    return found


def only(unit: Path, section: str, option: str) -> str:
    (value,) = options(unit, section)[option]
    return value


@needs_systemd
def test_systemd_understands_the_units() -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", SOCKET, SERVICE], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
def test_the_service_is_exposed_as_little_as_it_can_be() -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=12", "--no-pager", SERVICE],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout


def test_nobody_but_root_can_call() -> None:
    assert only(SOCKET, "Socket", "ListenStream") == "/run/qubes-restore-worker/calls.sock"
    assert only(SOCKET, "Socket", "SocketMode") == "0600"
    assert only(SOCKET, "Socket", "SocketUser") == "root"
    assert "Accept" not in options(SOCKET, "Socket")
    for service in ("Session", "Volume", "Archive"):
        config = REPOSITORY / "rpc-policy" / "rpc-config" / f"restore.{service}"
        assert "force-user = 'root'" in config.read_text().splitlines()


def test_there_is_one_worker_in_the_life_of_a_vm() -> None:
    assert only(SERVICE, "Unit", "StartLimitIntervalSec") == "infinity"
    assert only(SERVICE, "Unit", "StartLimitBurst") == "1"
    assert only(SERVICE, "Service", "Restart") == "no"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("DynamicUser", "yes"),
        ("NoNewPrivileges", "yes"),
        ("CapabilityBoundingSet", ""),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
        ("PrivateNetwork", "yes"),
        ("RestrictAddressFamilies", "AF_UNIX"),
        ("MemoryDenyWriteExecute", "yes"),
        ("LimitFSIZE", "0"),
        ("LimitCORE", "1"),
        ("MemorySwapMax", "0"),
    ],
)
def test_what_the_threat_model_counts_on_is_there(option: str, value: str) -> None:
    assert options(SERVICE, "Service")[option] == ([value] if value else [])


def test_nothing_can_be_staged() -> None:
    covered = " ".join(options(SERVICE, "Service")["InaccessiblePaths"]).split()
    assert {"/tmp", "/var/tmp", "/dev/shm"} <= set(covered)
    assert not {
        "ReadWritePaths",
        "StateDirectory",
        "CacheDirectory",
        "RuntimeDirectory",
        "LogsDirectory",
    } & set(options(SERVICE, "Service"))


def test_the_preset_enables_the_socket_and_not_the_service() -> None:
    (preset,) = UNITS.glob("*.preset")
    lines = [line for line in preset.read_text().splitlines() if not line.startswith("#")]
    assert lines == [f"enable {SOCKET.name}"]


def test_the_worker_can_set_its_limits_inside_those_of_the_service() -> None:
    command = only(SERVICE, "Service", "ExecStart").split()
    assert command == ["/usr/bin/python3", "-I", "-B", "-m", "qubes_restore_svc.worker", "--listen"]
    inside = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]);"
        "resource.setrlimit(resource.RLIMIT_CORE, (int(sys.argv[2]),) * 2);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2);"
        "from qubes_restore_svc.worker.__main__ import _restrict_process; _restrict_process();"
        "print(resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_FSIZE))"
    )
    limits = [only(SERVICE, "Service", name) for name in ("LimitCORE", "LimitFSIZE")]
    done = subprocess.run(
        [sys.executable, "-I", "-B", "-c", inside, REPOSITORY, *limits],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.stdout, done.stderr) == ("(1, 1) (0, 0)\n", "")


# --- The service, started by a systemd ---------------------------------------------------------------

#: In the worker's place: tells whoever calls what it sees and what it can do.
PROBE = """
import ctypes, errno, json, os, socket
def attempt(action, *arguments):
    try:
        action(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
libc = ctypes.CDLL(None, use_errno=True)
def queue():
    if libc.mq_open(b"/restore-test", os.O_RDWR | os.O_CREAT, 0o600, None) < 0:
        raise OSError(ctypes.get_errno(), "")
places = ["/", "/dev", "/dev/shm", "/run", "/run/lock", "/tmp", "/var", "/var/tmp"]
answer = {
    "mounts": open("/proc/self/mountinfo").read(),
    "files": {place: attempt(os.open, place + "/x", os.O_WRONLY | os.O_CREAT) for place in places},
    "queue": attempt(queue),
    "memory": attempt(os.memfd_create, "x"),
}
connection, _ = socket.socket(fileno=3).accept()
connection.sendall(json.dumps(answer).encode())
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a program finds that the unit has started in the worker's place."""
    units = tmp_path_factory.mktemp("units")
    shutil.copytree(UNITS, units, dirs_exist_ok=True)
    changes = units / f"{SERVICE.name}.d" / "test.conf"
    changes.parent.mkdir()
    # As text, because a file would have to lie where the service sees nothing.
    text = json.dumps(f"exec(bytes.fromhex('{PROBE.encode().hex()}'))")
    changes.write_text(
        f"[Service]\nSupplementaryGroups=\nExecStart=\nExecStart=/usr/bin/python3 -I -c {text}\n"
    )
    with started_systemd(units, SOCKET.name, only(SOCKET, "Socket", "ListenStream")) as (_, connection):
        connection.settimeout(20)
        yield json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))


def test_the_started_service_can_write_nowhere(started: dict[str, Any]) -> None:
    mounts = [line.split() for line in started["mounts"].splitlines()]
    writable = {fields[4] for fields in mounts if "rw" in fields[5].split(",")}
    # Nodes of devices, which belong to root, and processes: places where no file can be made.
    assert writable <= {"/dev", "/dev/console", "/dev/pts", "/proc"}
    assert "done" not in started["files"].values()


def test_the_started_service_has_no_memory_and_no_messages_that_outlive_it(started: dict[str, Any]) -> None:
    assert (started["queue"], started["memory"]) == ("EPERM", "EPERM")
