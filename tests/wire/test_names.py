"""Patterns: each takes what Qubes takes, and nothing that merely looks like it."""

import string
import time
import unicodedata
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from qubes_restore_svc.wire import names


def accepts(kind: Any, value: object) -> bool:
    try:
        return bool(TypeAdapter(kind).validate_python(value, strict=True) == value)
    except ValidationError:
        return False


#: Type, a value that fits, the characters that may stand in the middle, longest length.
WORD = string.ascii_letters + string.digits
PRINTABLE = "".join(map(chr, range(0x20, 0x7F)))
PATTERNS: dict[str, tuple[Any, str, str, int]] = {
    "QubeName": (names.QubeName, "ab", WORD + "_.-", 31),
    "NetvmName": (names.NetvmName, "ab", WORD + "_.-", 31),
    "QubeKey": (names.QubeKey, "ab", WORD + "_-", 64),
    "LabelName": (names.LabelName, "ab", WORD + "_.-", 64),
    "HomeUser": (names.HomeUser, "ab", WORD + "_.+@-", 255),
    "PropertyName": (names.PropertyName, "ab", string.ascii_lowercase + string.digits + "_", 64),
    "FeatureName": (names.FeatureName, "ab", WORD + "_.+:-", 255),
    "SettingValue": (names.SettingValue, "ab", PRINTABLE, 65_000),
    "TagName": (names.TagName, "ab", WORD + "_-", 255),
    "BackupId": (names.BackupId, "ab", WORD + "-", 128),
    "FilterName": (names.FilterName, "ab", string.ascii_lowercase + string.digits + "-", 32),
    "ErrorKind": (names.ErrorKind, "ab", string.ascii_lowercase + "-", 64),
    "AppmenuName": (names.AppmenuName, "ab", WORD + "_.+@ -", 255),
}
EACH = pytest.mark.parametrize("name", PATTERNS)


@EACH
def test_every_character_stands_for_itself_or_is_refused(name: str) -> None:
    kind, _, allowed, _ = PATTERNS[name]
    adapter = TypeAdapter(kind)
    taken = set()
    for code in [*range(0x300), *range(0x2000, 0x2100), *range(0xFF00, 0xFFF0), 0x1D41A, 0x10FFFF]:
        try:
            adapter.validate_python(f"a{chr(code)}a", strict=True)
        except ValidationError:
            continue
        taken.add(chr(code))
    assert taken == set(allowed)


@EACH
@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\0", "\u2028", "\u2029", "\x85", "\v", "\f"])
def test_nothing_may_hang_on_at_the_end_or_stand_before(name: str, end: str) -> None:
    kind, good, _, _ = PATTERNS[name]
    assert accepts(kind, good)
    assert not accepts(kind, good + end)
    assert not accepts(kind, end + good)
    assert not accepts(kind, end)


@EACH
@pytest.mark.parametrize(
    "lookalike",
    [
        "\u0430",
        "\uff57ork",
        "w\u043erk",
        "\uff11",
        "\u0663",
        "work\u200b",
        "work\u0301",
        "\ufb01le",
        "\u017f",
        "\u212a",
    ],
)
def test_letters_and_digits_of_other_scripts_are_refused(name: str, lookalike: str) -> None:
    assert not accepts(PATTERNS[name][0], lookalike)


@EACH
def test_the_longest_value_fits_and_one_more_character_does_not(name: str) -> None:
    kind, _, _, longest = PATTERNS[name]
    assert accepts(kind, "a" * longest)
    assert not accepts(kind, "a" * (longest + 1))


@EACH
@pytest.mark.parametrize("value", [1, 1.0, True, None, b"ab", ["ab"], bytearray(b"ab")])
def test_what_is_not_a_text_is_refused(name: str, value: object) -> None:
    assert not accepts(PATTERNS[name][0], value)


@pytest.mark.parametrize("name", sorted(set(PATTERNS) - {"NetvmName", "SettingValue"}))
def test_names_are_not_empty(name: str) -> None:
    assert not accepts(PATTERNS[name][0], "")


@pytest.mark.parametrize("kind", [names.NetvmName, names.SettingValue])
def test_a_netvm_and_a_value_may_be_empty(kind: Any) -> None:
    assert accepts(kind, "")


@pytest.mark.parametrize(
    "name", ["dom0", "work", "sys-net", "A", "a-", "a_", "fedora-41.min", "disp1234", "dm", "none-", "x-dmx"]
)
def test_names_of_qubes_that_qubesd_takes_are_taken(name: str) -> None:
    assert accepts(names.QubeName, name)
    assert accepts(names.NetvmName, name)


@pytest.mark.parametrize(
    "name",
    ["1work", "-work", "_work", ".work", "..", "none", "default", "Domain-0", "work-dm", "lost+found", "a b",
     "a/b", "@dispvm", "uuid:0", "../a", "a\\b", "$a", "a;b"],
)  # fmt: skip
def test_names_of_qubes_that_qubesd_refuses_are_refused(name: str) -> None:
    assert not accepts(names.QubeName, name)
    assert not accepts(names.NetvmName, name)


@pytest.mark.parametrize("tag", ["7zip", "-a", "_a", "created-by-dom0", "A1", "backup-restore-storage", "0"])
def test_tags_that_qubesd_takes_are_taken(tag: str) -> None:
    assert accepts(names.TagName, tag)


@pytest.mark.parametrize("tag", ["a.b", "a b", "a+b", "a:b", "é", ""])
def test_tags_that_qubesd_refuses_are_refused(tag: str) -> None:
    assert not accepts(names.TagName, tag)


@pytest.mark.parametrize("feature", ["gui", "service.cups", "vm-config.a_b", "supported-rpc.qubes.Gpg2", "0"])
def test_features_that_qubesd_takes_are_taken(feature: str) -> None:
    assert accepts(names.FeatureName, feature)


@pytest.mark.parametrize("label", ["red", "my-label_2.x", "label-8", "0"])
def test_labels_that_qubesd_takes_are_taken(label: str) -> None:
    assert accepts(names.LabelName, label)


@pytest.mark.parametrize("name", ["0a", "_a", "A", "a-b", "a.b"])
def test_names_of_properties_are_those_of_python_attributes(name: str) -> None:
    assert not accepts(names.PropertyName, name)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (names.Sha256, "0123456789abcdef" * 4, ["a" * 63, "a" * 65, "A" * 64, "a" * 64 + "\n", "g" * 64, ""]),
        (names.VmClass, "AppVM", ["appvm", "AppVM ", "", "VM", 1]),
        (names.VolumeName, "root", ["volatile", "kernel", "Root", "root\n", "", "../root"]),
        (names.Outcome, "ok", ["OK", "", "okay", True]),
    ],
)
def test_fixed_words_are_taken_to_the_letter(kind: Any, good: str, bad: list[object]) -> None:
    assert accepts(kind, good)
    assert [value for value in bad if accepts(kind, value)] == []


@pytest.mark.parametrize(("kind", "most"), [(names.Size, 2**63 - 1), (names.Count, 2**31)])
def test_numbers_are_whole_and_bounded(kind: Any, most: int) -> None:
    assert accepts(kind, 0)
    assert accepts(kind, most)
    for value in (-1, most + 1, 2**64, 10**400, 1.0, "1", True, False, None, float("nan"), float("inf")):
        assert not accepts(kind, value)


def test_free_text_keeps_what_can_be_seen_and_nothing_else() -> None:
    # Independent of the categories that the code names: isprintable() is false for control, format,
    # private, unassigned and surrogate characters, and for every separator but the plain space.
    separators = {char for char in map(chr, range(0x110000)) if unicodedata.category(char) == "Zs"}
    for code in range(0x110000):
        char = chr(code)
        expected = char if char.isprintable() or char in separators else "\ufffd"
        assert names.strip_control(char) == expected, hex(code)


@pytest.mark.parametrize(
    "attack",
    ["\x1b[2J", "\x9b31m", "\r", "\n", "\b\b", "\x7f", "\u202e", "\u2066", "\u200b", "\ufeff", "\u2028",
     "\U000e0041", "\0", "\u00ad"],
)  # fmt: skip
def test_free_text_cannot_steer_a_terminal(attack: str) -> None:
    cleaned = TypeAdapter[str](names.FreeText).validate_python(f"a{attack}b")
    assert cleaned.isprintable()
    assert len(cleaned) == len(f"a{attack}b")
    assert cleaned.startswith("a")
    assert cleaned.endswith("b")


def test_free_text_of_any_language_is_left_alone() -> None:
    text = "Prüfung: 日本語, العربية, emoji 🔑, naïve\u0301"
    assert accepts(names.FreeText, text)
    assert accepts(names.Notes, text)


def test_free_text_is_bounded_and_a_text() -> None:
    assert accepts(names.FreeText, "é" * 1000)
    assert not accepts(names.FreeText, "é" * 1001)
    assert not accepts(names.FreeText, b"abc")
    assert not accepts(names.Notes, 7)


def test_notes_keep_their_lines_and_nothing_else_that_is_not_seen() -> None:
    cleaned = TypeAdapter[str](names.Notes).validate_python("one\n\ttwo\r\n\x1b[0m\u202e\u2028end")
    assert cleaned == "one\n\ttwo\ufffd\n\ufffd[0m\ufffd\ufffdend"
    assert names.strip_control_lines("\n\n\t\t") == "\n\n\t\t"
    assert names.strip_control_lines("") == ""


def test_notes_are_bounded_in_bytes_as_qubesd_bounds_them() -> None:
    assert accepts(names.Notes, "a" * 256_000)
    assert not accepts(names.Notes, "a" * 256_001)
    assert accepts(names.Notes, "é" * 128_000)
    assert not accepts(names.Notes, "é" * 127_999 + "abc")


def test_notes_are_measured_after_they_were_cleaned() -> None:
    with pytest.raises(ValidationError):
        TypeAdapter[str](names.Notes).validate_python("\x1b" * 100_000)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (b"", ""),
        (b"one\ntwo \n \n", "two"),
        (
            b"2026-11-28 19:00:01.123 qrexec-client-vm[812]: qrexec-client-vm.c:42:main: Connection refused",
            "Connection refused",
        ),
        (b"qrexec-agent[7]: exec.c:12:fork_it: no such user", "no such user"),
        (b"cp: /a.c:1: no", "cp: /a.c:1: no"),
        (
            b"memory allocation of 65536 bytes failed\nnote: run with `RUST_BACKTRACE=1` environment variable"
            b" to display a backtrace\n",
            "memory allocation of 65536 bytes failed",
        ),
        (b"\x1b[2J" + b"y" * 999, "\ufffd[2J" + "y" * 295 + "\u2026"),
    ],
)
def test_a_program_is_quoted_with_its_last_line_and_without_log_marks(output: bytes, words: str) -> None:
    assert names.last_words(output) == words


@pytest.mark.parametrize("text", ["20260101T010203-1234", "20260101T010203"])
def test_a_backup_id_begins_with_the_local_time(text: str) -> None:
    assert names.backup_time(text) == time.mktime((2026, 1, 1, 1, 2, 3, 0, 0, -1))


@pytest.mark.parametrize("text", ["99999999T999999-1", "yesterday", "-"])
def test_an_id_that_begins_with_no_time_tells_none(text: str) -> None:
    assert names.backup_time(text) is None


@pytest.mark.parametrize(
    ("zone", "text"), [("Asia/Tokyo", "00010101T000000-1"), ("America/New_York", "99991231T235959-1")]
)
def test_a_time_that_is_no_moment_in_utc_is_none(
    zone: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", zone)  # in UTC it is in the year 0, or 10000, which there is not
    time.tzset()
    try:
        assert names.backup_time(text) is None
    finally:
        monkeypatch.undo()
        time.tzset()
