"""Undoing what was done to the system: every step is tried, none for ever, and what is left is named.

Strategy: a step that fails does not keep the next from being tried. What could not be undone is told without
hiding why the work ended: in addition to that error where there is one, as an error of its own where not.
"""

import asyncio
from collections.abc import Callable

from qubes_restore_svc.errors import Cancelled, HostFailed, RestoreError
from qubes_restore_svc.waiting import started

#: Seconds that the system may take to undo one thing: a qube is killed and its volumes are removed. More than
#: it takes to say by itself that it cannot.
UNDO_TIMEOUT_S = 90.0


async def undo(step: Callable[[], None], what_is_left: str) -> list[str]:
    """Run the blocking `step` in a thread; if it fails or takes too long, a clause that says what is left."""
    task = started(step)
    done, _ = await asyncio.wait([task], timeout=UNDO_TIMEOUT_S)
    if not done:
        task.add_done_callback(_look_at)
        return [f"{what_is_left} (no answer for {UNDO_TIMEOUT_S:.0f} seconds)"]
    error = task.exception()
    if error is None:
        return []
    return [f"{what_is_left} ({error.reason if isinstance(error, RestoreError) else error})"]


def tell_what_is_left(left: list[str], error: BaseException | None) -> None:
    """Say what the clauses in `left` name, beside `error`, which ended the work; nothing if there are none.

    Raises HostFailed if there is no error, and Cancelled for a cancel, which can say nothing itself.
    """
    if not left:
        return
    sentence = f"Left behind, to be removed by hand: {'; '.join(left)}."
    if isinstance(error, RestoreError):
        error.advice = f"{error.advice} {sentence}".strip()
    elif error is None:
        raise HostFailed("not everything could be cleared up", advice=sentence)
    elif isinstance(error, asyncio.CancelledError):
        raise Cancelled("it was cancelled", advice=sentence) from error
    else:
        error.add_note(sentence)


def _look_at(task: "asyncio.Future[None]") -> None:
    if not task.cancelled():
        task.exception()
