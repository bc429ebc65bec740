"""Names and order of chunks: one order is right, and a file that breaks it does not stop the others."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_restore_svc.archive import members
from qubes_restore_svc.archive.members import ChunkName, ChunkSequence, parse_chunk_name, parse_piece_name
from qubes_restore_svc.errors import BadArchive, ChunkOutOfOrder, RestoreError


def name(file: str, number: int) -> ChunkName:
    return ChunkName(file, number, f"{file}.{number:03d}")


def outcome(*names: tuple[str, int]) -> list[str]:
    """For each chunk the reason of its refusal, or nothing."""
    sequence, reasons = ChunkSequence(), []
    for file, number in names:
        try:
            sequence.expect(name(file, number))
            reasons.append("")
        except ChunkOutOfOrder as error:
            assert error.chunk == number
            assert sequence.is_broken(file)
            reasons.append(error.reason)
    return reasons


# --- Names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("qubes.xml.000.enc", ChunkName("qubes.xml", 0, "qubes.xml.000")),
        ("vm10/private.img.042.enc", ChunkName("vm10/private.img", 42, "vm10/private.img.042")),
        ("vm10/root.img.1000.enc", ChunkName("vm10/root.img", 1000, "vm10/root.img.1000")),
        ("vm10/root.img.9999999.enc", ChunkName("vm10/root.img", 9999999, "vm10/root.img.9999999")),
        ("a.000.enc.001.enc", ChunkName("a.000.enc", 1, "a.000.enc.001")),
        ("a.000.001.enc", ChunkName("a.000", 1, "a.000.001")),
        ("dom0-home/user name.000.enc", ChunkName("dom0-home/user name", 0, "dom0-home/user name.000")),
    ],
)
def test_a_chunk_name_is_taken_apart(text: str, expected: ChunkName) -> None:
    assert parse_chunk_name(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "backup-header", "a.000", "a.enc", ".000.enc", "a.00.enc", "a.0.enc", "a.0000.enc", "a.0001.enc",
    "a.0999.enc",
     "a.10000000.enc", "a.-01.enc", "a.+01.enc", "a.0x1.enc", "a. 01.enc", "a.1_0.enc",
     "a.\u0661\u0661\u0661.enc", "a.\u00b2\u00b2\u00b2.enc", "a.000.ENC", "a.000.enc ", "a.000.enc\n",
     "a\n.000.enc", "a.000.hmac", "vm10/.000.enc", "vm10//a.000.enc", "/a.000.enc", "../a.000.enc",
     "a/...000.enc", "a/..000.enc", "...000.enc", "a\\b.000.enc", "\u00e9.000.enc", "\udc80.000.enc"],
)  # fmt: skip
def test_any_other_name_is_refused(text: str) -> None:
    with pytest.raises(BadArchive) as caught:
        parse_chunk_name(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("qubes.xml.000", ChunkName("qubes.xml", 0, "qubes.xml.000")),
        (
            "appvms/work/private.img.1000",
            ChunkName("appvms/work/private.img", 1000, "appvms/work/private.img.1000"),
        ),
        (
            "vm-templates/fedora-23/..001",
            ChunkName("vm-templates/fedora-23/.", 1, "vm-templates/fedora-23/..001"),
        ),
        ("appvms/work/private.img.000.hmac", None),
        ("vm-templates/fedora-23/..001.hmac", None),
    ],
)
def test_the_name_of_a_piece_is_taken_apart(text: str, expected: ChunkName | None) -> None:
    assert parse_piece_name(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "qubes.xml", "x.00", "x.0000", "x.000.enc", "../x.000", "/x.000", "x/./y.000", "./.000",
     "x/../..000", "x.000.hmac.hmac", "x\n.000", ".hmac"],
)  # fmt: skip
def test_any_other_name_of_a_piece_is_refused(text: str) -> None:
    with pytest.raises(BadArchive):
        parse_piece_name(text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30).map(lambda text: text + ".000.enc") | st.text(max_size=30))
def test_a_name_is_refused_or_leads_back_to_itself(text: str) -> None:
    try:
        parsed = parse_chunk_name(text)
    except RestoreError as error:
        assert str(error).isprintable()
    else:
        assert f"{parsed.file}.{parsed.number:03d}.enc" == text == f"{parsed.member}.enc"


# --- Order ------------------------------------------------------------------------------------


def test_chunks_in_order_are_accepted() -> None:
    assert not any(outcome(("a", 0), ("a", 1), ("a", 2), ("b", 0), ("c", 0), ("c", 1)))


def test_numbers_go_on_past_999() -> None:
    assert not any(outcome(*(("a", number) for number in range(1002))))


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ((0, 1, 3), "chunk 003 of 'a' follows chunk 001"),
        ((0, 1, 2, 2), "chunk 002 of 'a' stands twice"),
        ((0, 0), "chunk 000 of 'a' stands twice"),
        ((0, 1, 2, 1), "chunk 001 of 'a' follows chunk 002"),
        ((0, 1, 0), "chunk 000 of 'a' follows chunk 001"),
        ((1,), "chunk 001 of 'a' is the first of its file"),
    ],
)
def test_a_chunk_that_is_missing_or_repeated_is_refused_with_the_reason(
    numbers: tuple[int, ...], reason: str
) -> None:
    reasons = outcome(*(("a", number) for number in numbers))
    assert reasons == [""] * (len(numbers) - 1) + [reason]


def test_a_file_that_comes_again_is_refused_and_the_file_between_goes_on() -> None:
    assert outcome(("a", 0), ("b", 0), ("a", 1), ("b", 1)) == [
        "",
        "",
        "chunk 001 of 'a' comes again after other files",
        "",
    ]


def test_a_whole_file_that_comes_again_is_refused() -> None:
    reasons = outcome(("a", 0), ("b", 0), ("a", 0), ("a", 1))
    assert reasons[2] == "chunk 000 of 'a' comes again after other files"
    assert reasons[3] == "chunk 001 of 'a' follows a chunk that was out of order"


def test_a_broken_file_stays_broken_and_the_next_file_is_read() -> None:
    follows = "follows a chunk that was out of order"
    assert outcome(
        ("a", 0), ("a", 2), ("a", 1), ("a", 3), ("b", 0), ("b", 1), ("a", 2), ("b", 2), ("c", 0)
    ) == [
        "",
        "chunk 002 of 'a' follows chunk 000",
        f"chunk 001 of 'a' {follows}",
        f"chunk 003 of 'a' {follows}",
        "",
        "",
        f"chunk 002 of 'a' {follows}",
        "",
        "",
    ]


def test_only_the_file_that_was_out_of_order_is_broken() -> None:
    sequence = ChunkSequence()
    sequence.expect(name("a", 0))
    with pytest.raises(ChunkOutOfOrder):
        sequence.expect(name("b", 1))
    assert not sequence.is_broken("a")
    assert sequence.is_broken("b")
    assert not sequence.is_broken("c")


def test_the_number_of_files_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "MAX_FILES", 3)
    sequence = ChunkSequence()
    for file in "abc":
        sequence.expect(name(file, 0))
    sequence.expect(name("c", 1))
    with pytest.raises(BadArchive, match="more than 3 files"):
        sequence.expect(name("d", 0))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), max_size=12))
def test_what_is_accepted_of_a_file_is_a_run_from_zero(names: list[tuple[str, int]]) -> None:
    reasons = outcome(*names)
    for file in "abc":
        own = [
            (number, reason) for (other, number), reason in zip(names, reasons, strict=True) if other == file
        ]
        accepted = [number for number, reason in own if not reason]
        assert accepted == list(range(len(accepted)))
        assert not any(reason for _, reason in own[: len(accepted)])
