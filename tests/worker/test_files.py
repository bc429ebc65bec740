"""Invariant 5: of a chunk whose MAC does not match, not one byte is handed on; and its memory comes back."""

import gc
from collections.abc import Iterable, Iterator

import pytest

from qubes_restore_svc.archive.container import HEAD_SIZE
from qubes_restore_svc.errors import AuthenticationFailed, Cancelled
from qubes_restore_svc.worker import opening
from qubes_restore_svc.worker.chunk import Chunk
from qubes_restore_svc.worker.files import ArchiveEnd, PlaintextFiles
from qubes_restore_svc.worker.selection import Selection

from ..support.backup_writer import BackupWriter, RawMember, join_members, sample_qube
from ..support.damage import DAMAGES, edited, flip_bit, sample_backup, victim_chunks, victim_file
from .support import MIB, Engine, Pass, Receiver, file_with, in_thread, pipe_with, verified, wait_until

WRITER = sample_backup(compression="none", log_n=2)
MEMBERS = list(WRITER.members())
FILE = victim_file(WRITER)
CHUNKS = [MEMBERS[place] for place in victim_chunks(WRITER, MEMBERS)]


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """All bytes that go into a decompressor, by the name of the inner archive (its first 100 bytes)."""
    streams: dict[str, bytes] = {}

    def spy(filter_name: str, pieces: Iterable[bytes]) -> Iterator[bytes]:
        name = ""
        for piece in pieces:
            name = name or bytes(piece[:100]).rstrip(b"\0").decode(errors="replace")
            streams[name] = streams.get(name, b"") + piece
            yield piece

    monkeypatch.setattr(opening, "decompress", spy)
    return streams


HONEST = b"".join(WRITER.compressed(FILE, dict(WRITER.files())[FILE]))
#: Bits of a container: in the key check, first and last of the content, in the MAC. Not in head or salt: that
#: is noticed before anything is derived.
PLACES = {"key check": 8 * 70, "first bit": 8 * HEAD_SIZE, "last bit": -8 * 32 - 1, "MAC": -1}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", [0, 1, len(CHUNKS) - 1])
def test_nothing_of_a_chunk_whose_mac_is_wrong_reaches_the_decompressor(
    number: int, place: str, handed_on: dict[str, bytes]
) -> None:
    broken = edited(MEMBERS, CHUNKS[number].name, lambda data: flip_bit(data, PLACES[place]))
    run = verified(join_members(broken), ["work", "vault"])
    assert run.outcomes == {"work/private": "authentication-failed", "vault/private": "ok"}
    error = run.volumes["work/private"].error
    assert error is not None and (error.qube, error.volume, error.chunk) == ("work", "private", number)
    assert ("does not belong to this backup" in error.reason) == (place == "key check")
    assert handed_on.get(FILE, b"") == HONEST[: number * WRITER.chunk_size]


@pytest.mark.parametrize("bit", list(PLACES.values()))
def test_nothing_of_a_qubes_xml_whose_mac_is_wrong_is_parsed(bit: int, handed_on: dict[str, bytes]) -> None:
    broken = edited(MEMBERS, "qubes.xml.000.enc", lambda data: flip_bit(data, bit))
    with file_with(join_members(broken)) as descriptor, pytest.raises(AuthenticationFailed):
        Pass(descriptor).open()
    assert handed_on == {}


def test_the_pieces_of_a_whole_file_are_its_content(handed_on: dict[str, bytes]) -> None:
    assert verified(join_members(MEMBERS)).outcomes["work/private"] == "ok"
    assert handed_on[FILE] == HONEST


def small_writer() -> BackupWriter:
    return BackupWriter([sample_qube("work", 1 << 18, 1)], compression="none", chunk_size=1 << 15, log_n=2)


class Bench(Pass):
    """A pass whose files a test takes itself."""

    def begin(self) -> PlaintextFiles:
        backup = self.open()
        files = PlaintextFiles(self.intake.events)
        self.thread = in_thread(lambda: self.intake.run(backup.proofs))
        assert files.next_file() == "vm10/private.img"
        return files


def test_each_chunk_gives_its_memory_back_when_it_is_through() -> None:
    archive = small_writer().to_bytes()
    with file_with(archive) as descriptor:
        bench = Bench(descriptor, memory=40 * 1024)  # one chunk and its derivation, no more
        files = bench.begin()
        content = b"".join(files.pieces(lambda: None, print))
        assert len(content) > 1 << 18
        assert isinstance(files.next_file(), ArchiveEnd)
        bench.finish()


def test_what_is_left_of_a_file_is_drained_and_its_memory_given_back() -> None:
    with file_with(small_writer().to_bytes()) as descriptor:
        bench = Bench(descriptor, memory=40 * 1024)
        files = bench.begin()
        pieces = files.pieces(lambda: None, print)
        next(pieces)
        assert files.chunk == 0
        pieces.close()
        assert files.drain() is None
        assert files.chunk is None
        assert isinstance(files.next_file(), ArchiveEnd)
        bench.finish()


def test_a_drained_file_still_tells_what_was_wrong_with_its_rest() -> None:
    members = list(small_writer().members())
    with file_with(join_members(members[:5] + members[6:])) as descriptor:
        bench = Bench(descriptor)
        files = bench.begin()
        error = files.drain()
        assert error is not None and error.kind == "chunk-out-of-order"


def test_the_check_can_stop_a_file_before_its_first_chunk_is_looked_at() -> None:
    def stop() -> None:
        raise Cancelled("stop")

    members = edited(small_writer().members(), "vm10/private.img.000.enc", lambda data: flip_bit(data, -1))
    with file_with(join_members(members)) as descriptor:
        bench = Bench(descriptor)
        files = bench.begin()
        with pytest.raises(Cancelled):
            next(files.pieces(stop, print))
        files.drain()
        bench.finish()


def test_the_position_rises_with_what_was_dealt_with_and_never_goes_back() -> None:
    writer = small_writer()
    archive = writer.to_bytes()
    skipped = RawMember("vm99/private.img.000.enc", bytes(MIB))
    with file_with(archive + join_members([skipped])) as descriptor:
        bench = Bench(descriptor)
        files = bench.begin()
        positions: list[int] = []

        def look() -> None:
            positions.append(files.position(bench.source.position))

        look()
        for _ in files.pieces(look, print):
            look()
        files.next_file()
        files.drain()
        assert isinstance(files.next_file(), ArchiveEnd)
        bench.finish()
        look()
    assert positions == sorted(positions)
    assert positions[0] < len(archive) / 2 < positions[-1]


def test_the_position_follows_the_intake_while_it_skips() -> None:
    content = small_writer().to_bytes() + join_members([RawMember("vm99/x.img.000.enc", bytes(5 * MIB))])
    with pipe_with(content, keep_open=True) as descriptor:
        run = Pass(descriptor)
        backup = run.open()
        files = PlaintextFiles(run.intake.events)
        run.wanted.narrow(Selection(backup.content, ()))
        in_thread(lambda: run.intake.run(backup.proofs))
        in_thread(lambda: [files.next_file() for _ in range(10)])
        wait_until(lambda: files.position(run.source.position) > 5 * MIB)
        run.stop.say()


@pytest.mark.parametrize("damage", ["bit-flipped-in-a-mac", "file-stands-twice", "inner-archive-is-noise"])
def test_an_error_that_is_kept_does_not_keep_its_chunk(damage: str) -> None:
    """A traceback holds the frames, and they the container of 100 MiB in which the error was found."""
    gc.collect()
    gc.disable()
    try:
        with file_with(DAMAGES[damage].apply(WRITER)) as descriptor:
            run = Pass(descriptor, engine=Engine())
            run.start(mode="restore", receiver=Receiver(run.messages.append))
            run.finish()
        kept = [qube.error for qube in run.pipeline._selection if qube.error is not None]
        assert kept
        assert all(error.__traceback__ is None and error.__context__ is None for error in kept)
        assert [found for found in gc.get_objects() if isinstance(found, Chunk)] == []
    finally:
        gc.enable()
