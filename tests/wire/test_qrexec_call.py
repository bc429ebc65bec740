"""Descriptors: the exact forms that qrexec sends, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_restore_svc.errors import ProtocolViolation
from qubes_restore_svc.wire import qrexec_call
from qubes_restore_svc.wire.qrexec_call import (
    MAX_DESCRIPTOR,
    ServiceCall,
    encode_descriptor,
    parse_descriptor,
)


@pytest.mark.parametrize(
    ("descriptor", "call"),
    [
        # qrexec-daemon appends "+" to a name without an argument; qrexec-client in dom0 sends it as it is.
        (b"restore.Session+ dom0\0", ServiceCall("restore.Session", "", "dom0")),
        (b"restore.Session dom0\0", ServiceCall("restore.Session", "", "dom0")),
        (b"restore.Volume+vm10.private dom0\0", ServiceCall("restore.Volume", "vm10.private", "dom0")),
        (b"restore.Archive+ dom0\0", ServiceCall("restore.Archive", "", "dom0")),
        (b"a+b+c work.vm\0", ServiceCall("a", "b+c", "work.vm")),
        (b"a++ x\0", ServiceCall("a", "+", "x")),
        (b"a+-_.9 A" + b"b" * 30 + b"\0", ServiceCall("a", "-_.9", "A" + "b" * 30)),
    ],
)
def test_what_qrexec_sends_in_a_vm_is_understood(descriptor: bytes, call: ServiceCall) -> None:
    assert parse_descriptor(descriptor) == call
    assert parse_descriptor(encode_descriptor(call)) == call


def test_the_descriptor_is_the_command_line_and_a_nul() -> None:
    call = ServiceCall(qrexec_call.VOLUME, qrexec_call.volume_argument("vm10", "private"), "dom0")
    assert encode_descriptor(call) == b"restore.Volume+vm10.private dom0\0"
    assert encode_descriptor(ServiceCall(qrexec_call.SESSION, "", "dom0")) == b"restore.Session dom0\0"
    assert qrexec_call.ARCHIVE == "restore.Archive"


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"\0",
        b" \0",
        b"restore.Session dom0",
        b"restore.Session dom0\n",
        b"restore.Session dom0\0\0",
        b"restore.Session dom0\0x",
        b"restore.Session\0dom0\0",
        b"restore.Session \0",
        b"restore.Session\0",
        b" dom0\0",
        b"+arg dom0\0",
        b"restore.Session  dom0\0",
        b" restore.Session dom0\0",
        b"restore.Session dom0 \0",
        b"restore.Session\tdom0\0",
        b"restore.Session\ndom0\0",
        b"restore.Session dom0\n\0",
        b"restore.Session+ dom0 name work\0",  # the form of calls to dom0, where no service of ours is
        b"restore.Session+ dom0 keyword adminvm\0",
        b"restore.Volume+../etc dom0\0",
        b"restore.Volume+a/b dom0\0",
        b"restore.Volume+a b dom0\0",
        b"restore.Volume+a%00 dom0\0",
        b"restore/Session dom0\0",
        b"restore.Session+a 1dom\0",
        b"restore.Session+a -dom\0",
        b"restore.Session+a do/m\0",
        b"restore.Session+a @dispvm\0",
        b"restore.Session+a uuid:00\0",
        b"restore.Session+a " + b"d" * 32 + b"\0",
        b"restore.S\xc3\xa9ssion dom0\0",
        b"restore.Session+\xd9\xa3 dom0\0",
        b"restore.Session+a d\xc3\xb6m\0",
        b"QUBESRPC restore.Session dom0\0",
        b"user:QUBESRPC restore.Session dom0\0",
    ],
)
def test_hostile_descriptors_are_refused(hostile: bytes) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        parse_descriptor(hostile)
    assert caught.value.reason == "a malformed service descriptor"


def descriptor_of(size: int) -> bytes:
    return b"a+" + b"b" * (size - 2 - 6) + b" dom0\0"


def test_a_descriptor_is_at_most_256_bytes() -> None:
    assert len(descriptor_of(MAX_DESCRIPTOR)) == MAX_DESCRIPTOR == 256
    assert parse_descriptor(descriptor_of(256)).argument == "b" * 248
    for size in (257, 258, 65_000):
        with pytest.raises(ProtocolViolation):
            parse_descriptor(descriptor_of(size))


def test_nothing_after_a_long_descriptor_is_overlooked() -> None:
    for size in (255, 256, 257):
        with pytest.raises(ProtocolViolation):
            parse_descriptor(descriptor_of(size) + b"more")


def test_every_volume_can_be_asked_for() -> None:
    call = ServiceCall(qrexec_call.VOLUME, qrexec_call.volume_argument("k" * 64, "private"), "d" * 31)
    assert parse_descriptor(encode_descriptor(call)) == call


@pytest.mark.parametrize(
    "call",
    [
        ServiceCall("", "", "dom0"),
        ServiceCall("a", "", ""),
        ServiceCall("a b", "", "dom0"),
        ServiceCall("a", "b c", "dom0"),
        ServiceCall("a", "b", "dom0 x"),
        ServiceCall("a", "b\0", "dom0"),
        ServiceCall("a", "b\n", "dom0"),
        ServiceCall("a", "é", "dom0"),
        ServiceCall("a", "\ud800", "dom0"),
        ServiceCall("a", "b" * 249, "dom0"),
        ServiceCall("a/b", "", "dom0"),
    ],
)
def test_a_call_that_qrexec_could_not_make_is_not_encoded(call: ServiceCall) -> None:
    with pytest.raises(ProtocolViolation, match="qrexec would refuse"):
        encode_descriptor(call)


@given(
    st.sampled_from([b"restore.Session dom0\0", b"restore.Volume+vm10.root dom0\0", b"a+ b\0"]),
    st.integers(0, 40),
    st.integers(0, 2),
    st.binary(max_size=2) | st.sampled_from([b" ", b"+", b"\0", b"\n", b".", b"/"]),
)
def test_any_edit_gives_a_call_that_encodes_again_or_a_violation(
    descriptor: bytes, at: int, removed: int, inserted: bytes
) -> None:
    edited = descriptor[:at] + inserted + descriptor[at + removed :]
    try:
        call = parse_descriptor(edited)
    except ProtocolViolation:
        return
    assert encode_descriptor(call) == edited.replace(b"+ ", b" ", 1 if not call.argument else 0)
