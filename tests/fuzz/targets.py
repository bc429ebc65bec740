"""What is fuzzed: every parser of bytes or text that the other side of a boundary chooses.

Strategy: a target is a function that gives any bytes to one parser. It may raise `RestoreError`, or the one
error that the parser documents instead; everything else is a finding. Where two parts of the program must
agree (a head that is accepted and the engines that derive it, a message and its encoding), the target asserts
it. Seeds come from our own writers, so they are right and reach deep; the dictionary has the words that the
formats are made of.
"""

import argparse
import enum
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

from pydantic import SecretStr, ValidationError

from qubes_restore_svc.archive import header, openssl, settings_files
from qubes_restore_svc.archive.container import HEAD_SIZE, open_small, parse_head
from qubes_restore_svc.archive.filters import BLOCK_SIZE, FILTERS, decompress
from qubes_restore_svc.archive.inner_tar import read_directory, read_image, read_small_file
from qubes_restore_svc.archive.members import (
    ChunkSequence,
    MemberReader,
    parse_chunk_name,
    parse_piece_name,
    shown,
)
from qubes_restore_svc.archive.outer_tar import OuterTarReader
from qubes_restore_svc.archive.qfile import QfileReader
from qubes_restore_svc.archive.qubes_xml import parse_qubes_xml
from qubes_restore_svc.archive.tar_header import BadTarHeader, parse_pax_records, parse_tar_header
from qubes_restore_svc.archive.xml_tree import parse_xml
from qubes_restore_svc.cli.inputs import read_passphrase_file
from qubes_restore_svc.cli.qvm_arguments import parse_restore_arguments
from qubes_restore_svc.errors import RestoreError
from qubes_restore_svc.kdf.engine import KdfEngine, OpensslEngine, best_engine
from qubes_restore_svc.local.command import parse_arguments
from qubes_restore_svc.qubes.config import parse_config
from qubes_restore_svc.wire import messages, restore_call
from qubes_restore_svc.wire.connection import Connection
from qubes_restore_svc.wire.models import Message
from qubes_restore_svc.wire.names import strip_control, strip_control_lines
from qubes_restore_svc.wire.qrexec_call import ServiceCall, encode_descriptor, parse_descriptor
from qubes_restore_svc.wire.volume import (
    RecordHeader,
    VolumeDecoder,
    encode_end,
    encode_header,
    encode_record,
)
from tests.support.containers import compress, container_head, header_text, scrypt_container
from tests.support.format3_writer import Format3Writer
from tests.support.inner_archives import directory_tar, inner_tar, plain_tar
from tests.support.outer_archive import qfile_stream
from tests.support.plans import ImagePlan, QubePlan
from tests.support.qubes_xml_writer import qubes_xml
from tests.support.wire import (
    End,
    frame,
    framed,
    from_broker,
    from_client,
    from_dom0,
    from_worker,
    heard,
    parsed,
)
from tests.torture.sample import FIREWALL, chunky_sample, tight_sample

Parser = Callable[[bytes], object]

_M = TypeVar("_M", bound=Message)
_State = TypeVar("_State", bound=enum.Enum)

#: Most bytes that an input may expand to before a target stops reading.
MOST = 8 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """A parser with inputs that it accepts, and words that its format knows."""

    name: str
    parse: Parser
    seeds: Callable[[], Sequence[bytes]]
    words: Sequence[bytes] = ()

    def run(self, data: bytes) -> bool:
        """Was it accepted? Whatever else it raises than what it may is a finding."""
        try:
            self.parse(data)
        except (RestoreError, BadTarHeader):
            return False
        return True


# --- The archive ---------------------------------------------------------------------------------------


def _walk(reader: MemberReader, data: bytes) -> None:
    """Read members as the intake does, contents passed over."""
    position = 0
    for _ in range(2000):
        while reader.content_left:
            piece = data[position : position + reader.content_left]
            position += len(piece)
            reader.content(piece)
            if not piece:
                reader.eof()
                return
        wanted = reader.wanted
        piece = data[position : position + wanted]
        position += len(piece)
        if not wanted or len(piece) < wanted:
            reader.eof(piece)
            return
        reader.feed(piece)


def _outer_tar(data: bytes) -> None:
    _walk(OuterTarReader(), data)


def _qfile(data: bytes) -> None:
    _walk(QfileReader(), data)


def _chunk_names(data: bytes) -> None:
    sequence = ChunkSequence()
    for line in data.split(b"\n")[:200]:
        name = parse_chunk_name(line.decode("latin-1"))
        assert name.member in line.decode("latin-1")
        sequence.expect(name)


def _piece_names(data: bytes) -> None:
    sequence = ChunkSequence()
    for line in data.split(b"\n")[:200]:
        name = parse_piece_name(line.decode("latin-1"))
        if name is not None:
            assert name.member == line.decode("latin-1") == f"{name.file}.{name.number:03d}"
            sequence.expect(name)


def _mac_line(data: bytes) -> None:
    """A line is taken for a MAC of some digest, or refused; only one of all numbers proves a piece."""
    mac = openssl.parse_mac(data)
    assert mac.value.hex() in data.decode("latin-1").lower()
    assert bytes(openssl.open_piece(b"piece", mac, b"pass")) == b"piece"


def _openssl_stream(data: bytes) -> None:
    """What comes out does not depend on where the stream is cut, and is shorter than it."""
    found = []
    for cuts in ([data], [data[:9], data[9:40], data[40:]], [data[at : at + 1] for at in range(len(data))]):
        try:
            found.append(b"".join(openssl.decrypt(cuts, openssl.check_cipher("aes-256-cbc"), b"pass")))
        except RestoreError as error:
            found.append(error.reason.encode())
    assert found[0] == found[1] == found[2]
    assert b" " in found[0] or len(found[0]) < len(data)


def _directory(data: bytes) -> None:
    names = set()
    for name, image in read_directory([data[:700], data[700:]], "vm-templates/tpl"):
        assert "/" not in name and name not in names
        names.add(name)
        end = 0
        for extent in image.extents:
            assert end <= extent.offset and len(extent.data) > 0
            end = extent.offset + len(extent.data)
        assert end <= image.size


def _header(data: bytes) -> None:
    with suppress(RestoreError):
        header.peek_version(data)
    found = header.parse_header(data)
    assert header.open_header(data, data) == found
    assert found.backup_id.isascii()


def _container(data: bytes) -> None:
    """Every head that is accepted is one that the engines accept; a container opens or is refused."""
    if data[:1] == b"\xff" and len(data) > 10:  # a forged head, with the right checksum
        numbers = (int.from_bytes(data[2:6], "big"), int.from_bytes(data[6:10], "big"))
        data = container_head(data[1], *numbers, bytes(32)) + data[10:].ljust(64, b"\0")
    head = parse_head(data[:HEAD_SIZE])
    for engine in _engines():
        assert engine.memory(head.parameters) > 0
        if head.parameters.log_n <= 4 and head.parameters.r * head.parameters.p <= 16:
            (keys,) = engine.derive([head.request(b"pass")])
            with suppress(RestoreError):
                open_small(data, keys)


@cache
def _engines() -> tuple[KdfEngine, ...]:
    return (OpensslEngine(), best_engine())


def _filter(name: str) -> Parser:
    def parse(data: bytes) -> None:
        total = 0
        for block in decompress(name, [data[: len(data) // 2], data[len(data) // 2 :]]):
            assert 0 < len(block) <= BLOCK_SIZE
            total += len(block)
            if total > MOST:
                return

    return parse


def _inner(data: bytes) -> None:
    image = read_image([data[:700], data[700:]], "vm10/private.img", 1 << 40)
    position = 0
    for extent in image.extents:
        assert position <= extent.offset and len(extent.data) > 0
        position = extent.offset + len(extent.data)
        assert position <= image.size


def _small(data: bytes) -> None:
    assert len(read_small_file([data], "vm10/firewall.xml", 1 << 16)) <= 1 << 16


def _tar_header(data: bytes) -> None:
    found = parse_tar_header(data[:512])
    assert found.size >= 0 and found.name


def _qubes_xml(data: bytes, backup_format: int = 4) -> None:
    """What is read fits into a manifest, and that into a frame."""
    content = parse_qubes_xml(data, backup_format)
    manifest = messages.Manifest(
        backup_id="x",
        format=4,
        compression_filter="gzip",
        qubes=tuple(qube.info for qube in content.qubes),
        refused=content.refused,
    )
    assert heard(from_worker(), framed(manifest)) == [manifest]


def _settings(data: bytes) -> None:
    """What is read of a qube's settings can be sent."""
    kind, rest = data[:1], data[1:]
    if kind == b"f":
        sent = messages.QubeSettings(key="vm10", firewall=settings_files.parse_firewall(rest))
    elif kind == b"n":
        sent = messages.QubeSettings(key="vm10", notes=settings_files.parse_notes(rest))
    else:
        sent = messages.QubeSettings(key="vm10", appmenus=settings_files.parse_appmenus(rest))
    assert heard(from_worker(), framed(sent)) == [sent]


# --- The wire ------------------------------------------------------------------------------------------


def _conversation(end: Callable[[], Connection[_State, _M]], *ours: Message) -> Parser:
    """All that comes at one end, which says its own part as soon as it may: in one piece as in two."""

    def read(pieces: Sequence[bytes]) -> tuple[list[_M], RestoreError | None]:
        connection, received, to_say = end(), list[_M](), list(ours)
        try:
            for piece in pieces:
                connection.receive(piece)
                while True:
                    while to_say and connection.may_come(type(to_say[0])):
                        connection.send(to_say.pop(0))
                    message = connection.next_message()
                    if message is None:
                        break
                    received.append(message)
        except RestoreError as error:
            return received, error
        return received, None

    def parser(data: bytes) -> None:
        received, error = read([data])
        again, error_again = read([data[: len(data) // 3], data[len(data) // 3 :]])
        assert (again, str(error_again)) == (received, str(error))
        if error is not None:
            raise error

    return parser


def _round_trip(end: Callable[[], End[_M]]) -> Parser:
    def parser(data: bytes) -> None:
        message = parsed(end(), data)
        # Free text is stripped when it is read, and may need more bytes than before; it stays what it is.
        with suppress(RestoreError):
            assert heard(end(), framed(message)) == [message]

    return parser


def _volume(data: bytes) -> None:
    decoder, position, end = VolumeDecoder(4096), 0, 0
    while wanted := decoder.wanted:
        event = decoder.feed(data[position : position + wanted])
        position += wanted
        if isinstance(event, RecordHeader):
            assert end <= event.offset
            end = event.offset + event.length
            position += event.length


def _descriptor(data: bytes) -> None:
    call = parse_descriptor(data)
    assert parse_descriptor(encode_descriptor(call)) == call


# --- What people and other programs write ----------------------------------------------------------------


def _config(data: bytes) -> None:
    parse_config(data.decode("utf-8", "replace"))


@cache
def _passphrase_file() -> int:
    return os.memfd_create("passphrase")


def _passphrase(data: bytes) -> None:
    os.truncate(_passphrase_file(), 0)
    os.pwrite(_passphrase_file(), data, 0)
    found = read_passphrase_file(f"/proc/self/fd/{_passphrase_file()}")
    assert found and "\n" not in found


def _arguments(parse: Callable[[Sequence[str]], object]) -> Parser:
    def parser(data: bytes) -> None:
        words = data.decode("utf-8", "surrogateescape").split("\n")
        # argparse ends the process for what it does not accept, and says why.
        said = io.StringIO()
        with suppress(SystemExit, argparse.ArgumentError), redirect_stderr(said), redirect_stdout(said):
            parse(words)

    return parser


def _location(data: bytes) -> None:
    with suppress(ValidationError):
        restore_call.BackupLocation(qube="sys-usb", text=data.decode("utf-8", "surrogateescape"))


def _text(data: bytes) -> None:
    """Cleaned text steers no terminal, whatever it was; to clean it again changes nothing."""
    text = data.decode("utf-8", "surrogateescape")
    for clean, allowed in ((strip_control, ""), (strip_control_lines, "\n\t")):
        cleaned = clean(text)
        assert clean(cleaned) == cleaned
        assert all(char.isprintable() or char in allowed or char.isspace() for char in cleaned)
    assert shown(data).isascii() or "…" in shown(data)


# --- Seeds -----------------------------------------------------------------------------------------------

_QUBE = (
    b'{"key":"vm10","name":"work","class":"AppVM","label":"red","volumes":[{"name":"private","size":4096}]}'
)
_ERROR = b'"error":{"kind":"bad-image","reason":"x","qube":null,"volume":null,"chunk":1,"advice":""}'


def _image_archives() -> list[bytes]:
    image = ImagePlan(8192, [(512, b"x" * 700), (4096, b"y" * 100)])
    return [b"".join(inner_tar("vm10/private.img", image, sparse)) for sparse in ("gnu", "pax", "none")]


def _containers() -> list[bytes]:
    forged = b"\xff\x04" + (8).to_bytes(4, "big") + (1).to_bytes(4, "big") + b"x"
    return [scrypt_container(b"text", b"pass", 1, 1, 1, bytes(32)), forged]


def _messages(*fields: bytes) -> Callable[[], list[bytes]]:
    return lambda: [b"{" + text + b"}" for text in fields]


_WORKER = (
    b'"type":"manifest","backup_id":"x","format":4,"compression_filter":"gzip","qubes":['
    + _QUBE
    + b'],"refused":[]',
    b'"type":"volume_ready","key":"vm10","volume":"private","image_size":4096',
    b'"type":"volume_done","key":"vm10","volume":"private","outcome":"failed",' + _ERROR,
    b'"type":"volume_done","key":"vm10","volume":"private","outcome":"ok","image_size":1,"data_bytes":1,"sha256":"'
    + b"0" * 64
    + b'"',
    b'"type":"qube_settings","key":"vm10","firewall":[{"action":"accept","proto":"tcp"}],"notes":"x"',
    b'"type":"progress","archive_bytes":1,"image_bytes":1',
    b'"type":"log","level":"info","text":"x","key":"vm10"',
    b'"type":"failed",' + _ERROR,
    b'"type":"finished","archive_bytes":1',
)
_BROKER = (
    b'"type":"open","protocol":1,"passphrase":"x","memory":1,"jobs":1,"storage":{"qube":"a","location_id":"b"}',
    b'"type":"start","mode":"restore","keys":["vm10"]',
    b'"type":"skip_qube","key":"vm10"',
    b'"type":"cancel"',
)
_CLIENT = (
    b'"type":"open","mode":"restore","location":{"qube":"sys-usb","text":"/x"},"passphrase":"x","choice":'
    b'{"names":["work"],"conflicts":"rename"},"worker":{"memory":400}',
    b'"type":"choose","choice":{"missing":"skip"}',
    b'"type":"confirm","plan":1',
    b'"type":"cancel"',
)
_ANSWER = (
    b'"type":"plan","number":1,"mode":"restore","backup_id":"x","qubes":[]',
    b'"type":"volume_started","qube":"work","volume":"private","image_size":1',
    b'"type":"qube_finished","qube":{"name":"work","class":"AppVM","outcome":"restored"}',
    b'"type":"refused",' + _ERROR,
    b'"type":"report","mode":"restore","tool_version":"1","started":"2026-01-01T00:00:00Z","finished":'
    b'"2026-01-01T00:00:00Z","status":0',
)
_JSON_WORDS = (
    *(b'"', b"{", b"}", b"[", b"]", b":", b",", b"null", b"true", b"-1", b"1e9", b"9223372036854775807"),
    *(b"\\u202e", b"\\ud800", b'"type":', b'"error":', b'"qubes":'),
)
_XML_WORDS = (
    *(b"<!DOCTYPE x>", b"<!ENTITY a 'b'>", b"&a;", b"<![CDATA[", b"]]>", b"<domain", b"</domain>", b"class="),
    *(b"<property name=", b"<feature name=", b"backup-path", b"..", b"vm10/", b"<rule>", b"dsthost"),
    *(b"dstports", b"0-65535", b"::/0", b"<device", b"required="),
)
_TAR_WORDS = (
    *(b"ustar\x0000", b"ustar  \0", b"\x80", b"77777777777\0", b"GNU.sparse.major=1\n", b"GNU.sparse.size="),
    *(b"30 path=vm10/../../x\n", b"20 size=9999999\n", b"\0" * 512, b"0000000\0", b"S", b"x", b"g"),
)


def _no_arguments() -> list[bytes]:
    return [b"extract\nbackup\n--to\nx\n-p\nfile", b"list\nbackup", b"verify\n-\n--memory\n100\n--jobs\n2"]


def _sample_config() -> list[bytes]:
    return [(Path(__file__).parents[2] / "etc/config.yaml").read_bytes(), b"worker:\n  memory: 4000\n"]


def _streams(name: str) -> list[bytes]:
    content = bytes(range(256)) * 4
    return [b"".join(compress(name, [content])), b"".join(compress(name, [content, b"x" * 9000]))]


_OLD_FIREWALL = b"""<QubesFirewallRules policy="deny" dns="allow" icmp="deny">
<rule address="1.2.3.4" netmask="24"
 proto="tcp" port="80" toport="90" expire="1"/></QubesFirewallRules>"""


def _targets_of_format_3(qubes: Sequence[QubePlan]) -> Iterator[Target]:
    writer = Format3Writer(qubes, passphrase="pass")
    old_xml = writer.qubes_xml().replace(
        b"<QubesAppVm ", b"<QubesAppVm services=\"{u'cups': False}\" pcidevs=\"['00:14.0']\" kernel='None' "
    )
    words = (b"services=", b"{'a': True}", b"template_qid=", b"QubesHVm", b"QubesNetVm", b"dispvm_netvm_qid=")
    yield Target(
        "qubes-xml-3", partial(_qubes_xml, backup_format=3), lambda: [old_xml], (*_XML_WORDS, *words)
    )
    yield Target("header-3", _header, lambda: [writer.header_text()], (b"encrypted=False\n", b"SHA1"))
    names = b"qubes.xml.000\nqubes.xml.000.hmac\nvm-templates/tpl/..000\nappvms/work/private.img.000"
    yield Target("piece-names", _piece_names, lambda: [names], (b".hmac", b"..", b"/.", b".000", b".1000"))
    lines = [writer.sealed("x", b"piece")[1].data]
    lines += [replace(writer, digest=digest).sealed("x", b"piece")[1].data for digest in ("sha1", "sha256")]
    yield Target("mac-line", _mac_line, lambda: lines, (b"(stdin)= ", b"SHA1", b"\r\n", b"0" * 64))
    streams = [writer.encrypt(bytes(range(size)), "x") for size in (0, 16, 90)]
    yield Target("openssl-stream", _openssl_stream, lambda: streams, (b"Salted__", b"\x10" * 16))
    image = ImagePlan(8192, [(512, b"x" * 700), (4096, b"y" * 100)])
    directory = directory_tar(
        "vm-templates/tpl", {"root.img": image, "private.img": image}, {"notes.txt": b"x"}
    )
    yield Target(
        "directory", _directory, lambda: [directory], (*_TAR_WORDS, b"vm-templates/tpl/./", b"L", b"K")
    )
    yield Target("firewall-1", lambda data: _settings(b"f" + data), lambda: [_OLD_FIREWALL], _XML_WORDS)


def _stream(*messages: bytes) -> Callable[[], list[bytes]]:
    return lambda: [b"".join(frame(b"{" + text + b"}") for text in messages)]


def _targets_of_the_wire() -> Iterator[Target]:
    from_worker_in_order = [_WORKER[number] for number in (0, 5, 1, 6, 3, 4, 8)]
    from_dom0_in_order = [_ANSWER[number] for number in (0, 1, 2, 4)]
    opened = messages.Open(passphrase=SecretStr("x"))
    manifest = messages.Manifest(backup_id="x", format=4, compression_filter="gzip", qubes=())
    asked = restore_call.OpenBackup(
        mode="restore", location=restore_call.BackupLocation(text="/x"), passphrase=SecretStr("x")
    )
    plan = restore_call.Plan(number=1, mode="restore", backup_id="x", qubes=())
    for name, parser, seeds in (
        (
            "session-broker",
            _conversation(messages.broker_end, opened, messages.Start(mode="verify", keys=("vm10",))),
            _stream(*from_worker_in_order),
        ),
        ("session-worker", _conversation(messages.worker_end, manifest), _stream(*_BROKER)),
        (
            "call-client",
            _conversation(restore_call.client_end, asked, restore_call.Confirm(plan=1)),
            _stream(*from_dom0_in_order),
        ),
        (
            "call-dom0",
            _conversation(restore_call.service_end, plan, plan.model_copy(update={"number": 2})),
            _stream(*_CLIENT[:2], _CLIENT[2].replace(b"1", b"2"), _CLIENT[3]),
        ),
        ("worker-message", _round_trip(from_worker), _messages(*_WORKER)),
        ("broker-message", _round_trip(from_broker), _messages(*_BROKER)),
        ("client-message", _round_trip(from_client), _messages(*_CLIENT)),
        ("broker-answer", _round_trip(from_dom0), _messages(*_ANSWER)),
    ):
        yield Target(name, parser, seeds, _JSON_WORDS)


def _targets() -> Iterator[Target]:
    sample = tight_sample()
    yield Target("outer-tar", _outer_tar, lambda: [sample.archive[:8192]], _TAR_WORDS)
    yield Target("qfile", _qfile, lambda: [qfile_stream(sample.members)])
    yield Target(
        "tar-header", _tar_header, lambda: [sample.archive[:512], sample.archive[1024:1536]], _TAR_WORDS
    )
    yield Target(
        "pax-records", parse_pax_records, lambda: [b"13 path=vm10\n21 mtime=1.123456789\n"], _TAR_WORDS
    )
    names = "\n".join(member.name for member in chunky_sample("none").members[2:]).encode()
    yield Target("chunk-names", _chunk_names, lambda: [names], (b".000.enc", b".1000.enc", b"../", b"\0"))
    words = (b"version=4\n", b"encrypted=True\n", b"hmac-algorithm=", b"backup-id=", b"compressed=False\n")
    yield Target("header", _header, lambda: [header_text("gzip", "20260101T010203-1")], words)
    yield Target("container", _container, _containers)
    for name in FILTERS:
        yield Target(f"filter-{name}", _filter(name), partial(_streams, name))
    yield Target("inner-tar", _inner, _image_archives, _TAR_WORDS)
    small = b"".join(plain_tar("vm10/firewall.xml", [FIREWALL.encode()], len(FIREWALL)))
    yield Target("small-file", _small, lambda: [small], _TAR_WORDS)
    yield Target("qubes-xml", _qubes_xml, lambda: [qubes_xml(sample.writer.qubes)], _XML_WORDS)
    yield Target(
        "xml-tree", lambda data: parse_xml(data, "x", 1 << 20), lambda: [FIREWALL.encode()], _XML_WORDS
    )
    rule = FIREWALL.replace(
        "<rules/>",
        '<rules><rule><properties><property name="action">accept</property><property name="dsthost">'
        "10.0.0.0/8</property></properties></rule></rules>",
    )
    seeds = [b"f" + FIREWALL.encode(), b"f" + rule.encode(), b"nnotes\r\n", b"mfirefox.desktop\n"]
    yield Target("settings", _settings, lambda: seeds, _XML_WORDS)
    yield from _targets_of_format_3(sample.writer.qubes)
    yield from _targets_of_the_wire()
    volume = (
        encode_header(4096) + encode_record(512, 4) + b"abcd" + encode_record(1024, 1) + b"e" + encode_end(5)
    )
    yield Target("volume-stream", _volume, lambda: [volume], (b"\xff" * 8, b"QRSVOLUM"))
    call = ServiceCall("restore.Volume", "vm10.private", "dom0")
    yield Target(
        "descriptor", _descriptor, lambda: [encode_descriptor(call)], (b"restore.Session+", b" dom0\0")
    )
    yield Target(
        "config", _config, _sample_config, (b"worker:\n", b"  - ", b"&a ", b"*a", b"!!python", b": null")
    )
    yield Target(
        "passphrase", _passphrase, lambda: [b"correct horse\n", b"\xef\xbb\xbfx\r\n"], (b"\r\n", b"\0")
    )
    options = (b"--to\n", b"--jobs\n", b"--memory=", b"-p\n", b"--exclude\n", b"--compression\n", b"\n-\n")
    yield Target("arguments", _arguments(parse_arguments), _no_arguments, options)
    qvm = [b"backup\nwork", b"--verify-only\n-d\nsys-usb\n/mnt/x", b"--location-is-service\n-d\nnas\nX"]
    yield Target(
        "qvm-arguments", _arguments(parse_restore_arguments), lambda: qvm, (b"-d\n", b"--rename-conflicting")
    )
    yield Target(
        "location", _location, lambda: [b"/mnt/backup", b"tar -c x | y"], (b"\xed\xa0\x80", b"\x1b[2J")
    )
    yield Target(
        "text", _text, lambda: [b"text\n", "‮x".encode()], (b"\x1b[31m", b"\xe2\x80\xae", b"\xc2\x9b")
    )


#: Every target by its name.
TARGETS = {target.name: target for target in _targets()}
