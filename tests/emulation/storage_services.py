"""The stock services of a qube that holds backups: qubes.RegisterBackupLocation, .RestoreById and .Restore.

Strategy: programs of an emulated domain that do what the stock scripts do (qubes-core-agent-linux, qubes-
rpc/), on the same files, with the same output, words on stderr and exit codes, also where these are odd:
where a command gives the backup, what it exits with is what the service exits with, unless tar2qfile failed
before.
"""

import contextlib
import os
import random
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from . import tar2qfile
from .domain import write_program

_ID_CHARACTERS = string.ascii_letters + string.digits


def install(services: Path, *, by_id: bool = True) -> None:
    """Install them in a domain's folder of services; without `by_id`, what an agent has that is too old."""
    services.mkdir(parents=True, exist_ok=True)
    for name in _SERVICES:
        if by_id or name == "qubes.Restore":
            write_program(services / name, __name__, name)


def main() -> int:
    """Run the service that is named first, with the caller's argument after it; returns its exit code."""
    name, *arguments = sys.argv[1:]
    return _SERVICES[name](arguments[0] if arguments else "")


def register_backup_location(argument: str) -> int:
    """Read a line, give an id for it, which is good until stdin ends."""
    registry = _registry()
    registry.mkdir(parents=True, exist_ok=True)
    location, complete = _read_line()
    if not complete:
        return 1
    entry = _new_file(registry)
    try:
        entry.write_bytes(f"{os.getpid()} {_start_time(os.getpid())}\n".encode() + location + b"\n")
        print(entry.name, flush=True)
        os.close(1)
        while os.read(0, 4096):
            pass
    finally:
        entry.unlink(missing_ok=True)
    return 0


def restore_by_id(argument: str) -> int:
    """Send the wanted parts of the location that is registered under the id `argument`."""
    if not argument:
        return _fail("Missing backup location ID argument")
    entry = _registry() / argument
    if not entry.exists():
        return _fail("Invalid location ID")
    try:
        owner, location = entry.read_bytes().split(b"\n")[:2]
        pid, start_time = (int(number) for number in owner.split())
        valid = _start_time(pid) == start_time
    except (OSError, ValueError):
        valid = False
    if not valid:
        return _fail("Invalid location ID")
    tar2qfile.say("Starting Restorecopy")
    paths, complete = _read_line(b" ")
    if not complete:
        return 1
    tar2qfile.say(f"Backup location: {location.decode(errors='replace')}")
    wanted = [path for path in paths.split(b" ") if path]
    tar2qfile.say(f"Paths: {_printable(b' '.join(wanted))}")
    return _send(location, wanted, fail_early=True)


def restore(argument: str) -> int:
    """The older service: the location comes as the first line."""
    tar2qfile.say("Starting Restorecopy")
    location, _ = _read_line()
    paths, _ = _read_line(b" ")
    tar2qfile.say(f"Arguments: {location.decode(errors='replace')}")
    wanted = [path for path in paths.split(b" ") if path]
    tar2qfile.say(f"Paths: {b' '.join(wanted).decode(errors='replace')}")
    return _send(location, wanted, fail_early=False)


_SERVICES: dict[str, Callable[[str], int]] = {
    "qubes.RegisterBackupLocation": register_backup_location,
    "qubes.RestoreById": restore_by_id,
    "qubes.Restore": restore,
}


def _send(location: bytes, wanted: list[bytes], *, fail_early: bool) -> int:
    """Send a file, or what a command writes. With `fail_early`, all ends at the first failure (`set -e`)."""
    place = os.fsdecode(location)
    if os.path.isfile(place):
        tar2qfile.say(f"Performing restore from backup file {place}")
        tar2qfile.say(f"Copying {place} to STDOUT")
        return tar2qfile.run(place, wanted)
    tar2qfile.say("Checking if arguments is matching a command")
    command = place.split(" ")[0]
    if not _is_command(command):
        words = f"Invalid command {command}" if fail_early else f"Invalid file or command: {place}"
        tar2qfile.say(words)
        return 2
    tar2qfile.say(f"Redirecting {place} to STDOUT")
    if fail_early and (code := _shell('eval "set -- $1"', place)):
        return code
    reading, writing = os.pipe()
    # Quotes in the location count as in a shell, and the command does not get the caller's stream.
    script = ["/bin/sh", "-c", 'eval "set -- $1"; "$@"', "sh", place]
    with subprocess.Popen(script, stdin=subprocess.DEVNULL, stdout=writing) as source:
        os.close(writing)
        code = tar2qfile.run(reading, wanted)
        os.close(reading)
        if code and fail_early:
            os._exit(code)  # without waiting for the command
        status = source.wait()
    if status and fail_early:
        return status if status > 0 else 128 - status
    return code


def _registry() -> Path:
    return Path(os.environ.get("XDG_RUNTIME_DIR", ""), "qubes-backup-location")


def _new_file(folder: Path) -> Path:
    """A new empty file that only its owner can read, named with eight letters and digits."""
    while True:
        path = folder / "".join(random.choices(_ID_CHARACTERS, k=8))
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            return path


def _read_line(blanks: bytes = b" \t") -> tuple[bytes, bool]:
    """A line of stdin as the shell's `read -r` gives it, byte by byte, without `blanks` around it.

    False if the input ended before the line did.
    """
    line = b""
    while (byte := os.read(0, 1)) not in (b"\n", b""):
        line += byte
    return line.replace(b"\0", b"").strip(blanks), byte == b"\n"


def _start_time(pid: int) -> int:
    """When a process started (field 22 of its stat); raises OSError if there is none."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _is_command(word: str) -> bool:
    """What `command -v` finds: a program, or something of the shell's own."""
    return bool(word) and not os.path.isdir(word) and _shell('command -v "$1" >/dev/null', word) == 0


def _shell(script: str, word: str) -> int:
    return subprocess.run(
        ["/bin/sh", "-c", script, "sh", word], stdin=subprocess.DEVNULL, check=False
    ).returncode


def _printable(paths: bytes) -> str:
    return "".join(chr(byte) if 32 <= byte <= 126 else "_" for byte in paths)


def _fail(words: str) -> int:
    tar2qfile.say(words)
    return 1
