"""`python fake_dom0.py SCRIPT …`: a program at the other end of a call, which plays what a JSON file says.

Strategy: standard library only, so that it starts at once. The steps are lists, a verb and what it needs; the
words after SCRIPT are what a client adds, and are noted with `words`. Without a further step it ends with 0.
"""

import json
import os
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Play all steps."""
    script = Path(sys.argv[1])
    for verb, *rest in json.loads(script.read_text()):
        play(script.parent, verb, rest)


def play(folder: Path, verb: str, rest: list[Any]) -> None:
    """One step."""
    if verb == "hear":
        message = hear()
        if message["type"] != rest[0]:
            sys.exit(f"fake dom0: {message['type']} instead of {rest[0]}")
    elif verb == "say":
        payload = json.dumps(rest[0]).encode()
        sys.stdout.buffer.write(struct.pack("!I", len(payload)) + payload)
        sys.stdout.buffer.flush()
    elif verb == "hear end":
        while os.read(0, 1 << 16):
            pass
    elif verb == "words":
        (folder / rest[0]).write_text(json.dumps(sys.argv[2:]))
    elif verb == "take passphrase":
        take_passphrase(folder / rest[0])
    elif verb == "note":
        (folder / rest[0]).write_text(str(os.getpid()))
    elif verb == "stderr":
        os.write(2, rest[0].encode())
    elif verb == "flood":
        flood(rest[0], rest[1])
    elif verb == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif verb == "close output":
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(1, 0)
    elif verb == "leave a copy":
        leave_a_copy(folder / rest[0])
    elif verb == "stay":
        while True:
            time.sleep(60)
    elif verb == "exit":
        sys.exit(rest[0])
    else:
        sys.exit(f"fake dom0: what is {verb}?")


def hear() -> Any:
    """The next message of the client."""
    head = sys.stdin.buffer.read(4)
    if len(head) < 4:
        sys.exit("fake dom0: the client hung up")
    return json.loads(sys.stdin.buffer.read(struct.unpack("!I", head)[0]))


def flood(descriptor: int, size: int) -> None:
    """Write that many bytes, whoever reads."""
    while size:
        size -= os.write(descriptor, b"x" * min(size, 1 << 16))


def take_passphrase(note: Path) -> None:
    """Ask for the passphrase, a line; note it, and which descriptors are open besides the standard ones."""
    handed = {name: int(number) for name, _, number in (word.partition("=") for word in sys.argv[3:])}
    there = [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]
    there = [fd for fd in there if os.path.exists(f"/proc/self/fd/{fd}")]
    os.write(handed["passphrase"], b"?")
    said = b""
    while not said.endswith(b"\n") and (piece := os.read(handed["passphrase"], 1 << 16)):
        said += piece
    note.write_text(json.dumps([said.decode(), sorted(there), handed]))


def leave_a_copy(note: Path) -> None:
    """Another process, which holds our standard streams and outlives us."""
    process = os.fork()
    if process == 0:
        while True:
            time.sleep(60)
    note.write_text(str(process))


if __name__ == "__main__":
    main()
