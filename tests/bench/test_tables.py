"""Tables of plain text."""

import pytest

from . import tables
from .tables import Table, as_text


def test_a_table_is_aligned_and_in_the_form_that_markdown_takes() -> None:
    table = Table("Title", ["", "wall, s"], [["manual", "99.7"], ["extract", "20.0"]], ["A note."])
    assert as_text(table) == (
        "## Title\n\n"
        "|         | wall, s |\n"
        "| ------- | ------: |\n"
        "| manual  |    99.7 |\n"
        "| extract |    20.0 |\n\n"
        "A note.\n"
    )


def test_a_row_of_another_length_is_a_mistake() -> None:
    with pytest.raises(ValueError):
        as_text(Table("Title", ["", "a"], [["x", "1", "2"]]))


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (tables.seconds(99.74), "99.7"),
        (tables.seconds(1.234), "1.23"),
        (tables.seconds(0.0123), "0.0123"),
        (tables.mib(5800 << 20), "5800"),
        (tables.mib(3 << 19), "1.50"),
        (tables.mib(0), "0"),
        (tables.mib(None), "–"),
        (tables.ratio(5.034), "5.03"),
        (tables.ratio(None), "–"),
        (tables.percent(0.925), "92 %"),
    ],
)
def test_figures_have_the_digits_that_mean_something(shown: str, expected: str) -> None:
    assert shown == expected
