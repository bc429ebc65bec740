"""From files to verified volumes: what is wrong stays where it is, and whoever waits can be stopped."""

import contextlib
import errno
import hashlib
import os
import random
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal

import pytest
from pydantic import SecretStr

from qubes_restore_svc.archive.container import HEAD_SIZE
from qubes_restore_svc.archive.inner_tar import Image, read_image
from qubes_restore_svc.kdf.engine import KdfRequest
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.names import VmClass
from qubes_restore_svc.worker import memory, pipeline
from qubes_restore_svc.worker.meter import ALL

from ..support.backup_writer import (
    BackupWriter,
    ImagePlan,
    QubePlan,
    RawMember,
    Replacements,
    join_members,
    outer_member,
    sample_image,
    sample_qube,
)
from ..support.damage import (
    DAMAGES,
    Damage,
    edited,
    flip_bit,
    sample_backup,
    victim_chunks,
    victim_file,
    with_cost,
)
from ..support.fixtures import expectation, shared_fixture
from ..support.qubes_xml_writer import qubes_xml
from .support import (
    MIB,
    PATIENCE_S,
    Engine,
    Hanging,
    Pass,
    Receiver,
    file_with,
    in_thread,
    join,
    pipe_with,
    verified,
    wait_until,
)

WRITER = sample_backup(log_n=2)
MEMBERS = list(WRITER.members())
ALL_OK = {
    "work/private": "ok",
    "vault/private": "ok",
    "custom-template/root": "ok",
    "custom-template/private": "ok",
}
NOTES = WRITER.qubes[0].notes
FIREWALL = WRITER.qubes[0].firewall
LATE = [damage for damage in DAMAGES.values() if damage.scope == "qube"]


def check_order(run: Pass) -> None:
    """Every message may come where it came, and the last one says that it was the last."""
    end = m.broker_end()
    end.advance(m.Open(passphrase=SecretStr("x")))
    end.advance(m.Manifest(backup_id="b", format=4, compression_filter="gzip", qubes=()))
    end.advance(m.Start(mode="verify", keys=("vm10",)))
    for message in run.messages:
        end.advance(message)
    assert isinstance(run.messages[-1], m.Finished)


def expected_sha256(writer: BackupWriter) -> dict[str, str]:
    return {
        f"{qube.name}/{volume}": image.sha256()
        for qube in writer.qubes
        for volume, image in qube.volumes.items()
    }


# --- All is well -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", ["gnu", "pax", "none"])
@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_every_volume_is_verified_with_its_size_and_hash(compression: str, sparse: str) -> None:
    writer = sample_backup(compression, sparse, log_n=2)
    run = verified(writer.to_bytes())
    assert run.outcomes == ALL_OK
    assert {name: done.sha256 for name, done in run.volumes.items()} == expected_sha256(writer)
    assert run.volumes["work/private"].image_size == 1 << 20
    assert set(run.settings) == {"work", "vault", "scratch", "custom-template"}
    assert all(settings.error is None for settings in run.settings.values())
    assert run.warnings == []
    assert run.budget.used == 0
    check_order(run)


def test_every_volume_is_streamed_with_the_same_hash() -> None:
    with file_with(WRITER.to_bytes()) as descriptor:
        run = Pass(descriptor)
        receiver = Receiver(run.messages.append)
        run.start(mode="restore", receiver=receiver)
        run.finish()
    for thread in receiver.threads:
        join(thread)
    assert run.outcomes == ALL_OK
    by_key = {f"{done.key}.{done.volume}": done.sha256 for done in run.volumes.values()}
    assert receiver.sha256 == by_key
    assert set(by_key.values()) == set(expected_sha256(WRITER).values())
    check_order(run)


def test_settings_files_come_with_their_qube() -> None:
    run = verified(WRITER.to_bytes())
    settings = run.settings["work"]
    assert settings.firewall == ()
    assert settings.notes == "Keep the spare key in the blue box.\n"
    assert settings.appmenus == ("firefox.desktop",)
    assert run.settings["vault"].firewall is None


@pytest.mark.parametrize("mode", ["verify", "restore"])
def test_nothing_is_staged(mode: Literal["verify", "restore"]) -> None:
    """Invariant 6: from the first byte to the last, no file is opened for writing, and none is made."""
    watching, opened = True, list[object]()

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[2], int):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TMPFILE):
                opened.append(arguments[0])
        elif watching and event in ("os.mkdir", "os.rename", "os.symlink", "os.truncate", "tempfile.mkstemp"):
            opened.append(event)

    with file_with(WRITER.to_bytes()) as descriptor:
        sys.addaudithook(watch)
        run = Pass(descriptor)
        run.start(mode=mode, receiver=Receiver(run.messages.append))
        run.finish()
        assert run.outcomes == ALL_OK
        assert opened == []
        os.close(os.open(os.devnull, os.O_WRONLY))
        watching = False
    assert opened == [os.devnull], "the watch does not see what it is there for"


def test_a_qube_without_volumes_gets_its_settings_message() -> None:
    run = verified(WRITER.to_bytes(), ["scratch"])
    assert [type(message) for message in run.messages] == [m.QubeSettings, m.Finished]
    assert run.settings["scratch"].error is None


def test_the_home_of_dom0_is_one_opaque_volume() -> None:
    writer = replace(WRITER, qubes=WRITER.qubes[1:2], dom0_home=True)
    inner = b"".join(dict(writer.files())["dom0-home/user"])
    run = verified(writer.to_bytes(), ["dom0"])
    done = run.volumes["dom0/home"]
    assert done.outcome == "ok" and done.image_size == done.data_bytes == len(inner)
    assert done.sha256 == hashlib.sha256(inner).hexdigest()


def test_a_home_is_streamed_as_well() -> None:
    with file_with(replace(WRITER, qubes=(), dom0_home=True).to_bytes()) as descriptor:
        run = Pass(descriptor)
        receiver = Receiver(run.messages.append)
        run.start(mode="restore", receiver=receiver)
        run.finish()
    join(receiver.threads[0])
    assert receiver.sha256 == {"dom0.home": run.volumes["dom0/home"].sha256}


@pytest.mark.parametrize("name", ["gzip", "none", "zstd", "xz", "bzip2", "pigz", "sparse-map"])
def test_backups_that_the_stock_programs_wrote_are_verified(name: str) -> None:
    backup = shared_fixture(f"{name}.qbackup")
    facts = expectation(backup)
    with backup.open("rb") as file:
        run = Pass(file.fileno(), memory=2048 * MIB, passphrase=facts.passphrase)
        if max(request for request in _costs(backup)) > 14:
            pytest.skip("its keys cost seconds; the whole program is tested with it")
        run.start()
        run.finish()
    for volume, fact in facts.volumes.items():
        assert (run.volumes[volume].image_size, run.volumes[volume].sha256) == (fact.size, fact.sha256)


def _costs(backup: os.PathLike[str]) -> list[int]:
    with open(backup, "rb") as file:
        content = file.read()
    costs, place = [], -1
    while (place := content.find(b"scrypt\0", place + 1)) >= 0:
        costs.append(content[place + 7])
    return costs


# --- What is not selected -----------------------------------------------------------------------------


@pytest.mark.parametrize("opened", [file_with, pipe_with])
def test_what_is_not_selected_is_not_derived(opened: Callable[[bytes], AbstractContextManager[int]]) -> None:
    with opened(WRITER.to_bytes()) as descriptor:
        run = Pass(descriptor)
        run.start(["vault"])
        run.finish()
    assert run.outcomes == {"vault/private": "ok"}
    assert {name.rpartition(".")[0] for name in run.engine.members[2:]} == {"vm11/private.img"}
    assert isinstance(run.messages[-1], m.Finished)
    assert run.messages[-1].archive_bytes == len(WRITER.to_bytes())


@pytest.mark.parametrize("file", ["icon.png", "apps.templates/firefox.desktop", "empty", "volatile.img"])
def test_ignored_files_of_a_selected_qube_are_not_derived(file: str) -> None:
    broken = RawMember(f"vm10/{file}.000.enc", b"no container at all")
    run = verified(join_members([*MEMBERS[:3], broken, *MEMBERS[3:]]))
    assert run.outcomes == ALL_OK
    assert not any(file in member for member in run.engine.members)


@pytest.mark.parametrize("mode", ["verify", "restore"])
def test_a_root_that_nothing_promises_is_restored_with_its_standalone(
    mode: Literal["verify", "restore"],
) -> None:
    path = shared_fixture("hvm-root.qbackup")
    expected = expectation(path)
    with file_with(path.read_bytes()) as descriptor:
        run = Pass(descriptor, passphrase=expected.passphrase)
        run.start(mode=mode)
        run.finish()
    assert "win/root" in expected.volumes
    assert {name: done.sha256 for name, done in run.volumes.items()} == {
        name: volume.sha256 for name, volume in expected.volumes.items()
    }
    assert run.settings["win"].error is None
    check_order(run)


def unpromised(klass: VmClass) -> list[RawMember]:
    """A backup of one qube with a root that its qubes.xml does not promise."""
    images = {"root": sample_image(1 << 16, 1, 2), "private": sample_image(1 << 16, 1, 1)}
    template = None if klass == "StandaloneVM" else "fedora-41"
    promised = QubePlan("work", klass, volumes={"private": images["private"]}, template=template)
    lie = qubes_xml([promised])
    written = BackupWriter([replace(promised, volumes=images)], log_n=2)
    return list(replace(written, replacements=Replacements(qubes_xml=lie)).members())


def test_a_root_of_a_qube_whose_class_has_none_is_named_and_not_derived() -> None:
    run = verified(join_members(unpromised("AppVM")))
    assert run.outcomes == {"work/private": "ok"}
    assert [text for text in run.warnings if "also holds 'vm10/root.img', which no qube" in text]
    assert run.settings["work"].error is None
    assert not any("root.img" in member for member in run.engine.members)


def test_a_root_that_nothing_promises_and_that_is_broken_fails_its_qube() -> None:
    members = unpromised("StandaloneVM")
    for broken in (
        edited(members, "vm10/root.img.000.enc", lambda data: flip_bit(data, -1)),
        edited(members, "vm10/root.img.000.enc", lambda data: data[:100]),
    ):
        run = verified(join_members(broken))
        assert run.outcomes == {"work/private": "ok"}
        assert run.settings["work"].error is not None


def test_what_no_qube_claims_is_named_and_what_a_restore_ignores_is_not() -> None:
    writer = BackupWriter([sample_qube("work", 1 << 12, 1)], log_n=2, dom0_home=True)
    without_dom0 = replace(writer, replacements=Replacements(qubes_xml=qubes_xml(writer.qubes)))
    more = [RawMember(f"{name}.000.enc", bytes(200)) for name in ("vm99/private.img", "vm10/icon.png")]
    run = verified(join_members([*without_dom0.members(), *more]))
    assert run.outcomes == {"work/private": "ok"}
    assert run.warnings == [
        "the archive also holds 'dom0-home/user', 'vm99/private.img', which no qube in its list claims"
    ]


def late(file: str) -> tuple[bytes, bytes]:
    """A backup without this file of its first qube, and the file."""
    members = [member for member in MEMBERS if member.name.startswith(f"vm10/{file}")]
    return join_members([member for member in MEMBERS if member not in members]), join_members(members)


def after_the_closing(before: bytes, file: bytes) -> Pass:
    """A pass over both, the file coming when its qube is closed for certain."""
    reader, writer = os.pipe()
    with open(writer, "wb", buffering=0) as pipe:
        run = Pass(reader)
        feeder = in_thread(lambda: pipe.write(before))
        run.start()
        join(feeder)
        wait_until(lambda: "work" in run.settings)
        pipe.write(file)
    run.finish()
    os.close(reader)
    return run


def ahead_of_the_closing(before: bytes, file: bytes) -> Pass:
    """A pass over both, in which the intake has run ahead and does not know that the qube will be closed."""
    gate = threading.Event()

    def hold(request: KdfRequest) -> None:
        if b"vm10/private.img.000" in request.passphrase:
            gate.wait(PATIENCE_S)

    with file_with(before + file) as descriptor:
        run = Pass(descriptor, engine=Engine(hold), jobs=40)
        run.start()
        wait_until(lambda: run.source.position >= len(before))
        gate.set()
        run.finish()
    return run


@pytest.mark.parametrize("way", [after_the_closing, ahead_of_the_closing])
@pytest.mark.parametrize(("file", "matters"), [("notes", False), ("firewall", True)])
def test_a_file_after_the_close_of_its_qube_is_told_and_a_firewall_fails_the_qube(
    way: Callable[[bytes, bytes], Pass], file: str, matters: bool
) -> None:
    run = way(*late(file))
    assert run.outcomes == ALL_OK
    assert run.settings["work"].error is None and run.settings["work"].notes == (
        None if file == "notes" else NOTES
    )
    taken_back = [message for message in run.messages if isinstance(message, m.QubeIncomplete)]
    assert [
        (message.key, "firewall.xml stands behind" in message.error.reason) for message in taken_back
    ] == ([("vm10", True)] if matters else [])
    assert bool([text for text in run.warnings if "stands behind" in text]) != matters
    check_order(run)


def test_a_late_firewall_that_is_not_authentic_takes_no_qube_back() -> None:
    before, firewall = late("firewall")
    place = firewall.index(b"scrypt\0") + 200
    run = after_the_closing(before, flip_bit(firewall, place * 8))
    assert not [message for message in run.messages if isinstance(message, m.QubeIncomplete)]
    assert [text for text in run.warnings if text.startswith("firewall.xml stands behind")]


def test_a_firewall_that_stands_before_the_volumes_is_applied() -> None:
    firewall = [member for member in MEMBERS if member.name.startswith("vm10/firewall")]
    rest = [member for member in MEMBERS if member not in firewall]
    run = verified(join_members([*rest[:3], *firewall, *rest[3:]]))
    assert run.outcomes == ALL_OK
    assert run.settings["work"].firewall == () and run.settings["work"].error is None


# --- What is wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", LATE, ids=lambda damage: damage.name)
def test_every_damage_of_one_qube_fails_that_qube_and_no_other(damage: Damage) -> None:
    run = verified(damage.apply(WRITER))
    victim = WRITER.qubes[damage.victim].name
    victims = {WRITER.qubes[position].name for position in damage.victims}
    failed = {name: kind for name, kind in run.outcomes.items() if kind != "ok"}
    errors = [refused.error for refused in run.backup.content.refused]
    if victim in run.settings and (error := run.settings[victim].error) is not None:
        errors.append(error)
    kinds = {*failed.values(), *(error.kind for error in errors)}
    assert kinds and kinds <= damage.kinds | {"missing-volume"} and kinds & damage.kinds
    assert {name.partition("/")[0] for name in failed} <= {victim}
    assert all(settings.error is None for name, settings in run.settings.items() if name not in victims)
    survivors = {name for name in ALL_OK if name.partition("/")[0] != victim}
    assert survivors <= set(run.outcomes) <= set(ALL_OK)
    assert run.budget.used == 0
    check_order(run)


def test_an_error_says_which_chunk_of_which_volume_of_which_qube() -> None:
    members = edited(MEMBERS, "vm11/private.img.001.enc", lambda data: flip_bit(data, -1))
    error = verified(join_members(members)).volumes["vault/private"].error
    assert error is not None
    assert (error.qube, error.volume, error.chunk) == ("vault", "private", 1)


def test_an_error_in_a_settings_file_fails_its_qube_with_the_name_of_the_file() -> None:
    members = edited(MEMBERS, "vm10/firewall.xml.000.enc", lambda data: flip_bit(data, -1))
    run = verified(join_members(members))
    error = run.settings["work"].error
    assert error is not None
    assert (error.kind, error.qube, error.volume) == ("authentication-failed", "work", "firewall.xml")
    assert run.settings["work"].firewall is None and run.settings["work"].notes is None
    assert run.outcomes == ALL_OK


def two_volumes() -> BackupWriter:
    images = {"root": sample_image(1 << 19, 1, 5), "private": sample_image(1 << 17, 1, 6)}
    template = QubePlan("debian", "TemplateVM", volumes=images)
    return BackupWriter([template, sample_qube("vault", 1 << 16, 1, seed=7)], chunk_size=1 << 15, log_n=2)


def broken_root() -> bytes:
    members = edited(two_volumes().members(), "vm10/root.img.001.enc", lambda data: flip_bit(data, -1))
    return join_members(members)


def test_verify_goes_on_with_the_other_volumes_of_a_qube_that_failed() -> None:
    run = verified(broken_root())
    assert run.outcomes == {
        "debian/root": "authentication-failed",
        "debian/private": "ok",
        "vault/private": "ok",
    }


def test_restore_leaves_out_the_other_volumes_of_a_qube_that_failed() -> None:
    with file_with(broken_root()) as descriptor:
        run = Pass(descriptor)
        run.start(mode="restore", receiver=Receiver(run.messages.append))
        run.finish()
    assert run.outcomes == {
        "debian/root": "authentication-failed",
        "debian/private": "skipped",
        "vault/private": "ok",
    }
    assert run.volumes["debian/private"].outcome == "skipped"
    assert run.settings["debian"].error is not None
    assert run.settings["debian"].error.kind == "authentication-failed"
    check_order(run)


@pytest.mark.parametrize("mode", ["verify", "restore"])
def test_the_rest_of_a_file_that_failed_is_not_derived(
    mode: Literal["verify", "restore"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MAX_LOCATED", 4)
    count = len([member for member in two_volumes().members() if "root.img" in member.name])
    with file_with(broken_root()) as descriptor:
        run = Pass(descriptor, jobs=1)
        run.start(mode=mode, receiver=Receiver(run.messages.append))
        run.finish()
    # Up to the broken one, 2; those that the intake had taken before it was known, 4; and the one that it was
    # just taking.
    assert len([name for name in run.engine.members if "root.img" in name]) <= 7 < count


def test_a_chunk_that_does_not_fit_the_budget_fails_its_qube_only() -> None:
    members = edited(MEMBERS, "vm11/private.img.000.enc", lambda data: with_cost(data, 17))
    run = verified(join_members(members))
    assert run.outcomes == {**ALL_OK, "vault/private": "budget-too-small"}
    error = run.volumes["vault/private"].error
    assert error is not None and "--memory 129" in error.advice and error.chunk == 0


def test_a_chunk_that_claims_a_tebibyte_fails_its_qube_without_an_allocation() -> None:
    members = [
        replace(member, declared_size=1 << 40) if member.name == "vm11/private.img.000.enc" else member
        for member in MEMBERS
    ]
    run = verified(join_members(members))
    assert run.outcomes["work/private"] == "ok"
    assert run.outcomes["vault/private"] == "budget-too-small"
    assert run.outcomes["custom-template/root"] == "archive-truncated"


@pytest.mark.parametrize("place", ["in a chunk", "in a header"])
def test_a_cut_archive_keeps_the_qubes_before_the_cut_and_fails_the_rest(place: str) -> None:
    before = [member for member in MEMBERS if not member.name.startswith(("vm12/", "vm13/"))]
    cut = len(join_members(before)) + (3000 if place == "in a chunk" else 700)
    run = verified(join_members(MEMBERS)[:cut] if place == "in a header" else cut_template(3000))
    assert run.outcomes["work/private"] == "ok"
    assert (
        run.outcomes["custom-template/root"] == run.outcomes["custom-template/private"] == "archive-truncated"
    )
    assert run.settings["work"].error is None
    check_order(run)


def cut_template(size: int) -> bytes:
    """The backup up to `size` bytes into the first chunk of its last qube."""
    place = victim_chunks(WRITER, MEMBERS, -1)[0]
    return join_members(MEMBERS)[: len(join_members(MEMBERS[:place])) + size]


def test_a_cut_after_a_qubes_volumes_fails_it_for_its_firewall_may_have_followed() -> None:
    """Nothing promises firewall.xml: with it lost, the qube would come back more open than it was."""
    writer = BackupWriter([QubePlan("work", volumes={"private": sample_image(1 << 16, 1, 1)})], log_n=2)
    ignored = outer_member(RawMember("vm10/icon.png.000.enc", bytes(3000)))
    run = verified(writer.to_bytes() + ignored[:2500])
    assert run.outcomes == {"work/private": "ok"}
    error = run.settings["work"].error
    assert error is not None and error.kind == "archive-truncated"


CLOSED_QUBES = BackupWriter(
    [replace(sample_qube(name, 1 << 12, 1), firewall=FIREWALL) for name in ("work", "vault", "mail")], log_n=2
)
#: Three qubes of two members each, a volume and a firewall.
CLOSED_MEMBERS = list(CLOSED_QUBES.members())


def without_member(name: str) -> bytes:
    return join_members([member for member in CLOSED_MEMBERS if not member.name.startswith(name)])


@pytest.mark.parametrize("selected", [None, ["work"], ["work", "mail"]])
def test_a_cut_between_volume_and_firewall_shows_in_what_else_is_missing(selected: list[str] | None) -> None:
    """Selected or not: what the list promises and the archive lacks tells that it was cut."""
    run = verified(join_members(CLOSED_MEMBERS[:4]), selected)
    assert run.outcomes["work/private"] == "ok"
    error = run.settings["work"].error
    assert error is not None and error.kind == "archive-truncated"
    assert "holds nothing of vault and 1 more" in error.reason and "'vm10/private.img'" in error.reason


def test_a_cut_behind_a_complete_qube_costs_the_qube_of_the_last_file() -> None:
    run = verified(join_members(CLOSED_MEMBERS[:7]))
    errors = {name: settings.error and settings.error.kind for name, settings in run.settings.items()}
    assert errors == {"work": None, "vault": "archive-truncated", "mail": None}
    assert run.outcomes["mail/private"] == "missing-volume"


def test_a_cut_before_the_last_firewall_of_all_costs_its_qube() -> None:
    """It shows in the filling of the volume before; at the very end of that, nobody could know."""
    archive = join_members(CLOSED_MEMBERS)
    end = PLACES["vm12/firewall.xml.000.enc"]
    data_end = len(archive[:end].rstrip(b"\0"))
    assert end - data_end > 4096
    for size in range(-(-data_end // 512) * 512, end, 512):
        run = verified(archive[:size])
        assert lost(run) == {"mail"} and not open_qubes(run), size
    assert lost(verified(archive[:end])) == set()


def test_a_volume_that_is_missing_among_others_is_no_sign_of_a_cut() -> None:
    run = verified(without_member("vm11/private"))
    assert {name: settings.error for name, settings in run.settings.items()} == dict.fromkeys(run.settings)
    assert run.outcomes == {"work/private": "ok", "vault/private": "missing-volume", "mail/private": "ok"}


# --- Damage costs what it hit ------------------------------------------------------------------------------


def lost(run: Pass) -> set[str]:
    """The qubes that a broker would not call complete."""
    names = set(run.names.values())
    complete = {name for name, settings in run.settings.items() if settings.error is None}
    bad = {name.partition("/")[0] for name, outcome in run.outcomes.items() if outcome != "ok"}
    return (names - complete) | bad


#: Where the members stand that follow qubes.xml, by name.
PLACES = {
    member.name: len(join_members(CLOSED_MEMBERS[:position]))
    for position, member in enumerate(CLOSED_MEMBERS)
    if "/" in member.name
}


def open_qubes(run: Pass) -> set[str]:
    """Those that would come back complete, but without their firewall."""
    return {name for name, settings in run.settings.items() if settings.firewall is None} - lost(run)


@pytest.mark.parametrize("member", PLACES)
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_bit_of_a_header_costs_at_most_the_qube_that_the_header_belongs_to(member: str, block: int) -> None:
    """Every 127th bit of the pax header, its records and the header proper. `make torture` flips all."""
    archive = join_members(CLOSED_MEMBERS)
    owner = {"vm10": "work", "vm11": "vault", "vm12": "mail"}[member[:4]]
    for bit in range((PLACES[member] + 512 * block) * 8, (PLACES[member] + 512 * (block + 1)) * 8, 127):
        run = verified(flip_bit(archive, bit))
        assert lost(run) <= {owner}, bit
        assert not open_qubes(run), bit
        assert not lost(run) or [text for text in run.warnings if "the archive is damaged from byte" in text]


@pytest.mark.parametrize("member", PLACES)
@pytest.mark.parametrize("sectors", [1, 8, 20])
def test_zeroed_sectors_leave_no_qube_open_and_cost_those_beside_them(member: str, sectors: int) -> None:
    archive = bytearray(join_members(CLOSED_MEMBERS))
    start = PLACES[member]
    archive[start : start + 512 * sectors] = bytes(512 * sectors)
    run = verified(bytes(archive))
    number = int(member[2:4]) - 10
    names = ["work", "vault", "mail"]
    assert lost(run) <= set(names[max(0, number - 1) : number + 1])
    assert not open_qubes(run)
    assert bool(lost(run)) == (sectors > 1)  # one is the pax header, without which the file is still found


def test_a_bit_of_the_filling_between_two_files_costs_nothing_and_is_told() -> None:
    archive = join_members(CLOSED_MEMBERS)
    run = verified(flip_bit(archive, (PLACES["vm11/private.img.000.enc"] - 700) * 8 + 3))
    assert lost(run) == set()
    assert [text for text in run.warnings if "nothing is lost by it" in text]


def test_the_last_header_of_an_archive_costs_its_qube() -> None:
    archive = join_members(CLOSED_MEMBERS)
    run = verified(flip_bit(archive, (PLACES["vm12/firewall.xml.000.enc"] + 1024 + 130) * 8))
    assert lost(run) == {"mail"}
    error = run.settings["mail"].error
    assert error is not None and error.kind == "archive-damaged"


def test_a_root_that_nothing_promises_and_whose_header_is_damaged_fails_its_qube() -> None:
    members = unpromised("StandaloneVM")
    place = next(number for number, member in enumerate(members) if "root" in member.name)
    run = verified(flip_bit(join_members(members), (len(join_members(members[:place])) + 1024 + 130) * 8))
    assert run.outcomes == {"work/private": "ok"}
    assert lost(run) == {"work"}


@pytest.mark.parametrize("is_disk", [False, True], ids=["file", "disk"])
def test_a_sector_that_cannot_be_read_costs_the_qube_that_it_hit(
    monkeypatch: pytest.MonkeyPatch, is_disk: bool
) -> None:
    archive = join_members(CLOSED_MEMBERS)
    for member, place in PLACES.items():
        for offset in (0, 1536):
            bad = (place + offset) // 4096 * 4096
            for name in ("read", "readv", "preadv"):
                monkeypatch.setattr(os, name, failing_from(name, bad, bad + 4096))
            monkeypatch.setattr(os, "fstat", as_a_disk if is_disk else os.fstat)
            run = verified(archive)
            monkeypatch.undo()
            number = int(member[2:4]) - 10
            assert lost(run) <= {*["work", "vault", "mail"][max(0, number - 1) : number + 1]}
            assert not open_qubes(run)
            assert not lost(run) or "Input/output error" in str(run.messages)


def as_a_disk(fd: int, honest: Callable[[int], os.stat_result] = os.fstat) -> os.stat_result:
    """`os.fstat` of a block device that holds what the file `fd` holds: it tells no size."""
    found = honest(fd)
    status = list(found)
    status[stat.ST_MODE] = stat.S_IFBLK | stat.S_IMODE(found.st_mode)
    status[stat.ST_SIZE] = 0
    return os.stat_result(status)


def failing_from(name: str, start: int, end: int) -> Callable[..., object]:
    """`os.NAME`, which fails with EIO for the bytes from `start` to `end` of a file, as a disk would."""
    honest: Callable[..., object] = getattr(os, name)

    def call(fd: int, target: object, *rest: int) -> object:
        try:
            here = rest[0] if rest else os.lseek(fd, 0, os.SEEK_CUR)
        except OSError:
            return honest(fd, target, *rest)
        if start <= here < end:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if here < start:  # what comes before it is given
            if isinstance(target, int):
                return honest(fd, min(target, start - here))
            assert isinstance(target, list)
            return honest(fd, [target[0][: start - here]], *rest)
        return honest(fd, target, *rest)

    return call


def test_a_cut_among_the_files_of_others_leaves_a_complete_qube_alone() -> None:
    run = verified(cut_template(3000), ["work", "vault"])
    assert run.outcomes == {"work/private": "ok", "vault/private": "ok"}
    assert run.settings["vault"].error is None


def test_settings_that_no_message_can_hold_fail_their_qube_and_not_the_session() -> None:
    rule = "<rule><properties><property name='action'>accept</property>{}</properties></rule>"
    comment = "<property name='comment'>" + "c" * 40 + "</property>"
    firewall = f'<firewall version="2"><rules>{rule.format(comment) * 4096}</rules></firewall>'
    work = QubePlan(
        "work",
        volumes={"private": ImagePlan(512)},
        firewall=firewall,
        notes='"' * 250_000,
        appmenus=[f"{'a' * 240}{number}.desktop" for number in range(4000)],
    )
    run = verified(BackupWriter([work, sample_qube("vault", 512, 1)], log_n=2).to_bytes())
    error = run.settings["work"].error
    assert error is not None and error.kind == "bad-metadata", run.settings["work"].error
    assert run.settings["vault"].error is None
    for message in run.messages:
        m.encode_message(message)


def test_a_decompressor_that_stops_early_gives_all_its_memory_back() -> None:
    """The generator that was stopped holds a chunk; with a tight budget the intake waits for just that."""
    file = victim_file(WRITER)
    noise = random.Random(1).randbytes(1 << 18)
    writer = replace(WRITER, replacements=Replacements(compressed={file: [noise]}))
    archive = writer.to_bytes()
    second_head = archive.index(b"scrypt\0", archive.index(b"vm10/private.img.001")) + HEAD_SIZE

    def wait_for_the_intake(request: KdfRequest) -> None:
        if b"vm10/private.img.000" in request.passphrase:
            wait_until(lambda: run.source.position >= second_head)
            time.sleep(0.05)

    with file_with(archive) as descriptor:
        run = Pass(descriptor, memory=(1 << 16) + 128 + 8192, engine=Engine(wait_for_the_intake))
        run.start(["work", "vault"])
        run.finish()
    assert run.outcomes == {"work/private": "bad-compression", "vault/private": "ok"}


def test_a_mistake_of_ours_in_one_file_is_reported_for_that_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = read_image

    def fail_once(blocks: Iterator[bytes], name: str, size: int) -> Image:
        if name.startswith("vm10"):
            raise KeyError(WRITER.passphrase)
        return honest(blocks, name, size)

    monkeypatch.setattr(pipeline, "read_image", fail_once)
    run = verified(WRITER.to_bytes())
    assert run.outcomes == {**ALL_OK, "work/private": "error"}
    error = run.volumes["work/private"].error
    assert error is not None and "KeyError" in error.reason
    log = capsys.readouterr().err
    assert "fail_once" in log and WRITER.passphrase not in log + repr(run.messages)


def test_memory_that_the_system_refuses_fails_the_volume_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Poor(Engine):
        def derive(self, requests: "list[KdfRequest]") -> list[bytes]:  # type: ignore[override] # of a test
            if b"vm11" in requests[0].passphrase:
                raise MemoryError
            return super().derive(requests)

    run = verified(WRITER.to_bytes(), engine=Poor())
    assert run.outcomes == {**ALL_OK, "vault/private": "budget-too-small"}


# --- Order, and waiting ------------------------------------------------------------------------------------


def test_derivations_that_end_in_any_order_are_delivered_in_theirs() -> None:
    """Of the derivations that run, always the last one ends first."""
    lock, waiting, most = threading.Lock(), list[tuple[KdfRequest, threading.Event]](), 0

    def scramble(request: KdfRequest) -> None:
        nonlocal most
        mine = threading.Event()
        with lock:
            waiting.append((request, mine))
            most = max(most, len(waiting))
        if not mine.wait(PATIENCE_S):
            raise Hanging("a derivation was forgotten")

    stop = threading.Event()

    def release() -> None:
        source = random.Random(1)
        while not stop.wait(0.004):
            with lock:
                if waiting:
                    waiting.pop(-1 if source.random() < 0.7 else 0)[1].set()

    releaser = in_thread(release)
    run = verified(two_volumes().to_bytes(), engine=Engine(scramble), jobs=4)
    stop.set()
    join(releaser)
    assert most == 4
    assert {name: done.sha256 for name, done in run.volumes.items()} == expected_sha256(two_volumes())


def test_with_room_for_one_chunk_at_a_time_everything_still_comes_through() -> None:
    writer = two_volumes()
    run = verified(writer.to_bytes(), memory=(1 << 15) + 128 + 8192, jobs=4)
    assert {name: done.sha256 for name, done in run.volumes.items()} == expected_sha256(writer)


@pytest.mark.parametrize("opened", [file_with, pipe_with])
def test_a_broker_that_does_not_read_stops_the_intake(
    opened: Callable[[bytes], AbstractContextManager[int]],
) -> None:
    image = sample_image(20 * MIB, 1, 3)
    writer = BackupWriter(
        [QubePlan("work", volumes={"private": image})], compression="none", chunk_size=MIB, log_n=2
    )
    gate = threading.Event()
    with opened(writer.to_bytes()) as descriptor:
        run = Pass(descriptor, memory=4 * MIB, jobs=2)
        receiver = Receiver(run.messages.append, pause=lambda _: gate.wait(3 * PATIENCE_S))
        run.start(mode="restore", receiver=receiver)
        wait_until(lambda: receiver.connections)
        run.thread.join(0.3)
        # What is only located takes no memory, wherever in the archive it lies.
        assert opened is file_with or run.source.position < 8 * MIB
        assert run.budget.used <= 4 * MIB
        assert run.thread.is_alive()
        gate.set()
        run.finish()
    assert run.outcomes == {"work/private": "ok"}
    join(receiver.threads[0])
    assert list(receiver.sha256.values()) == [image.sha256()]


def test_the_progress_rises_to_the_whole_archive_and_the_whole_images() -> None:
    archive = WRITER.to_bytes()
    seen: list[m.Progress] = []

    def look() -> None:
        if hasattr(run, "pipeline"):
            seen.append(run.progress())

    with file_with(archive) as descriptor:
        run = Pass(descriptor, engine=Engine(lambda _: seen.append(run.progress()) if run.names else None))
        run.names = {}
        run.start()
        run.finish()
    seen.append(run.progress())
    assert [one.archive_bytes for one in seen] == sorted(one.archive_bytes for one in seen)
    done = [one.done or 0 for one in seen]
    assert done == sorted(done) and len(set(done)) > 3 and done[-1] == ALL
    assert seen[-1].archive_bytes == len(archive)
    assert seen[-1].image_bytes == sum(done.image_size for done in run.volumes.values())


# --- Being told to stop ------------------------------------------------------------------------------------


@contextlib.contextmanager
def streaming(pause: "threading.Event", archive: bytes) -> "Iterator[tuple[Pass, Receiver]]":
    with file_with(archive) as descriptor:
        run = Pass(descriptor)
        receiver = Receiver(run.messages.append, pause=lambda _: pause.wait(3 * PATIENCE_S))
        run.start(mode="restore", receiver=receiver)
        yield run, receiver
        run.finish()


def large_first() -> BackupWriter:
    first = QubePlan("work", volumes={"private": sample_image(4 * MIB, 1, 3)})
    return BackupWriter([first, sample_qube("vault", 1 << 16, 1, seed=9)], chunk_size=1 << 18, log_n=2)


def test_what_has_come_of_a_volume_counts_before_all_of_it_is_there() -> None:
    pause = threading.Event()
    with streaming(pause, large_first().to_bytes()) as (run, _):
        wait_until(lambda: run.pipeline._data() > 0, "data of the first volume")
        assert run.pipeline._data() < run.pipeline._expected and run.outcomes == {}
        pause.set()


def test_a_qube_can_be_skipped_while_its_volume_is_stuck() -> None:
    gate = threading.Event()
    with streaming(gate, large_first().to_bytes()) as (run, _):
        wait_until(lambda: run.messages)
        run.thread.join(0.05)
        run.selection.skip("vm10")
        wait_until(lambda: "work/private" in run.volumes)
        gate.set()
    assert run.outcomes == {"work/private": "skipped", "vault/private": "ok"}
    assert run.volumes["work/private"].outcome == "skipped"
    check_order(run)


def test_a_broker_that_hangs_up_gives_the_qube_up() -> None:
    def hang_up(connection: socket.socket) -> None:
        connection.close()

    with file_with(two_volumes().to_bytes()) as descriptor:
        run = Pass(descriptor)
        receiver = Receiver(run.messages.append)
        receiver._pause = lambda connection: hang_up(connection) if len(receiver.connections) == 1 else None
        run.start(mode="restore", receiver=receiver)
        run.finish()
    assert run.outcomes == {"debian/root": "skipped", "debian/private": "skipped", "vault/private": "ok"}


def test_a_qube_that_is_skipped_before_its_turn_costs_nothing_and_is_not_announced() -> None:
    gate = threading.Event()
    engine = Engine(lambda request: gate.wait(PATIENCE_S) if b"vm10" in request.passphrase else None)
    archive = WRITER.to_bytes()
    with file_with(archive) as descriptor:
        run = Pass(descriptor, engine=engine, jobs=1)
        run.start()
        # One waits at the gate, and the intake takes nothing any more.
        wait_until(lambda: len(engine.requests) == 3 and run.source.position == len(archive))
        run.selection.skip("vm11")
        gate.set()
        run.finish()
    assert run.outcomes == {**ALL_OK, "vault/private": "skipped"}
    assert not any("vm11" in member for member in engine.members)
    assert not [one for one in run.messages if isinstance(one, m.VolumeReady) and one.key == "vm11"]


def test_a_skip_that_races_with_the_announcement_is_answered_once() -> None:
    archive = two_volumes().to_bytes()
    source = random.Random(5)
    for _ in range(15):
        with file_with(archive) as descriptor:
            run = Pass(descriptor)
            run.start(mode="restore", receiver=Receiver(run.messages.append))
            run.thread.join(source.random() * 0.02)
            run.selection.skip("vm10")
            run.finish()
        assert run.outcomes["vault/private"] == "ok"
        assert set(run.outcomes) == {"debian/root", "debian/private", "vault/private"}
        assert set(run.outcomes.values()) <= {"ok", "skipped"}
        check_order(run)
        assert run.budget.used == 0


def test_a_hole_of_terabytes_can_be_skipped() -> None:
    giant = QubePlan("giant", volumes={"private": ImagePlan(1 << 43, [(0, b"x" * 512)])})
    archive = BackupWriter([giant, sample_qube("vault", 512, 1)], log_n=2).to_bytes()
    with file_with(archive) as descriptor:
        run = Pass(descriptor)
        run.start()
        wait_until(lambda: run.progress().image_bytes > 10 * MIB, "progress inside of a hole")
        run.selection.skip("vm10")
        run.finish()
    assert run.outcomes == {"giant/private": "skipped", "vault/private": "ok"}


@pytest.mark.parametrize("stage", ["deriving", "announcing", "sending", "hashing a hole", "waiting for room"])
def test_a_cancel_at_any_stage_ends_the_pass_quickly_and_frees_everything(stage: str) -> None:
    gate = threading.Event()
    hold = gate if stage in ("deriving", "waiting for room") else None
    first_chunk = b"vm10/private.img.000"
    engine = Engine(
        lambda request: hold.wait(PATIENCE_S) if hold and first_chunk in request.passphrase else None
    )
    writer = large_first()
    if stage == "hashing a hole":
        giant = QubePlan("giant", volumes={"private": ImagePlan(1 << 43, [(0, b"x" * 512)])})
        writer = replace(writer, qubes=[giant])
    with file_with(writer.to_bytes()) as descriptor:
        run = Pass(descriptor, engine=engine, memory=MIB)
        receiver = Receiver(run.messages.append, pause=lambda _: gate.wait(3 * PATIENCE_S))
        if stage == "announcing":
            never: Future[socket.socket] = Future()
            receiver.announce = lambda ready: never  # type: ignore[method-assign] # a broker that never calls
        run.start(mode="verify" if stage == "hashing a hole" else "restore", receiver=receiver)
        run.thread.join(0.1)
        assert run.thread.is_alive()
        emitted = len(run.messages)
        run.stop.say()
        run.scheduler.close()
        if hold is not None:
            hold.set()  # a derivation cannot be interrupted
        join(run.thread)
        wait_until(lambda: run.budget.used == 0, "the release of all memory")
        assert len(run.messages) == emitted
        gate.set()


def test_a_cancel_just_before_a_volume_is_offered_ends_the_pass_all_the_same() -> None:
    never: Future[socket.socket] = Future()

    def announce(ready: m.VolumeReady) -> "Future[socket.socket]":
        run.stop.say()
        return never

    with file_with(large_first().to_bytes()) as descriptor:
        run = Pass(descriptor)
        receiver = Receiver(run.messages.append)
        receiver.announce = announce  # type: ignore[method-assign] # a cancel at that moment
        run.start(mode="restore", receiver=receiver)
        run.finish()
    assert never.cancelled() and not run.messages


def test_a_cancel_while_the_archive_is_silent_is_seen_when_it_speaks_again() -> None:
    archive = large_first().to_bytes()
    reader, writer = os.pipe()
    feeder = in_thread(lambda: os.write(writer, archive[: len(archive) // 4]))
    run = Pass(reader)
    run.start()
    join(feeder)
    run.stop.say()
    os.close(writer)
    join(run.thread)
    run.scheduler.close()
    wait_until(lambda: run.budget.used == 0)
    assert not any(isinstance(message, m.Finished) for message in run.messages)
    os.close(reader)
