"""The emulated storage qube behaves as the stock agent: ids, path lists, the qfile and its answer, failures.

Strategy: a disposable calls the services through the switchboard, as a worker would. What is sent is
compared with recordings of the real programs, and with a qfile that the tests write themselves.
"""

import os
import shlex
import signal
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fixtures import shared_fixture
from tests.support.outer_archive import RawMember, join_members, qfile_stream

from . import storage_services
from .bench import Bench, alive, open_bench, wait_until

CONTENT = {
    "backup-header": b"version=4\n",
    "backup-header.hmac": b"0123",
    "qubes.xml.000.enc": b"x" * 700,
    "vm1/private.img.000.enc": b"a" * 512,
    "vm10/private.img.000.enc": b"b" * 5000,
    "vm10/private.img.001.enc": b"c",
    "dom0-home/user.000.enc": b"d" * 100_000,
}
MEMBERS = [RawMember(name, data) for name, data in CONTENT.items()]
END = bytes(32)  #: the last header of a qfile


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with open_bench(tmp_path) as opened:
        storage_services.install(opened.root / "vault" / "qubes-rpc")
        yield opened


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    path = tmp_path / "my backup.qbackup"
    path.write_bytes(join_members(MEMBERS))
    return path


class Registration:
    """A location that stays registered for the length of a `with`; `id` is what the service gave for it."""

    def __init__(self, bench: Bench, location: str) -> None:
        self.call = bench.call_from("dom0", "vault", "qubes.RegisterBackupLocation")
        assert self.call.stdin is not None and self.call.stdout is not None
        self.call.stdin.write(location.encode() + b"\n")
        self.call.stdin.flush()
        self.id = self.call.stdout.readline().decode().removesuffix("\n")

    def __enter__(self) -> str:
        return self.id

    def __exit__(self, *exc: object) -> None:
        with self.call:
            self.call.communicate(timeout=20)


def fetch(
    bench: Bench, identifier: str, paths: bytes, *, spoil: int = 0, answer: bytes | None = None
) -> tuple[int, bytes, bytes]:
    """Call RestoreById as a worker does: exit code, the stream, stderr.

    The answer is right unless it is given, or `spoil` changes its checksum.
    """
    return converse(bench, f"qubes.RestoreById+{identifier}", paths + b"\n", spoil=spoil, answer=answer)


def converse(
    bench: Bench, service: str, words: bytes, *, spoil: int = 0, answer: bytes | None = None
) -> tuple[int, bytes, bytes]:
    with bench.call_from("work", "vault", service) as client:
        assert client.stdin is not None and client.stdout is not None and client.stderr is not None
        client.stdin.write(words)
        client.stdin.flush()
        stream = read_stream(client)
        if answer is None:
            answer = struct.pack("<IIQI", 0, 0, zlib.crc32(stream) ^ spoil, 0)
        if stream.endswith(END):
            client.stdin.write(answer)
            client.stdin.flush()
        client.stdin.close()
        rest, errors = client.stdout.read(), client.stderr.read()
        return client.wait(20), stream + rest, errors


def read_stream(client: "subprocess.Popen[bytes]") -> bytes:
    """A qfile up to its end, or up to the end of the output."""
    assert client.stdout is not None
    stream = b""
    while len(header := client.stdout.read(32)) == 32:
        name_length, _, length = struct.unpack_from("<IIQ", header)
        body = client.stdout.read(name_length + length)
        stream += header + body
        if not name_length or len(body) < name_length + length:
            return stream
    return stream + header


def members(*names: str) -> bytes:
    """The qfile of these members of the backup."""
    return qfile_stream([RawMember(name, CONTENT[name]) for name in names])


def test_a_registered_file_is_sent_whole_as_a_qfile(bench: Bench, backup: Path) -> None:
    with Registration(bench, str(backup)) as identifier:
        assert len(identifier) == 8 and identifier.isalnum() and identifier.isascii()
        code, stream, errors = fetch(bench, identifier, b"")
    assert (code, stream) == (0, qfile_stream(MEMBERS))
    assert errors.decode().splitlines() == [
        "Starting Restorecopy",
        f"Backup location: {backup}",
        "Paths: ",
        f"Performing restore from backup file {backup}",
        f"Copying {backup} to STDOUT",
        "EOF",
    ]


@pytest.mark.parametrize(
    ("paths", "recording"),
    [
        (b"backup-header backup-header.hmac qubes.xml.000.enc", "gzip.manifest.qfile"),
        (b"vm11/", "gzip.vm11.qfile"),
    ],
)
def test_the_stream_is_what_the_real_program_sent(bench: Bench, paths: bytes, recording: str) -> None:
    with Registration(bench, str(shared_fixture("gzip.qbackup"))) as identifier:
        code, stream, _ = fetch(bench, identifier, paths)
    assert (code, stream) == (0, shared_fixture(recording).read_bytes())


def test_paths_are_beginnings_of_names(bench: Bench, backup: Path) -> None:
    with Registration(bench, str(backup)) as identifier:
        assert fetch(bench, identifier, b"vm10/")[1] == members(
            "vm10/private.img.000.enc", "vm10/private.img.001.enc"
        )
        assert fetch(bench, identifier, b" vm1   dom0-home/ ")[1] == members(
            "vm1/private.img.000.enc",
            "vm10/private.img.000.enc",
            "vm10/private.img.001.enc",
            "dom0-home/user.000.enc",
        )
        assert fetch(bench, identifier, b"vm7/")[:2] == (0, END)


def test_the_stream_ends_early_once_every_path_has_matched(bench: Bench, tmp_path: Path) -> None:
    late = [*MEMBERS, RawMember("backup-header-again", b"later")]
    (tmp_path / "backup").write_bytes(join_members(late))
    with Registration(bench, str(tmp_path / "backup")) as identifier:
        # After the last match comes a file that is not wanted: there it stops, and "again" is never seen.
        assert fetch(bench, identifier, b"backup-header")[1] == members("backup-header", "backup-header.hmac")
        everything = fetch(bench, identifier, b"backup-header vm7/")[1]
        assert everything.count(b"backup-header-again") == 1


def test_the_answer_decides_the_exit_code(bench: Bench, backup: Path) -> None:
    with Registration(bench, str(backup)) as identifier:
        assert fetch(bench, identifier, b"vm1/", spoil=1)[0] == 1
        assert fetch(bench, identifier, b"vm1/", answer=b"")[0] == 1
        assert fetch(bench, identifier, b"vm1/", answer=struct.pack("<IIQI", 28, 0, 0, 0))[0] == 1
        no_more_wanted = struct.pack("<IIQI", 122, 0, 0, 0)
        assert fetch(bench, identifier, b"vm1/", answer=no_more_wanted)[0] == 0
        short = struct.pack("<IIQ", 0, 0, zlib.crc32(members("vm1/private.img.000.enc")))
        assert fetch(bench, identifier, b"vm1/", answer=short)[0] == 0


def test_an_id_ends_with_the_call_that_registered_it(bench: Bench, backup: Path) -> None:
    registration = Registration(bench, str(backup))
    with registration:
        entry = bench.root / "vault" / "run" / "qubes-backup-location" / registration.id
        assert entry.stat().st_mode & 0o777 == 0o600
        assert fetch(bench, registration.id, b"vm1/")[0] == 0
    assert registration.call.returncode == 0
    assert not entry.exists()
    assert fetch(bench, registration.id, b"vm1/") == (1, b"", b"Invalid location ID\n")


def test_an_id_ends_when_the_caller_that_registered_it_is_killed(bench: Bench, backup: Path) -> None:
    with (registration := Registration(bench, str(backup))) as identifier:
        registration.call.send_signal(signal.SIGKILL)
        entry = bench.root / "vault" / "run" / "qubes-backup-location" / identifier
        wait_until(lambda: not entry.exists())
        assert fetch(bench, identifier, b"vm1/")[0] == 1


@pytest.mark.parametrize("owner", ["999999999 1", "1 1", "nonsense"])
def test_an_id_whose_owner_is_gone_or_another_process_now_is_not_valid(bench: Bench, owner: str) -> None:
    registry = bench.root / "vault" / "run" / "qubes-backup-location"
    registry.mkdir()
    (registry / "Abcd1234").write_text(f"{owner}\n/etc/hostname\n")
    assert fetch(bench, "Abcd1234", b"") == (1, b"", b"Invalid location ID\n")


def test_registering_gives_one_line_and_ends_its_output(bench: Bench, backup: Path) -> None:
    with (registration := Registration(bench, str(backup))):
        assert registration.call.stdout is not None
        assert registration.call.stdout.read() == b""
        assert registration.call.poll() is None


def test_a_location_without_its_newline_is_not_registered(bench: Bench) -> None:
    assert bench.result("dom0", "vault", "qubes.RegisterBackupLocation", b"/some/where")[:2] == (1, b"")


def test_calls_without_an_id_or_a_line_of_paths_fail(bench: Bench, backup: Path) -> None:
    assert fetch(bench, "", b"") == (1, b"", b"Missing backup location ID argument\n")
    with Registration(bench, str(backup)) as identifier:
        code, output, _ = bench.result("work", "vault", f"qubes.RestoreById+{identifier}", b"vm1/")
        assert (code, output) == (1, b"")


def test_a_location_that_is_no_file_is_run_as_a_command(bench: Bench, backup: Path) -> None:
    with Registration(bench, f"cat {shlex.quote(str(backup))}") as identifier:
        assert fetch(bench, identifier, b"")[:2] == (0, qfile_stream(MEMBERS))


def test_a_command_that_is_not_there_exits_2(bench: Bench) -> None:
    with Registration(bench, "no-such-command --at all") as identifier:
        code, stream, errors = fetch(bench, identifier, b"")
    assert (code, stream) == (2, b"")
    assert errors.endswith(b"Invalid command no-such-command\n")


def test_a_command_that_fails_half_way_breaks_the_stream(bench: Bench, backup: Path) -> None:
    whole = backup.stat().st_size
    with Registration(bench, f"head -c {whole // 2} {shlex.quote(str(backup))}") as identifier:
        code, stream, _ = fetch(bench, identifier, b"")
    assert code == 1
    assert qfile_stream(MEMBERS).startswith(stream) and not stream.endswith(END)


def test_a_command_that_fails_at_its_end_shows_in_the_exit_code_only(bench: Bench, backup: Path) -> None:
    command = f"sh -c 'cat \"$1\"; exit 7' sh {shlex.quote(str(backup))}"
    with Registration(bench, command) as identifier:
        assert fetch(bench, identifier, b"")[:2] == (7, qfile_stream(MEMBERS))


def test_an_early_end_kills_the_command_and_that_is_the_exit_code(bench: Bench, tmp_path: Path) -> None:
    big = RawMember("vm10/root.img.000.enc", os.urandom(4 << 20))
    (tmp_path / "big").write_bytes(join_members([*MEMBERS[:3], big]))
    with Registration(bench, f"cat {shlex.quote(str(tmp_path / 'big'))}") as identifier:
        code, stream, _ = fetch(bench, identifier, b"backup-header")
    assert (code, stream) == (128 + signal.SIGPIPE, members("backup-header", "backup-header.hmac"))


def test_a_wrong_answer_shows_before_what_becomes_of_the_command(bench: Bench, tmp_path: Path) -> None:
    big = RawMember("vm10/root.img.000.enc", os.urandom(4 << 20))
    (tmp_path / "big").write_bytes(join_members([*MEMBERS[:3], big]))
    with Registration(bench, f"cat {shlex.quote(str(tmp_path / 'big'))}") as identifier:
        assert fetch(bench, identifier, b"backup-header", spoil=1)[0] == 1


def test_what_is_no_archive_gives_an_empty_stream(bench: Bench, tmp_path: Path) -> None:
    for data in (b"", b"nonsense " * 1000, join_members(MEMBERS)[512:]):
        (tmp_path / "no archive").write_bytes(data)
        with Registration(bench, str(tmp_path / "no archive")) as identifier:
            code, stream, _ = fetch(bench, identifier, b"")
        assert (code, stream) == (0, END)


def test_nothing_after_a_broken_header_is_sent(bench: Bench, tmp_path: Path) -> None:
    archive = join_members(MEMBERS[:2]) + b"broken".ljust(512, b"!") + join_members(MEMBERS[2:])
    (tmp_path / "broken").write_bytes(archive)
    with Registration(bench, str(tmp_path / "broken")) as identifier:
        assert fetch(bench, identifier, b"")[:2] == (0, qfile_stream(MEMBERS[:2]))


def test_only_plain_files_are_sent(bench: Bench, tmp_path: Path) -> None:
    odd = [RawMember("vm1/link", b"", b"2", "target"), RawMember("vm1/dir/", b"", b"5"), *MEMBERS[:1]]
    (tmp_path / "odd").write_bytes(join_members(odd))
    with Registration(bench, str(tmp_path / "odd")) as identifier:
        assert fetch(bench, identifier, b"")[:2] == (0, qfile_stream(MEMBERS[:1]))


def test_a_file_that_is_cut_off_breaks_the_stream_where_it_is_wanted(bench: Bench, backup: Path) -> None:
    archive = backup.read_bytes()
    backup.write_bytes(archive[: archive.index(b"b" * 5000) + 3000])
    with Registration(bench, str(backup)) as identifier:
        assert fetch(bench, identifier, b"vm10/")[0] == 1
        assert fetch(bench, identifier, b"vm1/")[:2] == (0, members("vm1/private.img.000.enc"))


def test_an_agent_without_the_service_exits_127(bench: Bench, backup: Path) -> None:
    services = bench.root / "work" / "qubes-rpc"
    storage_services.install(services, by_id=False)
    assert bench.result("dom0", "work", "qubes.RegisterBackupLocation", b"/x\n")[:2] == (127, b"")
    assert bench.result("vault", "work", "qubes.RestoreById+x", b"\n")[:2] == (127, b"")


def test_the_older_service_takes_the_location_with_the_call(bench: Bench, backup: Path) -> None:
    assert converse(bench, "qubes.Restore", f"{backup}\nvm1/\n".encode())[:2] == (
        0,
        members("vm1/private.img.000.enc"),
    )
    command = f"sh -c 'cat \"$1\"; exit 7' sh {shlex.quote(str(backup))}"
    assert converse(bench, "qubes.Restore", f"{command}\n\n".encode())[:2] == (0, qfile_stream(MEMBERS))
    assert converse(bench, "qubes.Restore", b"no-such-command\n\n")[:2] == (2, b"")


def test_a_fetch_whose_caller_is_killed_ends_with_its_command(bench: Bench, tmp_path: Path) -> None:
    mark, first = tmp_path / "pid", tmp_path / "first"
    command = bench.root / "vault" / "bin" / "endless"
    command.write_text(f'#!/bin/sh\necho $$ >"{mark}"\nexec cat "{first}" /dev/zero\n')
    command.chmod(0o755)
    header = join_members([RawMember("vm1/x", b"", declared_size=1 << 30)])
    first.write_bytes(header[: header.index(b"vm1/x\0") + 512])
    with Registration(bench, "endless") as identifier:
        with bench.call_from("work", "vault", f"qubes.RestoreById+{identifier}") as client:
            assert client.stdin is not None and client.stdout is not None
            client.stdin.write(b"\n")
            client.stdin.flush()
            assert len(client.stdout.read(1000)) == 1000
            client.kill()
        wait_until(lambda: not alive(int(mark.read_text())))
