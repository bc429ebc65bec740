"""Everything of an emulated Qubes that a restore could leave behind, as plain values that can be compared.

A snapshot holds the qubes with all that was set for them and the hashes of their volumes, the system's
properties, the files in the domains' directories and in the pools, and the processes that belong to the
emulation: those that run in its domains, and those that have its directory in their environment or on their
command line.
"""

import fnmatch
import hashlib
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from tests.emulation.daemon.state import Domain
from tests.emulation.qubesd import Qubesd

Snapshot = dict[str, object]

_BLOCK = 64 * 1024
#: Written by the emulation, not by what is tested.
_OWN_FILES = ("*/journal", "*/qrexec.sock", "*/bin/qrexec-client*")


def take_snapshot(
    qubesd: Qubesd, root: Path, ignored_files: Collection[str], processes: Collection[int]
) -> Snapshot:
    """The state now, without files of the domains whose path below `root` matches one of the patterns.

    `processes` are those that are known to run in the domains.
    """
    with qubesd.lifecycle.lock:
        system = qubesd.system
        return {
            "qubes": {name: _qube(qubesd, domain) for name, domain in sorted(system.domains.items())},
            "properties": dict(system.properties),
            "files": _files(root, (*_OWN_FILES, *ignored_files)),
            "pools": _files(qubesd.directory / "volumes", ()),
            "processes": _processes(str(root.parent), processes),
        }


def content_hash(path: Path) -> str:
    """SHA-256 over the blocks of a file that are not zero, with where they are, and its size."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        offset = 0
        while offset < size:
            try:
                offset = os.lseek(file.fileno(), offset, os.SEEK_DATA) // _BLOCK * _BLOCK
            except OSError:
                break  # nothing but a hole from here on
            block = os.pread(file.fileno(), _BLOCK, offset)
            if block.strip(b"\0"):
                digest.update(f"{offset} {len(block)}\n".encode() + block)
            offset += len(block)
        digest.update(str(size).encode())
    return digest.hexdigest()


def _qube(qubesd: Qubesd, domain: Domain) -> Snapshot:
    return {
        "klass": domain.klass,
        "power_state": domain.power_state,
        "properties": dict(sorted(domain.properties.items())),
        "tags": sorted(domain.tags),
        "features": dict(sorted(domain.features.items())),
        "firewall": list(domain.firewall),
        "notes": domain.notes,
        "devices": dict(sorted(domain.devices.items())),
        "volumes": {
            volume.name: (
                volume.pool,
                volume.size,
                volume.importing,
                content_hash(qubesd.volumes.path(volume)),
            )
            for volume in domain.volumes.values()
            if volume.save_on_stop
        },
    }


def _files(folder: Path, ignored: Collection[str]) -> list[str]:
    found = (
        str((Path(place) / name).relative_to(folder))
        # Passes over what vanishes meanwhile, as the home of a qube that is being removed.
        for place, folders, files in os.walk(folder)
        for name in (*files, *(one for one in folders if (Path(place) / one).is_symlink()))
    )
    return sorted(path for path in found if not any(fnmatch.fnmatchcase(path, glob) for glob in ignored))


def _processes(marker: str, known: Collection[int]) -> list[str]:
    """The command lines of the processes that belong to the emulation in that directory, or are known to."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with suppress(OSError):  # it has gone meanwhile
            command = Path(f"/proc/{entry}/cmdline").read_bytes()
            environment = Path(f"/proc/{entry}/environ").read_bytes()
            belongs = int(entry) in known or marker.encode() in command + b"\0" + environment
            if belongs and command:
                found.append(command.replace(b"\0", b" ").decode(errors="replace").strip())
    return sorted(found)
