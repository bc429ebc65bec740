"""The domains of the emulated Qubes: programs that run in them, what these reach, and how they die."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import qubesadmin.config

from .bench import Bench, open_bench, wait_until
from .emulated import EmulatedQubes


@pytest.fixture
def qubes(tmp_path: Path) -> Iterator[EmulatedQubes]:
    with EmulatedQubes(tmp_path) as qubes:
        yield qubes


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with open_bench(tmp_path) as opened:
        yield opened


def python(qubes: EmulatedQubes, name: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run a line of Python in a domain."""
    command = [sys.executable, "-c", f"import qubesadmin; app = qubesadmin.Qubes(); {code}"]
    environment = qubes.domain_environment(name)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)


def in_domain(bench: Bench, name: str, script: str) -> subprocess.Popen[bytes]:
    """Run a shell in a domain, which says a line when it is there."""
    pipe = subprocess.PIPE
    environment = bench.switchboard.environment(name)
    process = subprocess.Popen(["/bin/bash", "-c", script], env=environment, stdin=pipe, stdout=pipe)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


# --- The GUI domain ------------------------------------------------------------------------------


def test_a_gui_domain_is_there_only_when_asked_for(qubes: EmulatedQubes) -> None:
    before = qubes.snapshot()
    assert "sys-gui" not in qubes.qubesd.names()
    qubes.add_gui_domain("sys-gui")
    vm = qubes.app().domains["sys-gui"]
    assert (vm.klass, vm.netvm, vm.is_running()) == ("AppVM", None, True)
    assert qubes.client_program("sys-gui").exists()
    qubes.kill_domain("sys-gui")
    assert vm.is_halted()
    assert not [call for call in qubes.qubesd.calls if ".Start" in call.method or ".Kill" in call.method]
    now = qubes.snapshot()
    assert (now["properties"], now["pools"]) != (before["properties"], before["pools"])


def test_a_program_in_a_gui_domain_can_look_at_the_system_and_not_change_it(qubes: EmulatedQubes) -> None:
    qubes.add_gui_domain("sys-gui")
    names = "sorted(vm.name for vm in app.domains if vm.klass == 'TemplateVM')"
    done = python(qubes, "sys-gui", f"print(app.qubesd_connection_type, {names})")
    assert done.stdout == "qrexec ['debian-12-xfce', 'fedora-41-xfce']\n", done.stderr
    done = python(qubes, "sys-gui", "print(app.domains['personal'].template, *app.pools.keys())")
    assert done.stdout == "fedora-41-xfce vm-pool lvm varlibqubes linux-kernel\n", done.stderr
    done = python(qubes, "sys-gui", "app.domains['personal'].tags.add('mine')")
    assert "QubesDaemonAccessError: Service call error: Request refused" in done.stderr
    assert "mine" not in qubes.qubesd.tags("personal")


def test_a_program_in_any_other_qube_can_import_qubesadmin_and_ask_in_vain(qubes: EmulatedQubes) -> None:
    qubes.add_gui_domain("sys-gui")
    qubes.start_domain("personal")
    assert qubesadmin.config.VARIABLE not in qubes.domain_environment("personal")
    done = python(qubes, "personal", "list(app.domains)")
    assert "QubesDaemonAccessError: Service call error: Request refused" in done.stderr
    assert not qubes.qubesd.calls


def test_a_qube_can_call_services_of_others_with_qubesadmin(qubes: EmulatedQubes) -> None:
    qubes.add_gui_domain("sys-gui")
    qubes.install_dom0_service("restore.List", ["/bin/cat"])
    qubes.grant("restore.List", "sys-gui")
    call = "app.run_service('dom0', 'restore.List', prefix_data=b'hello ').communicate(b'world')"
    assert python(qubes, "sys-gui", f"print({call})").stdout == "(b'hello world', b'')\n"


# --- The end of a domain -------------------------------------------------------------------------


def test_a_domain_takes_all_its_programs_with_it(bench: Bench) -> None:
    with (
        in_domain(bench, "work", "echo up; setsid sleep 1000 & sleep 1000") as mine,
        in_domain(bench, "vault", "echo up; read -r") as other,
    ):
        wait_until(lambda: len(bench.switchboard.processes()) == 4)
        bench.switchboard.stop_domain("work")
        assert mine.wait(20) == -signal.SIGKILL
        assert bench.switchboard.processes() == {other.pid}
        other.communicate(b"\n")


def test_a_program_in_a_domain_that_dies_sees_nothing_of_its_end(bench: Bench) -> None:
    bench.service("vault", "test.Wait", "echo up; cat")
    script = 'qrexec-client-vm vault test.Wait; for i in {1..100}; do echo >>"$HOME/seen"; done'
    with in_domain(bench, "work", script) as process:
        bench.switchboard.stop_domain("work")
        assert process.wait(20) == -signal.SIGKILL
    assert not (bench.root / "work" / "home" / "seen").exists()


def test_what_a_domain_has_in_its_runtime_directory_ends_with_it(bench: Bench) -> None:
    folder = bench.root / "work"
    for place in ("run", "home"):
        (folder / place / "file").touch()
    bench.switchboard.stop_domain("work")
    bench.switchboard.start_domain("work")
    assert [(folder / place / "file").exists() for place in ("run", "home")] == [False, True]


# --- qrexec-client-vm ----------------------------------------------------------------------------


def test_a_local_program_is_the_callers_end_and_has_the_other_streams(bench: Bench) -> None:
    bench.service("vault", "test.Upper", "tr a-z A-Z")
    script = 'echo asked; exec >&-; read -r answer; echo "$0 $1 $answer" >&"$SAVED_FD_1"; cat <&"$SAVED_FD_0"'
    script += ' >&"$SAVED_FD_1"'
    program = bench.root / "work" / "program"
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    words = [str(bench.root / "work" / "bin" / "qrexec-client-vm"), "vault", "test.Upper"]
    done = subprocess.run(
        [*words, str(program), "-T"],
        env=bench.switchboard.environment("work"),
        input=b"mine",
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert done.stdout == f"{program} -T ASKED\nmine".encode()
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("service", "program", "code"),
    [("exit 0", "exit 3", 3), ("exit 4", "exit 3", 4), ("exit 0", "kill -9 $$", 137)],
)
def test_the_exit_code_of_a_local_program_counts_after_the_services(
    bench: Bench, service: str, program: str, code: int
) -> None:
    bench.service("vault", "test.End", service)
    words = [str(bench.root / "work" / "bin" / "qrexec-client-vm"), "vault", "test.End"]
    done = subprocess.run([*words, "/bin/bash", "-c", program], timeout=20, check=False)
    assert done.returncode == code


def test_a_local_program_is_not_looked_for_on_the_path(bench: Bench) -> None:
    bench.service("vault", "test.End", 'cat; touch "$HOME/over"')
    words = [str(bench.root / "work" / "bin" / "qrexec-client-vm"), "vault", "test.End", "cat"]
    done = subprocess.run(words, timeout=20, check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (255, b"execv: No such file or directory\n")
    wait_until((bench.root / "vault" / "home" / "over").exists)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["vault"], 2),
        (["--nonsense", "vault", "test.Echo"], 2),
        (["-p", "a", "-p", "b", "vault", "test.Echo"], 2),
        (["--use-stdin-socket", "vault", "test.Echo"], 2),
        (["--", "vault", "test.Echo"], 0),
        (["-tT", "--buffer-size=65536", "--source-qube=dom0", "vault", "test.Echo"], 0),
        (["vault", "-t"], 127),
    ],
)
def test_the_words_of_the_client_are_those_of_the_original(bench: Bench, words: list[str], code: int) -> None:
    bench.service("vault", "test.Echo", 'test "$QREXEC_REMOTE_DOMAIN" = work')
    client = str(bench.root / "work" / "bin" / "qrexec-client-vm")
    done = subprocess.run([client, *words], stdin=subprocess.DEVNULL, timeout=20, check=False)
    assert done.returncode == code


def test_the_last_of_two_filter_options_counts(bench: Bench) -> None:
    bench.service("vault", "test.Escape", r"printf '\033'")
    on, off = "--filter-escape-chars-stdout", "--no-filter-escape-chars-stdout"
    assert bench.result("work", "vault", "test.Escape", b"", on, off)[1] == b"\033"
    assert bench.result("work", "vault", "test.Escape", b"", off, on)[1] == b"_"
