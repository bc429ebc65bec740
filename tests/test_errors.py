"""Errors: one class a kind, and a text that says where, what and what to do."""

import ast
import errno
import inspect
import re
import sys

import pytest

from qubes_restore_svc import errors
from qubes_restore_svc.errors import (
    ERROR_KINDS,
    BadImage,
    ExitStatus,
    HostFailed,
    NoSpace,
    RestoreError,
    exhausted,
    how_ended,
    unforeseen,
)
from tests.support.fixtures import REPOSITORY

CLASSES = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, RestoreError)
]
EACH = pytest.mark.parametrize("cls", CLASSES)


def test_every_class_is_found_by_its_kind_and_no_two_share_one() -> None:
    assert len(CLASSES) > 30
    assert sorted(ERROR_KINDS) == sorted(cls.kind for cls in CLASSES)
    assert all(ERROR_KINDS[cls.kind] is cls for cls in CLASSES)
    assert len({cls.kind for cls in CLASSES}) == len(CLASSES)


@EACH
def test_a_kind_is_a_word_of_the_class_itself(cls: type[RestoreError]) -> None:
    assert "kind" in vars(cls)
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", cls.kind)
    assert len(cls.kind) <= 64


@EACH
def test_advice_is_a_sentence_and_the_docstring_says_what_happened(cls: type[RestoreError]) -> None:
    assert cls.default_advice == "" or re.fullmatch(r"[A-Z`-].*\.", cls.default_advice)
    assert cls.__doc__
    assert cls.__doc__.rstrip().endswith(".")


@EACH
def test_no_worker_can_choose_the_exit_status(cls: type[RestoreError]) -> None:
    assert cls.exit_status is ExitStatus.NOTHING or not cls.for_a_worker_to_say


@EACH
def test_every_class_is_made_and_printed_the_same_way(cls: type[RestoreError]) -> None:
    error = cls("the reason", qube="work", volume="root", chunk=3)
    advice = f" {cls.default_advice}" if cls.default_advice else ""
    assert str(error) == "work/root, chunk 3: the reason" + (f".{advice}" if advice else "")
    assert isinstance(error, Exception)
    assert error.args == ("the reason",)


def test_only_the_places_that_are_known_are_printed() -> None:
    assert BadImage("r", advice="").place == ""
    assert str(BadImage("r", advice="")) == "r"
    assert BadImage("r", qube="work").place == "work"
    assert BadImage("r", volume="root").place == "root"
    assert BadImage("r", chunk=0).place == "chunk 0"
    assert BadImage("r", qube="work", chunk=0).place == "work, chunk 0"
    assert BadImage("r", qube="", volume="root").place == "root"


def test_advice_can_be_replaced_and_left_out() -> None:
    assert str(BadImage("r", advice="Do this.")) == "r. Do this."
    assert str(BadImage("r", advice="")) == "r"
    assert BadImage("r").advice == BadImage.default_advice != ""


def test_places_are_filled_in_once() -> None:
    error = BadImage("r", volume="root")
    assert error.at(qube="work", volume="private", chunk=0) is error
    assert (error.qube, error.volume, error.chunk) == ("work", "root", 0)
    error.at(qube="other", chunk=5)
    assert (error.qube, error.volume, error.chunk) == ("work", "root", 0)
    error.at()
    assert error.place == "work/root, chunk 0"


def test_every_error_ends_a_run_with_the_status_of_its_class() -> None:
    statuses = {"usage": 2, "bad-configuration": 2, "cancelled": 130}
    assert {kind: cls.exit_status for kind, cls in ERROR_KINDS.items()} == {
        kind: statuses.get(kind, 1) for kind in ERROR_KINDS
    }


@pytest.mark.parametrize(
    ("path", "row"),
    [
        ("README.md", r"^\| (\d+) \| "),
        ("man/qubes-restore-svc.1", r"^\.TP\n\.B (\d+)$"),
        ("man/qvm-backup-restore.1", r"^\.TP\n\.B (\d+)$"),
    ],
)
def test_the_documents_tell_every_exit_status_and_no_other(path: str, row: str) -> None:
    told = [int(number) for number in re.findall(row, (REPOSITORY / path).read_text(), re.MULTILINE)]
    assert told == list(ExitStatus)


def test_a_full_disk_is_a_failure_of_the_host() -> None:
    assert issubclass(NoSpace, HostFailed)
    assert ERROR_KINDS["no-space"] is NoSpace
    assert ERROR_KINDS["host-failed"] is HostFailed
    assert ERROR_KINDS["error"] is RestoreError


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (BlockingIOError(errno.EAGAIN, "x"), "no more processes or threads can be started in the worker"),
        (RuntimeError("can't start new thread"), "no more processes or threads can be started in the worker"),
        (OSError(errno.EMFILE, "x"), "one process has too many files open in the worker"),
        (OSError(errno.ENFILE, "x"), "the system has too many files open in the worker"),
        (OSError(errno.ENOMEM, "x"), "there is no memory left in the worker"),
        (OSError(errno.ENOBUFS, "x"), "there is no memory left in the worker"),
        (MemoryError(), "there is no memory left in the worker"),
    ],
)
def test_what_has_run_out_is_named_with_what_to_do(error: Exception, words: str) -> None:
    found = exhausted(error, "in the worker")
    assert found is not None and found.reason == words
    assert found.advice
    assert unforeseen(error, "in the worker").reason == words


@pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), RuntimeError("x"), KeyError("secret"), OSError()])
def test_what_nobody_provided_for_is_told_without_its_text(error: Exception) -> None:
    assert exhausted(error) is None
    with pytest.raises(type(error)) as caught:
        raise error
    told = unforeseen(caught.value)
    assert type(told) is RestoreError
    assert re.fullmatch(
        rf"something failed that must not fail \({type(error).__name__}, test_errors.py line \d+\)",
        told.reason,
    )


def test_an_error_that_is_known_stays_what_it_is() -> None:
    error = BadImage("r")
    assert unforeseen(error) is error


def test_errors_need_the_standard_library_only() -> None:
    tree = ast.parse(inspect.getsource(errors))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    assert modules
    assert [name for name in modules if (name or "").split(".")[0] not in sys.stdlib_module_names] == []


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (5, "ended with exit code 5"),
        (-9, "was killed by signal 9 (SIGKILL)"),
        (-63, "was killed by signal 63"),
        (137, "ended with exit code 137, as after signal 9 (SIGKILL)"),
        (255, "ended with exit code 255"),
    ],
)
def test_the_end_of_a_program_is_told_with_the_name_of_its_signal(status: int, said: str) -> None:
    assert how_ended(status) == said


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (102348, "99.9 KiB"),
        (102350, "100 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (8 << 20, "8.0 MiB"),
        (3 << 29, "1.5 GiB"),
        (1023 << 30, "1023 GiB"),
        (16 << 40, "16.0 TiB"),
        (1 << 63, "8388608.0 TiB"),
    ],
)
def test_a_size_is_given_in_its_largest_unit(size: int, text: str) -> None:
    assert errors.size_text(size) == text
