"""What the worker may still claim: every volume of the plan once, and nothing else.

Strategy: the ledger starts with the promises of the plan and crosses off what is answered. A volume without a
promise may be announced too, once, while its qube is open, if the class of the qube keeps such a volume. The
class is the one in the plan; the worker has no say in it. A claim that is not open is a ProtocolViolation; so
a worker cannot name a qube that was not selected, send a volume twice, make one larger than announced, have
two qubes in the making at once, or finish with something missing.
"""

from collections.abc import Iterable

from qubes_restore_svc.errors import ProtocolViolation, RestoreError
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.names import KEPT_VOLUMES, DigestKind, VolumeName, shortened
from qubes_restore_svc.wire.volume import MAX_IMAGE_SIZE

#: Characters of a text of the worker's; its own longest have 400 at the most.
_MAX_PHRASE = 500


class Ledger:
    """The open claims of one session over the selected qubes, whose digests are of the kind `digest`.

    `here`: keys of qubes that are here already. They may be taken back, and that is all.
    """

    def __init__(
        self,
        qubes: Iterable[m.ListedQube],
        digest: DigestKind,
        *,
        ignore_size_limit: bool,
        here: Iterable[str] = (),
    ) -> None:
        self._digest = digest
        self._unpromised: set[tuple[str, VolumeName]] = set()
        self._limits: dict[tuple[str, VolumeName], int] = {}
        self._unannounced: set[tuple[str, VolumeName]] = set()
        self._unanswered: set[tuple[str, VolumeName]] = set()
        self._unsettled: set[str] = set()
        self._settled = set(here)
        self._announced: dict[tuple[str, VolumeName], int] = {}
        self._current: str | None = None
        for qube in qubes:
            self._unsettled.add(qube.key)
            for volume in qube.volumes:
                claim = (qube.key, volume.name)
                unlimited = ignore_size_limit or volume.size is None
                self._limits[claim] = MAX_IMAGE_SIZE if unlimited else min(volume.size or 0, MAX_IMAGE_SIZE)
                self._unannounced.add(claim)
                self._unanswered.add(claim)
            for name in KEPT_VOLUMES[qube.klass]:
                if (claim := (qube.key, name)) not in self._limits:
                    self._unpromised.add(claim)
                    self._limits[claim] = MAX_IMAGE_SIZE

    def announce(self, message: m.VolumeReady) -> None:
        """A volume is announced; raises ProtocolViolation unless it is open, new, and within its limit."""
        claim = (message.key, message.volume)
        if claim in self._unpromised and message.key in self._unsettled:
            self._unpromised.remove(claim)
            self._unannounced.add(claim)
            self._unanswered.add(claim)
        if claim not in self._unannounced:
            raise ProtocolViolation("a volume that was not asked for, or not any more")
        if message.image_size > self._limits[claim]:
            raise ProtocolViolation(
                f"a volume of {message.image_size} bytes, where {self._limits[claim]} are allowed"
            )
        if self._current not in (None, message.key):
            raise ProtocolViolation("a volume of another qube before the end of the one before")
        self._unannounced.remove(claim)
        self._announced[claim] = message.image_size
        self._current = message.key

    def answer(self, message: m.VolumeDone) -> None:
        """A volume is answered for; raises ProtocolViolation unless it was open and is as announced."""
        claim = (message.key, message.volume)
        if claim not in self._unanswered:
            raise ProtocolViolation("an answer for a volume that was not asked for, or not any more")
        if message.outcome == "ok" and not self._is_as_announced(claim, message.image_size):
            raise ProtocolViolation(f"a volume of {message.image_size} bytes, other than was announced")
        digest = message.fsverity if self._digest == "fsverity" else message.sha256
        if message.outcome == "ok" and digest is None:
            raise ProtocolViolation(f"a volume without the digest that was asked for, {self._digest}")
        self._unanswered.remove(claim)
        self._unannounced.discard(claim)

    def settle(self, message: m.QubeSettings) -> None:
        """A qube's part is over; raises ProtocolViolation if it was before, or a volume is unanswered."""
        if message.key not in self._unsettled:
            raise ProtocolViolation("settings of a qube that was not asked for, or not any more")
        if any(key == message.key for key, _ in self._unanswered):
            raise ProtocolViolation("the end of a qube before all of its volumes were answered for")
        self._unsettled.remove(message.key)
        self._settled.add(message.key)
        if self._current == message.key:
            self._current = None

    def take_back(self, message: m.QubeIncomplete) -> None:
        """A qube that was over is not complete; raises ProtocolViolation if it was not over, or twice."""
        if message.key not in self._settled:
            raise ProtocolViolation("a qube taken back twice, or before it was complete")
        self._settled.remove(message.key)

    def finish(self) -> None:
        """The worker says that it has finished; raises ProtocolViolation if something is open."""
        if self._unanswered or self._unsettled:
            raise ProtocolViolation("'finished' while qubes are missing")

    def _is_as_announced(self, claim: tuple[str, VolumeName], image_size: int) -> bool:
        announced = self._announced.get(claim)
        if announced is None:
            return False
        # What is announced for `home` is a ceiling.
        return image_size <= announced if claim[1] == "home" else image_size == announced


def believed_error(untrusted_error: m.ErrorInfo) -> RestoreError:
    """The worker's error; a plain one if a worker may not send this kind."""
    error = untrusted_error.to_error()
    kind = type(error) if error.for_a_worker_to_say else RestoreError
    return kind(
        one_phrase(error.reason),
        qube=None if error.qube is None else one_phrase(error.qube),
        volume=None if error.volume is None else one_phrase(error.volume),
        chunk=error.chunk,
        advice=one_phrase(error.advice),
    )


def one_phrase(untrusted_text: str) -> str:
    """A text of the worker that may stand within a line of ours: short, and without the wide gaps that would
    push its end to where the next line of a terminal begins."""
    return shortened(" ".join(untrusted_text.split()), _MAX_PHRASE)
