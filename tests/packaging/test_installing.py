"""Installing, upgrading and removing, on a scratch system: what scriptlets do, and what is left."""

from pathlib import Path

import pytest

from qubes_restore_svc.wire import qrexec_call
from tests.packaging.conftest import Packages
from tests.packaging.packages import Package, newer
from tests.packaging.scratch_system import ScratchSystem, cannot_become_root

LINKS = {
    "usr/local/bin/qvm-backup-restore": "/usr/libexec/qubes-restore-svc/qvm-backup-restore",
    "usr/local/share/man/man1/qvm-backup-restore.1.gz":
        "/usr/share/qubes-restore-svc/man/man1/qvm-backup-restore.1.gz",
    "usr/local/share/bash-completion/completions/qvm-backup-restore":
        "/usr/share/qubes-restore-svc/completion/qvm-backup-restore.bash",
    "usr/local/share/zsh/site-functions/_qvm-backup-restore":
        "/usr/share/qubes-restore-svc/completion/_qvm-backup-restore",
    "usr/local/share/fish/vendor_completions.d/qvm-backup-restore.fish":
        "/usr/share/qubes-restore-svc/completion/qvm-backup-restore.fish",
}  # fmt: skip
COMMAND = "usr/local/bin/qvm-backup-restore"
HOOK = "/etc/qubes/post-install.d/20-qubes-restore-svc.sh"
ANNOUNCED = [
    f"qvm-features-request supported-rpc.{name}=1"
    for name in (qrexec_call.SESSION, qrexec_call.VOLUME, qrexec_call.ARCHIVE)
]


@pytest.fixture
def system(tmp_path: Path) -> ScratchSystem:
    if cannot_become_root():
        pytest.skip("neither root nor a namespace in which to be root")
    system = ScratchSystem(tmp_path / "system", recorded=("systemctl", "qvm-features-request", "python3"))
    for folder in ("etc/qubes/policy.d/include", "etc/qubes/rpc-config", "etc/qubes/post-install.d",
                   "etc/qubes-rpc", "usr/lib/systemd/system", "usr/lib/systemd/system-preset",
                   "usr/lib/systemd/user",
                   "usr/lib/tmpfiles.d", "usr/libexec", "usr/share/applications", "usr/share/doc",
                   "usr/share/licenses", "usr/share/man/man1", "usr/share/zsh/site-functions",
                   "usr/share/bash-completion/completions", "usr/share/fish/vendor_completions.d",
                   "usr/lib/python3.11/site-packages", "usr/lib/python3/dist-packages",
                   "usr/local/bin", "usr/local/share/man/man1", "usr/local/share/zsh/site-functions",
                   "usr/local/share/fish/vendor_completions.d",
                   "usr/local/share/bash-completion/completions"):  # fmt: skip
        (system.root / folder).mkdir(parents=True, exist_ok=True)
    return system


# --- dom0 ----------------------------------------------------------------------------------------


def in_dom0(packages: Packages) -> list[Package]:
    """What dom0 gets, in an order in which it can be installed."""
    return [packages[name] for name in ("common", "tools", "manager", "dom0")]


def test_removing_from_dom0_leaves_nothing(system: ScratchSystem, rpms: Packages) -> None:
    before = system.files()
    system.install(*in_dom0(rpms))
    assert system.files() > before
    system.remove(*reversed(in_dom0(rpms)))
    assert system.files() == before


def test_an_upgrade_keeps_link_and_configuration(system: ScratchSystem, rpms: Packages) -> None:
    system.install(*in_dom0(rpms))
    kept = {
        "etc/qubes-restore-svc/config.yaml": "mine",
        "etc/qubes/policy.d/include/qubes-restore-svc": "my rule",
    }
    for name, text in kept.items():
        (system.root / name).write_text(text)
    before = system.files()
    system.reinstall(rpms["dom0"], rpms["tools"])
    assert system.files() == before
    assert {name: (system.root / name).read_text() for name in kept} == kept
    assert str((system.root / COMMAND).readlink()) == LINKS[COMMAND]


@pytest.mark.parametrize(("kind", "part"), [("rpm", "dom0"), ("rpm", "vm"), ("deb", "vm")])
def test_an_upgrade_with_other_defaults_keeps_what_the_administrator_wrote(
    system: ScratchSystem, kind: str, part: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    packages: Packages = request.getfixturevalue(f"{kind}s")
    system.install(packages["common"], packages[part])
    config = {name: entry.noreplace for name, entry in packages[part].entries.items() if entry.config}
    for name in config:
        (system.root / name.lstrip("/")).write_text("mine")
    system.upgrade(newer(packages[part], tmp_path, "# other\n"))
    kept = {name: (system.root / name.lstrip("/")).read_text() == "mine" for name in config}
    assert kept == config
    assert [name for name, noreplace in config.items() if not noreplace] == (
        ["/etc/qubes/policy.d/31-qubes-restore-svc.policy"] if part == "dom0" else []
    )


def test_what_the_administrator_wrote_and_the_reports_survive_a_removal(
    system: ScratchSystem, rpms: Packages
) -> None:
    system.install(*in_dom0(rpms))
    report = system.root / "var/log/qubes-restore-svc/restore-20261120T201530Z-1.json"
    report.write_text("{}")
    config = system.root / "etc/qubes-restore-svc/config.yaml"
    config.write_text("mine")
    system.remove(*reversed(in_dom0(rpms)))
    assert report.read_text() == "{}"
    assert config.with_name("config.yaml.rpmsave").read_text() == "mine"
    assert not config.exists()


@pytest.mark.parametrize("name", [qrexec_call.START, qrexec_call.VERIFY, qrexec_call.LIST])
@pytest.mark.parametrize("arguments", [(), ("argument",), ("-c", "import os"), ("", "restore.Start")])
def test_what_a_caller_says_does_not_reach_the_command_line_of_a_service(
    system: ScratchSystem, rpms: Packages, name: str, arguments: tuple[str, ...]
) -> None:
    system.install(rpms["common"], rpms["dom0"])
    system.run(f"/etc/qubes-rpc/{name}", *arguments)
    assert system.calls() == [f"python3 -I -m qubes_restore_svc.dom0_service {name}"]


# --- dom0 and GUI domains ------------------------------------------------------------------------


def test_installing_the_tools_puts_the_command_and_its_page_before_the_stock_ones(
    system: ScratchSystem, packages: Packages
) -> None:
    said = system.install(packages["common"], packages["tools"])
    assert "stays" not in said
    for link, target in LINKS.items():
        assert str((system.root / link).readlink()) == target
        assert (system.root / target.lstrip("/")).is_file()


def test_removing_from_a_gui_domain_leaves_nothing(system: ScratchSystem, packages: Packages) -> None:
    before = system.files()
    system.install(packages["common"], packages["tools"], packages["manager"])
    system.remove(packages["manager"], packages["tools"], packages["common"])
    # dpkg removes directories that no package owns any more, of which this test has made some.
    assert system.files() <= before


@pytest.mark.parametrize("dangling", [False, True])
def test_a_command_of_the_administrators_own_is_left_alone(
    system: ScratchSystem, packages: Packages, dangling: bool
) -> None:
    own = system.root / COMMAND
    own.symlink_to("/opt/own") if dangling else own.write_text("own")
    said = system.install(packages["common"], packages["tools"])
    assert f"/{COMMAND} is there already and stays: the command is {LINKS[COMMAND]}" in said
    system.reinstall(packages["tools"])
    system.remove(packages["tools"], packages["common"])
    assert str(own.readlink()) == "/opt/own" if dangling else own.read_text() == "own"


# --- A template ----------------------------------------------------------------------------------


def test_installing_in_a_template_enables_the_socket_by_its_preset(
    system: ScratchSystem, packages: Packages
) -> None:
    system.install(packages["common"], packages["vm"])
    assert system.calls() == [
        "systemctl daemon-reload",
        "systemctl --no-reload preset qubes-restore-worker.socket",
    ]
    preset = system.root / "usr/lib/systemd/system-preset/75-qubes-restore-worker.preset"
    lines = [line for line in preset.read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["enable qubes-restore-worker.socket"]


def test_an_upgrade_in_a_template_leaves_the_administrators_choice(
    system: ScratchSystem, packages: Packages
) -> None:
    system.install(packages["common"], packages["vm"])
    system.calls()
    system.reinstall(packages["vm"])
    assert set(system.calls()) == {"systemctl daemon-reload"}


def test_removing_from_a_template_stops_the_worker_and_leaves_nothing(
    system: ScratchSystem, packages: Packages
) -> None:
    before = system.files()
    system.install(packages["common"], packages["vm"])
    system.calls()
    system.remove(packages["vm"], packages["common"])
    assert system.calls() == [
        "systemctl disable --now qubes-restore-worker.socket qubes-restore-worker.service",
        "systemctl daemon-reload",
    ]
    if packages["vm"].path.suffix == ".deb":
        left = system.files() - before
        assert {f"/{name}" for name in left} == {
            name for name, entry in packages["vm"].entries.items() if entry.config
        }
        system.purge(packages["vm"], packages["common"])
        system.calls()
    # dpkg removes directories that no package owns any more, of which this test has made some.
    assert system.files() <= before


def test_a_scratch_system_without_systemd_can_be_installed_on(
    system: ScratchSystem, packages: Packages
) -> None:
    """As a template is, before it is one."""
    (system.root / "usr/bin/systemctl").unlink()
    system.install(packages["common"], packages["vm"])
    system.remove(packages["vm"], packages["common"])


def test_the_template_tells_dom0_of_its_services(system: ScratchSystem, packages: Packages) -> None:
    system.install(packages["common"], packages["vm"])
    system.calls()
    system.run(HOOK)
    assert system.calls() == ANNOUNCED


@pytest.mark.parametrize(("persistence", "tells"), [("full", True), ("rw-only", False), ("none", False)])
def test_only_a_qube_whose_root_stays_tells_dom0(
    system: ScratchSystem, rpms: Packages, persistence: str, tells: bool
) -> None:
    reader = system.root / "usr/bin/qubesdb-read"
    reader.write_text(f'#!/bin/sh\n[ "$1" = /qubes-vm-persistence ] && echo {persistence}\n')
    reader.chmod(0o755)
    system.install(rpms["common"], rpms["vm"])
    system.calls()
    system.run(HOOK)
    assert system.calls() == (ANNOUNCED if tells else [])


def test_a_removed_debian_package_says_nothing_through_the_file_it_leaves(
    system: ScratchSystem, debs: Packages
) -> None:
    system.install(debs["common"], debs["vm"])
    system.remove(debs["vm"], debs["common"])
    system.calls()
    system.run(HOOK)
    assert system.calls() == []
