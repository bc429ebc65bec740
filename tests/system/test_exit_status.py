"""Every exit status on every way that leads to it, and what the report says of it.

Strategy: the command as a process, on small backups, through the real sandbox. (Which damage is
reported how is the subject of the tests of whole restores.)
"""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from qubes_restore_svc.errors import ExitStatus
from tests.support.backup_writer import PASSPHRASE
from tests.support.damage import DAMAGES, sample_backup
from tests.support.documents import checked
from tests.support.fixtures import REPOSITORY

from .support import command, environment, finished, passphrase_file, running, small_backup

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


#: How each can be reached, by a command that lists a backup: the words, and which damage the backup has.
WAYS: dict[ExitStatus, tuple[str, str | None]] = {
    ExitStatus.COMPLETE: ("list", None),
    ExitStatus.NOTHING: ("list", "header-with-a-key-twice"),
    ExitStatus.USAGE: ("list --memory 0", None),
    ExitStatus.PARTLY: ("list", "qube-name-with-dotdot"),
    ExitStatus.DIFFERENT: ("compare --with {directory}", None),
    ExitStatus.CANCELLED: ("list", None),
}


@pytest.mark.parametrize("status", ExitStatus)
def test_every_exit_status_that_is_told_can_be_reached(
    status: ExitStatus, passphrase: Path, tmp_path: Path
) -> None:
    words, damage = WAYS[status]
    backup = DAMAGES[damage].apply(sample_backup()) if damage else small_backup().to_bytes()
    with running(*words.format(directory=tmp_path).split(), "-", "-p", passphrase, feed=True) as run:
        run.feed(backup[:100] if status is ExitStatus.CANCELLED else backup)
        if status is ExitStatus.CANCELLED:
            run.worker()
            run.interrupt()
        else:
            run.end_of_backup()
        assert run.outcome().status == status


# --- 0 -------------------------------------------------------------------------------------------


def test_0_and_a_full_report_when_everything_is_restored(
    backup: Path, passphrase: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    outcome = finished("extract", backup, "--to", tmp_path / "out", "-p", passphrase, report=report)
    assert outcome.status == 0, outcome.errors
    assert outcome.report is not None
    facts = outcome.report
    assert set(facts) == {
        "type", "schema_version", "tool_version", "mode", "asked_by", "backup_id", "started", "finished",
        "status", "error", "warnings", "qubes", "derivations",
    }  # fmt: skip
    assert facts["asked_by"] is None
    assert (facts["type"], facts["schema_version"], facts["tool_version"]) == ("report", 1, "0.1.0")
    assert (facts["mode"], facts["backup_id"], facts["status"]) == ("restore", "20260101T010203-1234", 0)
    began, ended = (datetime.fromisoformat(str(facts[key])) for key in ("started", "finished"))
    assert began <= ended and began.tzinfo is not None
    assert isinstance(facts["qubes"], list)
    qubes = {qube["name"]: qube for qube in facts["qubes"]}
    assert {name: qube["outcome"] for name, qube in qubes.items()} == {
        "dom0": "left out", "work": "restored", "vault": "restored", "debian": "restored",
    }  # fmt: skip
    expected = {
        f"{qube.name}/{volume}": (image.size, image.fsverity(), None)
        for qube in small_backup().qubes
        for volume, image in qube.volumes.items()
    }
    found = {
        f"{qube['name']}/{volume['name']}": (volume["size"], volume["fsverity"], volume["sha256"])
        for qube in facts["qubes"]
        for volume in qube["volumes"]
    }
    assert found == expected
    volume = qubes["work"]["volumes"][0]
    assert (volume["outcome"], volume["error"]) == ("ok", None)
    assert 0 < volume["data_bytes"] <= volume["size"]
    for _, fsverity, _ in expected.values():
        assert fsverity in outcome.output
    records = {
        path.parent.name: checked(path.read_text(), "qube") for path in tmp_path.glob("out/*/qube.json")
    }
    assert records.keys() == {"work", "vault", "debian"}
    assert all(record["class"] == qubes[name]["class"] for name, record in records.items())


def test_plain_sha_256_is_told_in_its_place_when_it_is_asked_for(
    backup: Path, passphrase: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    outcome = finished("verify", backup, "vault", "-p", passphrase, "--sha256", report=report)
    assert outcome.report is not None and isinstance(outcome.report["qubes"], list)
    (vault,) = (qube for qube in outcome.report["qubes"] if qube["name"] == "vault")
    sha256 = small_backup().qubes[1].volumes["private"].sha256()
    assert [(one["fsverity"], one["sha256"]) for one in vault["volumes"]] == [(None, sha256)]
    assert "DIGEST (sha256sum FILE)" in outcome.output and sha256 in outcome.output


def test_0_for_a_part_when_only_that_part_was_asked_for(backup: Path, passphrase: Path) -> None:
    outcome = finished("verify", "-p", passphrase, backup, "-x", "debian", "work", "vault", "vault")
    assert outcome.status == 0, outcome.errors
    rows = [line.split()[0] for line in outcome.output.splitlines()[1:]]
    assert rows == ["work", "vault"]
    assert outcome.errors.endswith("2 of 2 qubes verified.\n")


def test_0_through_a_pipe_and_with_a_passphrase_from_standard_input(backup: Path, passphrase: Path) -> None:
    outcome = finished("verify", "-", "-p", passphrase, input=backup.read_bytes())
    assert outcome.status == 0, outcome.errors
    outcome = finished("list", backup, "-p", "-", input=PASSPHRASE.encode())
    assert outcome.status == 0, outcome.errors


def test_0_without_the_sandbox_which_says_what_is_lost(backup: Path, passphrase: Path) -> None:
    nowhere = {"PATH": "/nonexistent"}
    words = command("verify", backup, "-p", passphrase, "--no-sandbox", "-q")
    ended = subprocess.run(
        words, env=environment("x") | nowhere, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert ended.returncode == 0
    assert "without the sandbox, a backup that was made to attack" in ended.stderr
    assert "read your files, your keys, and use your network" in ended.stderr


def test_0_and_the_list_as_json(backup: Path, passphrase: Path) -> None:
    outcome = finished("list", backup, "-p", passphrase, "--json")
    assert outcome.status == 0
    listed = checked(outcome.output, "list")
    assert listed["backup_id"] == "20260101T010203-1234"
    assert listed["refused"] == []
    assert [qube["name"] for qube in listed["qubes"]] == ["dom0", "work", "vault", "debian"]
    assert set(listed["qubes"][1]) == {
        "key", "name", "class", "template", "netvm", "label", "home_user", "backup_size", "volumes",
    }  # fmt: skip
    assert outcome.errors == ""


# --- 1 -------------------------------------------------------------------------------------------


def test_1_and_a_report_for_a_wrong_passphrase(backup: Path, tmp_path: Path) -> None:
    report, target = tmp_path / "report.json", tmp_path / "out"
    wrong = passphrase_file(tmp_path, "incorrect")
    outcome = finished("extract", backup, "--to", target, "-p", wrong, report=report)
    assert outcome.status == 1
    assert outcome.errors == (
        "qubes-restore-svc: the backup does not open with this passphrase."
        " Check the keyboard layout and Caps Lock, and try again.\n"
    )
    assert outcome.report is not None and outcome.report["status"] == 1
    assert "'kind': 'wrong-passphrase'" in str(outcome.report["error"])
    assert not target.exists()


def test_1_when_every_qube_is_there_already(backup: Path, passphrase: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert finished("extract", backup, "--to", target, "-p", passphrase).status == 0
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    outcome = finished("extract", backup, "--to", target, "-p", passphrase)
    assert outcome.status == 1
    assert "work, vault, debian: a qube of this name is there already" in outcome.errors
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before


def test_1_without_bubblewrap_and_how_to_install_it(backup: Path, passphrase: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    words = command("verify", backup, "-p", passphrase, "--report", report)
    env = environment("x") | {"PATH": "/nonexistent"}
    ended = subprocess.run(words, env=env, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "bubblewrap, which isolates the worker, is not installed. Install it (" in ended.stderr
    assert "--no-sandbox" in ended.stderr
    assert json.loads(report.read_text())["error"]["kind"] == "sandbox-unavailable"


def test_1_when_the_memory_does_not_hold_a_derivation(backup: Path, passphrase: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    outcome = finished("verify", backup, "-p", passphrase, "--memory", "1", report=report)
    assert outcome.status == 1
    assert "--memory " in outcome.errors
    assert outcome.report is not None
    assert "'kind': 'budget-too-small'" in str(outcome.report["error"])


def test_1_for_what_is_no_backup(passphrase: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for name in (empty, Path(__file__), "/dev/null", "/dev/zero"):
        outcome = finished("verify", name, "-p", passphrase)
        assert outcome.status == 1, name
        assert "Traceback" not in outcome.errors


# --- 2 -------------------------------------------------------------------------------------------

Arguments = Callable[[Path, Path], list[str | Path]]
REFUSED: dict[str, tuple[Arguments, str]] = {
    "no backup": (lambda backup, _: ["verify"], "BACKUP"),
    "an option cut short": (lambda backup, _: ["verify", backup, "--no"], "--no"),
    "a missing backup": (lambda backup, _: ["list", f"{backup}.old"], "No such file"),
    "a directory": (lambda backup, _: ["list", backup.parent], "is a directory, not a backup"),
    "a socket": (lambda backup, folder: ["list", _socket(folder)], "cannot be opened"),
    "an unknown qube": (
        lambda backup, _: ["verify", backup, "wrok"],
        "no qube named 'wrok'. Did you mean work? It holds: debian, dom0, vault, work.",
    ),
    "nothing selected": (lambda backup, _: ["verify", backup, "work", "-x", "work"], "no qube is selected"),
    "an unknown filter": (lambda backup, _: ["verify", backup, "-Z", "rar"], "choose from"),
    "too many jobs": (lambda backup, _: ["verify", backup, "--jobs", "1025"], "from 1 to 1024"),
    "a target that is a file": (lambda backup, _: ["extract", backup, "--to", backup], "not a directory"),
    "a target without parent": (
        lambda backup, folder: ["extract", backup, "--to", folder / "a" / "b"],
        "is no directory. Create it first.",
    ),
    "a report over the backup": (
        lambda backup, _: ["verify", backup, "--report", backup],
        "it is the backup",
    ),
    "a report in no directory": (
        lambda backup, folder: ["verify", backup, "--report", folder / "a" / "b"],
        "no such directory",
    ),
    "a report that is a directory": (
        lambda backup, folder: ["verify", backup, "--report", folder],
        "it is a directory",
    ),
    "two things from standard input": (lambda backup, _: ["verify", "-", "-p", "-"], "cannot both"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_2_for_what_cannot_be_carried_out(case: str, backup: Path, passphrase: Path, tmp_path: Path) -> None:
    make, words = REFUSED[case]
    arguments = make(backup, tmp_path)
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}
    if arguments and "-p" not in arguments:
        arguments += ["-p", passphrase]
    outcome = finished(*arguments)
    assert outcome.status == 2, outcome.errors
    assert words in outcome.errors
    assert "Traceback" not in outcome.errors
    assert outcome.output == ""
    assert {path: path.stat().st_size for path in tmp_path.rglob("*")} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_2_for_a_directory_that_may_not_be_written_to(backup: Path, passphrase: Path, tmp_path: Path) -> None:
    target = tmp_path / "closed"
    target.mkdir(mode=0o500)
    outcome = finished("extract", backup, "--to", target, "-p", passphrase)
    assert outcome.status == 2
    assert f"you may not write to {target}" in outcome.errors


def test_2_without_a_terminal_to_ask_on(backup: Path) -> None:
    outcome = finished("verify", backup)
    assert outcome.status == 2
    assert "there is no terminal to ask for the passphrase on. Use -p FILE or -p -." in outcome.errors


def _socket(folder: Path) -> Path:
    path = folder / "socket"
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
    return path


# --- 3 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["verify"], ["extract", "--to"]], ids=["verify", "extract"])
def test_3_when_a_part_is_there(arguments: list[str], passphrase: Path, tmp_path: Path) -> None:
    backup, target = tmp_path / "sample.qbackup", tmp_path / "out"
    backup.write_bytes(DAMAGES["data-after-the-compressed-stream"].apply(sample_backup()))
    places = [target] if arguments[0] == "extract" else []
    report = tmp_path / "report.json"
    outcome = finished(*arguments, *places, backup, "-p", passphrase, report=report)
    assert outcome.status == 3, outcome.errors
    assert "3 of 4 qubes" in outcome.errors
    assert outcome.report is not None and outcome.report["status"] == 3
    assert isinstance(outcome.report["qubes"], list)
    [failed] = [qube for qube in outcome.report["qubes"] if qube["outcome"] == "failed"]
    assert (failed["name"], failed["error"]["kind"]) == ("work", "bad-compression")
    assert failed["error"]["reason"] in outcome.errors
    assert failed["error"]["advice"] in outcome.errors
    if arguments[0] == "extract":
        assert {path.name for path in target.iterdir()} == {"vault", "scratch", "custom-template"}


def test_3_when_a_qube_cannot_even_be_listed(passphrase: Path, tmp_path: Path) -> None:
    backup = tmp_path / "sample.qbackup"
    backup.write_bytes(DAMAGES["qube-name-with-dotdot"].apply(sample_backup()))
    outcome = finished("list", backup, "-p", passphrase, "--json")
    assert outcome.status == 3
    assert outcome.errors.startswith("not listed: ")
    assert len(checked(outcome.output, "list")["refused"]) == 1
