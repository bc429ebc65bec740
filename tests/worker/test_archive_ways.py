"""Whichever way the archive comes by: the same manifest, the same volumes, the same errors."""

import pytest

from ..support.backup_writer import BackupWriter
from ..support.damage import DAMAGES, sample_backup
from ..support.fixtures import expectation, shared_fixture
from .support import MIB
from .ways import ARCHIVE, NEW_WAYS, WRITER, MakeWay, run

FIXTURES = ("bzip2", "gzip", "none", "pigz", "sparse-map", "xz", "zstd", "format3", "format3-sha1-plain")


@pytest.mark.parametrize("fixture", FIXTURES)
@pytest.mark.parametrize("name", NEW_WAYS)
async def test_recorded_backups_come_bit_for_bit_by_every_way(
    name: str, fixture: str, make_way: MakeWay
) -> None:
    path = shared_fixture(f"{fixture}.qbackup")
    expected = expectation(path)
    way = make_way(name, path.read_bytes())
    outcome = await run(way, mode="restore", passphrase=expected.passphrase, memory=256 * MIB)
    assert outcome.manifest is not None and outcome.finished
    names = {qube.key: qube.name for qube in outcome.manifest.qubes}
    received = {}
    for argument, sha256 in outcome.received.items():
        key, volume = argument.split(".")
        received[f"{names[key]}/{volume}"] = sha256
    received.pop("dom0/home", None)  # not among what is expected
    assert received == {name: volume.sha256 for name, volume in expected.volumes.items()}
    assert set(outcome.kinds.values()) == {"ok"}
    assert outcome.warnings == []
    assert outcome == await run(
        make_way("passed", path.read_bytes()),
        mode="restore",
        passphrase=expected.passphrase,
        memory=256 * MIB,
    )


@pytest.mark.parametrize("fixture", ["gzip", "format3"])
@pytest.mark.parametrize("name", ["passed", *NEW_WAYS])
async def test_a_wrong_passphrase_is_followed_by_another_while_the_backup_stays_open(
    name: str, fixture: str, make_way: MakeWay
) -> None:
    path = shared_fixture(f"{fixture}.qbackup")
    passphrase, archive = expectation(path).passphrase, path.read_bytes()
    right = await run(make_way("passed", archive), passphrase=passphrase, memory=256 * MIB)
    way = make_way(name, archive)
    assert await run(way, passphrase=passphrase, memory=256 * MIB, wrong=["no", "neither"]) == right
    assert right.finished and set(right.kinds.values()) == {"ok"}


@pytest.mark.parametrize("name", NEW_WAYS)
async def test_a_backup_with_every_kind_of_qube_and_dom0s_home_comes_by_every_way(
    name: str, make_way: MakeWay
) -> None:
    archive = sample_backup(log_n=2)
    archive = BackupWriter(archive.qubes, log_n=2, chunk_size=archive.chunk_size, dom0_home=True)
    outcome = await run(make_way(name, archive.to_bytes()))
    assert set(outcome.kinds.values()) == {"ok"} and "dom0.home" in outcome.kinds
    assert outcome.settings["vm10"].notes is not None and outcome.settings["vm10"].firewall is not None
    assert outcome == await run(make_way("passed", archive.to_bytes()))


#: Damage to the tar around the members, which the storage VM's own program reads: it passes over what it does
#: not understand, or gives up there. What reaches the worker is what of the backup is left.
HIDDEN = frozenset({
    "empty-file", "bit-flipped-in-a-tar-header", "member-with-dotdot", "member-with-an-absolute-name",
    "member-without-a-name", "member-with-control-characters", "member-with-a-very-long-name",
    "member-that-is-no-chunk", "symbolic-link", "hard-link", "character-device", "block-device", "directory",
    "pipe", "sparse-member", "global-pax-header", "gnu-long-name", "member-of-4-exbibytes",
    "member-of-negative-size", "member-with-a-negative-pax-size",
})  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_backup_has_the_same_outcome_in_two_passes(damage: str, make_way: MakeWay) -> None:
    archive = DAMAGES[damage].apply(WRITER)
    outcome = await run(make_way("conversed", archive))
    if damage not in HIDDEN:
        assert outcome.summary == (await run(make_way("passed", archive))).summary
        return
    sound = (await run(make_way("passed", ARCHIVE))).volumes
    assert outcome.failed is not None or set(outcome.volumes) == set(sound)
    for name, done in outcome.volumes.items():
        assert done.outcome == "failed" or done.fsverity == sound[name].fsverity


@pytest.mark.parametrize("name", ["conversed", "fetched"])
async def test_a_storage_qube_that_stops_at_damage_is_told_of(name: str, make_way: MakeWay) -> None:
    outcome = await run(make_way(name, DAMAGES["bit-flipped-in-a-tar-header"].apply(WRITER)))
    assert set(outcome.kinds.values()) == {"missing-volume"}
    assert [text for text in outcome.warnings if "the file itself may hold more" in text]
    for done in outcome.volumes.values():
        assert done.error is not None and "stops reading at damage" in done.error.advice
    sound = await run(make_way(name, ARCHIVE))
    assert not [text for text in sound.warnings if "the file itself" in text]


@pytest.mark.parametrize(
    "damage",
    ["cut-off-in-the-metadata", "cut-off-in-the-last-chunk", "cut-off-between-chunks", "missing-volume"],
)
async def test_an_archive_that_ends_early_has_the_same_outcome_if_it_is_fetched(
    damage: str, make_way: MakeWay
) -> None:
    archive = DAMAGES[damage].apply(WRITER)
    assert (await run(make_way("fetched", archive))).summary == (
        await run(make_way("passed", archive))
    ).summary
