"""The worker's units: systemd understands them, they promise what they should, and a worker can live so."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.fixtures import REPOSITORY

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
