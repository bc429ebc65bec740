"""A location of a backup in a qube, as a person names it."""

import pytest

from qubes_restore_svc.errors import UsageError
from qubes_restore_svc.wire.location import QubePath, QubeService

STORAGE = "sys-usb"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("/backups/qubes backup", b"/backups/qubes backup\n"),
        ("/with\nline\r\nends", b"/withlineends\n"),
        ("ssh host 'cat \"/x\"' | gpg -d", b"ssh host 'cat \"/x\"' | gpg -d\n"),
        ("/büro", "/büro\n".encode()),
        ("/not-utf8-\udcff", b"/not-utf8-\xff\n"),
        ("x" * 16383, b"x" * 16383 + b"\n"),
    ],
)
def test_a_path_or_command_is_one_line_as_it_stands(text: str, line: bytes) -> None:
    assert QubePath(STORAGE, text).line == line


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("\r\n", "empty"),
        ("  ", "empty"),
        ("/a\x00b", "control character"),
        ("/a\tb", "control character"),
        ("/a\x1b[2J", "control character"),
        ("/a\x85b", "control character"),
        ("/a\ud800", "UTF-8"),
        ("x" * 16384, "longer"),
    ],
)
def test_what_is_no_path_and_no_command_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        QubePath(STORAGE, text)


@pytest.mark.parametrize("service", ["x", "my.Backup", "my.Backup+", "my.Backup+arg.1_2-3+4"])
def test_a_service_is_a_name_perhaps_with_an_argument(service: str) -> None:
    assert QubeService(STORAGE, service).service == service


@pytest.mark.parametrize(
    "service", ["", "+arg", "a b", "a\n", "a;b", "../a", "a+b c", "a+/b", "ä", "DEFAULT:x", "x" * 201]
)
def test_what_is_no_service_is_refused(service: str) -> None:
    with pytest.raises(UsageError, match="not the name of a qrexec service"):
        QubeService(STORAGE, service)


@pytest.mark.parametrize("qube", ["", "dom0", "@dispvm", "a b", "-d", "sys-usb\n", "x" * 32])
def test_a_backup_lies_in_a_qube(qube: str) -> None:
    with pytest.raises(UsageError):
        QubePath(qube, "/x")
    with pytest.raises(UsageError):
        QubeService(qube, "x")
