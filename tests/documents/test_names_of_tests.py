"""Names of tests: short enough to be read, as CONTRIBUTING asks, and true where documents mention them."""

import re

from tests.support.fixtures import REPOSITORY

_DEFINED = re.compile(r"^ *(?:async )?def (test_\w+)\(", re.MULTILINE)
_MENTIONED = re.compile(r"`(test_\w+)`")

#: What CONTRIBUTING gives as an example.
_EXAMPLES = {"test_a_volume_that_ends_early_rolls_back_its_qube"}


def names_of_tests() -> list[str]:
    return [
        name
        for path in sorted((REPOSITORY / "tests").rglob("test_*.py"))
        for name in _DEFINED.findall(path.read_text())
    ]


def test_the_name_of_a_test_has_less_than_80_characters() -> None:
    assert len(names_of_tests()) > 1000
    assert [name for name in names_of_tests() if len(name) >= 80] == []


def test_every_test_that_a_document_names_exists() -> None:
    documents = [REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    mentioned = {name for path in documents for name in _MENTIONED.findall(path.read_text())}
    assert len(mentioned) > 5
    assert mentioned - _EXAMPLES <= set(names_of_tests())
