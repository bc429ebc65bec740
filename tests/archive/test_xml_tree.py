"""Small XML documents: how deep they may go. What else is refused is told of qubes.xml and firewall.xml."""

import pytest

from qubes_restore_svc.archive.xml_tree import MAX_DEPTH, parse_xml
from qubes_restore_svc.errors import BadMetadata


def test_elements_are_nested_down_to_a_limit() -> None:
    def nested(depth: int) -> bytes:
        return b"<a>" * depth + b"</a>" * depth

    assert parse_xml(nested(MAX_DEPTH), "it", 10_000).tag == "a"
    for depth in (MAX_DEPTH + 1, 100_000):
        with pytest.raises(BadMetadata, match="it nests elements deeper than 32 levels"):
            parse_xml(nested(depth), "it", 1 << 20)
