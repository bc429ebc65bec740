"""Who may call what, with which argument, on whom: before, during and after a restore.

The rules are the project's own, beside what a Qubes system allows and asks by itself; the qubes carry the
tags that they carry in each phase. Each line of the comparison in docs/threat-model.md has a test here.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.emulation.emulated import REPOSITORY, install_policy
from tests.emulation.policy import DOM0_UUID, Policy, Qube

WORKER, STORAGE, OTHER = "disp-restore-1234", "sys-usb", "personal"
QUBES: Mapping[str, Qube] = {
    "dom0": Qube("AdminVM"),
    WORKER: Qube("DispVM", default_dispvm="default-dvm"),
    STORAGE: Qube("AppVM"),
    "nas": Qube("AppVM"),  # another qube that holds backups
    OTHER: Qube("AppVM", default_dispvm="default-dvm"),
    "half": Qube("AppVM", tags={"backup-restore-in-progress", "restore-svc-unfinished"}),
    "default-dvm": Qube("AppVM", template_for_dispvms=True),
    "template": Qube("TemplateVM"),
    "sys-gui": Qube("AppVM"),
    "stock-mgmt": Qube("DispVM", tags={"backup-restore-mgmt"}),
    "stock-storage": Qube("AppVM", tags={"backup-restore-storage"}),
}
#: Tags in each phase. Before and after they are the same, which is the point.
DURING = {WORKER: {"restore-svc-worker"}, STORAGE: {"restore-svc-storage"}}
PHASES: Mapping[str, Mapping[str, set[str]]] = {"before": {}, "during": DURING, "after": {}}
#: All the ways to name a target.
TARGETS = (
    "dom0", "@adminvm", "@default", "@dispvm", "@dispvm:default-dvm", STORAGE, "nas", OTHER, "half",
    "template", WORKER, "stock-storage",
)  # fmt: skip
#: What stock rules allow or ask of any qube, or of the stock restore's; and what has no rule at all.
SERVICES = (
    "qubes.Filecopy", "qubes.VMShell", "qubes.VMExec", "qubes.OpenInVM", "qubes.OpenURL", "qubes.StartApp",
    "qubes.GetDate", "qubes.GetImageRGBA", "qubes.FeaturesRequest", "qubes.NotifyTools",
    "qubes.NotifyUpdates", "qubes.SyncAppMenus", "qubes.Notifications", "qubes.UpdatesProxy",
    "qubes.ConnectTCP", "qubes.GetRandomizedTime", "policy.RegisterArgument", "qubes.Restore",
    "qubes.RegisterBackupLocation",
    "qubes.Backup", "my.Own", "qubes.VMRootShell", "qubes.VMExecGUI", "qubes.ReceiveUpdates",
    "admin.vm.property.GetAll", "admin.property.GetAll", "whonix.SdwdateStatus", "whonix.NewStatus",
    "whonix.GatewayCommand",
)  # fmt: skip
#: What the stock paranoid mode grants its disposable: each with its argument and the target in that rule.
STOCK_GRANTS = (
    ("admin.vm.Create.AppVM", "template", "dom0"),
    ("admin.vm.Create.StandaloneVM", "template", "dom0"),
    ("admin.vm.Create.TemplateVM", "", "dom0"),
    ("admin.vm.List", "", "dom0"),
    ("admin.vm.List", "", OTHER),
    ("admin.vm.property.Get", "provides_network", OTHER),
    ("admin.vm.property.Get", "template_for_dispvms", OTHER),
    ("admin.vm.feature.Set", "gui", "half"),
    ("admin.vm.firewall.Set", "", "half"),
    ("admin.vm.property.Set", "netvm", "half"),
    ("admin.vm.property.Set", "kernelopts", "half"),
    ("admin.vm.tag.Set", "guivm-dom0", "half"),
    ("admin.vm.volume.Import", "private", "half"),
    ("admin.vm.volume.ImportWithSize", "private", "half"),
    ("admin.vm.volume.Info", "private", "half"),
    ("admin.vm.volume.List", "", "half"),
    ("admin.vm.volume.Set.revisions_to_keep", "private", "half"),
)
WORKER_SERVICES = ("restore.Session", "restore.Volume", "restore.Archive")
CLIENT_SERVICES = ("restore.Start", "restore.List", "restore.Verify")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp("policy")
    install_policy(folder / "policy.d")
    return Policy.load(folder / "policy.d")


@pytest.fixture(scope="module")
def generous(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The same, on a system where a later file allows everything to everybody."""
    folder = tmp_path_factory.mktemp("generous")
    install_policy(folder / "policy.d")
    (folder / "policy.d" / "32-generous.policy").write_text(
        "* * @anyvm @anyvm allow\n* * @anyvm @adminvm allow target=dom0\n"
    )
    return Policy.load(folder / "policy.d")


def action(policy: Policy, phase: str, source: str, target: str, service: str, argument: str = "") -> str:
    tags = PHASES[phase]
    qubes = {name: replace(qube, tags={*qube.tags, *tags.get(name, ())}) for name, qube in QUBES.items()}
    return policy.judge(source, target, service, argument, qubes).action


# --- The worker ----------------------------------------------------------------------------------


def test_during_a_restore_the_worker_may_fetch_the_backup_from_the_tagged_qube(policy: Policy) -> None:
    fetch = [action(policy, phase, WORKER, STORAGE, "qubes.RestoreById", "aB3x") for phase in PHASES]
    assert fetch == ["deny", "allow", "deny"]


@pytest.mark.parametrize("target", [target for target in TARGETS if target != STORAGE])
def test_the_worker_may_fetch_a_backup_from_nowhere_else(generous: Policy, target: str) -> None:
    assert action(generous, "during", WORKER, target, "qubes.RestoreById", "aB3x") == "deny"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("service", [*SERVICES, *WORKER_SERVICES, *CLIENT_SERVICES])
def test_the_worker_may_call_nothing_else_not_even_what_every_qube_may(
    generous: Policy, service: str, target: str
) -> None:
    for argument in ("", "aB3x", "vm10.private"):
        assert action(generous, "during", WORKER, target, service, argument) == "deny"


@pytest.mark.parametrize(("service", "argument", "target"), STOCK_GRANTS)
def test_what_the_stock_restore_grants_its_disposable_is_denied_to_the_worker(
    policy: Policy, service: str, argument: str, target: str
) -> None:
    assert action(policy, "during", "stock-mgmt", target, service, argument) == "allow"
    assert action(policy, "during", WORKER, target, service, argument) == "deny"


def test_a_worker_of_an_anonymous_template_gets_nothing_that_whonix_grants(policy: Policy) -> None:
    tags = {"anon-vm", "anon-gateway", "whonix-updatevm"}
    qubes = {**QUBES, "sys-whonix": Qube(tags={"anon-gateway"}), "anon": Qube(tags={"anon-vm"})}
    calls = (
        ("sys-whonix", "whonix.NewStatus", "status"),
        ("anon", "whonix.GatewayCommand", "restart"),
        ("anon", "whonix.SdwdateStatus", ""),
        ("@default", "qubes.UpdatesProxy", ""),
    )
    for worker_tag, action in ((set(), "allow"), ({"restore-svc-worker"}, "deny")):
        qubes[WORKER] = replace(QUBES[WORKER], tags=tags | worker_tag)
        for target, service, argument in calls:
            assert policy.judge(WORKER, target, service, argument, qubes).action == action


@pytest.mark.parametrize(("service", "argument", "target"), STOCK_GRANTS)
def test_the_stock_tag_beside_ours_gives_the_worker_nothing(
    policy: Policy, service: str, argument: str, target: str
) -> None:
    qubes = {name: replace(qube, tags={*qube.tags, *DURING.get(name, ())}) for name, qube in QUBES.items()}
    qubes[WORKER] = replace(qubes[WORKER], tags={"restore-svc-worker", "backup-restore-mgmt"})
    assert policy.judge(WORKER, target, service, argument, qubes).action == "deny"


def test_only_the_calls_of_every_start_of_a_qube_are_denied_without_a_notification(
    policy: Policy,
) -> None:
    muted = {
        (service, target)
        for service in [*SERVICES, *WORKER_SERVICES, "qubes.RestoreById", "qubes.WindowIconUpdater"]
        for target in ("dom0", "@default", OTHER)
        if is_muted(policy, service, target)
    }
    to_dom0 = ("FeaturesRequest", "NotifyTools", "NotifyUpdates", "SyncAppMenus", "WindowIconUpdater")
    assert muted == {
        *((f"qubes.{service}", "dom0") for service in to_dom0),
        *(("qubes.GetDate", target) for target in ("dom0", "@default", OTHER)),
        *(("qubes.UpdatesProxy", target) for target in ("@default", OTHER)),
    }


def is_muted(policy: Policy, service: str, target: str) -> bool:
    """Whether the worker's call is denied by a rule that notifies nobody."""
    qubes = {name: replace(qube, tags=DURING.get(name, ())) for name, qube in QUBES.items()}
    decision = policy.judge(WORKER, target, service, "", qubes)
    assert decision.action == "deny" and decision.rule is not None
    return decision.rule.parameters.get("notify") == "no"


def test_a_target_named_by_its_uuid_is_no_way_round(generous: Policy) -> None:
    qubes = {
        name: replace(qube, uuid=f"id-of-{name}", tags=DURING.get(name, ())) for name, qube in QUBES.items()
    }
    qubes["dom0"] = replace(qubes["dom0"], uuid=DOM0_UUID)
    for target in [DOM0_UUID, *(qube.uuid for qube in qubes.values())]:
        for service in ("qubes.RestoreById", "qubes.VMShell", "admin.vm.List"):
            decision = generous.judge(WORKER, f"uuid:{target}", service, "x", qubes)
            wanted = service == "qubes.RestoreById" and target == f"id-of-{STORAGE}"
            assert decision.action == ("allow" if wanted else "deny")


# --- The others ----------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("source", [OTHER, "nas", STORAGE, "half", "template", "sys-gui"])
def test_no_other_qube_may_fetch_the_backup(policy: Policy, phase: str, source: str) -> None:
    assert action(policy, phase, source, STORAGE, "qubes.RestoreById", "aB3x") == "deny"


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("source", [OTHER, STORAGE, "nas", "half", "sys-gui", "stock-mgmt", WORKER])
@pytest.mark.parametrize("service", WORKER_SERVICES)
def test_nobody_but_dom0_may_call_a_workers_services_anywhere(
    generous: Policy, phase: str, source: str, service: str
) -> None:
    for target in TARGETS:
        for argument in ("", "ready", "qfile", "vm10.private"):
            assert action(generous, phase, source, target, service, argument) == "deny"


@pytest.mark.parametrize("source", [OTHER, STORAGE, "nas", "half", "sys-gui", "stock-mgmt"])
@pytest.mark.parametrize("service", SERVICES)
def test_nobody_may_call_the_worker_while_the_restore_lasts(
    generous: Policy, source: str, service: str
) -> None:
    assert action(generous, "during", source, WORKER, service) == "deny"


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("service", CLIENT_SERVICES)
def test_nobody_may_ask_dom0_for_a_restore_as_installed(generous: Policy, phase: str, service: str) -> None:
    for source in set(QUBES) - {"dom0"}:
        for target in TARGETS:
            assert action(generous, phase, source, target, service) == "deny"


def test_what_an_administrator_grants_counts_and_nothing_beside_it(
    tmp_path: Path,
) -> None:
    install_policy(tmp_path / "policy.d")
    include = tmp_path / "policy.d" / "include" / "qubes-restore-svc"
    include.write_text(include.read_text() + "\nrestore.Verify * sys-gui @adminvm allow target=dom0\n")
    policy = Policy.load(tmp_path / "policy.d")
    assert action(policy, "before", "sys-gui", "dom0", "restore.Verify") == "allow"
    assert action(policy, "before", "sys-gui", "dom0", "restore.Start") == "deny"
    assert action(policy, "before", OTHER, "dom0", "restore.Verify") == "deny"
    assert action(policy, "during", WORKER, "dom0", "restore.Verify") == "deny"


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The policy with every example of the include file as a rule."""
    folder = tmp_path_factory.mktemp("examples")
    install_policy(folder / "policy.d")
    include = folder / "policy.d" / "include" / "qubes-restore-svc"
    lines = include.read_text().splitlines()
    include.write_text("\n".join(line[2:] if line.startswith("# restore") else line for line in lines) + "\n")
    return Policy.load(folder / "policy.d")


@pytest.mark.parametrize(
    ("source", "tags", "wanted"),
    [
        ("sys-gui", (), ("allow", "allow", "ask")),
        ("my-admin", (), ("allow", "allow", "allow")),
        (OTHER, ("may-verify",), ("allow", "allow", "deny")),
        (OTHER, (), ("deny", "deny", "deny")),
        (WORKER, ("restore-svc-worker", "may-verify"), ("deny", "deny", "deny")),
    ],
)
def test_the_examples_in_the_include_file_grant_what_they_say(
    examples: Policy, source: str, tags: tuple[str, ...], wanted: tuple[str, ...]
) -> None:
    qubes = {**QUBES, "my-admin": Qube("AppVM")}
    qubes[source] = replace(qubes[source], tags=tags)
    for service, action in zip(("restore.List", "restore.Verify", "restore.Start"), wanted, strict=True):
        decision = examples.judge(source, "dom0", service, "", qubes)
        assert (decision.action, service) == (action, service)
        assert decision.target == ("dom0" if action == "allow" else None)
        assert decision.choices == ({"dom0"} if action == "ask" else frozenset())
        assert examples.judge(source, STORAGE, service, "", qubes).action == "deny"


def test_other_qubes_keep_what_the_stock_rules_give_them(policy: Policy) -> None:
    for phase in PHASES:
        assert action(policy, phase, OTHER, "nas", "qubes.Filecopy") == "ask"
        assert action(policy, phase, OTHER, "@dispvm", "qubes.OpenURL") == "allow"
        assert action(policy, phase, "stock-mgmt", "stock-storage", "qubes.RestoreById", "x") == "allow"


def test_the_file_comes_after_the_administrators_rules_and_before_every_packages() -> None:
    (name,) = (path.name for path in (REPOSITORY / "rpc-policy").glob("*.policy"))
    assert sorted([name, "30-user.policy", "35-compat.policy", "85-admin-backup-restore.policy"]) == [
        "30-user.policy",
        name,
        "35-compat.policy",
        "85-admin-backup-restore.policy",
    ]
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-")


def test_a_stock_restore_from_the_same_qube_goes_on_beside_ours(policy: Policy) -> None:
    tags = {"restore-svc-storage", "backup-restore-storage"}
    qubes = {**QUBES, STORAGE: Qube("AppVM", tags=tags)}
    assert policy.judge("stock-mgmt", STORAGE, "qubes.RestoreById", "x", qubes).action == "allow"
    assert policy.judge(OTHER, STORAGE, "qubes.RestoreById", "x", qubes).action == "deny"


@pytest.mark.parametrize("service", WORKER_SERVICES)
def test_calls_reach_the_workers_socket_as_root(service: str) -> None:
    text = (REPOSITORY / "rpc-policy" / "rpc-config" / service).read_text()
    assert [line for line in text.splitlines() if not line.startswith("#")] == ["force-user = 'root'"]
