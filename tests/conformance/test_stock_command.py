"""What differs from the stock command, both driven on an emulated dom0: docs/differences.md has the table."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conformance import stock_command
from tests.emulation.dom0 import Dom0, wait_until
from tests.emulation.emulated import EmulatedQubes
from tests.support.backup_writer import PASSPHRASE, BackupWriter, ImagePlan, QubePlan

IMAGE = ImagePlan(1 << 20, ((4096, b"data" * 5000),))
#: Of a volume into which nothing has come: what qubesd gives a new qube.
EMPTY = 2 << 30
SETTINGS = {"autostart": "True", "kernelopts": "init=/bin/sh", "memory": "800"}


def qube(name: str, template: str = "debian-12-xfce", **properties: str) -> QubePlan:
    return QubePlan(name, template=template, properties=properties, volumes={"private": IMAGE})


def whole(path: Path) -> None:
    """A backup of two qubes."""
    BackupWriter([qube("one", **SETTINGS), qube("two")], log_n=4).write(path)


def with_home(path: Path) -> None:
    BackupWriter([qube("one")], log_n=4, dom0_home=True).write(path)


def of_a_missing_template(path: Path) -> None:
    BackupWriter([qube("one", "gone"), qube("two")], log_n=4).write(path)


def of_a_name_that_is_taken(path: Path) -> None:
    BackupWriter([qube("personal"), qube("two")], log_n=4).write(path)


def chunk_places(path: Path) -> list[int]:
    """Where the headers of the qubes' chunks stand."""
    return sorted(match.start() for match in re.finditer(rb"vm\d+/private\.img\.000\.enc", path.read_bytes()))


def with_a_flipped_bit(path: Path) -> None:
    """In what was encrypted of the first qube."""
    whole(path)
    data = bytearray(path.read_bytes())
    data[chunk_places(path)[0] + 712] ^= 1
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    """In what was encrypted of the second qube."""
    whole(path)
    path.write_bytes(path.read_bytes()[: chunk_places(path)[-1] + 600])


def nothing(path: Path) -> None:
    """No file at all."""


@dataclass(frozen=True, slots=True)
class Side:
    """What one of the two commands makes of it: `new` are the qubes that are there afterwards, with the size
    of what is in them; `says` is in what it prints, `never` is not."""

    status: int
    new: dict[str, int]
    says: str = ""
    never: str = "Traceback"


@dataclass(frozen=True, slots=True)
class Difference:
    """One line of the table. LOCATION in `words` is the backup."""

    backup: Callable[[Path], None]
    words: str
    stock: Side
    ours: Side
    passphrase: str = PASSPHRASE


BOTH = {"one": IMAGE.size, "two": IMAGE.size}
DIFFERENCES = {
    "the same": Difference(
        whole,
        "LOCATION",
        Side(0, BOTH, "Please install updates for all the restored templates"),
        Side(0, BOTH, "2 of 2 qubes restored.", never="nstall updates"),
    ),
    "a qube behind an option": Difference(
        whole,
        "LOCATION --verify-only one",
        Side(2, {}, "unrecognized arguments: one"),
        Side(0, {}, "1 of 1 qube verified."),
    ),
    "a qube that is not in it": Difference(
        whole, "LOCATION one tow", Side(0, {"one": IMAGE.size}), Side(2, {}, "Did you mean two?")
    ),
    "an exclusion that is not in it": Difference(
        whole, "-x tow LOCATION", Side(0, BOTH), Side(2, {}, "Did you mean two?")
    ),
    "a pattern": Difference(
        whole, "LOCATION t*", Side(0, {}), Side(0, {"two": IMAGE.size}, "1 of 1 qube restored.")
    ),
    "a missing file": Difference(
        nothing,
        "LOCATION",
        Side(1, {}, "Traceback", never="cannot be"),
        Side(2, {}, "cannot be opened: No such file or directory"),
    ),
    "a wrong passphrase": Difference(
        whole,
        "LOCATION",
        Side(1, {}, "Corrupted backup header (hmac verification failed)"),
        Side(1, {}, "the backup does not open with this passphrase"),
        passphrase="wrong",
    ),
    "a flipped bit": Difference(
        with_a_flipped_bit,
        "LOCATION",
        Side(0, {"one": EMPTY, "two": EMPTY}, "-> Done."),
        Side(3, {"two": IMAGE.size}, "1 of 2 qubes restored."),
    ),
    "a flipped bit, verified": Difference(
        with_a_flipped_bit,
        "--verify-only LOCATION",
        Side(1, {}, "failed to decrypt", never="two: verified"),
        Side(3, {}, "two: verified"),
    ),
    "a file that was cut off": Difference(
        cut_off,
        "LOCATION",
        Side(0, {"one": EMPTY, "two": EMPTY}, "-> Done."),
        Side(3, {"one": IMAGE.size}, "The file was cut off"),
    ),
    "a missing template": Difference(
        of_a_missing_template,
        "LOCATION",
        Side(1, {}, "Install them before proceeding", never="fedora-41-xfce"),
        Side(1, {}, "take the default, fedora-41-xfce (--ignore-missing)"),
    ),
    "a name that is taken": Difference(
        of_a_name_that_is_taken,
        "LOCATION",
        Side(1, {}, "There are VMs with conflicting names", never="--name"),
        Side(1, {}, "--name QUBE=NEW"),
    ),
    "dom0's home": Difference(
        with_home,
        "LOCATION --verify-only",
        Side(0, {}, "Verifying dom0..."),
        Side(0, {}, "2 of 2 qubes verified."),
    ),
}


class Bench:
    """Both commands on one emulated dom0, whose home is `home`."""

    def __init__(self, dom0: Dom0, client: Path, folder: Path) -> None:
        self.dom0 = dom0
        self.before = set(dom0.qubes.qubesd.names())
        self.home = folder / "home"
        self.home.mkdir()
        self.backup = folder / "backup"
        self._client = client
        self._passphrase = folder / "passphrase"

    def start(
        self, stock: bool, words: Sequence[str], passphrase: str = PASSPHRASE
    ) -> "subprocess.Popen[str]":
        self._passphrase.write_text(passphrase + "\n")
        environment = self.dom0.qubes.dom0_environment() | {"HOME": str(self.home)}
        if stock:
            environment["PYTHONPATH"] = str(self._client)
            command = [sys.executable, "-B", stock_command.__file__]
        else:
            driver = ["-m", "tests.emulation.restore_driver", str(self.dom0.folder)]
            command = [sys.executable, *driver, "--mgmt-vm", "--memory", "1500"]
        return subprocess.Popen(
            [*command, "-p", str(self._passphrase), *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, stock: bool, words: Sequence[str], passphrase: str = PASSPHRASE) -> tuple[int, str]:
        """The exit status, and what was printed."""
        process = self.start(stock, words, passphrase)
        said, _ = process.communicate(timeout=300)
        return process.returncode, said

    @property
    def new(self) -> dict[str, int]:
        """The qubes that were not there before, and the size of their private volumes."""
        qubesd = self.dom0.qubes.qubesd
        names = set(qubesd.names()) - self.before
        return {name: qubesd.volume_path(name, "private").stat().st_size for name in names}


@pytest.fixture
def bench(checkout: Callable[[str], Path], tmp_path: Path) -> Iterator[Bench]:
    client = checkout("qubes-core-admin-client")
    with EmulatedQubes(tmp_path / "system") as qubes:
        yield Bench(Dom0(qubes, tmp_path / "dom0-files"), client, tmp_path)


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "ours"])
@pytest.mark.parametrize("case", DIFFERENCES.values(), ids=DIFFERENCES)
def test_both_commands_do_what_the_table_of_differences_says(
    bench: Bench, case: Difference, stock: bool
) -> None:
    case.backup(bench.backup)
    words = [str(bench.backup) if word == "LOCATION" else word for word in case.words.split()]
    status, said = bench.run(stock, words, case.passphrase)
    side = case.stock if stock else case.ours
    assert (status, bench.new) == (side.status, side.new), said
    assert side.says in " ".join(said.split()) and side.never not in said, said


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "ours"])
def test_only_the_stock_command_lets_a_backup_start_a_qube_with_the_system(bench: Bench, stock: bool) -> None:
    whole(bench.backup)
    assert bench.run(stock, [str(bench.backup)])[0] == 0
    vm = bench.dom0.qubes.app().domains["one"]
    assert (vm.memory, vm.autostart, vm.kernelopts == "init=/bin/sh") == (800, stock, stock)


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "ours"])
def test_only_the_stock_command_leaves_empty_qubes_behind_a_cancel(bench: Bench, stock: bool) -> None:
    costs = [10, 10, *[19] * 8]
    BackupWriter([qube(name) for name in ("one", "two", "three", "four")], log_n=costs).write(bench.backup)
    process = bench.start(stock, [str(bench.backup)])
    wait_until(lambda: "one" in bench.dom0.qubes.qubesd.names(), "the first qube")
    time.sleep(0.3)  # in the middle of the first key
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert ("Traceback" in said) is stock, said
    if stock:
        assert (process.returncode, set(bench.new)) == (-signal.SIGINT, {"one", "two", "three", "four"})
        assert EMPTY in bench.new.values()
    else:
        assert (process.returncode, bench.new, "cancelled" in said) == (130, {}, True), said
