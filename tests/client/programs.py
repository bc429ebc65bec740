"""Transports to a program that plays a script; see `fake_dom0`."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qubes_restore_svc.client.transports import NOTHING_HANDED, Handed, ProgramTransport
from qubes_restore_svc.wire.models import Message

FAKE = Path(__file__).with_name("fake_dom0.py")

Step = Sequence[Any]


def said(message: Message) -> Step:
    """The step that says it."""
    return ("say", json.loads(message.model_dump_json(by_alias=True)))


def fake_command(folder: Path, steps: Sequence[Step]) -> list[str]:
    """The command of a program that plays these steps."""
    script = folder / "script.json"
    script.write_text(json.dumps(steps))
    return [sys.executable, "-I", "-S", str(FAKE), str(script)]


def fake_program(folder: Path, *steps: Step, handed: Handed = NOTHING_HANDED) -> ProgramTransport:
    """A transport to it."""
    return ProgramTransport(fake_command(folder, steps), handed)


def fake_qrexec(folder: Path, *steps: Step) -> str:
    """The path of something that can be started as qrexec-client-vm."""
    program = folder / "qrexec-client-vm"
    words = " ".join(f"'{word}'" for word in fake_command(folder, steps))
    program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    program.chmod(0o755)
    return str(program)


def is_gone(note: Path) -> bool:
    """Is the process whose number stands in `note` no more, reaped as well?"""
    try:
        os.kill(int(note.read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def open_descriptors() -> set[str]:
    """What this process has open, as far as it can be told apart."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:  # that was the directory itself
            continue
    return found
