"""What stands in the directory that a restore writes to: names of files, and the record `qube.json`.

Strategy: a qube is a directory of its name. While it is being written it is called `.NAME.partial`, which no
qube can be called; that name and the four file names below are all that this program ever creates, and so all
that it ever removes. The record holds every setting of the backup as data, for people and programs to read;
nothing in it is acted upon here.
"""

import json
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress

from qubes_restore_svc import __version__
from qubes_restore_svc.broker.filesystem import open_directory
from qubes_restore_svc.broker.host import NewQube
from qubes_restore_svc.broker.image_file import VOLUME_FILES
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.wire.messages import QubeSettings
from qubes_restore_svc.wire.names import VolumeName, strip_control

RECORD = "qube.json"
RECORD_FORMAT = 1  #: rises when a reader of the record has to know

_NAME = r"[a-zA-Z][a-zA-Z0-9_.-]{0,30}"
_PARTIAL = re.compile(rf"\.{_NAME}\.partial")
_FILES = frozenset({RECORD, *VOLUME_FILES.values()})


def partial_name(qube_name: str) -> str:
    """What a qube's directory is called until the qube is complete; raises HostFailed for a bad name.

    Names were checked long before they come here. The check stands here again because here it is that a
    `/` or a leading dot would do harm.
    """
    if not re.fullmatch(_NAME, qube_name):
        shown = strip_control(qube_name[:64])
        raise HostFailed("a directory for a qube of that name cannot be created", qube=shown)
    return f".{qube_name}.partial"


def remove_partial(name: str, inside: int, *, dir_fd: int) -> None:
    """Remove our files in the directory `inside`, and the directory if it still has this name.

    OSError if something else is left in it. What has its name instead is not touched.
    """
    for file in sorted(_FILES):
        with suppress(FileNotFoundError):
            os.unlink(file, dir_fd=inside)
    if leads_to(name, inside, dir_fd=dir_fd):
        os.rmdir(name, dir_fd=dir_fd)


def leads_to(name: str, descriptor: int, *, dir_fd: int) -> bool:
    """Is it what is open as `descriptor` that has this name, and not a link to it?"""
    try:
        return os.path.samestat(os.stat(name, dir_fd=dir_fd, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def clear_partials(directory: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Remove the partial directories of restores that were killed. Only under the lock.

    Returns the names of those that were removed, and of those that were not because they are not directories,
    hold something that no restore writes, or could not be removed.
    """
    cleared: list[str] = []
    kept: list[str] = []
    for name in sorted(os.listdir(directory)):
        if not _PARTIAL.fullmatch(name):
            continue
        outcome = kept
        with suppress(OSError):
            inside = open_directory(name, dir_fd=directory)
            try:
                if _holds_only_ours(inside):
                    remove_partial(name, inside, dir_fd=directory)
                    outcome = cleared
            finally:
                close_read(inside)
        outcome.append(name)
    return tuple(cleared), tuple(kept)


def record(qube: NewQube, settings: QubeSettings, sizes: Mapping[VolumeName, int]) -> bytes:
    """The content of `qube.json`: UTF-8, keys in order, the same bytes for the same qube.

    `sizes` are those of the volumes that were written, in bytes. `null` stands for what the backup does not
    say (`netvm`: the system's default), and for settings files that could not be had; why is a warning.
    """
    source = qube.source
    warnings = list(qube.warnings)
    if settings.error is not None:
        warnings.append(str(settings.error.to_error()))
    content = {
        "format": RECORD_FORMAT,
        "tool_version": __version__,
        "backup_id": qube.backup_id,
        "name": qube.name,
        "name_in_backup": source.name,
        "class": source.klass,
        "label": source.label,
        "template": source.template,
        "netvm": source.netvm,
        "properties": source.properties,
        "features": source.features,
        "tags": sorted(source.tags),
        "firewall": _rules(settings),
        "notes": settings.notes,
        "appmenus": None if settings.appmenus is None else list(settings.appmenus),
        "volumes": {volume: {"file": VOLUME_FILES[volume], "size": size} for volume, size in sizes.items()},
        "warnings": warnings,
    }
    text = json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    # A lone surrogate (from a path in a warning) becomes \udcXX, which is how JSON writes it.
    return text.encode("utf-8", "backslashreplace")


def _holds_only_ours(inside: int) -> bool:
    return all(
        file in _FILES and stat.S_ISREG(os.stat(file, dir_fd=inside, follow_symlinks=False).st_mode)
        for file in os.listdir(inside)
    )


def _rules(settings: QubeSettings) -> list[dict[str, object]] | None:
    if settings.firewall is None:
        return None
    return [rule.model_dump(exclude_none=True) for rule in settings.firewall]
