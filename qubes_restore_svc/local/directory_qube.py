"""One qube on its way into a directory, and the record `qube.json` that it gets there.

Strategy: a qube is a directory of its name, with its images and the record. The record holds every setting of
the backup as data, for people and programs to read; nothing in it is acted upon here. How the directory comes
to be there as a whole, or not at all, is in `broker/image_directory.py`.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence

from qubes_restore_svc import __version__
from qubes_restore_svc.broker.filesystem import make_file, reporting, write_fully
from qubes_restore_svc.broker.host import Definition, NewQube
from qubes_restore_svc.broker.image_directory import (
    VOLUME_FILES,
    ImageDirectory,
    clear_partials,
    partial_name,
)
from qubes_restore_svc.errors import HostFailed, QubeExists
from qubes_restore_svc.wire.messages import QubeSettings
from qubes_restore_svc.wire.names import QUBE_NAME, VolumeName, strip_control

RECORD = "qube.json"
RECORD_FORMAT = 1  #: rises when a reader of the record has to know

_FILES = frozenset({RECORD, *VOLUME_FILES.values()})


class DirectoryQube(ImageDirectory):
    """A `QubeTransaction` in a directory."""

    def __init__(self, directory: int, qube: NewQube) -> None:
        """Create the partial directory in `directory`, which stays open until this has ended.

        Raises HostFailed, also when something that is not ours has the partial name.
        """
        check_name(qube.name)
        self._qube = qube
        partial = partial_name(qube.name)
        with reporting(f"creating {partial}", qube=qube.name):
            try:
                super().__init__(directory, qube.name, qube.name, _FILES)
            except FileExistsError:
                reason = f"{partial} is in the way, and not a restore's leftover"
                raise HostFailed(reason, qube=qube.name) from None

    def change_template(self, template: str) -> None:
        """A directory has no templates, so this is never called."""
        raise self._failure("a directory has no templates")

    def commit(self, settings: QubeSettings, definition: Definition | None = None) -> Sequence[str]:
        """Write the record and give the qube its name, all of it on disk when this returns; no remarks.

        Raises QubeExists if the name has been taken since `begin`, NoSpace, or HostFailed (also when a
        volume is not finished). After any of these the qube can only be rolled back.
        """
        name = self._qube.name
        with self._mutex:
            self._check_open()
            if settings.key != self._qube.source.key:
                raise self._failure("the settings are those of another qube")
            with reporting(f"writing {RECORD}", qube=name):
                self._write_record(record(self._qube, settings, self._sizes()))
            with reporting("giving the complete qube its name", qube=name):
                if self._publish([name]) is None:
                    raise QubeExists("something of that name has appeared in the directory", qube=name)
        return ()

    def _write_record(self, content: bytes) -> None:
        file = make_file(RECORD, dir_fd=self._inside)
        try:
            write_fully(file, memoryview(content), 0)
            os.fsync(file)
        finally:
            os.close(file)


def check_name(qube_name: str) -> None:
    """Raises HostFailed for what no qube can be called.

    Names were checked long before they come here. The check stands here again because here it is that a
    `/` or a leading dot would do harm.
    """
    if not re.fullmatch(QUBE_NAME, qube_name):
        shown = strip_control(qube_name[:64])
        raise HostFailed("a directory for a qube of that name cannot be created", qube=shown)


def clear_unfinished(directory: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """See `clear_partials`, for the qubes of restores to this directory that were killed."""
    return clear_partials(directory, QUBE_NAME, _FILES)


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


def _rules(settings: QubeSettings) -> list[dict[str, object]] | None:
    if settings.firewall is None:
        return None
    return [rule.model_dump(exclude_none=True) for rule in settings.firewall]
