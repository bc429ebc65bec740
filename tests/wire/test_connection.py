"""A connection: frames, the JSON in them, and what is refused before anything in it is looked at."""

import enum
import json
import re
import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from qubes_restore_svc.errors import ProtocolViolation
from qubes_restore_svc.wire import connection
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.connection import (
    MAX_DEPTH,
    MAX_MEMBERS,
    MAX_OBJECTS,
    Connection,
    parse_object,
)
from tests.support.wire import frame, framed, from_broker, from_worker, heard

SIZE = 4 << 20
OPEN = m.Open(passphrase=SecretStr("x"))
MANIFEST = m.Manifest(backup_id="b", format=4, compression_filter="gzip", qubes=())

_State = TypeVar("_State", bound=enum.Enum)

logs = st.lists(st.builds(m.Log, level=st.just("info"), text=st.text("ab\u00e9", max_size=20)), max_size=3)


def opening() -> Connection[m.State, m.WorkerMessage]:
    """The broker's end, when it has said `open`."""
    end = m.broker_end()
    end.send(OPEN)
    return end


# --- Frames --------------------------------------------------------------------------------------


def test_a_frame_is_a_big_endian_length_and_its_payload() -> None:
    assert from_broker().send(m.Cancel()) == b'\0\0\0\x11{"type":"cancel"}'


@given(logs, st.data())
def test_however_the_stream_is_split_the_messages_are_the_same(
    sent: list[m.Log], data: st.DataObject
) -> None:
    stream = b"".join(map(framed, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    end = from_worker()
    received: list[m.WorkerMessage] = []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += heard(end, stream[start:stop])
    assert received == sent


@given(logs)
def test_byte_by_byte_is_a_way_to_split_too(sent: list[m.Log]) -> None:
    end = from_worker()
    stream = b"".join(map(framed, sent))
    assert [message for byte in stream for message in heard(end, bytes([byte]))] == sent


def all_that_comes(
    end: Connection[_State, m.WorkerMessage], pieces: list[bytes]
) -> tuple[list[m.WorkerMessage], str]:
    """The messages, and the violation at the end."""
    received = []
    try:
        for piece in pieces:
            end.receive(piece)
            while (message := end.next_message()) is not None:
                received.append(message)
    except ProtocolViolation as violation:
        return received, violation.reason
    return received, ""


@given(logs, st.binary(max_size=80))
def test_any_bytes_behind_good_frames_give_the_same_however_they_come(sent: list[m.Log], rest: bytes) -> None:
    stream = b"".join(map(framed, sent)) + rest
    whole = all_that_comes(from_worker(), [stream])
    assert whole == all_that_comes(from_worker(), [stream[i : i + 1] for i in range(len(stream))])
    assert whole[0] == sent
    length = int.from_bytes(rest[:4], "big")
    assert bool(whole[1]) == (len(rest) >= 4 and not len(rest) < length + 4 <= SIZE + 4)


@pytest.mark.parametrize("length", [0, SIZE + 1, 1 << 24, (1 << 32) - 1])
def test_a_length_out_of_bounds_is_refused_before_any_data_comes(length: int) -> None:
    end = from_worker()
    head = struct.pack("!I", length)
    assert heard(end, head[:3]) == []
    with pytest.raises(ProtocolViolation, match=f"a frame of {length} bytes, where 1 to {SIZE} are allowed"):
        heard(end, head[3:])


def test_a_frame_at_the_limit_is_taken() -> None:
    end = opening()
    assert heard(end, frame(framed(MANIFEST)[4:].ljust(SIZE))) == [MANIFEST]
    with pytest.raises(ProtocolViolation, match="a frame of 65537 bytes, where 1 to 65536 are allowed"):
        heard(end, struct.pack("!I", 65537))


@pytest.mark.parametrize("bad", [b"\0\0\0\0", frame(b"x"), frame(b"{}"), framed(m.Finished(archive_bytes=1))])
def test_after_a_violation_the_connection_says_the_same_again(bad: bytes) -> None:
    end = opening()
    for data in (bad, framed(MANIFEST), b""):
        with pytest.raises(ProtocolViolation) as caught:
            heard(end, data)
        assert caught.value.reason == all_that_comes(opening(), [bad])[1]
    assert end.state is m.State.OPENING


def test_good_messages_before_a_bad_one_are_delivered_first() -> None:
    end = opening()
    end.receive(framed(MANIFEST) + b"\xff\xff\xff\xff")
    assert end.next_message() == MANIFEST
    with pytest.raises(ProtocolViolation):
        end.next_message()


def test_a_frame_is_looked_at_under_the_limit_that_the_one_before_has_led_to() -> None:
    end = opening()
    end.receive(framed(MANIFEST) + struct.pack("!I", SIZE))
    assert end.next_message() == MANIFEST
    with pytest.raises(ProtocolViolation, match="where 1 to 65536 are allowed"):
        end.next_message()


# --- The order -----------------------------------------------------------------------------------


def test_a_message_that_may_not_come_now_is_not_even_validated() -> None:
    end = opening()
    for payload in (b'{"type":"volume_ready","key":[]}', b'{"type":"finished","x":1}'):
        with pytest.raises(ProtocolViolation, match="' while the session is opening"):
            heard(opening(), frame(payload))
    with pytest.raises(ProtocolViolation, match="unknown type"):
        heard(end, frame(framed(OPEN)[4:]))


def test_what_comes_after_the_last_word_is_neither_looked_at_nor_kept() -> None:
    end = opening()
    assert heard(end, framed(MANIFEST)) == [MANIFEST]
    failed = m.Failed(error=m.ErrorInfo(kind="error", reason="r"))
    assert heard(end, framed(failed) + b"\xff\xff\xff\xffgarbage") == [failed]
    tracemalloc.start()
    try:
        for _ in range(64):
            assert heard(end, bytes(64 << 10)) == []
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_message_that_may_not_be_sent_now_is_not_sent_and_changes_nothing() -> None:
    end = opening()
    assert not end.may_come(m.Start) and end.may_come(m.Cancel)
    with pytest.raises(ProtocolViolation, match="'start' while the session is opening"):
        end.send(m.Start(mode="verify", keys=("vm1",)))
    assert heard(end, framed(MANIFEST)) == [MANIFEST]
    assert end.send(m.Start(mode="verify", keys=("vm1",)))
    assert end.state is m.State.STREAMING


def test_a_message_that_is_too_large_is_not_sent_and_changes_nothing() -> None:
    end = m.worker_end()
    assert heard(end, framed(OPEN)) == [OPEN]
    text = "\u00e9" * 1000
    refused = (m.RefusedQube(name=text, error=m.ErrorInfo(kind="bad-image", reason=text)),) * 1200
    with pytest.raises(ProtocolViolation, match=f"more than the {SIZE}"):
        end.send(MANIFEST.model_copy(update={"refused": refused}))
    assert end.state is m.State.OPENING


# --- The shape of a payload ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        b"{}",
        b' {"a": 1}\n',
        b'{"a": -0, "b": null, "c": true, "d": "x"}',
        b'{"a": {"a": {"a": [1, {"a": []}]}}}',
        b'{"a": [{"a": 1}, {"a": 1}]}',
        json.dumps({"a": [0] * MAX_MEMBERS}).encode(),
        json.dumps({str(i): 0 for i in range(MAX_MEMBERS)}).encode(),
        b'{"a":' * MAX_DEPTH + b"0" + b"}" * MAX_DEPTH,
        b'{"a":[{},' * (MAX_DEPTH - 1) + b"{}" + b"]}" * (MAX_DEPTH - 1),
    ],
)
def test_an_object_of_modest_shape_passes(payload: bytes) -> None:
    def tupled(value: object) -> object:
        if isinstance(value, dict):
            return {key: tupled(member) for key, member in value.items()}
        return tuple(map(tupled, value)) if isinstance(value, list) else value

    assert parse_object(payload) == tupled(json.loads(payload))


@pytest.mark.parametrize(
    "payload",
    [b'{"a":1,"a":1}', b'{"a":1,"\\u0061":2}', b'{"x":{"a":1,"b":2,"a":3}}', b'{"x":[{"a":1,"a":1}]}',
     b'{"":1,"":1}'],
)  # fmt: skip
def test_a_key_that_stands_twice_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="a key stands twice"):
        parse_object(payload)


@pytest.mark.parametrize("number", ["1.0", "1e3", "1E400", "-0.0", "NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_not_an_integer_is_refused(number: str) -> None:
    with pytest.raises(ProtocolViolation, match="not an integer"):
        parse_object(f'{{"a":{number}}}'.encode())


@pytest.mark.parametrize("payload", [b"null", b"true", b"1", b'"x"', b"[]", b"[{}]"])
def test_what_is_not_an_object_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="not a JSON object"):
        parse_object(payload)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"{}x",
        b"{}{}",
        b"{,}",
        b'{"a":1,}',
        b"{a:1}",
        b"{'a':1}",
        b'{"a":01}',
        b'{"a":+1}',
        b'{"a":0x1}',
        b'{"a":1}//',
        b'{"a":"\n"}',
        b'{"a":"\x00"}',
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',
        b'{"a":"\xc0\x80"}',
        b'{"a":"\xf4\x90\x80\x80"}',
        b'\xef\xbb\xbf{"a":1}',
        '{"a":1}'.encode("utf-16"),
        '{"a":1}'.encode("utf-32-be"),
        b'{"a":"\\x41"}',
        b"[" * SIZE,
        b'{"a":' * (SIZE // 5),
        b'{"a":[' * (SIZE // 6),
        b'{"a":' + b"9" * (SIZE - 6) + b"}",
        b'{"a":-' + b"9" * 5000 + b"}",
    ],
    ids=lambda payload: repr(payload[:12]),
)
def test_what_is_not_json_or_too_deep_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="not JSON"):
        parse_object(payload)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b'{"a":[' + b",".join([b"0"] * (MAX_MEMBERS + 1)) + b"]}", "members in one place"),
        (b"{" + b",".join(b'"%d":0' % i for i in range(MAX_MEMBERS + 1)) + b"}", "members in one place"),
        (b'{"a":{"a":[' + b",".join([b"{}"] * (MAX_OBJECTS - 9)) + b"]}}", "members in one place"),
        (b'{"a":{"a":[' + b",".join([b"{}"] * 300_000) + b"]}}", f"more than {MAX_OBJECTS} objects"),
        (b'{"a":' * (MAX_DEPTH + 1) + b"0" + b"}" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} objects within"),
        (b'{"a":[{},' * MAX_DEPTH + b"{}" + b"]}" * MAX_DEPTH, f"more than {MAX_DEPTH} objects within"),
        (b'{"a":[[]]}', "array in an array"),
        (b'{"a":[0,[]]}', "array in an array"),
        (b'{"b":0,"a":[[' + b",".join([b"[]"] * 300_000) + b"]]}", "array in an array"),
    ],
    ids=["values", "keys", "wide", "objects", "deep", "deep arrays", "array", "second", "arrays"],
)
def test_a_shape_that_no_message_has_is_refused(payload: bytes, why: str) -> None:
    with pytest.raises(ProtocolViolation, match=why):
        parse_object(payload)


SMALL = SIZE >> 3


def wide(value: bytes) -> bytes:
    """As many arrays of that value as fit, none too wide."""
    array = b"[" + b",".join([value] * MAX_MEMBERS) + b"]"
    keys = range((SMALL - 2) // (len(array) + 8))
    return b"{" + b",".join(b'"%04x":%s' % (key, array) for key in keys) + b"}"


@pytest.mark.parametrize(
    "payload",
    [
        b'{"a":[' + b",".join([b"{}"] * (SMALL // 3)) + b"]}",
        b'{"a":[' + b",".join([b"[]"] * (SMALL // 3)) + b"]}",
        wide(b'{"":0}'),
        wide(b'"ab"'),
    ],
    ids=["objects", "arrays", "wide objects", "texts"],
)
def test_a_payload_takes_memory_in_proportion_to_its_size(
    payload: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_OBJECTS", MAX_OBJECTS >> 3)
    tracemalloc.start()
    try:
        with suppress(ProtocolViolation):
            parse_object(payload)
        assert tracemalloc.get_traced_memory()[1] < 28 * len(payload)
    finally:
        tracemalloc.stop()


def test_no_other_module_reads_json() -> None:
    root = Path(connection.__file__).parents[1]
    readers = [
        path
        for path in root.rglob("*.py")
        if re.search(r"json\.loads?\(|validate_json|from_json", path.read_text())
    ]
    assert [path.relative_to(root).as_posix() for path in readers] == ["wire/connection.py"]
