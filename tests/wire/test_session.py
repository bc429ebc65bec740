"""Who may say what, and when: the table of the session, written out a second time."""

import itertools
from typing import TypeVar, get_args

import pytest
from pydantic import SecretStr

from qubes_restore_svc.errors import ProtocolViolation
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.connection import Connection
from qubes_restore_svc.wire.messages import TRANSITIONS, State
from qubes_restore_svc.wire.names import Outcome, VolumeName

_Received = TypeVar("_Received", bound=m.Message)

ERROR = m.ErrorInfo(kind="bad-image", reason="broken")
MESSAGES: dict[str, m.Message] = {
    "open": m.Open(passphrase=SecretStr("x")),
    "start": m.Start(mode="restore", keys=("vm1",)),
    "skip_qube": m.SkipQube(key="vm1"),
    "cancel": m.Cancel(),
    "manifest": m.Manifest(backup_id="b", format=4, compression_filter="gzip", qubes=()),
    "volume_ready": m.VolumeReady(key="vm1", volume="private", image_size=1),
    "volume_done": m.VolumeDone(key="vm1", volume="private", outcome="failed", error=ERROR),
    "volume_done ok": m.VolumeDone(key="vm1", volume="private", outcome="ok", fsverity="0" * 64),
    "volume_done skipped": m.VolumeDone(key="vm1", volume="private", outcome="skipped", error=ERROR),
    "qube_settings": m.QubeSettings(key="vm1"),
    "qube_incomplete": m.QubeIncomplete(key="vm1", error=ERROR),
    "progress": m.Progress(archive_bytes=1),
    "log": m.Log(level="info", text="x"),
    "failed": m.Failed(error=ERROR),
    "finished": m.Finished(archive_bytes=1),
}

#: The broker's state, the worker's, and what is on its way to the worker and to the broker.
Crossing = tuple[str, str, tuple[str, ...], tuple[str, ...]]

#: State: message: next state. What does not stand here is a violation.
TABLE: dict[str, dict[str, str]] = {
    "idle": {"open": "opening", "cancel": "closed"},
    "opening": {
        "manifest": "listed", "progress": "opening", "log": "opening", "failed": "idle", "cancel": "closed",
    },
    "listed": {
        "start": "streaming", "progress": "listed", "log": "listed", "failed": "closed", "cancel": "closed",
    },
    "streaming": {
        "volume_ready": "volume", "volume_done": "streaming", "volume_done skipped": "streaming",
        "qube_settings": "streaming", "qube_incomplete": "streaming", "finished": "closed",
        "skip_qube": "streaming", "progress": "streaming", "log": "streaming", "failed": "closed",
        "cancel": "closed",
    },
    "volume": {
        "volume_done": "streaming", "volume_done ok": "streaming", "volume_done skipped": "streaming",
        "skip_qube": "volume", "progress": "volume", "log": "volume", "failed": "closed", "cancel": "closed",
    },
    "closed": {},
}  # fmt: skip

#: A way to reach each state.
PATHS: dict[str, list[str]] = {
    "idle": [],
    "opening": ["open"],
    "listed": ["open", "manifest"],
    "streaming": ["open", "manifest", "start"],
    "volume": ["open", "manifest", "start", "volume_ready"],
    "closed": ["open", "cancel"],
}


def led_to(state: str, end: Connection[State, _Received]) -> Connection[State, _Received]:
    for word in PATHS[state]:
        end.advance(MESSAGES[word])
    assert end.state.value == state
    return end


def session_in(state: str) -> Connection[State, m.WorkerMessage]:
    return led_to(state, m.broker_end())


def test_the_tests_know_every_state_and_every_message() -> None:
    assert {state.value for state in State} == set(TABLE)
    assert {type(message) for message in MESSAGES.values()} == {
        *get_args(m.BrokerMessage),
        *get_args(m.WorkerMessage),
    }


@pytest.mark.parametrize(("state", "word"), list(itertools.product(TABLE, MESSAGES)))
def test_each_message_in_each_state_follows_the_table_or_is_refused(state: str, word: str) -> None:
    session = session_in(state)
    following = TABLE[state].get(word)
    if following is not None:
        session.advance(MESSAGES[word])
        assert session.state.value == following
    else:
        with pytest.raises(ProtocolViolation) as caught:
            session.advance(MESSAGES[word])
        assert word.split()[0] in caught.value.reason
        assert session.state.value == state


def test_the_machine_knows_no_other_transitions() -> None:
    known = {
        (state.value, kind.model_fields["type"].default, to.value)
        for (state, kind), to in TRANSITIONS.items()
    }
    assert known == {
        (state, word.split()[0], following) for state, row in TABLE.items() for word, following in row.items()
    }


@pytest.mark.parametrize(("key", "volume"), [("vm2", "private"), ("vm1", "root"), ("vm2", "root")])
@pytest.mark.parametrize("outcome", ["ok", "failed"])
def test_a_volume_is_done_only_if_it_is_the_one_that_was_announced(
    key: str, volume: VolumeName, outcome: Outcome
) -> None:
    session = session_in("volume")
    ok = outcome == "ok"
    done = m.VolumeDone(
        key=key,
        volume=volume,
        outcome=outcome,
        fsverity="0" * 64 if ok else None,
        error=None if ok else ERROR,
    )
    with pytest.raises(ProtocolViolation, match="another volume than the one that was announced"):
        session.advance(done)
    assert session.state.value == "volume"
    session.advance(MESSAGES["volume_done ok"])
    assert session.state.value == "streaming"


def test_a_volume_that_was_done_is_not_done_again() -> None:
    session = session_in("volume")
    session.advance(MESSAGES["volume_done ok"])
    with pytest.raises(ProtocolViolation, match="never announced"):
        session.advance(MESSAGES["volume_done ok"])


def test_a_volume_that_was_announced_may_still_fail_or_be_skipped() -> None:
    for word in ("volume_done", "volume_done skipped"):
        session = session_in("volume")
        session.advance(MESSAGES[word])
        assert session.state is State.STREAMING


def test_the_next_volume_can_be_announced_when_one_is_done() -> None:
    session = session_in("volume")
    session.advance(MESSAGES["volume_done"])
    session.advance(m.VolumeReady(key="vm2", volume="root", image_size=1))
    session.advance(m.VolumeDone(key="vm2", volume="root", outcome="ok", fsverity="0" * 64))
    session.advance(MESSAGES["finished"])
    assert session.state is State.CLOSED


@pytest.mark.parametrize(
    ("state", "from_worker", "from_broker"),
    [
        ("idle", 64 << 10, 64 << 10),
        ("opening", 4 << 20, 64 << 10),
        ("listed", 64 << 10, 1 << 20),
        ("streaming", 2 << 20, 64 << 10),
        ("volume", 64 << 10, 64 << 10),
        ("closed", 64 << 10, 64 << 10),
    ],
)
def test_each_state_has_its_largest_frame(state: str, from_worker: int, from_broker: int) -> None:
    assert led_to(state, m.broker_end()).frame_limit == from_worker
    assert led_to(state, m.worker_end()).frame_limit == from_broker


@pytest.mark.parametrize(("state", "word"), [(state, word) for state, row in TABLE.items() for word in row])
def test_a_message_that_may_come_now_may_be_as_large_as_its_kind_allows(state: str, word: str) -> None:
    from_worker = isinstance(MESSAGES[word], get_args(m.WorkerMessage))
    limit = (led_to(state, m.broker_end()) if from_worker else led_to(state, m.worker_end())).frame_limit
    assert MESSAGES[word].max_size <= limit


def test_messages_that_cross_on_the_way_are_no_violation() -> None:
    """Each side's state and up to three messages on the way to it: nobody who is still open is surprised."""
    broker_words = {"open", "start", "skip_qube", "cancel"}
    seen: set[Crossing] = set()
    todo: list[Crossing] = [("idle", "idle", (), ())]
    while todo:
        case = todo.pop()
        if case in seen:
            continue
        seen.add(case)
        broker, worker, to_worker, to_broker = case
        if len(to_worker) < 3:
            for word in TABLE[broker].keys() & broker_words:
                todo.append((TABLE[broker][word], worker, (*to_worker, word), to_broker))
        if len(to_broker) < 3:
            for word in TABLE[worker].keys() - broker_words:
                todo.append((broker, TABLE[worker][word], to_worker, (*to_broker, word)))
        if to_worker and worker != "closed":
            assert to_worker[0] in TABLE[worker], f"the worker is told {to_worker[0]} in {case}"
            todo.append((broker, TABLE[worker][to_worker[0]], to_worker[1:], to_broker))
        if to_broker and broker != "closed":
            assert to_broker[0] in TABLE[broker], f"the broker is told {to_broker[0]} in {case}"
            todo.append((TABLE[broker][to_broker[0]], worker, to_worker, to_broker[1:]))
    assert {broker for broker, *_ in seen} == {worker for _, worker, *_ in seen} == set(TABLE)
