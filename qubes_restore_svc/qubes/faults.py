"""What goes wrong in a call to qubesd, as an error that a person can act on.

Strategy: a client of qubesd raises whatever class qubesd names, and some that it does not mean to (a
KeyError, an AssertionError over an answer that was cut off). So everything that comes out of a call is
translated, by the names of its classes; this module does not need `qubesadmin` for that. What it says is
searched whole, and shortened only to be shown: a failed import begins with the command that was run.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from qubes_restore_svc.errors import HostFailed, NoSpace, RestoreError
from qubes_restore_svc.wire.names import strip_control

#: Characters of a text that are shown: its beginning, and its end, where the reason stands as a rule.
_HEAD, _TAIL = 120, 180
_NO_ROOM = re.compile(
    r"no space left|disk quota exceeded|(insufficient|not enough|out of) (free )?(disk )?(space|extents)",
    re.IGNORECASE,
)
_ASK_THE_JOURNAL = "Look at `journalctl -u qubesd` in dom0 for the cause."


class QubeInUse(HostFailed):
    """A qube cannot be removed because others refer to it (as template, netvm or default)."""


@contextmanager
def asking(doing: str, *, qube: str | None = None, volume: str | None = None) -> Iterator[None]:
    """Translate what a call to qubesd in the block raises; `doing` reads like "removing the qube".

    Raises QubeInUse, NoSpace or HostFailed; a RestoreError of the block passes.
    """
    try:
        yield
    except RestoreError:
        raise
    except Exception as error:
        classes = {cls.__name__ for cls in type(error).__mro__}
        kind = HostFailed
        if "QubesVMInUseError" in classes:
            kind = QubeInUse
        elif _NO_ROOM.search(str(error)):
            kind = NoSpace
        unclear = "QubesDaemonCommunicationError" in classes or "QubesException" not in classes
        advice = _ASK_THE_JOURNAL if unclear else None
        raise kind(f"{doing} failed: {said_by(error)}", qube=qube, volume=volume, advice=advice) from error


def said_by(error: BaseException) -> str:
    """What `error` says, as a short clause of one line; its class if it says nothing."""
    text = strip_control(" ".join(str(error).split())).rstrip(". ")
    if len(text) > _HEAD + _TAIL:
        text = f"{text[:_HEAD]} \u2026 {text[-_TAIL:]}"
    return text or type(error).__name__
