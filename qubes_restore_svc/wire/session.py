"""Who may say what, and when: the session as one table.

Strategy: both sides feed every message they send or receive to a `SessionState`. It looks up
(state, type of message) in the table; what is not there is a ProtocolViolation. Messages of the
two sides can cross on the way, so a broker's message never leads to a state in which something that the
worker may already have sent is forbidden.

    IDLE       --open-->          OPENING
    OPENING    --manifest-->      LISTED
    LISTED     --start-->         STREAMING
    STREAMING  --volume_ready-->  VOLUME      (the volume can be fetched with restore.Volume)
    VOLUME     --volume_done-->   STREAMING   (of the same volume)
    STREAMING  --volume_done-->   STREAMING   (failed or skipped: there is nothing to fetch)
    STREAMING  --qube_settings--> STREAMING
    STREAMING  --qube_incomplete--> STREAMING (of one whose settings were sent)
    STREAMING  --finished-->      CLOSED
    from OPENING on, log and progress; failed and cancel, to CLOSED; from STREAMING on, skip_qube
"""

import enum

from qubes_restore_svc.errors import ProtocolViolation
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.framing import MAX_FRAME


class State(enum.Enum):
    """The states of a session."""

    IDLE = "idle"
    OPENING = "opening"
    LISTED = "listed"
    STREAMING = "streaming"
    VOLUME = "volume"
    CLOSED = "closed"


TRANSITIONS: dict[tuple[State, type[m.Message]], State] = {
    (State.IDLE, m.Open): State.OPENING,
    (State.OPENING, m.Manifest): State.LISTED,
    (State.LISTED, m.Start): State.STREAMING,
    (State.STREAMING, m.VolumeReady): State.VOLUME,
    (State.VOLUME, m.VolumeDone): State.STREAMING,
    (State.STREAMING, m.VolumeDone): State.STREAMING,
    (State.STREAMING, m.QubeSettings): State.STREAMING,
    (State.STREAMING, m.QubeIncomplete): State.STREAMING,
    (State.STREAMING, m.Finished): State.CLOSED,
}
for _state in (State.OPENING, State.LISTED, State.STREAMING, State.VOLUME):
    TRANSITIONS[_state, m.Log] = _state
    TRANSITIONS[_state, m.Progress] = _state
    TRANSITIONS[_state, m.Failed] = State.CLOSED
    TRANSITIONS[_state, m.Cancel] = State.CLOSED
for _state in (State.STREAMING, State.VOLUME):
    TRANSITIONS[_state, m.SkipQube] = _state

_FRAME_LIMITS = {
    State.OPENING: MAX_FRAME,
    State.STREAMING: m.QubeSettings.max_size,
    State.LISTED: m.Start.max_size,
}


class SessionState:
    """One side's view of the session. `state` is what `advance` has led to."""

    def __init__(self) -> None:
        self.state = State.IDLE
        self._announced: tuple[str, str] | None = None

    @property
    def frame_limit(self) -> int:
        """Size of the largest frame that may come now, bytes."""
        return _FRAME_LIMITS.get(self.state, m.Message.max_size)

    def advance(self, message: m.Message) -> None:
        """Take note of `message`, sent or received; raises ProtocolViolation if it may not come now."""
        following = TRANSITIONS.get((self.state, type(message)))
        if following is None:
            raise ProtocolViolation(f"'{_word(message)}' while the session is {self.state.value}")
        if isinstance(message, m.VolumeReady):
            self._announced = (message.key, message.volume)
        elif isinstance(message, m.VolumeDone):
            self._check_volume_done(message)
            self._announced = None
        self.state = following

    def _check_volume_done(self, message: m.VolumeDone) -> None:
        if self.state is State.VOLUME and (message.key, message.volume) != self._announced:
            raise ProtocolViolation("'volume_done' for another volume than the one that was announced")
        if self.state is State.STREAMING and message.outcome == "ok":
            raise ProtocolViolation("'volume_done' says ok of a volume that was never announced")


def _word(message: m.Message) -> str:
    """The message's type as it is on the wire."""
    return str(type(message).model_fields["type"].default)
