"""The beginning of a backup: every wrong beginning has its own error, and costs no more than it must."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest

from qubes_restore_svc.errors import (
    BadArchive,
    BadHeader,
    BudgetTooSmall,
    ChunkOutOfOrder,
    ExcessiveCost,
    RestoreError,
    UnknownFilter,
    WrongPassphrase,
)
from qubes_restore_svc.kdf.engine import KdfParameters, KdfRequest
from qubes_restore_svc.worker.keys import KeyScheduler
from qubes_restore_svc.worker.opening import OpenedBackup

from ..support.backup_writer import BACKUP_ID, BackupWriter, join_members, sample_qube
from ..support.damage import DAMAGES, Damage, edited, flip_bit, sample_backup, with_cost
from .support import MIB, PATIENCE_S, Engine, Pass, file_with, in_thread, join, pipe_with, wait_until

WRITER = sample_backup(log_n=2)
EARLY = [damage for damage in DAMAGES.values() if damage.scope == "backup"]


def opened(
    archive: bytes, *, passphrase: str | None = None, memory: int = 64 * MIB
) -> tuple[OpenedBackup, Pass]:
    with file_with(archive) as descriptor:
        run = Pass(descriptor, memory=memory, passphrase=passphrase or WRITER.passphrase)
        try:
            return run.open(), run
        finally:
            run.scheduler.close()
            wait_until(lambda: run.budget.used == 0, "the release of all memory")


def test_a_backup_opens_with_its_header_and_its_qubes() -> None:
    backup, run = opened(WRITER.to_bytes())
    assert backup.header.backup_id == BACKUP_ID
    assert backup.filter == "gzip"
    assert [qube.info.name for qube in backup.content.qubes] == [
        "work",
        "vault",
        "scratch",
        "custom-template",
    ]
    assert run.engine.members == ["backup-header", "qubes.xml.000"]


def test_no_more_than_the_beginning_is_read_and_derived() -> None:
    members = list(WRITER.members())
    _, run = opened(join_members(members))
    assert run.source.position <= len(join_members(members[:3])) + 2048


def test_a_qubes_xml_of_many_chunks_is_put_together() -> None:
    writer = replace(WRITER, compression="none", chunk_size=1000)
    backup, run = opened(writer.to_bytes(), memory=10 * 1024)
    assert len(backup.content.qubes) == 4
    assert len(run.engine.requests) > 5


def test_the_chunks_of_qubes_xml_must_come_in_order() -> None:
    members = list(WRITER.members())
    with pytest.raises(ChunkOutOfOrder, match="stands twice"):
        opened(join_members([*members[:3], *members[2:]]))


def test_the_passphrase_is_in_no_representation() -> None:
    backup, run = opened(WRITER.to_bytes())
    assert WRITER.passphrase not in repr(backup) + repr(run.engine.requests)


#: The keys that the opening asks for.
OPENING = {"backup-header", "qubes.xml.000"}


@pytest.mark.parametrize("ahead", [False, True])
def test_a_wrong_passphrase_is_known_from_two_keys_side_by_side_and_none_twice(ahead: bool) -> None:
    gate = threading.Event()
    engine = Engine(lambda request: b"/" not in request.passphrase or gate.wait(PATIENCE_S))
    second = Engine()
    with file_with(WRITER.to_bytes()) as descriptor:
        run = Pass(descriptor, passphrase="wrong", engine=engine, jobs=4, second=second)
        with pytest.raises(WrongPassphrase):
            run.open(ahead=ahead)
        assert not gate.is_set()
        run.stop.say()
        gate.set()
        run.scheduler.close()
        run.intake.abandon()
        wait_until(lambda: run.budget.used == 0)  # what runs is given up a moment later
    assert ahead or set(engine.members) == OPENING
    assert second.requests == []


def test_a_passphrase_that_opens_qubes_xml_is_not_called_wrong() -> None:
    members = edited(WRITER.members(), "backup-header.hmac", lambda data: flip_bit(data, 8 * 70))
    with file_with(join_members(members)) as descriptor:
        run = Pass(descriptor)
        with pytest.raises(BadHeader, match="though the passphrase is right"):
            run.open()
        run.scheduler.close()


def test_the_keys_of_header_and_qubes_xml_are_asked_for_before_either_is_waited_for() -> None:
    gate = threading.Event()
    with file_with(WRITER.to_bytes()) as descriptor:
        run = Pass(descriptor, engine=Engine(lambda _: gate.wait(PATIENCE_S)))
        thread = in_thread(run.open)
        wait_until(lambda: sorted(run.engine.members) == ["backup-header", "qubes.xml.000"])
        thread.join(0.05)
        assert thread.is_alive()
        assert len(run.engine.requests) == 2
        gate.set()
        join(thread)
        run.scheduler.close()


def test_ahead_the_volumes_are_asked_for_as_well() -> None:
    gate = threading.Event()
    with file_with(WRITER.to_bytes()) as descriptor:
        run = Pass(descriptor, engine=Engine(lambda _: gate.wait(PATIENCE_S)), jobs=4)
        thread = in_thread(lambda: run.start(ahead=True))
        wait_until(lambda: len(run.engine.requests) == 4, "as many derivations as there are jobs")
        assert sorted(run.engine.members)[:2] == ["backup-header", "qubes.xml.000"]
        assert all("/" in member for member in sorted(run.engine.members)[2:])
        gate.set()
        join(thread)
        run.finish()
    assert set(run.outcomes.values()) == {"ok"}


def test_the_keys_that_everything_waits_for_are_urgent_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []
    submit = KeyScheduler.submit

    def note(
        self: KeyScheduler, request: KdfRequest, *, urgent: bool, check: Callable[[], None]
    ) -> "Future[bytes]":
        asked.append((request.passphrase.decode().split("!")[-2], urgent))
        return submit(self, request, urgent=urgent, check=check)

    monkeypatch.setattr(KeyScheduler, "submit", note)
    with file_with(WRITER.to_bytes()) as descriptor:
        run = Pass(descriptor)
        run.start(ahead=True)
        run.finish()
    assert asked[:2] == [("backup-header", True), ("qubes.xml.000", True)]
    assert len(asked) > 2
    assert not any(urgent for _, urgent in asked[2:])


def test_ahead_is_not_run_while_qubes_xml_has_more_chunks_to_come() -> None:
    writer = replace(WRITER, compression="none", chunk_size=1000)
    with file_with(writer.to_bytes()) as descriptor:
        run = Pass(descriptor)
        run.open(ahead=True)
        assert run.intake._thread is None
        assert not any("/" in member for member in run.engine.members)
        run.scheduler.close()


@pytest.mark.parametrize("opened_as", [file_with, pipe_with])
def test_what_came_ahead_is_restored_if_selected_and_dropped_if_not(
    opened_as: Callable[[bytes], AbstractContextManager[int]],
) -> None:
    for names in (None, ["vault"], ["work"]):
        with opened_as(WRITER.to_bytes()) as descriptor:
            plain = Pass(descriptor)
            plain.start(names)
            plain.finish()
        with opened_as(WRITER.to_bytes()) as descriptor:
            run = Pass(descriptor)
            run.start(names, ahead=True)
            run.finish()
        assert run.outcomes == plain.outcomes and set(run.outcomes.values()) == {"ok"}
        assert run.settings == plain.settings
        assert run.volumes == plain.volumes
        assert run.budget.used == 0 and not run.scheduler._waiting


@pytest.mark.parametrize("opened_as", [file_with, pipe_with])
@pytest.mark.parametrize("beside", [0, 1, 300, 1000, 5000])
def test_a_budget_that_fits_qubes_xml_but_not_beside_the_header_is_enough(
    beside: int, opened_as: Callable[[bytes], AbstractContextManager[int]]
) -> None:
    """The opening holds the header's copy while it asks for room: it must not wait for itself."""
    archive = WRITER.to_bytes()
    size = len(list(WRITER.members())[2].data)
    with opened_as(archive) as descriptor:
        run = Pass(descriptor, memory=size + KdfParameters(2, 8, 1).memory + beside)
        thread = in_thread(run.open)
        join(thread)
        assert run.backup.content.qubes
        run.scheduler.close()


def test_a_budget_too_small_for_the_first_key_says_so_before_any_derivation() -> None:
    archive = BackupWriter([sample_qube("work", 4096, 1)], log_n=12).to_bytes()
    with file_with(archive) as descriptor:
        run = Pass(descriptor, memory=4 * MIB)
        with pytest.raises(BudgetTooSmall) as caught:
            run.open()
    assert "--memory 5" in caught.value.advice
    assert run.engine.requests == []


def test_an_excessive_cost_is_refused_before_anything_is_derived() -> None:
    members = edited(WRITER.members(), "backup-header.hmac", lambda data: with_cost(data, 40))
    with file_with(join_members(members)) as descriptor:
        run = Pass(descriptor)
        with pytest.raises(ExcessiveCost):
            run.open()
    assert run.engine.requests == []


def test_the_person_can_name_the_filter() -> None:
    with file_with(replace(WRITER, compression="bzip2").to_bytes()) as descriptor:
        assert Pass(descriptor).open("pbzip2").filter == "bzip2"
    with file_with(WRITER.to_bytes()) as descriptor, pytest.raises(UnknownFilter, match="rar"):
        Pass(descriptor).open("rar")


def test_what_follows_the_metadata_is_still_there_for_the_pass() -> None:
    with file_with(WRITER.to_bytes()) as descriptor:
        run = Pass(descriptor)
        run.open()
        member = run.members.next_member()
        assert member is not None and member.name == "vm10/private.img.000.enc"


def test_without_qubes_xml_nothing_opens() -> None:
    members = [member for member in WRITER.members() if not member.name.startswith("qubes.xml")]
    for rest in (members, members[:2]):
        with pytest.raises(BadArchive, match=r"qubes\.xml"):
            opened(join_members(rest))


@pytest.mark.parametrize("size", [5000, 1 << 40], ids=["a little", "a tebibyte"])
@pytest.mark.parametrize("name", ["backup-header", "backup-header.hmac"])
def test_a_header_that_claims_to_be_large_is_refused_unread(name: str, size: int) -> None:
    members = [
        replace(member, declared_size=size) if member.name == name else member for member in WRITER.members()
    ]
    with file_with(join_members(members)) as descriptor:
        run = Pass(descriptor)
        with pytest.raises(BadHeader):
            run.open()
        assert run.engine.requests == []


@pytest.mark.parametrize("damage", EARLY, ids=lambda damage: damage.name)
def test_every_damage_of_a_whole_backup_has_its_own_error(damage: Damage) -> None:
    """Those that lie after the metadata show in the pass, and those in one qube's entry leave it out."""
    archive = damage.apply(WRITER)
    try:
        backup, run = opened(archive, passphrase=damage.passphrase)
    except RestoreError as error:
        assert error.kind in damage.kinds
        assert WRITER.passphrase not in str(error)
        return
    refused = {qube.error.kind for qube in backup.content.refused}
    with file_with(archive) as descriptor:
        run = Pass(descriptor, passphrase=damage.passphrase or WRITER.passphrase)
        run.start()
        run.finish()
    assert refused & damage.kinds or set(run.outcomes.values()) & damage.kinds
    assert run.budget.used == 0
