"""The man pages and the README tell exactly the options, filters and exit statuses that the commands have.

The man pages also format without a complaint.
"""

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qubes_restore_svc.archive.filters import FILTERS
from qubes_restore_svc.cli import inputs
from qubes_restore_svc.cli.qvm_arguments import parse_restore_arguments
from qubes_restore_svc.errors import EXIT_MEANINGS, ExitStatus
from qubes_restore_svc.local.command import parse_arguments
from qubes_restore_svc.manager import launcher
from qubes_restore_svc.watch.command import watch_parser
from tests.support.fixtures import REPOSITORY

PAGES = sorted((REPOSITORY / "man").glob("*.1"))

#: An option in a text: not inside a word, and not the hyphens alone.
_OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")


README = (REPOSITORY / "README.md").read_text()


def options_in(text: str) -> set[str]:
    return set(_OPTION.findall(text))


def described(page: str) -> set[str]:
    """The options that have an entry of their own: those in the line after a `.TP`."""
    lines = (REPOSITORY / "man" / page).read_text().splitlines()
    heads = [line for before, line in itertools.pairwise(lines) if before == ".TP"]
    return {option for head in heads for option in _OPTION.findall(head.replace("\\-", "-"))}


def in_help(text: str) -> set[str]:
    """The options that are listed: those at the beginning of a line, before what is said of them."""
    heads = [re.split(r"\s{2,}", line.strip())[0] for line in text.splitlines() if line.startswith("  -")]
    return {option for head in heads for option in _OPTION.findall(head)}


def helped(capsys: pytest.CaptureFixture[str], *words: str) -> set[str]:
    with pytest.raises(SystemExit):
        parse_restore_arguments(words) if words[0] == "--mgmt-vm" else parse_arguments(words)
    return in_help(capsys.readouterr().out)


def test_the_page_of_qvm_backup_restore_tells_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = helped(capsys, "--mgmt-vm", "--help")
    assert {"-x", "--exclude", "--plan-b", "--mgmt-vm", "-h"} <= options
    assert described("qvm-backup-restore.1") == options


def options_of_qubes_restore_svc(capsys: pytest.CaptureFixture[str]) -> set[str]:
    options = helped(capsys, "--help")
    for command in ("list", "verify", "extract", "compare"):
        options |= helped(capsys, command, "--help")
    assert {"--to", "--no-sandbox", "--json", "--version"} <= options
    return options


def test_the_page_of_qubes_restore_svc_tells_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert described("qubes-restore-svc.1") == options_of_qubes_restore_svc(capsys)


def test_the_readme_tells_every_option_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    said = options_of_qubes_restore_svc(capsys)
    table = options_in(" ".join(re.findall(r"^\| (`-.*?) \|", README, re.MULTILINE)))
    assert {"-p", "--memory", "--json"} <= table <= said
    others = {"--nosignature", "-tools", "-dom0", "-vm", "-manager"}  # rpm's, and ends of names of packages
    of_both = said | helped(capsys, "--mgmt-vm", "--help")
    assert options_in(" ".join(re.findall(r"`(-.*?)`", README))) <= of_both | others
    shorts = {"--passphrase-file": "-p", "--exclude": "-x", "--verbose": "-v", "--quiet": "-q"}
    long = {option for option in said if option.startswith("--")} - {"--help"}
    assert {shorts.get(option, option) for option in long} <= options_in(README)


def test_the_page_of_qubes_restore_manager_tells_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launcher.main(["--help"])
    options = in_help(capsys.readouterr().out)
    assert "--log" in options
    assert described("qubes-restore-manager.1") == options


def test_the_page_of_qubes_restore_watch_tells_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = set[str]()
    for words in (["--help"], ["verify", "--help"], ["show", "--help"], ["collect", "--help"]):
        with pytest.raises(SystemExit):
            watch_parser().parse_args(words)
        options |= in_help(capsys.readouterr().out)
    assert {"--expect", "--state", "--version"} <= options
    assert described("qubes-restore-watch.1") == options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_speaks_of_no_option_that_it_does_not_describe(page: Path) -> None:
    spoken = set(_OPTION.findall(page.read_text().replace("\\-", "-")))
    assert spoken <= described(page.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.parametrize(
    "formatter",
    [("groff", "-man", "-ww", "-Tutf8", "-z"), ("mandoc", "-T", "lint", "-W", "warning")],
    ids=str,
)
def test_a_page_formats_without_a_complaint(formatter: tuple[str, ...], page: Path) -> None:
    if shutil.which(formatter[0]) is None:
        pytest.skip(f"{formatter[0]} is not installed")
    done = subprocess.run([*formatter, page], capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("page", ["qubes-restore-svc.1", "qvm-backup-restore.1"])
def test_a_page_tells_every_exit_status_in_the_words_of_the_table(page: str) -> None:
    section = (REPOSITORY / "man" / page).read_text().partition(".SH EXIT STATUS\n")[2].partition("\n.SH")[0]
    assert _told(re.findall(r"^\.B (\d+)\n(.*)$", section, re.MULTILINE)) == EXIT_MEANINGS


def test_readme_and_clients_are_told_every_exit_status_in_the_words_of_the_table() -> None:
    assert _told(re.findall(r"^\| (\d+) \| (.*) \|$", README, re.MULTILINE)) == EXIT_MEANINGS
    clients = " ".join((REPOSITORY / "docs" / "clients.md").read_text().split())
    assert ", ".join(f"{status} {text}" for status, text in EXIT_MEANINGS.items()) in clients


def _told(rows: list[tuple[str, str]]) -> dict[int, str]:
    """What is said of each status, as far as the table says it; all of it if that is something else."""
    told = {}
    for number, text in rows:
        status, said = int(number), text[0].lower() + text[1:]
        meant = EXIT_MEANINGS[ExitStatus(status)]
        told[status] = meant if said.startswith(meant) else said
    return told


def test_commands_pages_and_readme_have_the_filters_of_the_worker() -> None:
    assert inputs.FILTERS == FILTERS
    for page in ("qubes-restore-svc.1", "qvm-backup-restore.1"):
        row = (REPOSITORY / "man" / page).read_text().partition("compression-filter")[2].partition("\n.TP")[0]
        named = re.search(r"^\.BR (.* or .*)$", row, re.MULTILINE)
        assert named, page
        assert tuple(re.findall(r"\b(?!or\b)\w+", named[1])) == FILTERS
    told = re.findall(r"^\| `-Z FILTER`.*: (.*) \|$", README, re.MULTILINE)
    assert [tuple(filters.split(", ")) for filters in told] == [FILTERS]


def test_there_is_a_page_for_each_command() -> None:
    commands = sorted(path.name for path in (REPOSITORY / "bin").iterdir())
    assert commands == [
        "qubes-restore-manager",
        "qubes-restore-svc",
        "qubes-restore-watch",
        "qvm-backup-restore",
    ]
    assert [page.stem for page in PAGES] == commands
