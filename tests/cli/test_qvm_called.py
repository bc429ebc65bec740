"""What the command makes of a dom0 that ends, changes its mind, or says nothing more."""

import asyncio
from pathlib import Path

import pytest
from pydantic import SecretStr

from qubes_restore_svc.cli import qvm_arguments
from qubes_restore_svc.cli.displays import QuietDisplay
from qubes_restore_svc.cli.qvm_arguments import (
    RestoreArguments,
    check_way,
    parse_restore_arguments,
    restore_request,
    way_to_dom0,
)
from qubes_restore_svc.cli.qvm_restore import called
from qubes_restore_svc.client.transports import Handed, ProgramTransport, QrexecTransport, Transport
from qubes_restore_svc.errors import Cancelled, HostFailed, NotGranted, QubeExists, UsageError
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.messages import Cancel, Log
from qubes_restore_svc.wire.report import QubeReport, Report
from tests.client.fakes import (
    OTHER,
    PASSPHRASE,
    QUBE,
    RESULT,
    FakeTransport,
    Peer,
    Script,
    plan,
    refused,
    report,
)

SECOND = QUBE.model_copy(update={"key": "vm3", "name": "mail", "new_name": "mail-1", "notes": ("renamed",)})
STARTED = c.VolumeStarted(qube="work", volume="private", image_size=5)


class Seeing(QuietDisplay):
    """Knows what was finished."""

    def __init__(self) -> None:
        self.finished: list[str] = []

    def qube_finished(self, report: QubeReport) -> None:
        self.finished.append(f"{report.name} {report.outcome}")


class Restoring:
    """A restore that a script answers."""

    def __init__(self, script: Script, refusal: Exception | None = None, line: str = "-d nas b") -> None:
        self.transport = FakeTransport(script, HostFailed("the connection to dom0 broke off", advice="Look."))
        self.display = Seeing()
        self._refusal = refusal
        self._arguments = arguments(line)

    async def run(self, archive_fd: int | None = None) -> Report:
        check_way(self.transport)
        request = restore_request(self._arguments, archive_fd, self.transport)
        request = request.model_copy(update={"passphrase": SecretStr(PASSPHRASE)})
        report = await called(self.transport, request, self.display, self._review)
        await self.transport.check()  # also what the script expected
        return report

    async def _review(self, plan: c.Plan) -> None:
        if self._refusal is not None:
            raise self._refusal


def arguments(line: str) -> RestoreArguments:
    return parse_restore_arguments(["--mgmt-vm", *line.split()])


async def planned(peer: Peer) -> None:
    await peer.hear(c.OpenBackup)
    await peer.say(Log(level="warning", text="little room"), plan(1, "restore", QUBE, SECOND, OTHER))


async def running(peer: Peer) -> None:
    await planned(peer)
    await peer.hear(c.Confirm)
    await peer.say(STARTED, c.QubeFinished(qube=RESULT))


def test_everything_that_was_asked_for_reaches_dom0() -> None:
    async def dom0(peer: Peer) -> None:
        asked = await peer.hear(c.OpenBackup)
        assert isinstance(asked, c.OpenBackup)
        assert asked.location == c.BackupLocation(qube="sys-usb", text="/media/bc")
        assert asked.choice == c.Choice(names=("work",), exclude=("vault",), conflicts="rename", pool="p")
        assert asked.passphrase.get_secret_value() == PASSPHRASE
        assert (asked.mode, asked.compression_filter, asked.ignore_size_limit) == ("restore", "zstd", False)
        assert (asked.choice.pool, asked.worker) == ("p", c.WorkerWishes(template="dvm", memory=9, vcpus=3))
        await peer.say(refused(NotGranted("no", advice="ask")))

    line = "-d sys-usb --pool p --mgmt-template dvm --memory 9 --vcpus 3 /media/bc"
    line += " -Z zstd -x vault --rename-conflicting work"
    restoring = Restoring(dom0, line=line)
    found = asyncio.run(restoring.run())
    assert found.error is not None
    assert (found.error.kind, found.error.advice, found.status, found.qubes) == ("not-granted", "ask", 1, ())


@pytest.mark.parametrize(
    ("line", "location"),
    [
        ("-d dom0 /b", c.BackupLocation(qube="dom0", text="/b")),
        ("-d nas --location-is-service my.Backup+x",
         c.BackupLocation(qube="nas", text="my.Backup+x", service=True)),
    ],
)  # fmt: skip
def test_every_other_location(line: str, location: c.BackupLocation) -> None:
    async def dom0(peer: Peer) -> None:
        asked = await peer.hear(c.OpenBackup)
        assert isinstance(asked, c.OpenBackup) and asked.location == location
        await peer.say(refused(NotGranted("no")))

    restoring = Restoring(dom0, line=line)
    asyncio.run(restoring.run())


def test_a_file_here_is_named_by_its_whole_path_and_for_no_qube(tmp_path: Path) -> None:
    async def dom0(peer: Peer) -> None:
        asked = await peer.hear(c.OpenBackup)
        assert isinstance(asked, c.OpenBackup)
        assert asked.location == c.BackupLocation(text=str(backup))
        await peer.say(refused(NotGranted("no")))

    backup = tmp_path / "b"
    backup.write_bytes(b"x")
    (tmp_path / "link").symlink_to(backup)
    with backup.open("rb") as file:
        asyncio.run(Restoring(dom0, line=f"{tmp_path}/link").run(file.fileno()))


def test_a_plan_that_is_refused_here_cancels_the_call_and_is_told_of_every_qube() -> None:
    async def dom0(peer: Peer) -> None:
        await planned(peer)
        await peer.hear(Cancel)
        await peer.say(refused(Cancelled("it was cancelled")))
        await peer.hear_end()

    found = asyncio.run(Restoring(dom0, QubeExists("the backup does not fit")).run())
    assert found.error is not None and found.error.kind == "qube-exists"
    assert (found.status, found.backup_id, found.warnings) == (1, "backup-1", ("little room",))
    told = [(qube.name, qube.outcome, qube.error and qube.error.kind) for qube in found.qubes]
    assert told == [
        ("work", "failed", "qube-exists"),
        ("mail-1", "failed", "qube-exists"),
        ("vault", "left out", None),
    ]
    assert (found.qubes[1].name_in_backup, found.qubes[1].remark) == ("mail", "renamed")


def test_a_connection_that_breaks_in_the_middle_leaves_what_is_known() -> None:
    restoring = Restoring(running)
    found = asyncio.run(restoring.run())
    assert restoring.display.finished == ["work restored"]
    assert found.error is not None
    assert (found.status, found.error.reason) == (3, "the connection to dom0 broke off")
    told = [(qube.name, qube.outcome, qube.error and qube.error.kind) for qube in found.qubes]
    assert told == [
        ("work", "restored", None),
        ("mail-1", "failed", "host-failed"),
        ("vault", "left out", None),
    ]


@pytest.mark.parametrize("answered", [True, False])
def test_a_cancelled_task_comes_back_with_a_report(answered: bool) -> None:
    begun = asyncio.Event()

    async def dom0(peer: Peer) -> None:
        await running(peer)
        begun.set()
        await peer.hear(Cancel)
        if answered:
            await peer.say(report(status=130, error=Cancelled("it was cancelled")))

    async def whole() -> Report:
        task = asyncio.create_task(restoring.run())
        await begun.wait()
        while not restoring.display.finished:
            await asyncio.sleep(0)
        task.cancel()
        return await task

    restoring = Restoring(dom0)
    found = asyncio.run(whole())
    assert (found.status, found.tool_version) == (130, "1" if answered else found.tool_version)
    assert found.error is not None and found.error.kind == "cancelled"
    assert [qube.outcome for qube in found.qubes][:1] == ["restored"]


def test_cancelled_while_it_opens() -> None:
    opened = asyncio.Event()

    async def dom0(peer: Peer) -> None:
        await peer.hear(c.OpenBackup)
        opened.set()
        await peer.hear_end()

    async def whole() -> Report:
        restoring = Restoring(dom0)
        task = asyncio.create_task(restoring.run())
        await opened.wait()
        task.cancel()
        return await task

    found = asyncio.run(whole())
    assert (found.status, found.qubes) == (130, ())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--mgmt-template a~b b", "the qube that reads the backup cannot be as it was asked for (template: "),
        ("--pool a~b b", "no storage pool can have this name"),
        ("a~b\udcff", "the location of the backup cannot be told to dom0 (text: "),
        ("b a~b\udcff", "a list of qubes that holds something else than names"),
    ],
)
def test_what_fits_into_no_message_is_told_without_its_value(line: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        restore_request(arguments(f"-d nas {line}"), None, FakeTransport(planned))
    assert reason in caught.value.reason and "a~b" not in caught.value.reason


def test_only_in_dom0_a_comparison_can_be_asked_for() -> None:
    assert restore_request(arguments("--compare b"), 5, ProgramTransport()).mode == "compare"
    with pytest.raises(NotGranted, match="for dom0 alone"):
        restore_request(arguments("--compare -d nas b"), None, QrexecTransport())


@pytest.mark.parametrize(("line", "digest"), [("b", None), ("--sha256 b", "sha256")])
def test_the_configuration_decides_which_digest_is_told_unless_sha256_is_asked_for(
    line: str, digest: str | None
) -> None:
    assert restore_request(arguments(f"-d nas {line}"), None, FakeTransport(planned)).digest == digest


# --- Which way -----------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    found = (tmp_path / "qubesd.sock", tmp_path / "qrexec-client-vm")
    monkeypatch.setattr(qvm_arguments, "QUBESD_SOCKET", found[0])
    monkeypatch.setattr(qvm_arguments, "QREXEC_CLIENT", found[1])
    return found


def test_a_qube_calls_dom0_and_dom0_starts_its_service(places: tuple[Path, Path]) -> None:
    def way() -> Transport:
        return way_to_dom0(Handed())

    qubesd, qrexec = places
    assert isinstance(way(), ProgramTransport)  # neither: the service says that this is no Qubes system
    qrexec.touch()
    assert isinstance(way(), QrexecTransport)
    qubesd.touch()
    assert isinstance(way(), ProgramTransport)


@pytest.mark.parametrize(
    ("line", "location"),
    [
        ("b", c.BackupLocation(qube="dom0", text="-")),
        ("-d dom0 b", c.BackupLocation(qube="dom0", text="-")),
        ("-d nas b", c.BackupLocation(qube="nas", text="b")),
    ],
)
def test_in_dom0_a_file_is_handed_over_and_not_named(line: str, location: c.BackupLocation) -> None:
    assert restore_request(arguments(line), 5, ProgramTransport()).location == location


def test_a_file_of_dom0_is_one_here_only_in_dom0(places: tuple[Path, Path]) -> None:
    qubesd, qrexec = places
    there, here = arguments("-d dom0 b"), arguments("b")
    assert qvm_arguments.is_file_here(there) and qvm_arguments.is_file_here(here)
    qrexec.touch()
    assert not qvm_arguments.is_file_here(there) and qvm_arguments.is_file_here(here)
    qubesd.touch()
    assert qvm_arguments.is_file_here(there)
    assert not qvm_arguments.is_file_here(arguments("-d sys-usb b"))


def test_without_the_program_it_is_said_before_the_passphrase(tmp_path: Path) -> None:
    with pytest.raises(HostFailed, match=r"there is no .*/no"):
        check_way(QrexecTransport(program=str(tmp_path / "no")))
