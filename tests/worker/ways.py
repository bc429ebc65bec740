"""The ways to the archive, and a whole session over any of them.

Strategy: a `Way` says what dom0 does besides the session: nothing, calls of `restore.Archive`, or a storage
qube named in `open`. `run` plays the broker to the end and returns all that was said, to be compared.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from qubes_restore_svc.wire import messages as m

from ..support.backup_writer import PASSPHRASE
from ..support.damage import sample_backup
from .caller import Caller, Peer
from .storage import LOCATION, FakeStorage, Served, fake_storage, serve
from .support import Engine, file_with, in_thread, receive

WRITER = sample_backup(log_n=2)
ARCHIVE = WRITER.to_bytes()
KEYS = ("vm10", "vm11", "vm12", "vm13")
BEGINNING = ["backup-header.hmac", "backup-header", "qubes.xml"]


@dataclass
class Way:
    """One way by which `archive` comes to a worker: what is done before `open` and before `start`."""

    archive: bytes
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    resources: contextlib.ExitStack
    location: m.Storage | None = None
    served: list[Served] = field(default_factory=list)
    storage: FakeStorage | None = None

    def __post_init__(self) -> None:
        """Nothing to prepare."""

    @contextlib.asynccontextmanager
    async def session(self, engine: Engine | None = None) -> AsyncIterator[tuple[Caller, Peer]]:
        """A worker with a session over this archive."""
        with self.descriptor() as descriptor:
            async with Caller(descriptor, engine=engine) as caller:
                yield caller, await caller.session()

    def descriptor(self) -> contextlib.AbstractContextManager[int | None]:
        return contextlib.nullcontext()

    def before_open(self, caller: Caller) -> None:
        """What dom0 calls before it says `open`."""

    def before_start(self, caller: Caller) -> None:
        """What dom0 calls before it says `start`."""


class Passed(Way):
    def descriptor(self) -> contextlib.AbstractContextManager[int | None]:
        return file_with(self.archive)


class Called(Way):
    def before_open(self, caller: Caller) -> None:
        connection = caller.call(b"restore.Archive dom0\0")
        connection.setblocking(True)

        def feed() -> None:
            with connection, contextlib.suppress(OSError):
                connection.sendall(self.archive)

        in_thread(feed)


class Conversed(Way):
    def before_open(self, caller: Caller) -> None:
        serve(self.archive, caller.call(b"restore.Archive+qfile dom0\0"), self.served)

    def before_start(self, caller: Caller) -> None:
        self.before_open(caller)


class Fetched(Way):
    def __post_init__(self) -> None:
        self.location = LOCATION
        folder = self.folder / f"storage-{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        self.storage = self.resources.enter_context(fake_storage(folder, self.archive, self.monkeypatch))


WAYS: dict[str, type[Way]] = {"passed": Passed, "called": Called, "conversed": Conversed, "fetched": Fetched}
NEW_WAYS = ("called", "conversed", "fetched")
MakeWay = Callable[[str, bytes], Way]


@dataclass
class Outcome:
    """All that a session has said."""

    manifest: m.Manifest | None = None
    failed: m.ErrorInfo | None = None
    volumes: dict[str, m.VolumeDone] = field(default_factory=dict)
    settings: dict[str, m.QubeSettings] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    received: dict[str, str | None] = field(default_factory=dict)
    finished: bool = False

    @property
    def kinds(self) -> dict[str, str]:
        return {name: done.error.kind if done.error else "ok" for name, done in self.volumes.items()}

    @property
    def summary(self) -> object:
        """What must not depend on the way."""
        return (
            self.manifest,
            self.failed.kind if self.failed else None,
            {name: (kind, self.volumes[name].fsverity) for name, kind in self.kinds.items()},
            {
                key: (one.firewall, one.notes, one.appmenus, one.error.kind if one.error else None)
                for key, one in self.settings.items()
            },
            self.finished,
        )


async def run(
    way: Way,
    keys: Sequence[str] | None = None,
    *,
    mode: Literal["restore", "verify"] = "verify",
    passphrase: str = PASSPHRASE,
    memory: int | None = None,
    engine: Engine | None = None,
    wrong: Sequence[str] = (),
) -> Outcome:
    """A whole session over `way`; all qubes, if no keys are given. `wrong`: passphrases to try before."""
    outcome = Outcome()
    passphrases = [*wrong, passphrase]
    async with way.session(engine) as (caller, peer):
        way.before_open(caller)
        peer.open(passphrases.pop(0), storage=way.location, memory=memory, retry=bool(wrong))
        fetches = []
        while (message := await peer.next()) is not None:
            if isinstance(message, m.Manifest):
                outcome.manifest = message
                way.before_start(caller)
                selected = keys or [qube.key for qube in message.qubes]
                peer.say(m.Start(mode=mode, keys=tuple(selected)))
            elif isinstance(message, m.VolumeReady) and mode == "restore":
                name = f"{message.key}.{message.volume}"
                connection = caller.call(b"restore.Volume+" + name.encode() + b" dom0\0")
                connection.setblocking(True)
                fetches.append((name, asyncio.create_task(asyncio.to_thread(receive, connection))))
            elif isinstance(message, m.VolumeDone):
                assert f"{message.key}.{message.volume}" not in outcome.volumes
                outcome.volumes[f"{message.key}.{message.volume}"] = message
            elif isinstance(message, m.QubeSettings):
                outcome.settings[message.key] = message
            elif isinstance(message, m.Log):
                outcome.warnings.append(message.text)
            elif isinstance(message, m.Failed) and message.error.kind == "wrong-passphrase" and passphrases:
                peer.open(passphrases.pop(0), storage=way.location, memory=memory)
            elif isinstance(message, m.Failed):
                outcome.failed = message.error
                break
            elif isinstance(message, m.Finished):
                outcome.finished = True
        outcome.received = {name: await fetch for name, fetch in fetches}
        peer.writer.close()
        await caller.ended()
    if way.storage is not None:
        assert way.storage.processes() == []
    return outcome
