"""The emulated qrexec behaves as qrexec does: names, policy, half-close, exit codes, vanished peers."""

import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .bench import Bench, alive, open_bench, wait_until
from .process_io import DATA_EXIT_CODE, DATA_STDIN, DATA_STDOUT, FRAME, printable
from .switchboard import CallRecord
from .trigger import Kind, request

ECHO = "cat"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with open_bench(tmp_path) as opened:
        yield opened


def test_a_denied_call_exits_126_and_nothing_runs(bench: Bench) -> None:
    for name in ("test.Denied", "test.Asked"):
        bench.service("vault", name, 'touch "$HOME/ran"')
        code, output, errors = bench.result("work", "vault", name)
        assert (code, output, errors) == (126, b"", b"Request refused\n")
    assert not (bench.root / "vault" / "home" / "ran").exists()
    assert bench.switchboard.calls == [
        CallRecord("work", "vault", "test.Denied", "", "deny"),
        CallRecord("work", "vault", "test.Asked", "", "ask"),
    ]


def test_dom0_is_not_judged(bench: Bench) -> None:
    bench.service("vault", "test.Denied", "echo ran")
    assert bench.result("dom0", "vault", "test.Denied+x") == (0, b"ran\n", b"")
    assert bench.switchboard.calls == [CallRecord("dom0", "vault", "test.Denied", "x", "dom0")]


def test_the_policy_is_read_at_every_call_and_a_broken_one_denies_all(bench: Bench, tmp_path: Path) -> None:
    bench.service("vault", "test.Echo", ECHO)
    assert bench.result("work", "vault", "test.Echo", b"x")[0] == 0
    (tmp_path / "policy.d" / "60-broken.policy").write_text("nonsense\n")
    assert bench.result("work", "vault", "test.Echo", b"x")[0] == 126


def test_nobody_can_call_in_the_name_of_dom0(bench: Bench) -> None:
    bench.service("vault", "test.Say", 'echo "$QREXEC_REMOTE_DOMAIN"')
    assert bench.result("work", "vault", "DEFAULT:QUBESRPC test.Say dom0")[:2] == (127, b"")
    client = bench.root / "dom0" / "bin" / "qrexec-client"
    command = "DEFAULT:QUBESRPC test.Say dom0"
    words = [str(client), f"--socket-dir={bench.root / 'work'}", "-d", "vault", command]
    assert subprocess.run(words, capture_output=True, timeout=20).returncode == 126


def test_odd_characters_in_a_call_become_underscores(bench: Bench) -> None:
    bench.result("work", "va;ult", "test.Söcket$+a b")
    assert bench.switchboard.calls == [CallRecord("work", "va_ult", "test.S_cket_", "a_b", "deny")]


def test_a_halted_target_is_started(bench: Bench) -> None:
    bench.service("asleep", "test.Echo", ECHO)
    assert bench.result("work", "asleep", "test.Echo", b"x")[:2] == (0, b"x")


def test_a_target_that_does_not_start_is_a_refusal(bench: Bench) -> None:
    assert bench.result("work", "broken", "test.Echo", b"x")[:2] == (126, b"")


def test_dom0_does_not_start_its_target(bench: Bench) -> None:
    assert bench.result("dom0", "asleep", "test.Echo", b"x")[:2] == (125, b"")


def test_each_direction_can_be_closed_alone(bench: Bench) -> None:
    bench.service("vault", "test.Early", 'exec >&-; cat >"$HOME/got"')
    with bench.call_from("work", "vault", "test.Early") as client:
        assert client.stdin is not None and client.stdout is not None
        assert client.stdout.read() == b""  # the service's end of output, while it still reads
        assert client.poll() is None
        client.stdin.write(b"late")
        client.stdin.close()
        assert client.wait(20) == 0
    assert (bench.root / "vault" / "home" / "got").read_bytes() == b"late"


def test_a_socket_for_both_directions_sees_the_end_when_the_client_exits(
    bench: Bench,
) -> None:
    with bench.socket_service("vault", "test.Socket") as listener:
        mine, theirs = socket.socketpair()
        mine.settimeout(20)
        with (
            mine,
            bench.call_from(
                "dom0", "vault", "test.Socket", stdin=theirs.fileno(), stdout=theirs.fileno()
            ) as client,
        ):
            theirs.close()
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"last words")
                connection.shutdown(socket.SHUT_WR)
                assert mine.recv(100) == b"last words"
                wait_until(lambda: not os.path.lexists(f"/proc/{client.pid}/fd/1"))
                mine.setblocking(False)
                with pytest.raises(BlockingIOError):
                    mine.recv(100)
                mine.settimeout(20)
            assert mine.recv(100) == b""
            assert client.wait(20) == 0


def test_with_use_stdin_socket_the_end_is_seen_at_once(bench: Bench) -> None:
    with bench.socket_service("vault", "test.Socket") as listener:
        mine, theirs = socket.socketpair()
        mine.settimeout(20)
        options = ("--use-stdin-socket",)
        with mine, bench.call_from("work", "vault", "test.Socket", *options, stdin=theirs.fileno()) as client:
            theirs.close()
            connection, _ = listener.accept()
            with connection:
                connection.shutdown(socket.SHUT_WR)
                assert mine.recv(100) == b""
                assert client.poll() is None
                mine.shutdown(socket.SHUT_WR)
            assert client.wait(20) == 0


def test_much_data_goes_through_unchanged_in_pieces_of_64_kib(bench: Bench) -> None:
    data = os.urandom(3 << 20)
    with (
        bench.socket_service("vault", "test.Socket") as listener,
        bench.call_from("work", "vault", "test.Socket") as client,
    ):
        assert client.stdin is not None
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(len(b"test.Socket+ work\0")) == b"test.Socket+ work\0"
            client.stdin.write(data[:100])
            client.stdin.flush()
            assert connection.recv(100, socket.MSG_WAITALL) == data[:100]
        client.stdin.close()
    bench.service("vault", "test.Echo", ECHO)
    assert bench.result("dom0", "vault", "test.Echo", data) == (0, data, b"")


def test_a_caller_that_does_not_read_stops_the_service(bench: Bench) -> None:
    with (
        bench.socket_service("vault", "test.Socket") as listener,
        bench.call_from("work", "vault", "test.Socket") as client,
    ):
        connection, _ = listener.accept()
        with connection:
            client.send_signal(signal.SIGSTOP)
            connection.setblocking(False)
            room = select.poll()
            room.register(connection, select.POLLOUT)
            sent = 0
            while sent < 32 << 20 and room.poll(300):
                sent += connection.send(bytes(1 << 16))
            assert sent < 32 << 20
        client.kill()


def test_what_a_service_says_on_stderr_reaches_its_journal_and_the_caller(bench: Bench) -> None:
    bench.service("vault", "test.Err", r"printf 'oh\033 no\n' >&2")
    assert bench.result("work", "vault", "test.Err") == (0, b"", b"oh\033 no\n")
    assert bench.result("work", "vault", "test.Err", b"", "-T") == (0, b"", b"oh_ no\n")
    assert (bench.root / "vault" / "journal").read_bytes() == b"oh\033 no\n" * 2


def test_output_can_be_filtered_for_a_terminal(bench: Bench) -> None:
    bench.service("vault", "test.Echo", ECHO)
    assert bench.result("dom0", "vault", "test.Echo", b"a\033b\n", "-t")[1] == b"a_b\n"
    assert printable(bytes(range(256))).count(b"_") == 256 - 95 - 5 + 1


def test_prefix_data_comes_before_the_input(bench: Bench) -> None:
    bench.service("vault", "test.Echo", ECHO)
    assert bench.result("work", "vault", "test.Echo", b"world", "-p", "hello ")[1] == b"hello world"


def test_a_service_whose_caller_was_killed_sees_the_end_of_its_input(bench: Bench) -> None:
    bench.service(
        "vault",
        "test.Wait",
        'echo up; cat >/dev/null; touch "$HOME/over-$QREXEC_REMOTE_DOMAIN"; exec sleep 1000 </dev/null',
    )
    for caller in ("work", "dom0"):
        over = bench.root / "vault" / "home" / f"over-{caller}"
        client = bench.call_from(caller, "vault", "test.Wait")
        assert client.stdout is not None and client.stdin is not None and client.stderr is not None
        assert client.stdout.readline() == b"up\n"
        client.send_signal(signal.SIGKILL)
        client.wait(20)
        wait_until(over.exists)
        for stream in (client.stdin, client.stdout, client.stderr):
            stream.close()


def test_a_caller_whose_target_was_stopped_exits_255_and_nothing_of_it_is_left(bench: Bench) -> None:
    bench.service("vault", "test.Deep", "setsid -f true; (echo $BASHPID; exec sleep 1000) & echo $$; wait")
    clients = [bench.call_from(caller, "vault", "test.Deep") for caller in ("work", "dom0")]
    pids = []
    for client in clients:
        assert client.stdout is not None
        pids += [int(client.stdout.readline()), int(client.stdout.readline())]
    bench.switchboard.stop_domain("vault")
    assert [client.wait(20) for client in clients] == [255, 255]
    assert not [pid for pid in pids if alive(pid)]
    for client in clients:
        client.communicate()
    assert bench.result("dom0", "vault", "test.Deep")[0] == 125


def test_a_domain_that_was_stopped_can_be_started_again(bench: Bench) -> None:
    bench.service("vault", "test.Echo", ECHO)
    bench.switchboard.stop_domain("vault")
    bench.switchboard.start_domain("vault")
    assert bench.result("dom0", "vault", "test.Echo", b"x") == (0, b"x", b"")


def test_a_caller_in_a_domain_that_is_stopped_breaks_the_call(bench: Bench) -> None:
    with (
        bench.socket_service("vault", "test.Socket") as listener,
        bench.call_from("work", "vault", "test.Socket") as client,
    ):
        connection, _ = listener.accept()
        connection.settimeout(20)
        with connection:
            assert connection.recv(100) == b"test.Socket+ work\0"
            bench.switchboard.stop_domain("work")
            assert connection.recv(100) == b""
        assert client.wait(20) == -signal.SIGKILL


def test_a_frame_carries_64_kib_at_most(bench: Bench) -> None:
    bench.service("vault", "test.Much", "head -c 1000000 /dev/zero")
    with request(bench.root / "work" / "qrexec.sock", Kind.FROM_VM, "vault", "test.Much") as channel:
        stream = channel.makefile("rb")
        sizes = []
        while header := stream.read(FRAME.size):
            kind, size = FRAME.unpack(header)
            assert len(stream.read(size)) == size
            sizes += [size] if kind == DATA_STDOUT else []
        assert kind == DATA_EXIT_CODE
    assert sum(sizes) == 1_000_000 and max(sizes) <= 65536 and sizes[-1] == 0


def test_a_client_that_sends_a_larger_frame_is_a_vanished_peer(bench: Bench) -> None:
    switchboard = bench.root / "work" / "qrexec.sock"
    with (
        bench.socket_service("vault", "test.Socket") as listener,
        request(switchboard, Kind.FROM_VM, "vault", "test.Socket") as channel,
    ):
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as stream:
            channel.sendall(FRAME.pack(DATA_STDIN, 3) + b"abc" + FRAME.pack(DATA_STDIN, 65537))
            assert stream.read() == b"test.Socket+ work\0abc"
