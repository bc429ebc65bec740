"""List a backup with the standard library alone: `python without_the_library.py STORAGE_QUBE PATH`."""

import json
import struct
import subprocess
import sys
from getpass import getpass
from typing import IO, Any


def say(stream: IO[bytes], message: dict[str, Any]) -> None:
    """Send one message."""
    payload = json.dumps(message).encode()
    stream.write(struct.pack(">I", len(payload)) + payload)
    stream.flush()


def hear(stream: IO[bytes]) -> dict[str, Any] | None:
    """The next message; None at the end of the call."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    (length,) = struct.unpack(">I", head)
    message: dict[str, Any] = json.loads(stream.read(length))
    return message


def main(storage_qube: str, path: str) -> None:
    """Call restore.List of dom0, and print what it says."""
    program = subprocess.Popen(
        ["qrexec-client-vm", "dom0", "restore.List"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert program.stdin is not None and program.stdout is not None
    request = {
        "type": "open",
        "mode": "list",
        "location": {"qube": storage_qube, "text": path},
        "passphrase": getpass("Passphrase of the backup: "),
    }
    say(program.stdin, request)
    while (message := hear(program.stdout)) and message["type"] in ("log", "progress"):
        pass
    program.stdin.close()
    if message is None:
        print(f"the call ended with exit code {program.wait()}")
    elif message["type"] == "refused":
        print(message["error"]["reason"], message["error"]["advice"])
    else:
        for qube in message["qubes"]:
            print(qube["name"], qube["class"], qube["backup_size"])


if __name__ == "__main__":
    main(*sys.argv[1:])
