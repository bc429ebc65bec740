"""Qubes call services of dom0: what the policy lets through, what a service is told, how a call ends."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from .bench import alive, wait_until
from .emulated import EmulatedQubes
from .policy_files import PolicyError
from .switchboard import CallRecord, Question, say_no, say_yes

START = "restore.Start"
#: Says who called, and with what, a line for each thing it was told.
_TELL = (
    "import os, sys; told = {k: v for k, v in os.environ.items() if k.startswith('QREXEC_')};"
    "print(sorted(told.items())); print(sys.argv[1:])"
)
#: Says its process id, reads to the end of its input, says so in a file, and has a word of its own.
_UNTIL_EOF = 'echo $$; cat >/dev/null; echo over >"$HOME/over"; exit 7'


@pytest.fixture
def qubes(tmp_path: Path) -> Iterator[EmulatedQubes]:
    with EmulatedQubes(tmp_path) as qubes:
        qubes.add_gui_domain("sys-gui")
        qubes.start_domain("personal")
        yield qubes


def install(qubes: EmulatedQubes, script: str, service: str = START) -> None:
    qubes.install_dom0_service(service, ["/bin/bash", "-c", script])


def start(
    qubes: EmulatedQubes,
    source: str,
    service: str = START,
    target: str = "dom0",
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Call a service from a domain, as its programs do."""
    pipe = subprocess.PIPE
    whole = qubes.domain_environment(source) | dict(environment or {})
    words = ["qrexec-client-vm", target, service]
    return subprocess.Popen(words, env=whole, stdin=pipe, stdout=pipe, stderr=pipe)


def result(
    qubes: EmulatedQubes, source: str, service: str = START, data: bytes = b"", target: str = "dom0"
) -> tuple[int, bytes, bytes]:
    with start(qubes, source, service, target) as client:
        output, errors = client.communicate(data, timeout=30)
        return client.returncode, output, errors


def first_line(client: subprocess.Popen[bytes]) -> bytes:
    assert client.stdout is not None
    return client.stdout.readline()


def end(client: subprocess.Popen[bytes]) -> int:
    client.communicate(timeout=30)
    return client.returncode


# --- What the policy decides ---------------------------------------------------------------------


def test_an_allowed_call_is_a_conversation(qubes: EmulatedQubes) -> None:
    install(qubes, 'while read -r word; do echo "heard $word"; done; echo bye')
    qubes.grant(START, "sys-gui")
    with start(qubes, "sys-gui") as client:
        assert client.stdin is not None and client.stdout is not None
        for word in (b"one", b"two"):
            client.stdin.write(word + b"\n")
            client.stdin.flush()
            assert client.stdout.readline() == b"heard " + word + b"\n"
        client.stdin.close()
        assert client.stdout.read() == b"bye\n"
        assert client.wait(30) == 0


@pytest.mark.parametrize("target", ["dom0", "@adminvm", "$adminvm"])
def test_dom0_can_be_named_in_every_way(qubes: EmulatedQubes, target: str) -> None:
    install(qubes, "cat")
    qubes.grant(START, "sys-gui")
    assert result(qubes, "sys-gui", data=b"hello", target=target) == (0, b"hello", b"")


def test_a_call_that_is_not_granted_is_refused_and_nothing_runs(qubes: EmulatedQubes) -> None:
    install(qubes, 'touch "$HOME/ran"')
    qubes.grant(START, "sys-gui")
    before = qubes.snapshot()
    refused = (126, b"", b"Request refused\n")
    assert result(qubes, "personal") == refused
    assert result(qubes, "sys-gui", target="personal") == refused
    assert result(qubes, "sys-gui", "restore.List") == refused
    assert qubes.settled(before) == before
    assert qubes.switchboard.calls == [
        CallRecord("personal", "dom0", START, "", "deny"),
        CallRecord("sys-gui", "personal", START, "", "deny"),
        CallRecord("sys-gui", "dom0", "restore.List", "", "deny"),
    ]


def test_the_first_grant_that_matches_counts(qubes: EmulatedQubes) -> None:
    install(qubes, "echo ran")
    qubes.grant(START, "sys-gui", "deny")
    qubes.grant(START, "@type:AppVM")
    assert result(qubes, "sys-gui")[0] == 126
    assert result(qubes, "personal")[:2] == (0, b"ran\n")


def test_a_grant_that_is_no_rule_is_the_tests_mistake(qubes: EmulatedQubes) -> None:
    with pytest.raises(PolicyError):
        qubes.grant(START, "sys-gui", extra="nonsense=1")


def test_a_question_is_answered_by_whoever_is_there(qubes: EmulatedQubes) -> None:
    install(qubes, "echo ran")
    qubes.grant(START, "sys-gui", "ask")
    asked: list[Question] = []

    def remember(question: Question) -> str | None:
        asked.append(question)
        return say_yes(question)

    assert result(qubes, "sys-gui") == (126, b"", b"Request refused\n"), "nobody is there at first"
    qubes.when_asked(remember)
    assert result(qubes, "sys-gui", START + "+x")[:2] == (0, b"ran\n")
    assert asked == [Question("sys-gui", "dom0", START, "x", frozenset({"dom0"}), "dom0")]
    for answer in (say_no, lambda question: "personal"):
        qubes.when_asked(answer)
        assert result(qubes, "sys-gui") == (126, b"", b"Request refused\n")
    assert {call.decision for call in qubes.switchboard.calls} == {"ask"}


def test_an_answer_that_comes_after_the_caller_was_stopped_runs_nothing(qubes: EmulatedQubes) -> None:
    install(qubes, 'touch "$HOME/ran"')
    qubes.grant(START, "sys-gui", "ask")
    asked, answer = threading.Event(), threading.Event()

    def hesitate(question: Question) -> str | None:
        asked.set()
        answer.wait(30)
        return say_yes(question)

    qubes.when_asked(hesitate)
    with start(qubes, "sys-gui") as client:
        assert asked.wait(30)
        qubes.kill_domain("sys-gui")
        answer.set()
        end(client)
    qubes.start_domain("sys-gui")
    qubes.when_asked(say_no)
    assert result(qubes, "sys-gui")[0] == 126
    assert not (qubes.root / "dom0" / "home" / "ran").exists()


# --- What the service is told --------------------------------------------------------------------


def test_the_service_is_told_who_calls_and_with_what(qubes: EmulatedQubes) -> None:
    qubes.install_dom0_service(START, [sys.executable, "-c", _TELL])
    qubes.grant(START, "@anyvm")
    lie = {"QREXEC_REMOTE_DOMAIN": "dom0", "QREXEC_SERVICE_ARGUMENT": "lie"}
    for source, target, kind in (
        ("sys-gui", "dom0", [("QREXEC_REQUESTED_TARGET", "dom0"), ("QREXEC_REQUESTED_TARGET_TYPE", "name")]),
        (
            "personal",
            "@adminvm",
            [("QREXEC_REQUESTED_TARGET_KEYWORD", "adminvm"), ("QREXEC_REQUESTED_TARGET_TYPE", "keyword")],
        ),
    ):
        with start(qubes, source, START + "+a.b", target, lie) as client:
            told, words = client.communicate(timeout=30)[0].decode().splitlines()
        assert words == "[]"
        assert told == str(
            [
                ("QREXEC_REMOTE_DOMAIN", source),
                *kind,
                ("QREXEC_SERVICE_ARGUMENT", "a.b"),
                ("QREXEC_SERVICE_FULL_NAME", START + "+a.b"),
            ]
        )


def test_the_argument_is_the_last_word_of_a_program_that_takes_it(qubes: EmulatedQubes) -> None:
    command = [sys.executable, "-c", _TELL, "own word"]
    qubes.install_dom0_service(START, command, arguments=True)
    qubes.grant(START, "sys-gui")
    assert result(qubes, "sys-gui", START + "+a.b")[1].endswith(b"\n['own word', 'a.b']\n")
    assert result(qubes, "sys-gui")[1].endswith(b"\n['own word']\n")


def test_the_service_runs_in_dom0(qubes: EmulatedQubes) -> None:
    code = "import os, qubesadmin; print(sorted(vm.name for vm in qubesadmin.Qubes().domains)[:2]);"
    code += "print(os.environ['MINE'])"
    qubes.install_dom0_service(START, [sys.executable, "-c", code], {"MINE": "a b"})
    qubes.grant(START, "sys-gui")
    assert result(qubes, "sys-gui")[1] == b"['debian-12-xfce', 'default-dvm']\na b\n"


# --- How a call ends -----------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137)])
def test_the_exit_code_reaches_the_caller(qubes: EmulatedQubes, script: str, code: int) -> None:
    install(qubes, script)
    qubes.grant(START, "sys-gui")
    assert result(qubes, "sys-gui") == (code, b"", b"")


def test_a_call_is_over_when_its_service_has_ended_whatever_that_left_behind(qubes: EmulatedQubes) -> None:
    install(qubes, "sleep 1000 <&0 >/dev/null 2>&1 & echo $!; exit 3")
    qubes.grant(START, "sys-gui")
    with start(qubes, "sys-gui") as client:
        left = int(first_line(client))
        assert client.wait(30) == 3
        assert alive(left)


def test_a_service_that_is_not_installed_is_127(qubes: EmulatedQubes) -> None:
    qubes.grant(START, "sys-gui")
    assert result(qubes, "sys-gui") == (127, b"", b"")


def test_what_a_service_of_dom0_says_on_stderr_stays_in_dom0(qubes: EmulatedQubes) -> None:
    install(qubes, "echo secret >&2; echo public")
    qubes.grant(START, "sys-gui")
    assert result(qubes, "sys-gui") == (0, b"public\n", b"")
    assert (qubes.root / "dom0" / "journal").read_bytes() == b"secret\n"


def test_the_service_sees_the_end_of_what_the_caller_writes_and_can_still_answer(
    qubes: EmulatedQubes,
) -> None:
    install(qubes, "wc -c; exit 5")
    qubes.grant(START, "sys-gui")
    assert result(qubes, "sys-gui", data=bytes(12345)) == (5, b"12345\n", b"")


def test_the_service_sees_the_end_when_the_calling_process_is_killed(qubes: EmulatedQubes) -> None:
    install(qubes, _UNTIL_EOF)
    qubes.grant(START, "sys-gui")
    before = qubes.snapshot(["dom0/home/over"])
    with start(qubes, "sys-gui") as client:
        pid = int(first_line(client))
        assert alive(pid)
        client.kill()
        wait_until(lambda: not alive(pid))
    assert (qubes.root / "dom0" / "home" / "over").exists()
    assert qubes.settled(before, ["dom0/home/over"]) == before


def test_the_service_sees_the_end_when_the_calling_domain_dies(qubes: EmulatedQubes) -> None:
    install(qubes, _UNTIL_EOF)
    qubes.grant(START, "@anyvm")
    with start(qubes, "sys-gui") as client, start(qubes, "personal") as other:
        pid, other_pid = int(first_line(client)), int(first_line(other))
        qubes.kill_domain("sys-gui")
        wait_until(lambda: not alive(pid))
        assert (qubes.root / "dom0" / "home" / "over").exists()
        assert end(client) == -signal.SIGKILL
        assert alive(other_pid) and other.poll() is None, "the call of another domain goes on"
        assert end(other) == 7


def test_a_service_cannot_write_to_a_caller_that_is_gone(qubes: EmulatedQubes) -> None:
    install(qubes, 'trap "" PIPE; echo up; while echo more 2>/dev/null; do :; done; echo broken >"$HOME/end"')
    qubes.grant(START, "sys-gui")
    with start(qubes, "sys-gui") as client:
        assert first_line(client) == b"up\n"
        client.kill()
        wait_until((qubes.root / "dom0" / "home" / "end").exists)


def test_a_caller_that_closes_its_output_does_not_end_the_call(qubes: EmulatedQubes) -> None:
    install(qubes, 'echo up; head -c 1000000 /dev/zero && echo all >"$HOME/end"; cat >/dev/null; exit 4')
    qubes.grant(START, "sys-gui")
    with start(qubes, "sys-gui") as client:
        assert first_line(client) == b"up\n"
        assert client.stdin is not None and client.stdout is not None
        client.stdout.close()
        wait_until((qubes.root / "dom0" / "home" / "end").exists)
        assert client.poll() is None
        client.stdin.close()
        assert client.wait(30) == 4


def test_a_service_that_does_not_mind_its_callers_end_is_seen_as_left(qubes: EmulatedQubes) -> None:
    install(qubes, "echo $$; exec env -i sleep 1000")
    qubes.grant(START, "sys-gui")
    before = qubes.snapshot()
    with start(qubes, "sys-gui") as client:
        pid = int(first_line(client))
        qubes.kill_domain("sys-gui")
        end(client)
    qubes.start_domain("sys-gui")
    wait_until(lambda: qubes.snapshot()["processes"] == ["sleep 1000"])
    assert {**qubes.snapshot(), "processes": []} == {**before, "processes": []}
    os.kill(pid, signal.SIGKILL)
    assert qubes.settled(before) == before


def test_much_data_goes_both_ways_at_once(qubes: EmulatedQubes) -> None:
    install(qubes, 'tee >(wc -c >"$HOME/size")')
    qubes.grant(START, "sys-gui")
    data = os.urandom(8 << 20)
    assert result(qubes, "sys-gui", data=data) == (0, data, b"")
    size = qubes.root / "dom0" / "home" / "size"
    wait_until(lambda: size.exists() and size.read_text() == f"{8 << 20}\n")


def test_two_calls_at_once_do_not_wait_for_each_other(qubes: EmulatedQubes) -> None:
    install(qubes, "echo up; cat")
    qubes.grant(START, "@anyvm")
    with start(qubes, "sys-gui") as first, start(qubes, "personal") as second:
        assert (first_line(first), first_line(second)) == (b"up\n", b"up\n")
        assert second.communicate(b"x", timeout=30)[0] == b"x"
        assert first.communicate(b"y", timeout=30)[0] == b"y"
