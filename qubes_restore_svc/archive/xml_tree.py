"""Small XML documents as trees, under limits that bound memory, time and depth.

Strategy: count the markup before the first object is made of it, refuse declarations as the parser meets
them, and nesting as the tree grows. No entity expands, and nothing external is ever read.
"""

from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import ParseError, XMLParser

from qubes_restore_svc.errors import BadMetadata

MAX_MARKUP = 200_000  #: tags, and attributes, in one document; the tree then takes less than 200 MiB
MAX_DEPTH = 32  #: elements inside each other; qubes.xml has 6 levels


def parse_xml(untrusted_xml: bytes, what: str, max_size: int) -> Element:
    """The root element of a small UTF-8 document; comments stay in the tree as elements.

    `what` names the file in errors. Raises BadMetadata for more than `max_size` bytes, more than
    MAX_MARKUP tags or attributes, elements nested deeper than MAX_DEPTH, a document type or entities
    (so no entity expands and nothing external is ever read), and everything that is not XML.
    """
    if len(untrusted_xml) > max_size:
        raise BadMetadata(f"{what} has {len(untrusted_xml)} bytes; at most {max_size} are accepted")
    if b"\0" in untrusted_xml:
        raise BadMetadata(f"{what} is not UTF-8 text")
    # Every tag has a "<" and every attribute a "=": this holds before the first object is made of them.
    if max(untrusted_xml.count(b"<"), untrusted_xml.count(b"=")) > MAX_MARKUP:
        raise BadMetadata(f"{what} holds more than {MAX_MARKUP} tags or attributes")
    parser = XMLParser(target=_BoundedBuilder(what), encoding="utf-8", forbid_dtd=True)
    try:
        parser.feed(untrusted_xml)
        root: Element = parser.close()
    except DefusedXmlException:
        raise BadMetadata(f"{what} declares a document type or entities; Qubes never does") from None
    except ParseError as error:
        line, column = error.position
        raise BadMetadata(f"{what} is not well-formed XML (line {line}, column {column})") from None
    return root


class _BoundedBuilder(TreeBuilder):
    """Builds the tree, with comments kept as qubesd's parser keeps them, down to MAX_DEPTH."""

    def __init__(self, what: str) -> None:
        super().__init__(insert_comments=True, insert_pis=True)
        self._what = what
        self._depth = 0

    def start(self, tag: str, attrs: dict[Any, Any], /) -> Element:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise BadMetadata(f"{self._what} nests elements deeper than {MAX_DEPTH} levels")
        return super().start(tag, attrs)

    def end(self, tag: str, /) -> Element:
        self._depth -= 1
        return super().end(tag)
