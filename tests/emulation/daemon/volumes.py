"""Volumes: which a qube has, the files of those that are kept, and the import of new data.

A volume's file is sparse and lies in `POOL/VID` below the directory. An import writes a second file beside
it; the end of the import puts it in the volume's place, or throws it away. How much a pool can still take is
told to the program that writes by a third file, `….room`, in bytes of data.
"""

import os
import subprocess
import time
from pathlib import Path

from tests.emulation.daemon import properties
from tests.emulation.daemon.errors import AdminError, StumbleError, not_halted, protocol, storage
from tests.emulation.daemon.state import Domain, System, Volume

GIB = 1 << 30
#: Their sizes when created; whose are kept when the qube stops; whose are taken from the template.
_SIZES = {"root": 10 * GIB, "private": 2 * GIB, "volatile": 10 * GIB, "kernel": 0}
_KEPT = {
    "TemplateVM": ("root", "private"),
    "StandaloneVM": ("root", "private"),
    "AppVM": ("private",),
    "DispVM": (),
}
_FROM_TEMPLATE = {"TemplateVM": (), "StandaloneVM": (), "AppVM": ("root",), "DispVM": ("root", "private")}


class Volumes:
    """All volumes of a system, in a directory."""

    def __init__(self, directory: Path, system: System) -> None:
        self._directory = directory
        self._system = system

    def create(self, domain: Domain, pool: str | None, pools: dict[str, str]) -> None:
        """Give a new qube its volumes; `pool` is for all that can be anywhere, `pools` for single ones."""
        for name, size in _SIZES.items():
            from_template = name in _FROM_TEMPLATE[domain.klass]
            place = properties.read(self._system, self._system.holder, f"default_pool_{name}")
            source = ""
            if from_template:
                origin = self._origin(domain, name)
                place, source, size = origin.pool, origin.vid, origin.size
                if pools.get(name, place) != place:
                    raise AdminError(
                        "QubesException",
                        f"Snapshot volume {name} must be in the same pool as its origin ({name} volume of"
                        f" template),cannot move to pool {pools[name]} ",
                    )
            elif name in pools or (pool and name != "kernel"):
                place = pools.get(name) or pool
                if name != "kernel" and self._system.pools[str(place)].driver == "linux-kernel":
                    raise StumbleError("a pool of kernels takes no other volumes")
            volume = Volume(
                name,
                pool=str(place),
                vid=f"vm-{domain.name}-{name}",
                size=size,
                rw=name != "kernel",
                save_on_stop=name in _KEPT[domain.klass],
                snap_on_start=from_template,
                source=source,
            )
            domain.volumes[name] = volume
        for volume in domain.volumes.values():
            if volume.save_on_stop:
                self._make(self.path(volume), volume.size)

    def follow_template(self, domain: Domain) -> None:
        """The qube has another template: what it takes from it comes from there."""
        for name in _FROM_TEMPLATE[domain.klass]:
            origin, volume = self._origin(domain, name), domain.volumes[name]
            volume.pool, volume.source, volume.size = origin.pool, origin.vid, origin.size

    def remove(self, domain: Domain) -> None:
        for volume in domain.volumes.values():
            for path in (self.path(volume), self._import_path(volume), self._room_path(volume)):
                path.unlink(missing_ok=True)

    def path(self, volume: Volume) -> Path:
        """The file of a volume that is kept."""
        directory = self._directory / volume.pool
        if self._system.pools[volume.pool].driver == "file-reflink":
            return directory / f"{volume.vid}.img"
        return directory / volume.vid

    def told_path(self, volume: Volume) -> Path:
        """What is told: of the files of the driver file-reflink, the one that a running qube writes to."""
        path = self.path(volume)
        return path.with_name(f"{path.stem}-dirty.img") if path.suffix == ".img" else path

    def usage(self, volume: Volume) -> int:
        """Bytes that it takes."""
        return _allocated(self.path(volume)) if volume.save_on_stop else 0

    def pool_usage(self, pool: str) -> int:
        directory = self._directory / pool
        return sum(_allocated(path) for path in directory.iterdir()) if directory.exists() else 0

    def resize(self, volume: Volume, size: int) -> None:
        if not volume.rw:
            raise storage(f"Cannot resize: {volume.vid} is read-only")
        if size < volume.size:
            raise storage(
                f"For your own safety, shrinking of {volume.name} is disabled ({size} < {volume.size})."
                f" If you really know what you are doing, use `lvresize` on {volume.vid} manually."
            )
        volume.size = size
        if volume.save_on_stop:
            os.truncate(self.path(volume), size)

    def clear(self, domain: Domain, volume: Volume) -> None:
        self.begin_import(domain, volume, None)
        self.end_import(volume, "ok")

    def clone(self, volume: Volume, source: Volume) -> None:
        """Make it what the source is, or was when its qube was stopped."""
        if not any(source in domain.volumes.values() for domain in self._system.domains.values()):
            raise StumbleError(f"{source.vid} is gone")
        if not (volume.save_on_stop and source.save_on_stop):
            return
        self._make(self._import_path(volume), source.size)
        subprocess.run(["cp", "--sparse=always", self.path(source), self._import_path(volume)], check=True)
        volume.importing = True
        self.end_import(volume, "ok")

    def begin_import(self, domain: Domain, volume: Volume, size: int | None) -> str:
        """Make room for new data; brings its size and where it is to be written."""
        if not domain.halted:
            raise not_halted(domain.name)
        if not volume.save_on_stop:
            raise StumbleError(f"Cannot import_data: {volume.vid} is not save_on_stop")
        if volume.importing:
            raise storage(f"Import operation in progress on {volume.vid}")
        volume.importing = True
        pool = self._system.pools[volume.pool]
        size = volume.size if size is None else size
        if pool.size is not None:
            room = max(pool.size - self.pool_usage(pool.name), 0)
            self._room_path(volume).write_text(str(room))
        self._make(self._import_path(volume), size)
        if any(character.isspace() for character in str(self._import_path(volume))):
            raise protocol("Path contains whitespace")
        return f"{size} {self._import_path(volume)}"

    def end_import(self, volume: Volume, status: str) -> None:
        """What the program says in the end: `ok`, or `fail` and why in a second line."""
        if not volume.importing:
            raise storage(f"No import operation in progress on {volume.vid}")
        volume.importing = False
        self._room_path(volume).unlink(missing_ok=True)
        if status == "ok":
            volume.size = self._import_path(volume).stat().st_size
            self._import_path(volume).rename(self.path(volume))
            if self._system.pools[volume.pool].driver == "lvm_thin":
                volume.revisions.append(f"{int(time.time())}-back")
            return
        self._import_path(volume).unlink()
        raise AdminError("QubesException", f"Data import failed: {status.partition(chr(10))[2]}")

    def _origin(self, domain: Domain, name: str) -> Volume:
        """The volume that a snapshot is made of in the end, maybe the template's template's."""
        template = self._system.domains[str(domain.properties["template"])]
        if template.volumes[name].snap_on_start:
            return self._origin(template, name)
        return template.volumes[name]

    def _make(self, path: Path, size: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            file.truncate(size)

    def _import_path(self, volume: Volume) -> Path:
        path = self.path(volume)
        return path.with_name(f"{path.name}.import")

    def _room_path(self, volume: Volume) -> Path:
        path = self.path(volume)
        return path.with_name(f"{path.name}.import.room")


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
