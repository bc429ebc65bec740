"""A GUI domain with the grant has dom0 restore, verify and list, with what dom0 itself would make of it."""

from pathlib import Path

import pytest

from qubes_restore_svc.qubes.proof import FEATURE
from tests.emulation.remote_bench import (
    GUI,
    IMAGE,
    LIST,
    PASSPHRASE,
    START,
    STORAGE,
    VERIFY,
    Json,
    RemoteBench,
    open_message,
    open_remote,
    two_qubes,
)
from tests.emulation.snapshot import Snapshot
from tests.support.backup_writer import BackupWriter, QubePlan


@pytest.fixture(scope="module")
def backup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qubes with all kinds of settings, one with a name that is taken, and dom0's home."""
    qubes = [
        QubePlan("mine", "TemplateVM", volumes={"root": IMAGE, "private": IMAGE}, template=None),
        QubePlan(
            "work",
            volumes={"private": IMAGE},
            template="mine",
            label="blue",
            netvm="",
            properties={"memory": "800", "vcpus": "2", "autostart": "True", "kernelopts": "init=/bin/sh"},
            features={"menu-items": "firefox.desktop", "tag-created-vm-with": "evil"},
            tags=["guivm-dom0", "backup-restore-mgmt", "own"],
            notes="mine",
        ),
        QubePlan("personal", volumes={"private": IMAGE}, template="mine"),
    ]
    path = tmp_path_factory.mktemp("backup") / "backup"
    BackupWriter(qubes, log_n=4, chunk_size=1 << 18, compression="none", dom0_home=True).write(path)
    return path


CHOICE: Json = {"conflicts": "rename", "exclude": ["dom0"]}
WORDS = ("--rename-conflicting", "-x", "dom0")
RESTORED = {"mine/root", "mine/private", "work/private", "personal-1/private"}


@pytest.fixture(scope="module")
def by_dom0(tmp_path_factory: pytest.TempPathFactory, backup: Path) -> Snapshot:
    """The state of such a system after dom0's own command has restored the backup from the GUI domain."""
    with open_remote(tmp_path_factory.mktemp("dom0")) as bench:
        path = bench.put(backup)
        bench.dom0.restore(["-d", GUI, path, *WORDS], PASSPHRASE)
        Path(path).unlink()
        return bench.snapshot()


@pytest.mark.parametrize("place", [GUI, STORAGE])
def test_a_restore_for_a_gui_domain_makes_what_one_in_dom0_makes(
    backup: Path, by_dom0: Snapshot, bench: RemoteBench, place: str
) -> None:
    bench.grant(START)
    if place != GUI:
        bench.configure(f"storage: [{place}]")
    path = bench.put(backup, place)
    location = {"text": path} if place == GUI else {"text": path, "qube": place}
    client = bench.client(open_message(backup, location=location, choice=CHOICE))
    client.until("plan")
    client.say("confirm")
    events = client.rest()
    assert {event["name"] for event in events if event["event"] == "volume"} == RESTORED
    report = events[-1]["report"]
    assert (report["status"], report["error"]) == (0, None)
    digests = {volume["fsverity"] for qube in report["qubes"] for volume in qube["volumes"]}
    assert digests == {IMAGE.fsverity()}
    for volume in RESTORED:
        assert bench.dom0.sha256(volume) == (IMAGE.size, IMAGE.sha256())
    Path(path).unlink()
    for name in {volume.split("/")[0] for volume in RESTORED}:
        # What proves that a qube is finished says for whom it was restored, and nothing else of it differs.
        features = bench.qubes.app().domains[name].features
        assert f'"client":"{GUI}"' in features[FEATURE]
        features[FEATURE] = features[FEATURE].replace(GUI, "dom0")
    bench.check_as_before(by_dom0)
    called = {
        (call.source.rstrip("-0123456789"), call.target, call.service, call.decision)
        for call in bench.qubes.switchboard.calls
        if call.source != "dom0"
    }
    assert called == {
        (GUI, "dom0", START, "allow"),
        ("disp-restore", place, "qubes.RestoreById", "allow"),
    }


def test_a_verification_for_a_gui_domain_reads_everything_and_changes_nothing(
    bench: RemoteBench, backup: Path
) -> None:
    bench.grant(VERIFY)
    request = open_message(backup, "verify", location={"text": bench.put(backup)})
    before = bench.snapshot()
    client = bench.client(request)
    client.until("plan")
    client.say("confirm")
    report = client.rest()[-1]["report"]
    assert (report["mode"], report["status"]) == ("verify", 0)
    verified = {qube["name"]: qube["outcome"] for qube in report["qubes"]}
    assert verified == dict.fromkeys(("mine", "work", "personal", "dom0"), "verified")
    volumes = [volume for qube in report["qubes"] for volume in qube["volumes"] if volume["name"] != "home"]
    assert {volume["fsverity"] for volume in volumes} == {IMAGE.fsverity()}
    assert {call.service for call in bench.qubes.switchboard.calls if call.target == "dom0"} == {VERIFY}
    bench.check_as_before(before)


def test_a_list_shows_what_is_in_the_backup_and_leaves_nothing_running(
    bench: RemoteBench, backup: Path
) -> None:
    bench.grant(LIST)
    request = open_message(backup, "list", location={"text": bench.put(backup)})
    before = bench.snapshot()
    (event,) = bench.client(request).rest()
    listed = {qube["name"]: (qube["class"], qube["label"]) for qube in event["plan"]["qubes"]}
    assert {name: klass for name, (klass, _) in listed.items()} == {
        "mine": "TemplateVM", "work": "AppVM", "personal": "AppVM", "dom0": "AdminVM",
    }  # fmt: skip
    assert listed["work"] == ("AppVM", "blue")
    bench.check_as_before(before)
    assert list((bench.folder / "reports").iterdir()) == []


def test_another_choice_is_another_plan_and_only_that_is_carried_out(
    bench: RemoteBench, tmp_path: Path
) -> None:
    bench.grant(START)
    two_qubes().write(tmp_path / "two")
    path = bench.put(tmp_path / "two")
    before = bench.snapshot()
    call = bench.call()
    call.say(open_message(tmp_path, location={"text": path}))
    assert [qube.decision for qube in call.plan().qubes] == ["take", "take"]
    call.say({"type": "choose", "choice": {"names": ["second"]}})
    plan = call.plan()
    assert [qube.decision for qube in plan.qubes] == ["leave-out", "take"]
    call.say({"type": "confirm", "plan": plan.number})
    assert call.report().status == 0
    assert bench.new_qubes(before) == {"second"}
    bench.remove("second")
    bench.check_as_before(before)


def test_a_caller_goes_on_with_what_was_restored_for_it_and_with_nothing_else(
    bench: RemoteBench, backup: Path
) -> None:
    bench.grant(START)
    path = bench.put(backup)
    bench.dom0.restore(["-d", GUI, path, "mine"], PASSPHRASE)

    def restored(names: list[str]) -> Json:
        choice: Json = {**CHOICE, "names": names, "resume": True}
        client = bench.client(open_message(backup, location={"text": path}, choice=choice))
        client.until("plan")
        client.say("confirm")
        report = client.rest()[-1]["report"]
        return {qube["name"]: qube["outcome"] for qube in report["qubes"] if qube["name"] != "dom0"}

    assert restored(["personal"])["personal-1"] == "restored"
    outcomes = restored(["personal", "mine"])
    assert outcomes["personal-1"] == "already restored"
    # The one of dom0 is in the way as any qube is, and so this one gets a number.
    assert outcomes["mine-1"] == "restored"
