"""The command line: what is accepted becomes one value, and what is not ends with status 2."""

from pathlib import Path

import pytest

from qubes_restore_svc import __version__
from qubes_restore_svc.archive.filters import FILTERS
from qubes_restore_svc.errors import UsageError
from qubes_restore_svc.kdf.engine import best_engine
from qubes_restore_svc.local import command as arguments_module
from qubes_restore_svc.local.command import parse_arguments


def test_everything_at_once() -> None:
    line = (
        "extract b.qbackup --to out work -p pw vault --memory 2000 --jobs 3 -x a -Z zstd --exclude c"
        " --ignore-size-limit --ignore-cost-limit --no-sandbox -v --report r.json"
    )
    arguments = parse_arguments(line.split())
    assert arguments.command == "extract"
    assert arguments.backup == "b.qbackup"
    assert arguments.target == Path("out")
    assert arguments.qubes == ("work", "vault")
    assert arguments.exclude == ("a", "c")
    assert arguments.passphrase_file == "pw"
    assert arguments.memory == 2000 << 20
    assert arguments.jobs == 3
    assert arguments.compression_filter == "zstd"
    assert arguments.ignore_size_limit and arguments.ignore_cost_limit
    assert not arguments.sandbox
    assert arguments.verbose and not arguments.quiet
    assert arguments.report == Path("r.json")


def test_the_least_and_its_defaults() -> None:
    arguments = parse_arguments(["verify", "b"])
    assert (arguments.backup, arguments.qubes, arguments.exclude, arguments.target) == ("b", (), (), None)
    assert (arguments.memory, arguments.jobs, arguments.compression_filter) == (None, None, None)
    assert arguments.sandbox
    assert not (
        arguments.verbose
        or arguments.quiet
        or arguments.ignore_size_limit
        or arguments.ignore_cost_limit
        or arguments.json
    )


@pytest.mark.parametrize(
    "line",
    [
        "verify b work vault -p pw",
        "verify -p pw b work vault",
        "verify b -p pw work vault",
        "verify b work -p pw vault",
        "verify b work vault -p pw work",
        "verify -p pw -- b work vault",
        "verify b -p pw -- work vault",
    ],
)
def test_options_may_stand_anywhere_and_a_qube_twice_is_a_qube(line: str) -> None:
    arguments = parse_arguments(line.split())
    assert (arguments.backup, arguments.passphrase_file) == ("b", "pw")
    assert arguments.qubes == ("work", "vault")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "verify",
        "restore b",
        "list b work",
        "list b --to out",
        "list b --report r",
        "list b -x work",
        "verify b --to out",
        "extract b",
        "extract b --to",
        "verify b --no",
        "verify b --mem 5",
        "verify b --wrong work",
        "verify b work --wrong",
        "verify b --memory 0",
        "verify b --memory -5",
        "verify b --memory 1.5",
        "verify b --memory ٣",
        "verify b --memory 1073741825",
        "verify b --jobs 0",
        "verify b --jobs 1025",
        "verify b --jobs all",
        "verify b -Z rar",
        "verify b -v -q",
    ],
)
def test_what_has_no_meaning_is_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        parse_arguments(line.split())
    assert refused.value.code == 2
    said = capsys.readouterr().err
    command = line.partition(" ")[0]
    shown = command if command in ("list", "verify", "extract") else "[-h]"
    assert said.startswith(f"usage: qubes-restore-svc {shown}")


@pytest.mark.parametrize("option", ["--to", "--report"])
def test_an_empty_name_is_not_the_current_directory(option: str) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["extract", "b", "--to", "out", option, ""])


def test_standard_input_cannot_be_both() -> None:
    with pytest.raises(UsageError, match="cannot both come from standard input"):
        parse_arguments(["verify", "-", "-p", "-"])


def test_the_filters_are_those_that_the_worker_knows() -> None:
    for name in FILTERS:
        assert parse_arguments(["verify", "b", "-Z", name]).compression_filter == name
    with pytest.raises(SystemExit):
        parse_arguments(["verify", "b", "-Z", "compress"])


@pytest.mark.parametrize("command", ["list", "verify", "extract"])
def test_help_tells_the_exit_statuses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "130 cancelled" in said
    assert "BACKUP" in said
    assert all(len(line) <= 100 for line in said.splitlines())


def test_the_version_says_what_derives_the_keys(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nobody_answers() -> None:
        return None

    for engine in (best_engine().name, "unknown (the worker cannot be started)"):
        with pytest.raises(SystemExit) as left:
            parse_arguments(["--version"])
        assert left.value.code == 0
        said = capsys.readouterr().out
        assert said == f"qubes-restore-svc {__version__}\nkey derivation: {engine}\n"
        monkeypatch.setattr(arguments_module, "worker_engine", nobody_answers)
