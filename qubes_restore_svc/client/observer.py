"""Who watches a call: what the broker tells while it works."""

from typing import Protocol

from qubes_restore_svc.wire.report import QubeReport


class CallObserver(Protocol):
    """Told what happens, in its order. Texts are fit for a terminal. What it raises ends the call."""

    def progress(self, archive_bytes: int, image_bytes: int) -> None:
        """How much of the archive is dealt with, and how much of all images has been produced, in bytes."""
        ...

    def log(self, level: str, text: str) -> None:
        """A line, `info` or `warning`."""
        ...

    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        """A volume begins; `image_size` in bytes, of `home` a ceiling."""
        ...

    def qube_finished(self, report: QubeReport) -> None:
        """A qube is through, one way or the other."""
        ...


class NullObserver:
    """Watches nothing."""

    def progress(self, archive_bytes: int, image_bytes: int) -> None:
        """Ignored."""

    def log(self, level: str, text: str) -> None:
        """Ignored."""

    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        """Ignored."""

    def qube_finished(self, report: QubeReport) -> None:
        """Ignored."""
