"""Whose restore it is, and the hand-over to the stock program."""

import contextlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qubes_restore_svc.cli import qvm_backup_restore
from qubes_restore_svc.cli.qvm_backup_restore import is_isolated, is_isolated_all_the_same
from qubes_restore_svc.client.transports import QUBESD_SOCKET
from qubes_restore_svc.errors import BadConfiguration, UsageError
from qubes_restore_svc.qubes.config import CONFIG_PATH
from tests.support.fixtures import REPOSITORY

HANDING_OVER = """
import sys
from pathlib import Path
from qubes_restore_svc.cli.qvm_backup_restore import hand_over
hand_over(sys.argv[2:], Path(sys.argv[1]))
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def handed_over(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HANDING_OVER, program, *words],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    "line",
    [
        "--mgmt-vm b",
        "b --mgmt-vm",
        "b work -p pw --mgmt-vm",
        "--mgmt-vm",
        "--mgmt-vm --help",
        "--mgmt-vm -- b",
    ],
)
def test_a_restore_is_ours_if_the_option_says_so(line: str) -> None:
    assert is_isolated(line.split())


@pytest.mark.parametrize(
    "line",
    ["", "b", "--help", "--version", "b --paranoid-mode", "b -- work", "b --exclude=--mgmt-vm", "mgmt-vm",
     "--mgmt-v b", "--mgmt b", "--mgmt-vm= b", "--mgmt-vm=yes b", "--mgmt-template x b"],
)  # fmt: skip
def test_everything_else_is_the_stock_programs_which_refuses_what_it_does_not_know(line: str) -> None:
    assert not is_isolated(line.split())


def test_behind_two_hyphens_it_is_no_option_and_no_reason_to_read_a_backup_in_dom0() -> None:
    for line in ("b -- --mgmt-vm", "-- b --mgmt-vm", "-x -- --mgmt-vm"):
        with pytest.raises(UsageError, match="stands after --"):
            is_isolated(line.split())


def test_the_stock_program_gets_the_arguments_byte_for_byte_and_its_status_is_ours(tmp_path: Path) -> None:
    program = script(
        tmp_path / "stock",
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([list(map(repr, map(os.fsencode, sys.argv))), os.getpid()]))\nsys.exit(7)\n",
    )
    words = ["", "-x", "two words", "--", "$HOME", "é", os.fsdecode(b"\xff\xfe"), "--skip-broken"]
    process = subprocess.Popen(
        [sys.executable, "-c", HANDING_OVER, str(program), *words], stdout=subprocess.PIPE, env=ENVIRONMENT
    )
    said, _ = process.communicate(timeout=30)
    got, number = json.loads(said)
    assert got == [repr(os.fsencode(word)) for word in (str(program), *words)]
    assert number == process.pid
    assert process.returncode == 7


def test_a_stock_program_that_is_not_there_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    said = handed_over(tmp_path / "nowhere", "b").stderr
    assert "nowhere cannot be started: No such file or directory" in said
    said = handed_over(tmp_path, "b").stderr
    assert "cannot be started: Permission denied" in said


@pytest.mark.parametrize("way", ["exec ", ""])
def test_a_program_that_leads_back_to_us_is_called_once(way: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    again = f'{sys.executable} -c \'{HANDING_OVER}\' "$0" "$@"'
    program = script(tmp_path / "stock", f"#!/bin/sh\necho called >> {log}\n{way}{again}\n")
    done = handed_over(program, "b")
    assert done.returncode != 0
    assert "is not the stock program: it leads back to this one" in done.stderr
    assert log.read_text() == "called\n"


#: The command as in dom0 (or not), with a configuration of its own, and programs that only tell their name.
ENTRY = """
import sys
from pathlib import Path
from types import SimpleNamespace
from qubes_restore_svc.cli import qvm_backup_restore as m
folder, m.QUBESD_SOCKET, *words = map(Path, sys.argv[1:])
m.CONFIG = folder / "config.yaml"
ended = lambda name: lambda words: (print(name, *words), sys.exit(0))
m.hand_over = ended("stock")
sys.modules["qubes_restore_svc.cli.qvm_restore"] = SimpleNamespace(main=ended("ours"))
sys.argv[1:] = sys.argv[3:]
m.main()
"""
LINE = "dom0 reads the backup itself, with the stock command. With --mgmt-vm, a throw-away qube reads it.\n"
UNKNOWN = "so it is not known whether dom0 may read a backup, and it reads none. "
NOBODY = "there is no terminal to ask on who is to read the backup, a throw-away qube or dom0. "
ALWAYS, ASK, WHEN_ASKED = (f"command: {{mgmt_vm: {value}}}\n" for value in ("always", "ask", "when-asked"))


def configured(folder: Path, config: str | None, dom0: bool = True) -> list[str]:
    """The words that start the command there; its own come behind them."""
    if config is not None:
        (folder / "config.yaml").write_text(config)
        (folder / "config.yaml").chmod(0o644)
    return [sys.executable, "-c", ENTRY, str(folder), "/" if dom0 else "/nowhere"]


@pytest.mark.parametrize(
    ("config", "line", "does", "says"),
    [
        (None, "b", "stock", LINE),
        ("# command:\n  # mgmt_vm: always\n\n", "b work", "stock", LINE),
        (WHEN_ASKED, "b", "stock", LINE),
        (WHEN_ASKED, "b -- -q --help", "stock", LINE),
        (WHEN_ASKED, "-q b", "stock", ""),
        (WHEN_ASKED, "b --quiet", "stock", ""),
        (WHEN_ASKED, "--help", "stock", ""),
        (WHEN_ASKED, "-h", "stock", ""),
        (WHEN_ASKED, "--version", "stock", ""),
        (WHEN_ASKED, "b --paranoid-mode", "stock", ""),
        (WHEN_ASKED, "b --par --auto-close", "stock", ""),
        (WHEN_ASKED, "b --plan-b", "stock", ""),
        (WHEN_ASKED, "b --pass pw", "stock", LINE),
        (WHEN_ASKED, "b --mgmt-vm", "ours", ""),
        (ALWAYS, "b -p pw -- work", "ours", ""),
        (ALWAYS, "--help", "ours", ""),
        (ALWAYS, "b --paranoid-mode -q", "ours", ""),
        ("# é\u2028command: {mgmt_vm: always}", "b", "ours", ""),
        (ASK, "b", "2", NOBODY),
        (ASK, "b -q -p pw", "2", NOBODY),
        (ASK, "--help", "stock", ""),
        (ASK, "b --paranoid-mode", "stock", ""),
        (ASK, "b --mgmt-vm", "ours", ""),
        ("command: {mgmt_vm: never}", "b", "2", UNKNOWN),
        ("command: {mgmt-vm: always}", "b", "2", UNKNOWN),
        ("limits: {qubes: 0}", "b", "2", UNKNOWN),
        ("{", "b -q", "2", UNKNOWN),
        ("{", "b --mgmt-vm", "ours", ""),
    ],
)
def test_the_configuration_says_whether_dom0_may_read_a_backup(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: str | None,
    line: str,
    does: str,
    says: str,
) -> None:
    _, _, program, *words = configured(tmp_path, config)
    monkeypatch.setattr(sys, "argv", ["x", *words, *line.split()])
    for name in ("CONFIG", "QUBESD_SOCKET", "hand_over"):
        monkeypatch.setattr(qvm_backup_restore, name, None)
    monkeypatch.setitem(sys.modules, "qubes_restore_svc.cli.qvm_restore", None)
    monkeypatch.setattr(os, "isatty", lambda _: False)
    with pytest.raises(SystemExit) as ended:
        exec(program, {})
    said = capsys.readouterr()
    assert (said.out or str(ended.value.code)) == (does if does == "2" else f"{does} {line}\n")
    assert says in said.err
    assert len(said.err.splitlines()) == bool(says)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda config: config.chmod(0o646), "everybody may write to it"),
        (lambda config: config.write_bytes(b"# \xff"), "this is not UTF-8"),
        (
            lambda config: (config.unlink(), config.symlink_to("gone")),
            "is a link to a file that is not there",
        ),
    ],
)
def test_no_backup_is_handed_over_where_the_configuration_cannot_be_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path], object], said: str
) -> None:
    configured(tmp_path, "# nothing is set\n")
    monkeypatch.setattr(qvm_backup_restore, "CONFIG", tmp_path / "config.yaml")
    assert not is_isolated_all_the_same(["-q", "b"])
    fault(tmp_path / "config.yaml")
    with pytest.raises(BadConfiguration, match=said):
        is_isolated_all_the_same(["-q", "b"])


def test_in_a_qube_the_line_does_not_speak_of_dom0(tmp_path: Path) -> None:
    words = [*configured(tmp_path, None, dom0=False), "b"]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=30, check=True)
    assert done.stderr == f"qvm-backup-restore: {LINE}".replace("dom0", "this qube")


@pytest.mark.parametrize(
    ("answers", "does"),
    [
        (["qube\n"], "ours b"),
        (["DOM0 \n"], "stock b"),
        (["y\n", "dom\n", "qube\n"], "ours b"),
        (["\n"], "130"),
        ([], "130"),
    ],
)
def test_who_is_asked_chooses_who_reads_the_backup(tmp_path: Path, answers: list[str], does: str) -> None:
    process, terminal = pty.fork()
    if process == 0:
        os.environ["PYTHONPATH"] = str(REPOSITORY)
        words = [*configured(tmp_path, ASK), "b"]
        os.execv(words[0], words)
    said = b""
    left = list(answers)
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 4096):
            said += piece
            if said.endswith(b"Who is to read the backup? "):
                os.write(terminal, (left.pop(0) if left else "\x04").encode())
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    lines = said.decode().split("\r\n")
    assert (lines[-2] if status == 0 else str(status)) == does
    assert said.count(b"? ") == max(1, len(answers))
    if status:
        assert lines[-2] == "qvm-backup-restore: it was not said who is to read the backup"


def test_the_configuration_is_the_one_that_the_service_reads() -> None:
    assert qvm_backup_restore.CONFIG == CONFIG_PATH
    assert qvm_backup_restore.QUBESD_SOCKET == QUBESD_SOCKET


def entry(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qubes_restore_svc.cli.qvm_backup_restore", *words],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=30,
        check=False,
    )


def test_the_entry_refuses_a_misplaced_option_with_2() -> None:
    done = entry("backup", "--", "--mgmt-vm")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "qvm-backup-restore: --mgmt-vm stands after --, where it is no option. Put it before the --.\n"
    )


def test_our_help_needs_no_qubes_system() -> None:
    done = entry("--mgmt-vm", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: qvm-backup-restore --mgmt-vm")


def test_the_installed_program_is_the_entry() -> None:
    launcher = REPOSITORY / "bin" / "qvm-backup-restore"
    assert os.access(launcher, os.X_OK)
    assert launcher.read_text().splitlines()[0] == "#!/usr/bin/python3 -I"
    done = subprocess.run(
        [sys.executable, "-I", launcher, "--mgmt-vm", "--version"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("qvm-backup-restore --mgmt-vm")


def test_the_stock_command_is_not_slowed_down_by_our_imports() -> None:
    code = (
        "import sys, qubes_restore_svc.cli.qvm_backup_restore as m; from pathlib import Path;"
        "m.CONFIG = Path('etc/config.yaml'); m.is_isolated_all_the_same(['-q']); print(*sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=True
    )
    loaded = set(done.stdout.split())
    assert "qubes_restore_svc.cli.qvm_backup_restore" in loaded
    assert not loaded & {"pydantic", "argparse", "asyncio", "qubesadmin", "tqdm", "yaml"}
