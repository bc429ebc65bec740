"""A host that fails, or does something else, at any of the broker's calls."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from qubes_restore_svc.broker.interfaces import (
    Definition,
    HostView,
    NewQube,
    QubeTransaction,
    RestoredQube,
    VolumeSink,
)
from qubes_restore_svc.local.directory import DirectoryHost
from qubes_restore_svc.wire.messages import QubeSettings
from qubes_restore_svc.wire.names import VolumeName
from qubes_restore_svc.wire.report import VolumeReport

Trouble = Mapping[str, Callable[[], None]]


class TroubledHost:
    """A directory. Calls have names (`begin work`, `write work/private 1`); `trouble` runs before them.

    Unlike the directory it does not forgive: at the end of the lock the broker must have ended every qube,
    and every volume of those that were not rolled back.
    """

    def __init__(self, target: Path, trouble: Trouble) -> None:
        self.calls: list[str] = []
        self.begun: set[str] = set()  #: what has not been ended yet, `work` and `work/private`
        self._trouble = trouble
        self._directory = DirectoryHost(target)

    @contextmanager
    def lock(self) -> Iterator[Sequence[str]]:
        self.call("lock")
        with self._directory.lock() as remarks:
            try:
                yield remarks
            finally:
                assert not self.begun

    def view(self) -> HostView:
        self.call("view")
        return self._directory.view()

    def set_default_dispvm(self, qube: str, default_dispvm: str) -> None:
        self.call(f"default_dispvm {qube} {default_dispvm}")

    def restored_from(self, backup_id: str) -> Sequence[RestoredQube]:
        self.call(f"restored_from {backup_id}")
        return self._directory.restored_from(backup_id)

    def take_back(self, qube: str, backup_id: str, *, from_before: bool) -> bool:
        self.call(f"take_back {qube} {backup_id}")
        self._directory.take_back(qube, backup_id, from_before=from_before)
        return True

    def free_space(self, pool: str | None = None) -> int | None:
        self.call("free_space")
        return self._directory.free_space(pool)

    def begin(self, qube: NewQube) -> "TroubledQube":
        self.call(f"begin {qube.name}")
        transaction = TroubledQube(self, qube.name, self._directory.begin(qube))
        self.begun.add(qube.name)
        return transaction

    def call(self, name: str) -> None:
        self.calls.append(name)
        self._trouble.get(name, _nothing)()


@dataclass
class TroubledQube:
    host: TroubledHost
    name: str
    qube: QubeTransaction

    def create_volume(self, volume: VolumeName, image_size: int) -> "TroubledSink":
        self.host.call(f"create {self.name}/{volume}")
        sink = TroubledSink(self.host, f"{self.name}/{volume}", self.qube.create_volume(volume, image_size))
        self.host.begun.add(sink.name)
        return sink

    def change_template(self, template: str) -> None:
        self.host.call(f"template {self.name} {template}")

    def commit(
        self,
        settings: QubeSettings,
        definition: Definition | None,
        volumes: Sequence[VolumeReport] = (),
    ) -> Sequence[str]:
        self.host.call(f"commit {self.name}")
        remarks = self.qube.commit(settings, definition, volumes)
        self.host.begun.discard(self.name)
        return remarks

    def rollback(self) -> None:
        self.host.begun -= {name for name in self.host.begun if name.split("/")[0] == self.name}
        self.host.call(f"rollback {self.name}")
        self.qube.rollback()


@dataclass
class TroubledSink:
    host: TroubledHost
    name: str
    sink: VolumeSink
    writes: int = field(default=0)

    def write(self, offset: int, data: memoryview) -> None:
        self.writes += 1
        self.host.call(f"write {self.name} {self.writes}")
        self.sink.write(offset, data)

    def finish(self, size: int) -> None:
        self.host.call(f"finish {self.name}")
        self.sink.finish(size)
        self.host.begun.discard(self.name)

    def abandon(self) -> None:
        self.host.call(f"abandon {self.name}")
        self.sink.abandon()
        self.host.begun.discard(self.name)


def _nothing() -> None:
    pass
