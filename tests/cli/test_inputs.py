"""What is given besides options: the backup in every shape a path can have, and the passphrase."""

import getpass
import io
import os
import socket
import sys
import threading
from pathlib import Path

import pytest

from qubes_restore_svc.cli.inputs import (
    Passphrases,
    archive_size,
    check_target,
    open_archive,
    read_passphrase_file,
)
from qubes_restore_svc.errors import Cancelled, UsageError
from qubes_restore_svc.wire.names import MAX_PASSPHRASE

# --- The backup ------------------------------------------------------------------------------------


def test_a_file_is_opened_for_reading_only_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "backup"
    path.write_bytes(b"12345")
    fd = open_archive(str(path))
    try:
        assert archive_size(fd) == 5
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
        with pytest.raises(OSError):
            os.write(fd, b"x")
    finally:
        os.close(fd)


def test_the_size_is_what_is_still_to_be_read(tmp_path: Path) -> None:
    path = tmp_path / "backup"
    path.write_bytes(b"12345")
    fd = open_archive(str(path))
    try:
        os.lseek(fd, 2, os.SEEK_SET)
        assert archive_size(fd) == 3
        os.lseek(fd, 9, os.SEEK_SET)
        assert archive_size(fd) == 0
    finally:
        os.close(fd)


def test_a_named_pipe_is_waited_for_and_has_no_size(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    threading.Timer(0.1, lambda: path.open("wb").close()).start()
    fd = open_archive(str(path))
    assert archive_size(fd) is None
    os.close(fd)


def test_what_cannot_be_a_backup_is_refused_with_its_name(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    for name, reason in {
        "missing": "cannot be opened: No such file",
        "socket": "cannot be opened",
        ".": "is a directory, not a backup",
        "bad\0name": "cannot be opened",
    }.items():
        with pytest.raises(UsageError, match=reason) as refused:
            open_archive(f"{tmp_path}/{name}")
        assert refused.value.reason.startswith(str(tmp_path))


def test_a_directory_that_qubes_r1_wrote_is_refused_by_its_format(tmp_path: Path) -> None:
    (tmp_path / "qubes.xml").touch()
    with pytest.raises(UsageError, match="format 1") as refused:
        open_archive(str(tmp_path))
    assert "R3.2" in refused.value.advice


def test_the_name_of_a_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        open_archive(f"{tmp_path}/\x1b[2J\x9b31m")
    assert refused.value.reason.isprintable()


def test_a_terminal_is_no_backup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "isatty", lambda fd: True)
    with pytest.raises(UsageError, match="terminal"):
        open_archive("-")


# --- The target --------------------------------------------------------------------------------------


def test_a_target_is_a_directory_or_the_next_one_to_be(tmp_path: Path) -> None:
    check_target(tmp_path)
    check_target(tmp_path / "new")
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    check_target(link)


def test_what_can_be_no_target(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling", "a/b", "file/b"):
        with pytest.raises(UsageError):
            check_target(tmp_path / name)


# --- The passphrase ------------------------------------------------------------------------------------

FILES = {
    b"secret\n": "secret",
    b"secret": "secret",
    b"secret\r\n": "secret",
    b"secret\nsecond line\n": "secret",
    b"  spaces belong to it \t\n": "  spaces belong to it \t",
    b"\xef\xbb\xbfsecret\n": "secret",
    "pässwörd £ 鍵\n".encode(): "pässwörd £ 鍵",
    b"x" * MAX_PASSPHRASE + b"\n": "x" * MAX_PASSPHRASE,
    "鍵".encode() * MAX_PASSPHRASE + b"\r\n": "鍵" * MAX_PASSPHRASE,
    "\U0001f511".encode() * MAX_PASSPHRASE: "\U0001f511" * MAX_PASSPHRASE,
}
REFUSED = {
    b"": "is empty",
    b"\n": "is empty",
    b"\r\n": "is empty",
    b"secret\xff\n": "not UTF-8",
    "secret\n".encode("utf-16"): "not UTF-8",
    b"x" * (MAX_PASSPHRASE + 1): "longer than 4096",
    "\U0001f511".encode() * (MAX_PASSPHRASE + 1): "longer than 4096",
    b"x" * 1_000_000: "longer than 4096",
}


@pytest.mark.parametrize("content", FILES, ids=range(len(FILES)))
def test_the_passphrase_is_the_first_line_of_a_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "passphrase"
    path.write_bytes(content)
    assert read_passphrase_file(str(path)) == FILES[content]


def test_white_space_at_the_end_is_left_off_if_the_passphrase_fails_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "passphrase"
    path.write_bytes(b"  my secret \t\r\n")
    found = Passphrases(str(path), stdin_is_backup=False)
    assert (found.first(), found.has_other) == ("  my secret \t", True)
    assert (found.other(), found.has_other, found.other()) == ("  my secret", False, None)
    assert "without the white space at its end" in capsys.readouterr().err
    path.write_bytes(b" my secret\n")
    found = Passphrases(str(path), stdin_is_backup=False)
    assert (found.first(), found.has_other, found.other()) == (" my secret", False, None)


def test_who_types_has_three_tries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["one", "two", "three", "four"])
    monkeypatch.setattr(os, "isatty", lambda fd: True)
    monkeypatch.setattr(getpass, "getpass", lambda prompt: next(typed))
    found = Passphrases(None, stdin_is_backup=False)
    assert [found.first(), found.other(), found.other(), found.other()] == ["one", "two", "three", None]
    assert capsys.readouterr().err.count("does not open with this passphrase. Try again.") == 2


@pytest.mark.parametrize("content", REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_passphrase_is_refused_and_not_quoted(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "passphrase"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=REFUSED[content]) as refused:
        read_passphrase_file(str(path))
    assert "secret" not in str(refused.value) and "xxx" not in str(refused.value)
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


@pytest.mark.parametrize("name", ["missing", ".", "bad\0name", "/dev/null"])
def test_a_passphrase_file_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        read_passphrase_file(name if name.startswith("/") else f"{tmp_path}/{name}")


def test_the_passphrase_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "isatty", lambda fd: False)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b" secret \r\nmore")))
    assert Passphrases("-", stdin_is_backup=False).first() == " secret "


def test_what_is_typed_in_answer_to_a_dash_is_not_echoed_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "isatty", lambda fd: True)
    monkeypatch.setattr(getpass, "getpass", lambda prompt: "typed")
    assert Passphrases("-", stdin_is_backup=False).first() == "typed"


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (EOFError(), UsageError),
        (UnicodeDecodeError("utf-8", b"secret\xff", 6, 7, "invalid start byte"), UsageError),
        (Cancelled("it was cancelled"), Cancelled),
    ],
)
def test_a_prompt_that_is_not_answered(
    raised: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(prompt: str) -> str:
        raise raised

    monkeypatch.setattr(os, "isatty", lambda fd: True)
    monkeypatch.setattr(getpass, "getpass", answer)
    with pytest.raises(expected) as ended:
        Passphrases(None, stdin_is_backup=False).first()
    assert "secret" not in str(ended.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 300, "cannot be used: File name too long"),
        ("a\0b", "cannot be used: that is no name of a directory"),
        ("missing/out", "missing is no directory. Create it first."),
        ("file", "is not a directory"),
        ("file/out", "cannot be used: Not a directory"),
        ("loop/out", "cannot be used: Too many levels of symbolic links"),
    ],
)
def test_a_target_that_cannot_be_one_is_a_mistake_of_the_call(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError) as caught:
        check_target(tmp_path / name)
    assert words in str(caught.value)
