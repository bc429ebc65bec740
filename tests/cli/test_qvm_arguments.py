"""The command line of `qvm-backup-restore --mgmt-vm`: all of the stock command's, and what is ours."""

from pathlib import Path

import pytest

from qubes_restore_svc import __version__
from qubes_restore_svc.cli.qvm_arguments import RestoreArguments, parse_restore_arguments
from qubes_restore_svc.errors import UsageError


def parsed(line: str) -> RestoreArguments:
    return parse_restore_arguments(["--mgmt-vm", *line.split()])


def test_the_least_and_its_defaults() -> None:
    arguments = parsed("backup")
    assert (arguments.location, arguments.storage_qube, arguments.location_is_service) == (
        "backup",
        None,
        False,
    )
    assert (arguments.qubes, arguments.exclude, arguments.dom0_home) == ((), (), None)
    assert (arguments.conflicts, arguments.missing) == ("refuse", "refuse")
    assert (arguments.mgmt_template, arguments.memory, arguments.vcpus) == (None, None, None)
    assert (arguments.pool, arguments.name, arguments.template) == (None, [], [])
    assert (arguments.netvm, arguments.allow) == ([], [])
    assert (arguments.passphrase_file, arguments.compression_filter, arguments.report) == (None, None, None)
    assert not (arguments.verify_only or arguments.ignore_username_mismatch or arguments.ignore_size_limit)
    assert (arguments.loudness, arguments.yes, arguments.must_ask) == (0, False, True)


def test_every_option_of_the_stock_command() -> None:
    arguments = parsed(
        "--verify-only --skip-broken --ignore-missing --skip-conflicting --rename-conflicting -x a"
        " --exclude b --skip-dom0-home --ignore-username-mismatch --ignore-size-limit -Z zstd -d sys-usb -p -"
        " --auto-close --location-is-service --paranoid-mode --plan-b -v -v -q --force-root my.Backup+x work"
    )
    expected: dict[str, object] = {
        "location": "my.Backup+x",
        "storage_qube": "sys-usb",
        "location_is_service": True,
        "qubes": ("work",),
        "exclude": ("a", "b"),
        "verify_only": True,
        "skip_broken": True,
        "ignore_missing": True,
        "skip_conflicting": True,
        "rename_conflicting": True,
        "dom0_home": False,
        "ignore_username_mismatch": True,
        "ignore_size_limit": True,
        "ignore_cost_limit": False,
        "stall_timeout": None,
        "compression_filter": "zstd",
        "passphrase_file": "-",
        "yes": False,
        "mgmt_template": None,
        "memory": None,
        "vcpus": None,
        "pool": None,
        "report": None,
        "digest": None,
        "loudness": 1,
    }
    assert {name: getattr(arguments, name) for name in expected} == expected


def test_the_long_and_the_short_names_are_the_same() -> None:
    short = parsed("-x a -Z gzip -d sys-usb -p pw -v -q -q b")
    long = parsed(
        "--exclude a --compression-filter gzip --dest-vm sys-usb --passphrase-file pw --verbose --quiet"
        " --quiet b"
    )
    assert short == long


def test_what_is_ours() -> None:
    arguments = parsed(
        "--mgmt-template fedora-dvm --memory 6000 --vcpus 4 --pool vault-pool --report r.json --yes"
        " --dom0-home --template deb --template work=fed --netvm work=none --netvm net --name a=b"
        " --allow property:autostart b"
    )
    assert arguments.template == [("", "deb"), ("work", "fed")]
    assert arguments.netvm == [("work", "none"), ("", "net")]
    assert (arguments.name, arguments.allow) == ([("a", "b")], ["property:autostart"])
    assert (arguments.mgmt_template, arguments.memory, arguments.vcpus) == ("fedora-dvm", 6000, 4)
    assert (arguments.pool, arguments.report, arguments.dom0_home) == ("vault-pool", Path("r.json"), True)
    assert arguments.yes and not arguments.must_ask


@pytest.mark.parametrize("line", ["--verify-only b", "--yes b", "-p pw b", "-p - b"])
def test_nobody_is_asked(line: str) -> None:
    assert not parsed(line).must_ask


def test_a_comparison_is_neither_a_restore_nor_a_verification() -> None:
    found = {line: parsed(f"{line} b") for line in ("", "--verify-only", "--compare", "--compare -x dom0")}
    assert [one.mode for one in found.values()] == ["restore", "verify", "compare", "compare"]
    assert [one.must_ask for one in found.values()] == [True, False, False, False]
    with pytest.raises(SystemExit):
        parsed("--verify-only --compare b")


def test_what_restores_more_goes_first_as_in_the_stock_command() -> None:
    assert parsed("--skip-conflicting b").conflicts == "skip"
    assert parsed("--skip-conflicting --rename-conflicting b").conflicts == "rename"
    assert parsed("--skip-broken b").missing == "skip"
    assert parsed("--skip-broken --ignore-missing b").missing == "default"


def test_long_options_can_be_abbreviated_as_in_the_stock_command() -> None:
    arguments = parsed("--verify --skip-b --pass pw --comp gzip --ignore-m --loc --dest sys-usb --ex a b")
    assert arguments.verify_only and arguments.skip_broken and arguments.ignore_missing
    assert (arguments.passphrase_file, arguments.compression_filter) == ("pw", "gzip")
    assert (arguments.storage_qube, arguments.location_is_service, arguments.exclude) == (
        "sys-usb",
        True,
        ("a",),
    )


#: The options of the stock command that are written out (R4.3), without those of one letter.
STOCK = (
    "--verbose", "--quiet", "--force-root", "--help", "--verify-only", "--skip-broken", "--ignore-missing",
    "--skip-conflicting", "--rename-conflicting", "--exclude", "--skip-dom0-home",
    "--ignore-username-mismatch", "--ignore-size-limit", "--compression-filter", "--dest-vm",
    "--passphrase-file", "--auto-close", "--location-is-service", "--paranoid-mode", "--plan-b", "--version",
)  # fmt: skip
#: What was not clear before our options for choices came, or is about the command itself.
_NOT_OURS = ("--paranoid-mode", "--plan-b", "--help", "--version", "--force-root")


@pytest.mark.parametrize("option", [option for option in STOCK if option not in _NOT_OURS])
def test_what_abbreviates_one_option_of_the_stock_command_does_so_here(option: str) -> None:
    takes = {"--exclude", "--compression-filter", "--dest-vm", "--passphrase-file"}
    value = {"--compression-filter": "gzip"}.get(option, "x") if option in takes else ""
    least = next(
        length
        for length in range(3, len(option) + 1)
        if [one for one in (*STOCK, *OURS_BEFORE) if one.startswith(option[:length])] == [option]
    )
    for length in range(least, len(option)):
        assert parsed(f"-d q {option[:length]} {value} b") == parsed(f"-d q {option} {value} b")


#: Ours that were there before, and have narrowed what abbreviates an option of the stock command.
OURS_BEFORE = (
    "--dom0-home", "--pool", "--ignore-cost-limit", "--stall-timeout", "--mgmt-vm", "--mgmt-template",
    "--memory", "--vcpus", "--yes", "--report",
)  # fmt: skip


def test_dom0_is_the_place_of_a_file_also_when_it_is_named() -> None:
    assert parsed("-d dom0 b").storage_qube is None


@pytest.mark.parametrize(
    "line",
    [
        "b work vault -p pw",
        "b -p pw work vault",
        "-p pw b work vault work",
        "-p pw -- b work vault",
        "b -p pw work -- vault",
        "b -p pw work vault --",
    ],
)
def test_options_may_stand_anywhere_and_a_qube_twice_is_a_qube(line: str) -> None:
    arguments = parsed(line)
    assert (arguments.location, arguments.passphrase_file, arguments.qubes) == ("b", "pw", ("work", "vault"))


def test_after_two_hyphens_everything_is_a_name() -> None:
    arguments = parsed("-- -b --yes")
    assert (arguments.location, arguments.qubes, arguments.yes) == ("-b", ("--yes",), False)


def test_a_hyphen_alone_is_standard_input() -> None:
    assert parsed("- work").location == "-"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--",
        "-p pw",
        "b --nonsense",
        "b -d",
        "b --skip",
        "b --re",
        "b -Z sh",
        "b --memory 0",
        "b --memory 1.5",
        "b --vcpus 1025",
        "b --pool=",
        "b --mgmt-template=",
        "b --name work",
        "b --name =work",
        "b --name work=a=b",
        "b --template=",
        "b --template work=",
        "b --netvm a=b=c",
        "b --netvm wo~rk",
        "b -d=",
        "b --report=",
        "b --dom0-home --skip-dom0-home",
    ],
)
def test_what_has_not_the_form_ends_with_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = line.replace("-d=", "--dest-vm=").split()
    with pytest.raises(SystemExit) as left:
        parse_restore_arguments(["--mgmt-vm", *words])
    assert left.value.code == 2
    assert "usage: qvm-backup-restore --mgmt-vm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--location-is-service b", "--location-is-service requires -d"),
        ("--location-is-service -d dom0 b", "--location-is-service requires -d"),
        ("--skip-dom0-home b work dom0", "dom0 is named"),
        ("--compare b dom0", "dom0's home cannot be compared"),
        ("--compare --dom0-home b", "dom0's home cannot be compared"),
        ("-p - -", "cannot both come from standard input"),
        ("-d dom0 -p - -", "cannot both come from standard input"),
    ],
)
def test_what_contradicts_itself_is_refused(line: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parsed(line)


def test_a_hyphen_in_another_qube_is_not_our_standard_input() -> None:
    assert parsed("-d sys-usb -p - -").location == "-"


def test_the_help_fits_and_the_version_says_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("--help", "-h"):
        with pytest.raises(SystemExit) as left:
            parsed(line)
        assert left.value.code == 0
        said = capsys.readouterr().out
        assert "130 cancelled" in said and "LOCATION" in said and "QUBE" in said
        assert all(len(text) < 80 for text in said.splitlines())
    with pytest.raises(SystemExit) as left:
        parsed("--version")
    assert left.value.code == 0
    assert capsys.readouterr().out == f"qvm-backup-restore --mgmt-vm (qubes-restore-svc {__version__})\n"
