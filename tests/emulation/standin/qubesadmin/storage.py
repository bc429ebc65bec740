"""Volumes of qubes, and the pools they lie in. Every value is asked for anew."""

import typing
from typing import IO

import qubesadmin.exc

if typing.TYPE_CHECKING:
    from qubesadmin.app import QubesBase


class Volume:
    """A volume of a qube, by the names of both."""

    def __init__(self, app: "QubesBase", vm: str, vm_name: str) -> None:
        self.app = app
        self._vm = vm
        self._vm_name = vm_name

    @property
    def name(self) -> str:
        return self._vm_name

    @property
    def pool(self) -> str:
        """The name of its pool."""
        return self._info("pool")

    @property
    def vid(self) -> str:
        return self._info("vid")

    @property
    def size(self) -> int:
        """In bytes."""
        return int(self._info("size"))

    @property
    def usage(self) -> int:
        """What it takes of the pool, in bytes."""
        return int(self._info("usage"))

    @property
    def rw(self) -> bool:
        return self._info("rw") == "True"

    @property
    def snap_on_start(self) -> bool:
        return self._info("snap_on_start") == "True"

    @property
    def save_on_stop(self) -> bool:
        return self._info("save_on_stop") == "True"

    @property
    def source(self) -> str | None:
        return self._info("source") or None

    @property
    def revisions_to_keep(self) -> int:
        return int(self._info("revisions_to_keep"))

    def resize(self, size: int) -> None:
        """Make it `size` bytes long, which is not less than it is."""
        self._call("Resize", str(size).encode("ascii"))

    def import_data(self, stream: IO[bytes]) -> None:
        """Replace the content; the stream must have as many bytes as the volume has, and gets closed."""
        self._call("Import", stream=stream)

    def import_data_with_size(self, stream: IO[bytes], size: object) -> None:
        """Replace content and size; the stream must have exactly `size` bytes, and gets closed.

        Raises and leaves the volume as it was if it has not, or if the qube is not halted.
        """
        self._call("ImportWithSize", f"{size}\n".encode(), stream)

    @property
    def revisions(self) -> list[str]:
        """What there was before, by id."""
        return self._call("ListSnapshots").decode("ascii").splitlines()

    def clone(self, source: "Volume") -> None:
        """Make it what the volume `source` is, or was when its qube was last shut down."""
        self._call("CloneTo", source._call("CloneFrom"))

    def clear_data(self) -> None:
        """Make it empty, of the same size."""
        self._call("Clear")

    def _call(self, what: str, payload: bytes | None = None, stream: IO[bytes] | None = None) -> bytes:
        method = f"admin.vm.volume.{what}"
        return self.app.qubesd_call(self._vm, method, self._vm_name, payload, stream)

    def _info(self, key: str) -> str:
        try:
            answer = self._call("Info").decode("ascii")
        except qubesadmin.exc.QubesDaemonAccessError:
            raise qubesadmin.exc.QubesPropertyAccessError(key) from None
        return dict(line.split("=", 1) for line in answer.splitlines())[key]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Volume):
            return self.pool == other.pool and self.vid == other.vid
        return NotImplemented

    def __lt__(self, other: object) -> bool:
        if isinstance(other, Volume):
            return (self._vm, self._vm_name) < (other._vm, other._vm_name)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment] # as in the original: compared by value, which can change


class Pool:
    """A storage pool by its name."""

    def __init__(self, app: "QubesBase", name: str) -> None:
        self.app = app
        self.name = name

    @property
    def usage_details(self) -> dict[str, int]:
        answer = self._call("UsageDetails", "usage_details")
        return {key: int(value) for key, value in (line.split("=", 1) for line in answer.splitlines())}

    @property
    def config(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self._call("Info", "config").splitlines())

    @property
    def driver(self) -> str:
        return self.config["driver"]

    @property
    def size(self) -> int | None:
        """In bytes; None where the driver does not know."""
        return self.usage_details.get("data_size")

    @property
    def usage(self) -> int | None:
        """Bytes in use; None where the driver does not know."""
        return self.usage_details.get("data_usage")

    def _call(self, what: str, of: str) -> str:
        try:
            return self.app.qubesd_call("dom0", f"admin.pool.{what}", self.name).decode()
        except qubesadmin.exc.QubesDaemonAccessError:
            raise qubesadmin.exc.QubesPropertyAccessError(of) from None

    def __str__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Pool | str):
            return self.name == str(other)
        return NotImplemented

    def __lt__(self, other: object) -> bool:
        return self.name < other.name if isinstance(other, Pool) else NotImplemented

    __hash__ = None  # type: ignore[assignment] # as in the original
