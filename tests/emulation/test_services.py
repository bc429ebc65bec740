"""A domain runs its services as the agent does: executables, sockets, daemons, configuration."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .bench import Bench, alive, open_bench, wait_until
from .domain import Domain

ECHO = "cat"
SAY_ALL = 'echo "$1|$QREXEC_SERVICE_ARGUMENT|$QREXEC_SERVICE_FULL_NAME|$QREXEC_REMOTE_DOMAIN|$#"'


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with open_bench(tmp_path) as opened:
        yield opened


def test_an_executable_service_gets_the_stream_and_gives_its_exit_code(bench: Bench) -> None:
    bench.service("vault", "test.Echo", "cat; exit 3")
    assert bench.result("work", "vault", "test.Echo", b"hello") == (3, b"hello", b"")
    assert bench.result("dom0", "vault", "test.Echo", b"hello") == (3, b"hello", b"")


def test_an_executable_service_learns_who_calls_and_with_what(bench: Bench) -> None:
    bench.service("vault", "test.Say", SAY_ALL)
    assert bench.result("work", "vault", "test.Say+a+b")[1] == b"a+b|a+b|test.Say+a+b|work|1\n"
    assert bench.result("work", "vault", "test.Say")[1] == b"||test.Say+|work|0\n"
    assert bench.result("dom0", "vault", "test.Say+x")[1] == b"x|x|test.Say+x|dom0|1\n"
    assert bench.result("dom0", "vault", "test.Say+")[1] == b"||test.Say+|dom0|0\n"


def test_a_service_file_with_the_argument_comes_first(bench: Bench) -> None:
    bench.service("vault", "test.Say", "echo general")
    bench.service("vault", "test.Say+x", "echo special")
    assert bench.result("work", "vault", "test.Say+x")[1] == b"special\n"
    assert bench.result("work", "vault", "test.Say+y")[1] == b"general\n"


@pytest.mark.parametrize(
    ("caller", "called", "descriptor"),
    [
        ("work", "test.Socket+a.b", b"test.Socket+a.b work\0"),
        ("work", "test.Socket", b"test.Socket+ work\0"),
        ("dom0", "test.Socket+a.b", b"test.Socket+a.b dom0\0"),
        ("dom0", "test.Socket+", b"test.Socket+ dom0\0"),
        ("dom0", "test.Socket", b"test.Socket dom0\0"),
    ],
)
def test_a_socket_service_gets_its_descriptor_first_and_always_exits_with_0(
    bench: Bench, caller: str, called: str, descriptor: bytes
) -> None:
    with (
        bench.socket_service("vault", "test.Socket") as listener,
        bench.call_from(caller, "vault", called) as client,
    ):
        assert client.stdin is not None and client.stdout is not None
        client.stdin.write(b"ping")
        client.stdin.close()
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as stream:
            assert stream.read() == descriptor + b"ping"  # up to the half-close of the caller
            connection.sendall(b"pong")
        assert client.stdout.read() == b"pong"
        assert client.wait(20) == 0


def test_the_descriptor_is_left_out_when_the_configuration_says_so(bench: Bench) -> None:
    (bench.root / "vault" / "rpc-config" / "test.Socket").write_text("skip-service-descriptor = true\n")
    with (
        bench.socket_service("vault", "test.Socket") as listener,
        bench.call_from("work", "vault", "test.Socket", stdin=subprocess.DEVNULL) as client,
    ):
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(100) == b""
        assert client.wait(20) == 0


@pytest.mark.parametrize(
    "text", ["skip-service-descriptor = 'yes'", "wait-for-session = 2", "skip-service-descriptor = tru"]
)
def test_a_mistake_in_the_configuration_of_a_service_is_a_problem(bench: Bench, text: str) -> None:
    bench.service("vault", "test.Echo", ECHO)
    (bench.root / "vault" / "rpc-config" / "test.Echo").write_text(text)
    assert bench.result("work", "vault", "test.Echo", b"x")[:2] == (125, b"")


def test_a_service_can_wait_for_the_session(bench: Bench) -> None:
    bench.service("vault", "qubes.WaitForSession", 'echo ready >"$HOME/session"')
    bench.service("vault", "test.Session", 'cat "$HOME/session"')
    assert bench.result("work", "vault", "test.Session")[1] == b""
    (bench.root / "vault" / "rpc-config" / "test.Session").write_text("wait-for-session = 1\n")
    assert bench.result("work", "vault", "test.Session")[1] == b"ready\n"


def test_a_missing_service_exits_127_with_nothing_read(bench: Bench) -> None:
    (bench.root / "vault" / "qubes-rpc" / "test.Dangling").symlink_to("/nonexistent/calls.sock")
    with open("/dev/zero", "rb") as endless:
        for caller in ("work", "dom0"):
            for service in ("test.Missing", "test.Dangling"):
                with bench.call_from(caller, "vault", service, stdin=endless.fileno()) as client:
                    output, _ = client.communicate(timeout=20)
                    assert (client.returncode, output) == (127, b"")


def test_a_socket_on_which_nobody_listens_is_a_problem(bench: Bench) -> None:
    bench.socket_service("vault", "test.Socket").close()
    assert bench.result("dom0", "vault", "test.Socket")[:2] == (125, b"")


def test_what_is_neither_executable_nor_a_socket_is_a_problem(bench: Bench) -> None:
    (bench.root / "vault" / "qubes-rpc" / "test.File").write_text("data")
    assert bench.result("work", "vault", "test.File")[:2] == (125, b"")


def test_services_of_dom0_are_told_which_target_was_asked_for(bench: Bench) -> None:
    words = 'echo "$QREXEC_REMOTE_DOMAIN $QREXEC_REQUESTED_TARGET_TYPE"'
    bench.service("dom0", "test.Dom0", f"{words} $QREXEC_REQUESTED_TARGET $QREXEC_REQUESTED_TARGET_KEYWORD")
    assert bench.result("work", "dom0", "test.Dom0")[1] == b"work name dom0\n"
    assert bench.result("work", "@adminvm", "test.Dom0")[1] == b"work keyword adminvm\n"


def test_exit_on_client_eof_ends_a_socket_service_with_its_caller(bench: Bench) -> None:
    (bench.root / "vault" / "rpc-config" / "test.Socket").write_text("exit-on-client-eof = true\n")
    with (
        bench.socket_service("vault", "test.Socket") as listener,
        bench.call_from("work", "vault", "test.Socket", stdin=subprocess.DEVNULL) as client,
    ):
        connection, _ = listener.accept()
        with connection:
            assert client.wait(20) == 0


ACTIVATED = """
import os, socket, sys
assert os.environ["LISTEN_FDS"] == "1" and os.environ["LISTEN_PID"] == str(os.getpid())
listener = socket.socket(fileno=3)
for _ in range(int(sys.argv[1])):
    connection, _ = listener.accept()
    with connection, connection.makefile("rwb") as stream:
        connection.sendall(stream.read() + f" {os.environ['COLOUR']} {os.getpid()}".encode())
print("bye", file=sys.stderr)
"""


def activated(bench: Bench, calls: int) -> None:
    """Give `vault` a socket-activated daemon, which answers `calls` calls."""
    place = bench.root / "vault" / "run" / "daemon" / "calls.sock"
    command = [sys.executable, "-c", ACTIVATED, str(calls)]
    bench.switchboard.socket_activated("vault", place, command, {"COLOUR": "green"})
    (bench.root / "vault" / "qubes-rpc" / "test.Daemon").symlink_to(place)


def test_a_daemon_is_started_at_the_first_call_and_once(bench: Bench) -> None:
    activated(bench, 2)
    journal = bench.root / "vault" / "journal"
    assert not journal.exists()
    answers = [bench.result("dom0", "vault", f"test.Daemon+{argument}", b"hi") for argument in "ab"]
    assert [code for code, _, _ in answers] == [0, 0]
    (first, pid), (second, same_pid) = (output.rsplit(b" ", 1) for _, output, _ in answers)
    assert (first, second) == (b"test.Daemon+a dom0\0hi green", b"test.Daemon+b dom0\0hi green")
    assert pid == same_pid
    wait_until(lambda: bench.result("dom0", "vault", "test.Daemon")[0] == 125)
    assert journal.read_bytes() == b"bye\n"


def test_a_daemon_ends_with_its_domain(bench: Bench) -> None:
    activated(bench, 2)
    pid = int(bench.result("dom0", "vault", "test.Daemon", b"hi")[1].rsplit(b" ", 1)[1])
    assert alive(pid)
    bench.switchboard.stop_domain("vault")
    assert not alive(pid)


def test_nothing_starts_in_a_domain_that_was_stopped(tmp_path: Path) -> None:
    domain = Domain(tmp_path / "vault")
    domain.stop()
    with pytest.raises(ProcessLookupError):
        domain.start(["true"], environment={}, stdin=0, stdout=1, stderr=2)
