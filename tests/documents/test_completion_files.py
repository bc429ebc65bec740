"""TAB in the real shells: options, files and subcommands are offered, and never a qube of a backup."""

import contextlib
import os
import pty
import select
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from . import completion_files

#: What is typed, and what its last word is after TAB; where nothing fits, nothing changes.
TYPED = {
    "qubes-restore-svc ext": "extract",
    "qubes-restore-svc --vers": "--version",
    "qubes-restore-svc list --js": "--json",
    "qubes-restore-svc list --to": "--to",
    "qubes-restore-svc list back": "backup.bin",
    "qubes-restore-svc list backup.bin back": "back",
    "qubes-restore-svc verify -p 0 -x a back": "backup.bin",
    "qubes-restore-svc verify -p secr": "secret",
    "qubes-restore-svc extract b --to dire": "directory",
    "qubes-restore-svc extract b --to x --volume pri": "private",
    "qubes-restore-watch col": "collect",
    "qubes-restore-watch verify nas --he": "--help",
    "qubes-restore-svc extract b --skip-dom": "--skip-dom0-home",
    "qvm-backup-restore --mgmt-vm backup --skip-d": "--skip-dom0-home",
    "qubes-restore-watch show --state dire": "directory",
    "qvm-backup-restore --mgmt-v": "--mgmt-vm",
    "qvm-backup-restore --mgmt-vm back": "backup.bin",
    "qvm-backup-restore --mgmt-vm -d sys-usb back": "back",
    "qvm-backup-restore --mgmt-vm --location-is-s": "--location-is-service",
}

_BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
"_${1//-/_}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
#: Ctrl-X prints the line; it is typed after TAB, in an interactive shell.
_ZSH = """
fpath=({folder} $fpath); autoload -Uz compinit; compinit -u -D; unsetopt beep
shown() {{ print -r -- "<$BUFFER>" }}; zle -N shown; bindkey '^X' shown
PS1=ready
"""


def only(offered: list[str], typed: str) -> str:
    """What a shell puts into the line: the one word that is offered, or what was typed."""
    words = {word for word in offered if word}
    return words.pop().rstrip("/") if len(words) == 1 else typed.rpartition(" ")[2]


def bash(typed: str) -> str:
    name = typed.partition(" ")[0]
    words = [
        "bash",
        "--norc",
        "-c",
        _BASH,
        "bash",
        str(completion_files.FOLDER / f"{name}.bash"),
        *typed.split(" "),
    ]
    ended = subprocess.run(words, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    return only(ended.stdout.splitlines(), typed)


def fish(typed: str) -> str:
    source = completion_files.FOLDER / f"{typed.partition(' ')[0]}.fish"
    words = ["fish", "--no-config", "-c", f"source {source}; complete -C '{typed}'"]
    ended = subprocess.run(words, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    return only([line.partition("\t")[0] for line in ended.stdout.splitlines()], typed)


def zsh(typed: str) -> str:
    Path(".zsh").mkdir()
    Path(".zsh/.zshrc").write_text(_ZSH.format(folder=completion_files.FOLDER))
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe("zsh", ["zsh", "-d", "-i"], {**os.environ, "TERM": "dumb", "ZDOTDIR": ".zsh"})
    try:
        read_until(terminal, b"ready")
        os.write(terminal, f"{typed}\t\x18".encode())
        text = read_until(terminal, b">").partition(b"<")[2].partition(b">")[0].decode()
    finally:
        os.write(terminal, b"\x03exit\n")
        os.close(terminal)
        os.waitpid(process, 0)
    return text.strip().rpartition(" ")[2].rstrip("/")


def read_until(terminal: int, mark: bytes) -> bytes:
    said = b""
    with contextlib.suppress(OSError):
        while mark not in said and select.select([terminal], [], [], 20)[0]:
            said += os.read(terminal, 4096)
    assert mark in said, said
    return said


def test_the_files_are_current() -> None:
    made = dict(completion_files.files())
    kept = {path.name: path.read_text() for path in completion_files.FOLDER.iterdir()}
    assert kept == made, "run: python -m tests.documents.completion_files"


@pytest.mark.parametrize("typed", TYPED)
@pytest.mark.parametrize("complete", [bash, fish, zsh])
def test_tab_completes(
    complete: Callable[[str], str], typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which(complete.__name__) is None:
        pytest.skip(f"there is no {complete.__name__} here")
    (tmp_path / "backup.bin").touch()
    (tmp_path / "secret").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "direct-file").touch()
    monkeypatch.chdir(tmp_path)
    assert complete(typed) == TYPED[typed]
