"""Frames and the shape of what is in them."""

import json
import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_restore_svc.errors import ProtocolViolation
from qubes_restore_svc.wire.framing import MAX_FRAME, MAX_MEMBERS, FrameDecoder, check_json, encode_frame

payloads = st.lists(st.binary(min_size=1, max_size=40), max_size=8)


def test_a_frame_is_a_big_endian_length_and_its_payload() -> None:
    assert encode_frame(b"{}") == b"\0\0\0\x02{}"


@pytest.mark.parametrize("size", [0, MAX_FRAME + 1])
def test_a_payload_that_no_frame_may_carry_is_not_encoded(size: int) -> None:
    with pytest.raises(ProtocolViolation, match=rf"a frame of {size} bytes"):
        encode_frame(bytes(size))


def test_the_largest_frame_travels() -> None:
    payload = bytes(MAX_FRAME)
    assert list(FrameDecoder(MAX_FRAME).feed(encode_frame(payload))) == [payload]


@given(payloads, st.data())
def test_however_the_stream_is_split_the_payloads_are_the_same(
    sent: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(map(encode_frame, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    decoder = FrameDecoder(64)
    received: list[bytes] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += decoder.feed(stream[start:end])
    assert received == sent
    assert decoder.idle


@given(payloads)
def test_byte_by_byte_is_a_way_to_split_too(sent: list[bytes]) -> None:
    decoder = FrameDecoder(64)
    stream = b"".join(map(encode_frame, sent))
    assert [payload for byte in stream for payload in decoder.feed(bytes([byte]))] == sent


@given(st.binary(max_size=80), st.integers(1, 40))
def test_any_bytes_give_frames_within_the_limit_or_a_violation(stream: bytes, limit: int) -> None:
    decoder = FrameDecoder(limit)
    received: list[bytes] = []
    violated = False
    try:
        for byte in stream:
            received += decoder.feed(bytes([byte]))
    except ProtocolViolation:
        violated = True

    position, expected, expected_violation = 0, [], False
    while len(stream) - position >= 4:
        length = int.from_bytes(stream[position : position + 4], "big")
        if length == 0 or length > limit:
            expected_violation = True
            break
        if len(stream) - position - 4 < length:
            break
        expected.append(stream[position + 4 : position + 4 + length])
        position += 4 + length
    assert (received, violated) == (expected, expected_violation)


@pytest.mark.parametrize("length", [0, 11, 1 << 24, (1 << 32) - 1])
def test_a_length_out_of_bounds_is_refused_before_any_data_comes(length: int) -> None:
    decoder = FrameDecoder(10)
    head = struct.pack("!I", length)
    assert list(decoder.feed(head[:3])) == []
    with pytest.raises(ProtocolViolation, match=f"a frame of {length} bytes, where 1 to 10 are allowed"):
        list(decoder.feed(head[3:]))


def test_a_length_at_the_limit_is_taken() -> None:
    assert list(FrameDecoder(10).feed(encode_frame(b"0123456789"))) == [b"0123456789"]


def test_after_a_violation_the_decoder_stays_broken() -> None:
    decoder = FrameDecoder(10)
    for data in (b"\0\0\0\0", encode_frame(b"{}")):
        with pytest.raises(ProtocolViolation):
            list(decoder.feed(data))


def test_good_frames_before_a_bad_one_are_delivered_first() -> None:
    frames = FrameDecoder(10).feed(encode_frame(b"{}") + b"\xff\xff\xff\xff")
    assert next(frames) == b"{}"
    with pytest.raises(ProtocolViolation):
        next(frames)


def test_the_limit_can_change_between_two_frames_of_one_read() -> None:
    decoder = FrameDecoder(10)
    frames = decoder.feed(encode_frame(b"a" * 10) + encode_frame(b"b" * 10))
    next(frames)
    decoder.limit = 9
    with pytest.raises(ProtocolViolation, match="where 1 to 9 are allowed"):
        next(frames)


def test_a_decoder_is_idle_only_between_frames() -> None:
    decoder = FrameDecoder(10)
    stream = encode_frame(b"{}")
    for byte in stream[:-1]:
        list(decoder.feed(bytes([byte])))
        assert not decoder.idle
    list(decoder.feed(stream[-1:]))
    assert decoder.idle


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
    ],
)
def test_an_object_of_modest_shape_passes(payload: bytes) -> None:
    check_json(payload)


@pytest.mark.parametrize(
    "payload",
    [b'{"a":1,"a":1}', b'{"a":1,"\\u0061":2}', b'{"x":{"a":1,"b":2,"a":3}}', b'{"x":[{"a":1,"a":1}]}',
     b'{"":1,"":1}'],
)  # fmt: skip
def test_a_key_that_stands_twice_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="a key stands twice"):
        check_json(payload)


@pytest.mark.parametrize("number", ["1.0", "1e3", "1E400", "-0.0", "NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_not_an_integer_is_refused(number: str) -> None:
    with pytest.raises(ProtocolViolation, match="not an integer"):
        check_json(f'{{"a":{number}}}'.encode())


@pytest.mark.parametrize("payload", [b"null", b"true", b"1", b'"x"', b"[]", b"[{}]"])
def test_what_is_not_an_object_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="not a JSON object"):
        check_json(payload)


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
        b"[" * MAX_FRAME,
        b'{"a":' * (MAX_FRAME // 5),
        b'{"a":[' * (MAX_FRAME // 6),
        b'{"a":' + b"9" * (MAX_FRAME - 6) + b"}",
        b'{"a":-' + b"9" * 5000 + b"}",
    ],
    ids=lambda payload: repr(payload[:12]),
)
def test_what_is_not_json_or_too_deep_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="not JSON"):
        check_json(payload)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b'{"a":[' + b",".join([b"0"] * (MAX_MEMBERS + 1)) + b"]}", "members in one place"),
        (b"{" + b",".join(b'"%d":0' % i for i in range(MAX_MEMBERS + 1)) + b"}", "members in one place"),
        (b'{"a":{"a":[' + b",".join([b"{}"] * 300_000) + b"]}}", "members in one place"),
        (b'{"a":[[]]}', "array in an array"),
        (b'{"a":[0,[]]}', "array in an array"),
        (b'{"b":0,"a":[[' + b",".join([b"[]"] * 300_000) + b"]]}", "array in an array"),
    ],
    ids=["values", "keys", "objects", "array", "second", "arrays"],
)
def test_a_shape_that_no_message_has_is_refused(payload: bytes, why: str) -> None:
    with pytest.raises(ProtocolViolation, match=why):
        check_json(payload)


def test_the_check_takes_memory_in_proportion_to_the_payload() -> None:
    payload = b'{"a":[' + b",".join([b"{}"] * 100_000) + b"]}"
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolViolation):
            check_json(payload)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(payload)
    finally:
        tracemalloc.stop()
