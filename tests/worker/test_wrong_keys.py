"""A key that does not fit is derived once more before the backup is blamed, which may be right."""

import random
import time
from collections.abc import Callable, Sequence

import pytest

from qubes_restore_svc.kdf.engine import MAX_WORK, KdfParameters, KdfRequest
from qubes_restore_svc.wire import messages as m

from ..support.backup_writer import BackupWriter, ImagePlan, QubePlan, join_members
from ..support.damage import edited, flip_bit, sample_backup, with_cost
from .support import Engine, Pass, file_with, verified

WRITER = sample_backup(log_n=2)
ARCHIVE = WRITER.to_bytes()
MEMBERS = [member.name.removesuffix(".enc") for member in WRITER.members() if member.name.endswith(".enc")]
VICTIM = "vm10/private.img.001"


class Faulty(Engine):
    """An engine in which one bit of a key is wrong where `fault` says so of a member; `memory` in bytes."""

    def __init__(self, fault: Callable[[str], bool], memory: int = 0) -> None:
        super().__init__()
        self._fault = fault
        self._memory = memory
        self.faults: list[str] = []

    def memory(self, parameters: KdfParameters, stride: int = 1) -> int:
        return self._memory or super().memory(parameters, stride)

    def derive(self, requests: Sequence[KdfRequest]) -> list[bytes]:
        (key,) = super().derive(requests)
        member = requests[0].passphrase.decode().split("!")[-2]
        if not self._fault(member):
            return [key]
        self.faults.append(member)
        bit = len(self.faults)  # another one each time
        return [key[:40] + bytes([key[40] ^ bit]) + key[41:]]


def once(member: str) -> Callable[[str], bool]:
    """Wrong with the first key of this member."""
    left = [member]

    def fault(now: str) -> bool:
        if now in left:
            left.remove(now)
            return True
        return False

    return fault


def test_there_are_chunks_to_be_wrong_about() -> None:
    assert {VICTIM, "qubes.xml.000"} <= set(MEMBERS)


@pytest.mark.parametrize("seed", range(3))
def test_an_engine_that_is_wrong_at_random_costs_no_volume_and_is_named(seed: int) -> None:
    dice = random.Random(seed)
    engine, second = Faulty(lambda _: dice.random() < 1 / 3), Engine()
    run = verified(ARCHIVE, engine=engine, second=second, jobs=1)
    assert set(run.outcomes.values()) == {"ok"}
    assert run.outcomes == verified(ARCHIVE).outcomes
    assert len(engine.faults) > 2
    assert sorted(second.members) == sorted(engine.faults)
    said = run.remarks + run.warnings
    assert len(said) == len(engine.faults)
    assert all("wrong from OpenSSL" in text and "this computer may be faulty" in text for text in said)


@pytest.mark.parametrize(
    ("member", "place"),
    [
        ("backup-header", "the key of the header came"),
        ("qubes.xml.000", "qubes.xml: the key of chunk 0 came"),
        (VICTIM, "private: the key of chunk 1 came"),
    ],
)
def test_what_was_wrong_is_told_with_its_place(member: str, place: str) -> None:
    run = verified(ARCHIVE, engine=Faulty(once(member)))
    assert set(run.outcomes.values()) == {"ok"}
    (text,) = run.remarks + run.warnings
    assert place in text
    keys = [message.key for message in run.messages if isinstance(message, m.Log)]
    assert keys == (["vm10"] if member == VICTIM else [])


def test_without_memory_for_the_second_engine_the_first_one_is_asked_again() -> None:
    engine, second = Faulty(once(VICTIM)), Faulty(lambda _: False, memory=1 << 40)
    run = verified(ARCHIVE, engine=engine, second=second)
    assert set(run.outcomes.values()) == {"ok"}
    assert engine.members.count(VICTIM) == 2
    assert second.requests == []
    assert ", once more:" in run.warnings[0]


def test_two_wrong_keys_that_differ_are_not_the_backups_fault() -> None:
    wrong: Callable[[str], bool] = lambda member: member == VICTIM  # noqa: E731
    second = Faulty(wrong)
    second.faults.append("so that it is another bit")
    run = verified(ARCHIVE, engine=Faulty(wrong), second=second)
    assert run.outcomes["work/private"] == "faulty-machine"
    assert set(run.outcomes.values()) == {"faulty-machine", "ok"}


@pytest.mark.parametrize(("bit", "again"), [(8 * 70, [VICTIM]), (8 * 100, []), (-1, [])])
def test_damage_is_derived_again_only_where_the_key_does_not_fit(bit: int, again: list[str]) -> None:
    members = edited(WRITER.members(), f"{VICTIM}.enc", lambda data: flip_bit(data, bit))
    second = Engine()
    run = verified(join_members(members), second=second)
    assert run.outcomes["work/private"] == "authentication-failed"
    assert second.members == again
    assert run.warnings == []


def test_an_archive_of_forged_chunks_costs_one_more_key_a_volume() -> None:
    members = list(WRITER.members())
    for name in {member.name for member in members if "/" in member.name}:
        members = edited(members, name, lambda data: flip_bit(data, 8 * 70))
    second = Engine()
    with file_with(join_members(members)) as descriptor:
        run = Pass(descriptor, second=second)
        run.start()
        run.finish()
    assert set(run.outcomes.values()) == {"authentication-failed"}
    files = {name.rpartition(".")[0] for name in MEMBERS if "/" in name}
    assert len(second.requests) <= len(files)


class Pretending(Engine):
    """Takes a moment for dear derivations, whose keys fit nothing. `work` is what was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.work = 0

    def derive(self, requests: Sequence[KdfRequest]) -> list[bytes]:
        (request,) = requests
        self.work += request.parameters.work
        if request.parameters.log_n <= 20:
            return super().derive(requests)
        time.sleep(0.02)  # long enough for the pipeline to look at the key before
        return [bytes(64)]


@pytest.mark.parametrize("log_n", [23, 24])
def test_forged_heads_of_every_file_cost_no_more_than_a_few_of_them(log_n: int) -> None:
    honest, volumes = 10, 60
    image = ImagePlan(1 << 16, ((0, b"data"),))
    qubes = [QubePlan(f"work{number}", volumes={"private": image}) for number in range(volumes)]
    writer = BackupWriter(qubes, compression="none", log_n=4)
    members = list(writer.members())
    images = [member.name for member in members if "private.img" in member.name]
    for name in images[:honest] + images[honest + 1 : -1]:
        members = edited(members, name, lambda data: with_cost(data, log_n=log_n, r=8))
    engine, second = Pretending(), Pretending()
    with file_with(join_members(members)) as descriptor:
        run = Pass(descriptor, memory=1 << 40, engine=engine, second=second, jobs=1)
        run.start()
        run.finish()
    assert set(run.outcomes.values()) == {"ok", "authentication-failed", "excessive-cost"}
    assert list(run.outcomes.values()).count("ok") == 2
    assert engine.work + second.work < 9 * MAX_WORK
