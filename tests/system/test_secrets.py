"""The passphrase is on no command line, in no environment, in nothing that is said.

Strategy: passphrases that cannot occur by chance. While a run stands still in the middle of its backup, all
that anybody can see of its processes is searched; when it is over, everything that it said and wrote.
"""

import os
import resource
import shutil
import signal
from pathlib import Path

import pytest

from tests.support.backup_writer import BackupWriter, RawMember, join_members, sample_qube
from tests.support.damage import edited, flip_bit

from .support import finished, passphrase_file, running, wait_for

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

#: With letters that are written in several ways in JSON and in Python.
SECRET = 'zebra-"çrossing\\-9f3ac07e51d6'
FORMS = [
    SECRET,
    SECRET.encode().decode("latin-1"),
    SECRET.replace("\\", "\\\\").replace('"', '\\"'),
    "9f3ac07e51d6",
    "zebra",
    SECRET.encode().hex(),
]

ways = pytest.mark.parametrize("options", [(), ("--no-sandbox",)], ids=["sandbox", "plain"])


def writer() -> BackupWriter:
    return BackupWriter([sample_qube("work", 1 << 19, 0.7)], passphrase=SECRET, chunk_size=1 << 16, log_n=10)


def assert_nothing_in(text: str) -> None:
    assert not [form for form in FORMS if form in text]


@ways
def test_no_process_shows_it_while_it_runs(options: tuple[str, ...], tmp_path: Path) -> None:
    target, archive = tmp_path / "restored", writer().to_bytes()
    arguments = ("extract", "-", "--to", target, "-p", passphrase_file(tmp_path, SECRET), "-v")
    with running(*arguments, *options, report=tmp_path / "report.json", feed=True) as run:
        run.feed(archive[: len(archive) // 2])
        wait_for((target / ".work.partial").exists)
        worker = run.worker()
        processes = [run.process.pid, *run.processes()]
        assert len(processes) >= 2
        for process in processes:
            for file in ("cmdline", "environ", "comm", "status"):
                assert_nothing_in(Path(f"/proc/{process}/{file}").read_text(errors="replace"))
        # bubblewrap itself sets PWD.
        assert Path(f"/proc/{worker}/environ").read_bytes() in (b"", b"PWD=/\0")
        run.interrupt()
        assert_nothing_in(run.outcome().everything)


def test_nothing_that_is_said_or_written_holds_it(tmp_path: Path) -> None:
    right, wrong = passphrase_file(tmp_path, SECRET), tmp_path / "wrong"
    wrong.write_text(f"{SECRET}?\n", encoding="utf-8")
    members = list(writer().members())
    damaged: dict[str, list[RawMember]] = {
        "header": edited(members, "backup-header", lambda data: data.replace(b"version=4", b"version=9")),
        "copy": edited(members, "backup-header.hmac", lambda data: flip_bit(data, -300)),
        "list": edited(members, "qubes.xml.000.enc", lambda data: flip_bit(data, 1000)),
        "volume": edited(members, "vm10/private.img.001.enc", lambda data: flip_bit(data, 9000)),
        "nothing": members,
    }
    for name, changed in damaged.items():
        backup = tmp_path / f"{name}.qbackup"
        backup.write_bytes(join_members(changed))
        for passphrase in (right, wrong) if name == "nothing" else (right,):
            report = tmp_path / "report.json"
            outcome = finished("verify", backup, "-p", passphrase, "-v", report=report)
            assert (outcome.status == 0) == (name == "nothing" and passphrase is right), outcome.errors
            assert outcome.report is not None
            assert_nothing_in(outcome.everything)
    target = tmp_path / "restored"
    assert finished("extract", backup, "--to", target, "-p", right, "-q").status == 0
    assert_nothing_in((target / "work" / "qube.json").read_text())


@pytest.mark.parametrize(
    "content",
    [SECRET.encode() + b"\xff\n", SECRET.encode().ljust(5000, b"x") + b"\n", SECRET.encode("utf-16")],
    ids=["not UTF-8", "too long", "UTF-16"],
)
def test_a_passphrase_that_is_refused_is_not_quoted(content: bytes, tmp_path: Path) -> None:
    backup, file = tmp_path / "sample.qbackup", tmp_path / "passphrase"
    backup.write_bytes(writer().to_bytes())
    file.write_bytes(content)
    outcome = finished("verify", backup, "-p", file, report=tmp_path / "report.json")
    assert outcome.status == 2
    assert "Traceback" not in outcome.errors
    assert_nothing_in(outcome.everything)


def test_no_passphrase_can_be_given_on_the_command_line(tmp_path: Path) -> None:
    outcome = finished("verify", "--help")
    assert outcome.status == 0
    assert not [line for line in outcome.output.splitlines() if "PASS" in line]


@ways
def test_neither_side_can_dump_core(options: tuple[str, ...], tmp_path: Path) -> None:
    """With a limit of 0 the kernel would still pipe a dump to a collector, with 1 it does not (core(5)).

    Where this very process may not have more than 0, nobody started by it can have 1.
    """
    _, highest = resource.getrlimit(resource.RLIMIT_CORE)
    expected = "0" if highest == 0 else "1"
    with running("list", "-", "-p", passphrase_file(tmp_path, SECRET), *options, feed=True) as run:
        run.feed(writer().to_bytes()[: 16 << 10])
        worker = run.worker()
        run.wait_taken()
        for process in (run.process.pid, worker):
            assert core_limit(process) == [expected, expected]
        os.kill(worker, signal.SIGSEGV)
        outcome = run.outcome()
        assert outcome.status == 1
        assert_nothing_in(outcome.everything)


def core_limit(process: int) -> list[str]:
    """The soft and the hard limit."""
    limits = Path(f"/proc/{process}/limits").read_text().splitlines()
    [line] = [line for line in limits if line.startswith("Max core file size")]
    return line.split()[4:6]
