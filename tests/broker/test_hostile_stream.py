"""A worker that lies in the stream of a volume, or about it; what `test_hostile_worker` says holds here."""

import struct
from pathlib import Path

import pytest

from qubes_restore_svc.wire.volume import MAX_RECORD, encode_end, encode_header, encode_record
from tests.broker.fake_worker import (
    DOM0,
    VAULT,
    BackupQube,
    CancelJob,
    HangUp,
    Json,
    Pause,
    Say,
    honest,
)
from tests.broker.jobs import Outcome, check_restored, listing, run

SIZE = 50_000
HEADER = encode_header(SIZE)
HONEST = VAULT.volumes["root"].stream
DATA_BYTES = VAULT.volumes["root"].data_bytes
R, P = ("vm2", "root"), ("vm2", "private")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "restored"
    (path / "mine").mkdir(parents=True)
    (path / "mine" / "private.img").write_bytes(b"precious")
    return path


def record(offset: int, length: int, data: bytes | None = None) -> bytes:
    return encode_record(offset, length) + (bytes(length) if data is None else data)


def only_work_is_there(outcome: Outcome, target: Path) -> None:
    assert outcome.outcomes == {"work": "restored", "vault": "failed"}
    assert outcome.status == 3
    assert {path.split("/")[0] for path in listing(target)} == {"mine", "work"}
    assert (target / "mine" / "private.img").read_bytes() == b"precious"
    assert outcome.qube("vault").volumes[0].outcome == "failed"
    assert outcome.qube("vault").volumes[0].error is not None


END = encode_end(0)
STREAMS: dict[str, tuple[bytes, str]] = {
    "another magic": (b"QRSVOLUN" + HONEST[8:], "does not begin like one"),
    "another version": (struct.pack("!8sIQ", b"QRSVOLUM", 2, SIZE) + END, "does not begin like one"),
    "a larger image": (encode_header(SIZE + 1) + END, "does not begin like one of 50000 bytes"),
    "an image of 2^64-1 bytes": (encode_header((1 << 64) - 1) + END, "does not begin like one"),
    "a smaller image": (encode_header(SIZE - 1) + END, "does not begin like one of 50000 bytes"),
    "records that overlap": (HEADER + record(0, 100) + record(99, 1) + encode_end(101), "goes back"),
    "records that go back": (HEADER + record(4096, 100) + record(0, 1) + encode_end(101), "goes back"),
    "a record twice": (HEADER + record(0, 100) * 2 + encode_end(200), "goes back"),
    "a record past the end": (HEADER + record(SIZE - 1, 2) + encode_end(2), "reaches past the end"),
    "a record behind the end": (HEADER + record(SIZE, 1) + encode_end(1), "reaches past the end"),
    "a record at 2^64-1": (HEADER + record((1 << 64) - 1, 1) + encode_end(1), "reaches past the end"),
    "a record of no bytes": (HEADER + record(0, 0) + encode_end(0), "a volume record of 0 bytes"),
    "a record of 1 MiB and 1": (HEADER + record(0, MAX_RECORD + 1, b""), "a volume record of 1048577 bytes"),
    "a record of 4 GiB": (HEADER + record(0, 0xFFFFFFFF, b""), "a volume record of 4294967295 bytes"),
    "an end that counts too few": (
        HEADER + record(0, 100) + encode_end(99),
        "not that of 100 data bytes",
    ),
    "an end that counts too many": (
        HEADER + record(0, 100) + encode_end(101),
        "not that of 100 data bytes",
    ),
    "a byte after the end": (HONEST + b"\0", "goes on after its end"),
    "a second volume after the end": (HONEST * 2, "goes on after its end"),
    "nothing": (b"", "said to be complete and is not"),
    "half a header": (HEADER[:10], "said to be complete and is not"),
    "no record": (HEADER, "said to be complete and is not"),
    "half a record": (HEADER + record(0, 100)[:50], "said to be complete and is not"),
    "no end": (HONEST[: -len(END)], "said to be complete and is not"),
    "half an end": (HONEST[:-1], "said to be complete and is not"),
    "only an end": (HEADER + END, "not what was announced and sent"),
    "another volume": (VAULT.volumes["private"].stream, "does not begin like one of 50000 bytes"),
}


@pytest.mark.parametrize("what", STREAMS)
def test_a_stream_that_is_not_the_volume_ends_the_session(target: Path, what: str) -> None:
    data, reason = STREAMS[what]
    outcome = run(honest().streaming(*R, data), target)
    assert outcome.error.startswith("protocol-violation: a volume")
    assert reason in outcome.error
    only_work_is_there(outcome, target)


@pytest.mark.parametrize("what", ["a larger image", "a byte after the end", "records that overlap"])
def test_a_stream_that_breaks_the_protocol_counts_even_if_the_worker_falls_silent(
    target: Path, what: str
) -> None:
    data, reason = STREAMS[what]
    script = honest().streaming(*R, data)
    outcome = run(script.until(script.find("volume_done", *R)), target, stall_s=30)
    assert reason in outcome.error
    only_work_is_there(outcome, target)


@pytest.mark.parametrize("data", [b"", HEADER, HONEST[:-1], HONEST], ids=["no", "header", "most", "all"])
def test_a_complete_volume_whose_stream_stays_open_is_not_waited_for_for_ever(
    target: Path, data: bytes
) -> None:
    script = honest().streaming(*R, data, keep_open=True)
    outcome = run(script, target, stall_s=0.3, heartbeat_s=0.05)
    if data == HONEST:  # all of it is there, and hanging up is the end that it lacks
        assert outcome.status == 0
        return
    assert "said to be complete and does not end" in outcome.error
    only_work_is_there(outcome, target)


@pytest.mark.parametrize("heartbeats", [False, True])
def test_a_silent_worker_is_ended_and_one_that_lives_is_waited_for(target: Path, heartbeats: bool) -> None:
    pause_s = 0.8 if heartbeats else 12.0
    script = honest().streaming(*R, HONEST[:1000], keep_open=True)
    script = script.until(script.find("volume_done", *R), Pause(pause_s), CancelJob())
    outcome = run(script, target, stall_s=0.3, heartbeat_s=0.05 if heartbeats else None)
    if heartbeats:
        assert (outcome.status, outcome.error) == (130, "cancelled: it was cancelled")
        assert outcome.seconds >= pause_s
    else:
        assert outcome.error == "worker-stalled: the worker has said nothing for 0 seconds"
        assert outcome.seconds < pause_s
    assert outcome.outcomes == {"work": "restored", "vault": "failed"}
    assert {path.split("/")[0] for path in listing(target)} == {"mine", "work"}


MANY = [BackupQube(f"{n:064}", f"v{n}", {}, klass="DispVM") for n in range(4000)]


def test_a_worker_that_takes_no_messages_is_ended(target: Path) -> None:
    before = listing(target)
    outcome = run(honest(MANY).until(2), target, stall_s=0.3, deaf=True)
    assert outcome.error == "worker-stalled: the worker takes no messages"
    assert outcome.status == 1
    assert listing(target) == before


def test_a_worker_that_takes_no_messages_does_not_hold_up_a_cancel(target: Path) -> None:
    before = listing(target)
    script = honest(MANY).until(2, Pause(0.3), CancelJob())
    outcome = run(script, target, stall_s=30, deaf=True)
    assert (outcome.status, outcome.error) == (130, "cancelled: it was cancelled")
    assert listing(target) == before


@pytest.mark.parametrize("outcome_said", ["failed", "skipped"])
@pytest.mark.parametrize("stream", [HONEST, HONEST[:1000], b""], ids=["whole", "part", "none"])
def test_a_volume_that_the_worker_gives_up_is_not_there_even_if_all_of_it_came(
    target: Path, stream: bytes, outcome_said: str
) -> None:
    error: Json = {"kind": "authentication-failed", "reason": "its MAC does not match", "chunk": 3}
    place: Json = {"type": "volume_done", "key": "vm2", "volume": "root"}
    script = honest().streaming(*R, stream)
    said = Say({**place, "outcome": outcome_said, "error": error})
    outcome = run(script.with_steps(script.find("volume_done", *R), said), target)
    assert outcome.error == ""  # others could go on
    assert outcome.outcomes == {"work": "restored", "vault": "failed"}
    assert outcome.status == 3
    report = outcome.qube("vault")
    assert report.error is not None
    assert (report.error.kind, report.error.chunk) == ("authentication-failed", 3)
    assert report.volumes[0].outcome == outcome_said
    assert not (target / "vault").exists()


def test_a_stream_that_ends_early_leaves_the_word_to_the_session(target: Path) -> None:
    script = honest().streaming(*R, HONEST[:1000])
    outcome = run(script.until(script.find("volume_done", *R), Pause(0.05), HangUp()), target)
    assert outcome.error.startswith("worker-lost")
    only_work_is_there(outcome, target)


def test_each_volume_is_called_for_once_and_only_when_it_is_announced(target: Path) -> None:
    outcome = run(honest(), target)
    assert outcome.link.calls == [
        "restore.Session+",
        "restore.Volume+vm1.private",
        "restore.Volume+vm2.root",
        "restore.Volume+vm2.private",
    ]
    assert outcome.status == 0


def test_a_home_is_as_long_as_its_data_and_may_not_have_holes(tmp_path: Path) -> None:
    target = tmp_path / "restored"
    assert run(honest((DOM0,)), target, names=["dom0"]).status == 0
    check_restored(target, DOM0)
    script = honest((DOM0,))
    sent = encode_header(1 << 44) + record(0, 1) + record(1 << 30, 1) + encode_end(2)
    script = script.streaming("dom0-home", "home", sent)
    script = script.changed("volume_done", "dom0-home", "home", data_bytes=2, image_size=(1 << 30) + 1)
    outcome = run(script, tmp_path / "holes", names=["dom0"])
    assert "not what was announced and sent" in outcome.error
    assert outcome.status == 1
    assert not (tmp_path / "holes").exists()
