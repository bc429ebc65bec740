"""From a request and the configuration to link and host: what is asked for reaches what does it."""

import asyncio
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qubes_restore_svc.errors import BadConfiguration, HostFailed, RestoreError, UsageError, WorkerMissing
from qubes_restore_svc.qubes import dom0_restore as dom0
from qubes_restore_svc.qubes.backup_source import Dom0File, Location
from qubes_restore_svc.qubes.comparison import ComparedSystem
from qubes_restore_svc.qubes.config import load_config
from qubes_restore_svc.qubes.dom0_restore import PLACES, Dom0Restore, Places, dom0_restore
from qubes_restore_svc.qubes.host import QubesHost
from qubes_restore_svc.qubes.qrexec_link import QrexecLink
from qubes_restore_svc.wire.restore_call import OpenBackup, QubePath
from tests.cli.plans import plan, source, taken
from tests.emulation.qubesd import Qubesd

from .qubes_bed import DISPOSABLES, NETVM, emulation

CONFIG = """\
worker: {template: configured-dvm, memory: 3000, vcpus: 3}
restore: {pool: varlibqubes}
limits: {qubes: 1, stall_timeout: 90}
report: {directory: /reports, keep: 7}
log: {file: /log}
"""


DOM0_FILE = Dom0File(5)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    config = tmp_path / "config.yaml"
    return Places(
        config, tmp_path / "restore.lock", tmp_path / "worker.lock", tmp_path / "stock.lock", tmp_path
    )


@pytest.fixture
def qubesd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Qubesd]:
    with emulation(tmp_path, monkeypatch) as running:
        yield running


class Made:
    """What the parts were made with; the originals are made all the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.link: dict[str, object] = {}
        self.host: dict[str, object] = {}
        link, host = QrexecLink, QubesHost

        def make_link(system, location, **keywords):  # type: ignore[no-untyped-def]  # as it comes
            self.link = {"location": location, **keywords}
            return link(system, location, **keywords)

        def make_host(system, **keywords):  # type: ignore[no-untyped-def]  # as it comes
            self.host = keywords
            return host(system, **keywords)

        monkeypatch.setattr(dom0, "QrexecLink", make_link)
        monkeypatch.setattr(dom0, "QubesHost", make_host)


@pytest.fixture
def made(qubesd: Qubesd, monkeypatch: pytest.MonkeyPatch) -> Made:
    return Made(monkeypatch)


def request(**fields: object) -> OpenBackup:
    """One that is in order, but for `fields`; what it says of the location is not looked at."""
    whole = {"mode": "restore", "location": {"text": "b"}, "passphrase": "", **fields}
    return OpenBackup.model_validate(whole)


def parts(
    places: Places, asked: OpenBackup | None = None, location: Location = DOM0_FILE, client: str = "dom0"
) -> Dom0Restore:
    return dom0_restore(location, asked or request(), places, load_config(places.config), client)


def configure(places: Places, text: str) -> None:
    places.config.write_text(text)
    places.config.chmod(0o644)


def test_without_a_configuration_there_are_defaults(places: Places, made: Made) -> None:
    found = parts(places)
    assert made.link == {
        "location": Dom0File(5),
        "template": None,
        "memory": "auto",
        "vcpus": "auto",
        "most": (None, None),
        "ready_timeout_s": 120,
        "lock_path": places.worker_lock,
        "client": "dom0",
        "activity": "restoring",
    }
    assert made.host == {
        "pool": None,
        "home": places.home,
        "lock_path": places.restore_lock,
        "stock_lock_path": places.stock_lock,
        "client": "dom0",
        "activity": "restoring",
    }
    assert found.config.report.directory == Path("/var/log/qubes-restore-svc")
    assert found.excess(plan(taken(source("a")), taken(source("b")))) is None


def test_the_configuration_is_obeyed(places: Places, made: Made) -> None:
    configure(places, CONFIG)
    found = parts(places)
    assert (made.link["template"], made.link["memory"], made.link["vcpus"]) == ("configured-dvm", 3000, 3)
    assert made.host["pool"] == "varlibqubes"
    assert (found.config.report.directory, found.config.report.keep) == (Path("/reports"), 7)
    assert found.config.log.file == Path("/log")
    assert found.config.limits.stall_timeout == 90
    excess = found.excess(plan(taken(source("a")), taken(source("b"))))
    assert isinstance(excess, UsageError) and excess.reason.startswith("2 qubes are to be restored")


def test_the_person_has_the_last_word(places: Places, made: Made) -> None:
    configure(places, CONFIG)
    parts(places, request(worker={"template": "mine", "memory": 9000, "vcpus": 8}))
    assert (made.link["template"], made.link["memory"], made.link["vcpus"]) == ("mine", 9000, 8)
    parts(places, request(worker={"memory": "auto", "vcpus": "auto"}))
    assert (made.link["memory"], made.link["vcpus"]) == ("auto", "auto")


@pytest.mark.parametrize(
    ("configured", "client", "asked", "holds"),
    [
        (None, "dom0", None, None),
        (None, "sys-gui", 60, 60),
        (90, "dom0", None, 90),
        (90, "dom0", 600, 600),
        (90, "dom0", 60, 60),
        (90, "sys-gui", None, 90),
        (90, "sys-gui", 600, 90),
        (90, "sys-gui", 60, 60),
    ],
)
def test_dom0_has_the_last_word_on_a_stalled_backup_and_a_qube_can_only_shorten_it(
    configured: int | None, client: str, asked: int | None, holds: int | None, places: Places, made: Made
) -> None:
    configure(places, "" if configured is None else f"limits: {{stall_timeout: {configured}}}")
    restore = parts(places, client=client)
    assert restore.session_options(request(stall_timeout=asked)).stall_timeout_s == holds


@pytest.mark.parametrize(
    ("configured", "asked", "holds"),
    [
        ("", None, "fsverity"),
        ("report: {digest: sha256}", None, "sha256"),
        ("", "sha256", "sha256"),
        ("report: {digest: sha256}", "fsverity", "fsverity"),
    ],
)
def test_which_digest_is_told_is_configured_and_whoever_asks_for_another_gets_that(
    configured: str, asked: str | None, holds: str, places: Places, made: Made
) -> None:
    configure(places, configured)
    wanted = request(digest=asked)
    assert parts(places, wanted).session_options(wanted).digest == holds


def test_a_qube_gets_no_larger_worker_by_asking_for_none(places: Places, made: Made) -> None:
    parts(places, client="mgmt")
    assert made.link["most"] == (4000, 2)
    configure(places, "grants: {mgmt: {max_memory: 9000, max_vcpus: 1}}")
    parts(places, client="mgmt")
    assert made.link["most"] == (9000, 2)
    configure(places, "worker: {memory: 500, vcpus: 6}")
    parts(places, client="mgmt")
    assert made.link["most"] == (500, 6)


@pytest.mark.parametrize(
    ("mode", "names", "activity", "ahead"),
    [
        ("restore", (), "restoring", True),
        ("restore", ("work",), "restoring", False),
        ("verify", (), "verifying", True),
        ("list", (), "listing a backup", False),
        ("compare", (), "comparing", True),
    ],
)
def test_what_it_is_for_is_told_and_only_where_all_is_wanted_keys_are_derived_ahead(
    mode: str, names: tuple[str, ...], activity: str, ahead: bool, places: Places, made: Made
) -> None:
    places = replace(places, volume_reader=os.getuid())
    asked = request(mode=mode, choice={"names": names}, compression_filter="zstd", ignore_cost_limit=True)
    options = parts(places, asked).session_options(asked)
    assert made.link["activity"] == activity
    assert (options.ahead, options.compression_filter, options.ignore_cost_limit) == (ahead, "zstd", True)


def test_only_who_can_read_the_volumes_compares_them(places: Places, made: Made) -> None:
    for client in ("dom0", "sys-gui"):
        with pytest.raises(UsageError, match="only root can read the volumes") as refused:
            parts(replace(places, volume_reader=os.getuid() + 1), request(mode="compare"), client=client)
        assert "with sudo" in refused.value.advice
    found = parts(replace(places, volume_reader=os.getuid()), request(mode="compare"))
    assert isinstance(found.host, ComparedSystem)
    assert not isinstance(parts(places, request(mode="restore")).host, ComparedSystem)
    assert PLACES.volume_reader == 0


@pytest.mark.parametrize(
    ("asked", "qube", "error", "reason"),
    [
        (request(worker={"template": "nowhere"}), None, UsageError, "there is no qube nowhere"),
        (request(worker={"template": NETVM}), None, UsageError, f"no disposables can be made from {NETVM}"),
        (request(choice={"pool": "nowhere"}), None, HostFailed, "there is no storage pool 'nowhere'"),
        (request(), "nowhere", UsageError, "there is no qube nowhere"),
    ],
)
def test_what_is_not_here_is_found_out_early(
    asked: OpenBackup,
    qube: str | None,
    error: type[RestoreError],
    reason: str,
    places: Places,
    qubesd: Qubesd,
) -> None:
    with open(os.devnull) as nothing, pytest.raises(error, match=reason):
        location = Dom0File(nothing.fileno()) if qube is None else QubePath(qube, "b")
        asyncio.run(parts(places, asked, location).check(asked.choice.pool))


def test_a_template_without_the_worker_is_found_out_early(places: Places, qubesd: Qubesd) -> None:
    qubesd.system.domains[DISPOSABLES].features["supported-rpc.qubes.VMShell"] = "1"
    with pytest.raises(WorkerMissing, match="has no worker"):
        asyncio.run(parts(places).check())


def test_a_mistake_in_the_configuration_and_a_limit_that_an_option_would_void(places: Places) -> None:
    configure(places, "worker: {memory: much}")
    with pytest.raises(BadConfiguration, match="line 1"):
        parts(places)
    configure(places, "limits: {volume_size: 5}")
    with pytest.raises(UsageError, match="--ignore-size-limit is not possible"):
        parts(places, request(ignore_size_limit=True))


def test_where_there_is_no_qubes_it_is_said(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qubesadmin", None)
    with pytest.raises(HostFailed, match="this is not the dom0 of a Qubes system"):
        parts(places)
