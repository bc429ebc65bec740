"""The proof that a qube is finished: what counts as one, for whom, and when it goes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import qubesadmin

from qubes_restore_svc.broker.interfaces import RestoredQube
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.qubes.host import QubesHost
from qubes_restore_svc.qubes.proof import FEATURE, Proof, ProvenVolume
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.wire.messages import FirewallRule
from qubes_restore_svc.wire.report import VolumeReport
from tests.emulation.qubesd import Qubesd
from tests.qubes.qubes_bed import NETVM, TEMPLATE, new_host, new_qube, settings

VOLUME = VolumeReport(name="private", outcome="ok", size=10, data_bytes=5, fsverity="f" * 64)
KEPT = VolumeReport(name="private", outcome="ok", size=10, fsverity="f" * 64)


def finish(host: QubesHost, name: str = "work", firewall: tuple[FirewallRule, ...] | None = None) -> str:
    """Restore a qube, as the broker does; the id of its backup."""
    with host.lock():
        qube = new_qube(name)
        transaction = host.begin(qube)
        sink = transaction.create_volume("private", 10)
        sink.write(0, memoryview(b"x" * 10))
        sink.finish(10)
        transaction.commit(settings(firewall=firewall), qube.definition, (VOLUME,))
    return qube.backup_id


def feature(name: str = "work") -> str:
    return str(qubesadmin.Qubes().domains[name].features[FEATURE])


def test_a_finished_qube_is_proven_with_all_that_came(host: QubesHost, qubesd: Qubesd) -> None:
    backup_id = finish(host, "job", (FirewallRule(action="drop"),))
    finish(host, "other")
    name_in_backup = new_qube("job").source.name
    assert host.restored_from(backup_id) == [
        RestoredQube("job", name_in_backup, (KEPT,), has_firewall=True),
        RestoredQube("other", new_qube("other").source.name, (KEPT,), has_firewall=False),
    ]
    assert host.restored_from("another") == []


def test_the_proof_fits_a_feature_of_qubesd() -> None:
    longest = Proof(
        backup_id="b" * 128,
        name="n" * 31,
        name_in_backup="n" * 31,
        client="c" * 31,
        firewall=False,
        volumes=(
            ProvenVolume(name="root", size=(1 << 63) - 1, sha256="f" * 64),
            ProvenVolume(name="private", size=(1 << 63) - 1, sha256="f" * 64),
        ),
    )
    assert longest.text.isascii() and longest.text.isprintable() and len(longest.text) < 1000
    assert Proof.read(longest.text) == longest


@pytest.mark.parametrize("client", ["dom0", "sys-gui", "other"])
def test_only_dom0_and_the_caller_itself_go_on_with_what_it_restored(
    client: str, tmp_path: Path, system: QubesSystem
) -> None:
    backup_id = finish(new_host(tmp_path, system, client="sys-gui"))
    found = new_host(tmp_path, system, client=client).restored_from(backup_id)
    assert [qube.name for qube in found] == ([] if client == "other" else ["work"])


def test_no_caller_goes_on_with_what_dom0_restored(
    tmp_path: Path, host: QubesHost, system: QubesSystem
) -> None:
    backup_id = finish(host)
    assert list(new_host(tmp_path, system, client="sys-gui").restored_from(backup_id)) == []


def _cloned(app: qubesadmin.Qubes) -> None:
    """What qvm-clone copies: a new qube has the tags and features of the old one, which is removed."""
    twin, work = app.add_new_vm("AppVM", "twin", "red", TEMPLATE), app.domains["work"]
    for tag in map(str, work.tags):
        if not tag.startswith("created-by-"):
            twin.tags.add(tag)
    for name in work.features:
        twin.features[name] = work.features[name]
    del app.domains["work"]


def _unfinished(app: qubesadmin.Qubes) -> None:
    app.domains["work"].tags.add("restore-svc-unfinished")


def _in_progress(app: qubesadmin.Qubes) -> None:
    app.domains["work"].tags.add("backup-restore-in-progress")


def _without_the_tag(app: qubesadmin.Qubes) -> None:
    tags = app.domains["work"].tags
    tags.discard(next(tag for tag in map(str, tags) if tag.startswith("restored-from-backup-")))


def _of_a_longer_id(app: qubesadmin.Qubes) -> None:
    """Two ids can have the same tag: it has fewer characters, and ends after 128."""
    features = app.domains["work"].features
    features[FEATURE] = features[FEATURE].replace('"backup_id":"', '"backup_id":"0')


def _with_more(app: qubesadmin.Qubes) -> None:
    features = app.domains["work"].features
    features[FEATURE] = features[FEATURE].replace("{", '{"more":1,', 1)


def _empty(app: qubesadmin.Qubes) -> None:
    app.domains["work"].features[FEATURE] = ""


def _no_json(app: qubesadmin.Qubes) -> None:
    app.domains["work"].features[FEATURE] = "1"


@pytest.mark.parametrize(
    "change",
    [_cloned, _unfinished, _in_progress, _without_the_tag, _of_a_longer_id, _with_more, _empty, _no_json],
)
def test_what_is_not_as_the_restore_left_it_is_not_proven(
    change: Callable[[qubesadmin.Qubes], None], host: QubesHost, qubesd: Qubesd
) -> None:
    backup_id = finish(host)
    change(qubesadmin.Qubes())
    assert host.restored_from(backup_id) == []


@pytest.mark.parametrize("from_before", [True, False])
def test_what_is_taken_back_loses_its_proof_and_only_what_is_new_its_netvm(
    from_before: bool, host: QubesHost, qubesd: Qubesd
) -> None:
    backup_id = finish(host)
    qubesadmin.Qubes().domains["work"].netvm = NETVM
    assert host.take_back("work", backup_id, from_before=from_before) is not from_before
    assert host.restored_from(backup_id) == []
    assert FEATURE not in qubesadmin.Qubes().domains["work"].features
    netvm = qubesd.system.domains["work"].properties["netvm"]
    assert netvm == (NETVM if from_before else None)


def test_a_proof_goes_although_the_netvm_cannot_be_taken_away(host: QubesHost, qubesd: Qubesd) -> None:
    backup_id = finish(host)
    qubesd.fail("admin.vm.property.Set+netvm", message="no such luck")
    with pytest.raises(HostFailed, match="no such luck"):
        host.take_back("work", backup_id, from_before=False)
    assert host.restored_from(backup_id) == []


def test_a_proof_that_cannot_be_set_is_told_and_the_qube_is_there(host: QubesHost, qubesd: Qubesd) -> None:
    qubesd.fail(f"admin.vm.feature.Set+{FEATURE}", message="no such luck")
    with host.lock():
        qube = new_qube("work")
        transaction = host.begin(qube)
        remarks = transaction.commit(settings(), qube.definition, ())
    assert any(FEATURE in remark for remark in remarks)
    assert not qubesd.tags("work") & {"backup-restore-in-progress", "restore-svc-unfinished"}
