"""docs/clients.md: it lists what there is, and its examples run."""

import getpass
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import qubesadmin

from qubes_restore_svc import report_file
from qubes_restore_svc.client import api, transports
from qubes_restore_svc.errors import WrongPassphrase
from qubes_restore_svc.local import documents
from qubes_restore_svc.manager import restore
from qubes_restore_svc.wire import messages, models, names
from qubes_restore_svc.wire import report as reports
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.messages import Cancel
from tests.manager.script import Script, finish, move, qube
from tests.support.wire import framed

from . import client_pages as pages
from .client_words import FIELDS
from .fakes import OTHER, QUBE, RESULT, plan, report
from .programs import Step, fake_program, fake_qrexec, said

TEXT = pages.PAGE.read_text()

#: Runs an example with words: its exit status, and the lines that it prints.
Run = Callable[..., tuple[int, list[str]]]


def test_the_page_is_current() -> None:
    assert pages.page(TEXT) == TEXT, "run: python -m tests.client.client_pages"


def test_the_page_tells_every_message_field_and_kind_of_error() -> None:
    for kind in ("open", "choose", "confirm", "cancel", "plan", "volume_started", "report", "refused"):
        assert f"### `{kind}`\n" in TEXT
    for row in (
        "| `memory` | a whole number, 1 to 16777216 or `auto` or `null` | `null` | MiB; `auto`: ",
        "| `mode` | `list` or `verify` or `restore` or `compare` | required |",
        "| `not-granted` | The caller has not been given the right to do this",
        "| running | client | `cancel` | ending |",
    ):
        assert row in TEXT
    linked = set(re.findall(r"\]\(#([a-z]+)\)", TEXT))
    headings = {heading.lower().strip("`") for heading in re.findall(r"^##+ (\S+)$", TEXT, re.MULTILINE)}
    assert linked <= headings


def test_the_page_names_the_public_interface_which_is_all_there() -> None:
    assert all(hasattr(api, name) for name in api.__all__)
    for name in ("RestoreCall", "BlockingRestoreCall", "list_backup", "system_transport", "Observer"):
        assert name in api.__all__
        assert f"`{name}" in TEXT


def test_nothing_is_said_of_what_is_not_there() -> None:
    modules = (c, models, messages, names, reports, documents, report_file)
    for name in FIELDS:
        model, _, field = name.partition(".")
        found = next(getattr(module, model) for module in modules if hasattr(module, model))
        assert not field or field in found.model_fields, name


def test_the_bytes_of_the_page_are_those_of_the_message() -> None:
    (shown,) = re.findall(r"```hex\n(.*?)```", TEXT, re.DOTALL)
    assert bytes.fromhex(shown) == framed(Cancel())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The way to run a program of `examples/`."""

    def run(name: str, *words: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(getpass, "getpass", lambda prompt: "correct horse")
        monkeypatch.setattr(sys, "argv", [name, *words])
        status = 0
        try:
            runpy.run_path(str(pages.ROOT / "examples" / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            status = int(end.code or 0)
        return status, capsys.readouterr().out.splitlines()

    return run


def restoring(mode: c.Mode, *middle: Step) -> tuple[Step, ...]:
    last = said(report(mode))
    return ("hear", "open"), said(plan(mode=mode)), *middle, ("hear", "confirm"), last


def test_the_blocking_example_restores(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = said(c.QubeFinished(qube=RESULT))
    steps = (*restoring("restore", ("hear", "choose"), said(plan(2)))[:-1], finished, said(report()))
    monkeypatch.setattr(api, "system_transport", lambda: fake_program(tmp_path, *steps))
    assert run("restore", "sys-usb", "/media/usb/backup", "work") == (
        0,
        ["in the backup: work, vault", "will be restored: work", "work: restored", "everything is there"],
    )


def test_the_asyncio_example_verifies(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = restoring("verify")
    monkeypatch.setattr(api, "system_transport", lambda: fake_program(tmp_path, *steps))
    assert run("verify", "/home/user/backup") == (0, ["work: restored", "the backup is good"])


@pytest.mark.parametrize("words", [("restore", "sys-usb", "/backup", "work"), ("verify", "/backup")])
def test_an_example_says_what_is_wrong(
    words: tuple[str, ...], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = fake_qrexec(tmp_path, ("exit", 126))
    monkeypatch.setattr(api, "system_transport", lambda: transports.QrexecTransport(program=program))
    status, lines = run(*words)
    assert status == 1
    assert "dom0's policy does not let this qube call restore." in lines[0]


def test_the_example_with_the_stock_names_restores(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script((qube("work"), qube("vault")), steps=[move(64), finish("work")])
    app = SimpleNamespace(local_name="sys-gui", domains={"sys-usb": SimpleNamespace(name="sys-usb")})
    monkeypatch.setattr(restore, "call_dom0", script)
    monkeypatch.setattr(qubesadmin, "Qubes", lambda: app)
    _, told = run("stock_names", "sys-usb", "/backup", "vault")
    assert told[-3:] == ["64 %", "100 %", "everything is there"]
    assert [line for line in told if line.lstrip().startswith("work |")]
    assert not [line for line in told if "vault" in line]
    assert script.is_closed
    script.refusal = WrongPassphrase("it is another one")
    _, told = run("stock_names", "sys-usb", "/backup", "vault")
    assert told[0].startswith("It is another one. ")


def test_the_example_without_the_library_lists(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: Step = ("say", {"type": "log", "level": "info", "text": "t"})
    fake_qrexec(tmp_path, ("hear", "open"), log, said(plan(1, "list", QUBE, OTHER)), ("hear end",))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = ("without_the_library", "sys-usb", "/backup")
    assert run(*words) == (0, ["work AppVM 0", "vault AppVM 0"])
    fake_qrexec(tmp_path, ("exit", 126))
    assert run(*words) == (0, ["the call ended with exit code 126"])
