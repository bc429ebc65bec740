"""docs/clients.md: it lists what there is, and its examples run."""

import os
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import qubesadmin

from qubes_restore_svc.client import transports
from qubes_restore_svc.errors import WrongPassphrase
from qubes_restore_svc.manager import restore
from qubes_restore_svc.wire import messages, models, names
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.framing import encode_frame
from qubes_restore_svc.wire.messages import Cancel
from qubes_restore_svc.wire.models import encode_message
from tests.manager.script import Script, finish, move, qube

from . import client_pages as pages
from .client_words import FIELDS
from .fakes import OTHER, QUBE, RESULT, plan, report
from .programs import Step, fake_program, fake_qrexec, said

TEXT = pages.PAGE.read_text()
BLOCKING, ASYNC, STOCK, BYTES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_page_is_current() -> None:
    assert pages.page(TEXT) == TEXT, "run: python -m tests.client.client_pages"


def test_the_page_tells_every_message_field_and_kind_of_error() -> None:
    for kind in ("open", "choose", "confirm", "cancel", "plan", "volume_started", "report", "refused"):
        assert f"### `{kind}`\n" in TEXT
    for row in (
        "| `memory` | a whole number, 1 to 16777216 or `null` | `null` | MiB |",
        "| `mode` | `list` or `verify` or `restore` | required |",
        "| `not-granted` | The caller has not been given the right to do this",
        "| running | client | `cancel` | ending |",
    ):
        assert row in TEXT
    linked = set(re.findall(r"\]\(#([a-z]+)\)", TEXT))
    headings = {heading.lower().strip("`") for heading in re.findall(r"^##+ (\S+)$", TEXT, re.MULTILINE)}
    assert linked <= headings


def test_nothing_is_said_of_what_is_not_there() -> None:
    modules = (c, models, messages, names)
    for name in FIELDS:
        model, _, field = name.partition(".")
        found = next(getattr(module, model) for module in modules if hasattr(module, model))
        assert not field or field in found.model_fields, name


def test_the_bytes_of_the_page_are_those_of_the_message() -> None:
    (shown,) = re.findall(r"```hex\n(.*?)```", TEXT, re.DOTALL)
    assert bytes.fromhex(shown) == encode_frame(encode_message(Cancel()))


def run(example: str, folder: Path) -> None:
    path = folder / "example.py"
    path.write_text(example)
    runpy.run_path(str(path), run_name="__main__")


def restoring(mode: c.Mode, *middle: Step) -> tuple[Step, ...]:
    last = said(report(mode))
    return ("hear", "open"), said(plan(mode=mode)), *middle, ("hear", "confirm"), last


def test_the_blocking_example_restores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = said(c.QubeFinished(qube=RESULT))
    steps = (*restoring("restore", ("hear", "choose"), said(plan(2)))[:-1], finished, said(report()))
    monkeypatch.setattr(transports, "system_transport", lambda: fake_program(tmp_path, *steps))
    run(BLOCKING, tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "in the backup: work, vault",
        "will be restored: work",
        "work: restored",
        "everything is there",
    ]


def test_the_asyncio_example_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = restoring("verify")
    monkeypatch.setattr(transports, "system_transport", lambda: fake_program(tmp_path, *steps))
    run(ASYNC, tmp_path)
    assert capsys.readouterr().out.splitlines() == ["work: restored", "the backup is good"]


@pytest.mark.parametrize("example", [BLOCKING, ASYNC], ids=["blocking", "asyncio"])
def test_an_example_says_what_is_wrong(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = fake_qrexec(tmp_path, ("exit", 126))
    monkeypatch.setattr(transports, "system_transport", lambda: transports.QrexecTransport(program=program))
    run(example, tmp_path)
    assert "dom0's policy does not let this qube call restore." in capsys.readouterr().out


def test_the_example_with_the_stock_names_restores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script((qube("work"), qube("vault")), steps=[move(0, 64 << 20), finish("work")])
    app = SimpleNamespace(local_name="sys-gui", domains={"sys-usb": SimpleNamespace(name="sys-usb")})
    monkeypatch.setattr(restore, "call_dom0", script)
    monkeypatch.setattr(qubesadmin, "Qubes", lambda: app)
    run(STOCK, tmp_path)
    told = capsys.readouterr().out.splitlines()
    assert told[-3:] == ["64 %", "100 %", "everything is there"]
    assert [line for line in told if line.lstrip().startswith("work |")]
    assert not [line for line in told if "vault" in line]
    assert script.is_closed
    script.refusal = WrongPassphrase("it is another one")
    run(STOCK, tmp_path)
    assert capsys.readouterr().out.startswith("It is another one. ")


def test_the_example_without_the_library_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log: Step = ("say", {"type": "log", "level": "info", "text": "t"})
    fake_qrexec(tmp_path, ("hear", "open"), log, said(plan(1, "list", QUBE, OTHER)), ("hear end",))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run(BYTES, tmp_path)
    assert capsys.readouterr().out.splitlines() == ["work AppVM 0", "vault AppVM 0"]
    fake_qrexec(tmp_path, ("exit", 126))
    with pytest.raises(SystemExit, match="the call ended with exit code 126"):
        run(BYTES, tmp_path)
