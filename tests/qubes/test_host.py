"""The Qubes host as a whole: one restore at a time, what it sees, and what remains when it is killed."""

import errno
import grp
import io
import os
import signal
import time
from pathlib import Path

import pytest
import qubesadmin

from qubes_restore_svc.broker.interfaces import HostQube
from qubes_restore_svc.errors import Cancelled, HostFailed, RestoreInProgress
from qubes_restore_svc.qubes import dom0_home
from qubes_restore_svc.qubes.host import QubesHost, names_in_policy
from qubes_restore_svc.qubes.system import QubesSystem
from tests.emulation.qubesd import Qubesd
from tests.qubes.qubes_bed import (
    DISPOSABLES,
    NETVM,
    TEMPLATE,
    definition,
    new_host,
    new_qube,
    settings,
    state_of,
    stopped_program,
)

from ..support.descriptors import open_descriptors

SOON_S = 60.0


POLICY = {
    "policy.d/50-config-input.policy": "qubes.InputMouse * sys-usb @adminvm ask # for vault\n",
    "policy.d/30-user.policy": "!include include/mine\nqubes.Gpg + work @dispvm:gpg-dvm allow user=root\n",
    "policy.d/40-x.policy": "qubes.Filecopy * @anyvm @default allow target=files.x notify=no\n",
    "policy.d/include/mine": "sys-gui @tag:guivm-sys-gui allow target=dom0\n",
    "policy.d/notes.txt": "a b holiday",
    "run/policy.d/20-late.policy": "x * @anyvm late allow\n",
    "policy/qubes.Gpg": "$anyvm old-gui ask,user=root,default_target=old-files\n",
}


@pytest.fixture
def policy(tmp_path: Path) -> list[Path]:
    for name, text in POLICY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return [tmp_path / "run/policy.d", tmp_path / "policy.d", tmp_path / "policy"]


def test_the_names_in_the_policy_are_those_of_qubes(policy: list[Path]) -> None:
    os.mkfifo(policy[1] / "10-pipe.policy")
    names, unread = names_in_policy(policy)
    assert names == {
        "late": "20-late.policy",
        "work": "30-user.policy",
        "gpg-dvm": "30-user.policy",
        "files.x": "40-x.policy",
        "sys-usb": "50-config-input.policy",
        "sys-gui": "mine",
        "old-gui": "qubes.Gpg",
        "old-files": "qubes.Gpg",
    }
    assert unread == ()


def test_what_of_the_policy_cannot_be_read_is_said_and_the_rest_is_read(
    policy: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (policy[1] / "20-binary.policy").write_bytes(b"x * m\xe4n mail allow\n")
    honest = io.open

    def troubled(path: Path | str, *rest: object, **more: object) -> object:
        for end, number in {"30-user.policy": errno.EIO, "40-x.policy": errno.EACCES}.items():
            if str(path).endswith(end):
                raise OSError(number, os.strerror(number))
        return honest(path, *rest, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(io, "open", troubled)
    (policy[0] / "include").write_text("no directory")
    names, unread = names_in_policy(policy)
    assert "work" not in names and names["mail"] == "20-binary.policy" and names["sys-usb"]
    folder = policy[1]
    assert unread == (
        f"{policy[0]}/include (Not a directory)",
        f"{folder}/20-binary.policy (it is not UTF-8)",
        f"{folder}/30-user.policy (Input/output error)",
        f"{folder}/40-x.policy (Permission denied)",
    )


def test_a_policy_that_cannot_be_read_whole_is_a_remark_and_no_failure(
    host: QubesHost, tmp_path: Path
) -> None:
    for number in range(7):
        (tmp_path / f"{number}.policy").write_bytes(b"\xff")
    (remark,) = new_host(tmp_path, policy=[tmp_path]).view().remarks
    assert remark.startswith("rules for the names of restored qubes may stand in what cannot be read")
    assert f"{tmp_path}/0.policy (it is not UTF-8), " in remark and remark.endswith(", and 2 more")
    assert host.view().remarks == ()


@pytest.mark.parametrize(("client", "reserved"), [("dom0", set[str]()), ("sys-gui", {"sys-usb"})])
def test_a_name_in_the_policy_is_reserved_for_dom0(
    host: QubesHost, tmp_path: Path, client: str, reserved: set[str]
) -> None:
    (tmp_path / "50.policy").write_text(POLICY["policy.d/50-config-input.policy"])
    host = new_host(tmp_path, client=client, policy=[tmp_path])
    view = host.view()
    assert view.qubes_system is not None
    assert view.qubes_system.policy_names == {"sys-usb": "50.policy"}
    assert view.names == {*view.qubes_system.qubes, *reserved}


# --- The system as it is -------------------------------------------------------------------------


def test_the_host_shows_the_system(host: QubesHost, qubesd: Qubesd, monkeypatch: pytest.MonkeyPatch) -> None:
    group = grp.struct_group(("qubes", "x", 98, ["lena", "root"]))
    monkeypatch.setattr(grp, "getgrnam", {"qubes": group}.__getitem__)
    view = host.view()
    assert view.names == {"dom0", TEMPLATE, NETVM, DISPOSABLES}
    assert view.qubes_system is not None
    assert view.qubes_system.qubes[NETVM] == HostQube(NETVM, "AppVM", provides_network=True)
    assert (view.qubes_system.default_template, view.qubes_system.default_dispvm) == (TEMPLATE, DISPOSABLES)
    assert "red" in view.qubes_system.labels
    assert view.qubes_system.dom0_user == "lena"


def test_free_space_is_that_of_the_pool_that_is_used(
    tmp_path: Path, host: QubesHost, system: QubesSystem, qubesd: Qubesd
) -> None:
    qubesd.limit_pool("vm-pool", 5000)
    qubesd.limit_pool("lvm", 6000)
    assert host.free_space() == 5000
    assert new_host(tmp_path, system, pool="lvm").free_space() == 6000


@pytest.mark.parametrize(
    ("tagged", "runs", "is_done"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_a_finished_qube_loses_its_netvm_while_it_is_halted_and_of_this_backup(
    tagged: bool, runs: bool, is_done: bool, host: QubesHost, qubesd: Qubesd
) -> None:
    work = qubesadmin.Qubes().add_new_vm("AppVM", "work", "red", TEMPLATE)
    work.netvm = NETVM
    work.tags.add("restored-from-backup-1" if tagged else "restored-from-backup-2")
    if runs:
        work.start()
    assert host.take_back("work", "1", from_before=False) == is_done
    assert qubesd.system.domains["work"].properties["netvm"] == (None if is_done else NETVM)
    with pytest.raises(HostFailed, match="there is no such qube"):
        host.take_back("gone", "1", from_before=False)


def test_a_finished_qube_gets_its_disposable_template_later(host: QubesHost, qubesd: Qubesd) -> None:
    host.set_default_dispvm(NETVM, DISPOSABLES)
    assert qubesd.system.domains[NETVM].properties["default_dispvm"] == DISPOSABLES
    with pytest.raises(HostFailed):
        host.set_default_dispvm(NETVM, NETVM)


# --- The lock ------------------------------------------------------------------------------------


def test_only_one_restore_at_a_time(host: QubesHost, tmp_path: Path, system: QubesSystem) -> None:
    other = new_host(tmp_path, system)
    with host.lock():
        for second in (other, host):
            match = r"has been restoring since \d\d:\d\d .* \(process"
            with pytest.raises(RestoreInProgress, match=match), second.lock():
                pass
        host.begin(new_qube()).rollback()
    with other.lock():
        pass


def test_nothing_begins_without_the_lock(host: QubesHost) -> None:
    for _ in range(2):
        with pytest.raises(HostFailed, match="not locked"):
            host.begin(new_qube())
        with host.lock():
            pass


def test_a_qube_without_a_definition_is_refused(host: QubesHost) -> None:
    qube = new_qube()
    with host.lock(), pytest.raises(HostFailed, match="how it is to be set up"):
        host.begin(type(qube)(qube.name, qube.source, qube.backup_id))


def test_what_nobody_ended_ends_with_the_lock(host: QubesHost, qubesd: Qubesd, tmp_path: Path) -> None:
    before = state_of(tmp_path, qubesd)
    with pytest.raises(KeyError), host.lock():
        base = host.begin(new_qube("base", klass="TemplateVM", wanted=definition(template=None)))
        first = host.begin(new_qube("first", wanted=definition(template="base")))
        first.create_volume("private", 1 << 30).write(0, memoryview(b"x" * 100_000))
        base.create_volume("root", 100)
        host.begin(new_qube("dom0", klass="AdminVM")).create_volume("home", 100).write(0, memoryview(b"x"))
        raise KeyError
    assert state_of(tmp_path, qubesd) == before
    with pytest.raises(HostFailed):
        first.create_volume("private", 10)


def test_no_process_and_no_descriptor_stays(host: QubesHost, qubesd: Qubesd, tmp_path: Path) -> None:
    with host.lock():
        pass
    before = set(os.listdir("/proc/self/fd"))
    with host.lock():
        with pytest.raises(RestoreInProgress), host.lock():
            pass
        host.begin(new_qube()).create_volume("private", 100).write(0, memoryview(b"x"))
        host.begin(new_qube("dom0", klass="AdminVM")).create_volume("home", 100)
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert not (tmp_path / "restore.lock").exists()


def test_what_cannot_be_removed_is_told_at_the_end(host: QubesHost, qubesd: Qubesd) -> None:
    qubesd.fail("admin.vm.Remove+", message="the disk says no", times=None)
    with pytest.raises(HostFailed, match=r"not everything .*work.*the disk says no") as caught, host.lock():
        host.begin(new_qube())
    assert "qvm-remove" in caught.value.advice


def test_what_cannot_be_removed_does_not_hide_why_the_restore_ended(host: QubesHost, qubesd: Qubesd) -> None:
    qubesd.fail("admin.vm.Remove+", message="the disk says no", times=None)
    with pytest.raises(Cancelled) as caught, host.lock():
        host.begin(new_qube())
        raise Cancelled("it was cancelled", advice="As you like.")
    assert caught.value.advice.startswith("As you like. Left behind: work")
    qubesd.mend()
    with host.lock() as remarks:
        assert len(remarks) == 1
    qubesd.fail("admin.vm.Remove+", message="the disk says no", times=None)
    with pytest.raises(HostFailed, match="not everything") as failed, host.lock():
        host.begin(new_qube())
        raise KeyError
    assert isinstance(failed.value.__cause__, KeyError)


# --- A restore that is killed --------------------------------------------------------------------

KILLED = """
host = bed.new_host(place)
system = host._system
with host.lock():
    stop("locked")
    if step == "creating":
        add_tag = system.add_tag
        system.add_tag = lambda *arguments: stop("creating")
    home = host.begin(bed.new_qube("dom0", klass="AdminVM", key="dom0-home"))
    home.create_volume("home", 100).write(0, memoryview(b"x"))
    base = host.begin(bed.new_qube("base", klass="TemplateVM", wanted=bed.definition(template=None)))
    qube = host.begin(bed.new_qube(wanted=bed.definition(template="base")))
    sink = qube.create_volume("private", 1 << 30)
    sink.write(0, memoryview(b"x" * 100_000))
    sink.write(500_000_000, memoryview(b"x" * 100_000))
    stop("writing")
"""


@pytest.mark.parametrize("step", ["locked", "creating", "writing"])
def test_a_restore_that_is_killed_leaves_nothing(
    host: QubesHost, qubesd: Qubesd, tmp_path: Path, step: str
) -> None:
    before = state_of(tmp_path, qubesd)
    with stopped_program(KILLED, tmp_path, step) as process:
        with pytest.raises(RestoreInProgress), host.lock():
            pass
        os.killpg(process.pid, signal.SIGINT if step == "locked" else signal.SIGKILL)
    # A second run works as soon as the guard has cleared up.
    while True:
        try:
            with host.lock() as remarks:
                assert remarks == ()
                host.begin(new_qube()).rollback()
            break
        except RestoreInProgress as error:
            assert error.ends_soon
        time.sleep(0.01)
    assert state_of(tmp_path, qubesd) == before


def test_a_restore_whose_guard_is_killed_goes_on(host: QubesHost, qubesd: Qubesd, tmp_path: Path) -> None:
    before = state_of(tmp_path, qubesd)
    with host.lock():
        [guard] = [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
        os.kill(guard, signal.SIGKILL)
        os.waitid(os.P_PID, guard, os.WEXITED | os.WNOWAIT)
        host.begin(new_qube()).commit(settings(), definition())
        host.begin(new_qube("second")).rollback()
    del qubesadmin.Qubes().domains["work"]
    assert state_of(tmp_path, qubesd) == before


def test_a_process_that_cannot_be_started_is_an_error_and_leaves_no_lock(
    host: QubesHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    before = open_descriptors()
    with monkeypatch.context() as patch, pytest.raises(HostFailed, match="starting the process"):
        patch.setattr(os, "fork", refuse)
        with host.lock():
            pass
    assert not open_descriptors() - before
    assert not (tmp_path / "restore.lock").exists()
    with host.lock():
        pass


def test_a_system_that_cannot_be_asked_is_an_error_and_leaves_no_lock(
    host: QubesHost, qubesd: Qubesd, tmp_path: Path
) -> None:
    qubesd.fail("*", "", times=None)
    with pytest.raises(HostFailed, match="listing the tags failed"), host.lock():
        pass
    assert not (tmp_path / "restore.lock").exists()


# --- dom0's home ---------------------------------------------------------------------------------


def test_an_unfinished_home_is_removed_and_what_only_looks_like_one_is_not(
    host: QubesHost, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    for name, file in (("2026-01-01-010203", "home.tar"), ("2026-01-01-010204", "dom0-home.tar"),
                       ("2026-01-01-010205", "thesis.odt")):  # fmt: skip
        directory = home / f".home-restore-{name}.partial"
        directory.mkdir()
        (directory / file).touch()
    (home / ".home-restore-mine.partial").mkdir()
    with host.lock() as remarks:
        assert ["was removed" in remark for remark in remarks] == [True, True, False]
    assert sorted(os.listdir(home)) == [
        ".home-restore-2026-01-01-010205.partial",
        ".home-restore-mine.partial",
    ]


def test_the_home_of_dom0_is_one_archive(host: QubesHost, tmp_path: Path) -> None:
    with host.lock():
        home = host.begin(new_qube("dom0", klass="AdminVM", key="dom0-home"))
        sink = home.create_volume("home", 1 << 40)
        sink.write(0, memoryview(b"archive"))
        sink.finish(7)
        [remark] = home.commit(settings("dom0-home"), None)
    [directory] = (tmp_path / "home").iterdir()
    assert directory.name.startswith("home-restore-")
    archive = directory / dom0_home.ARCHIVE_NAME
    assert archive.read_bytes() == b"archive"
    assert str(archive) in remark and "not in dom0" in remark
