"""docs/documents.md and the published schema say what the models say."""

import json
import re

import jsonschema

from . import schema_pages as pages


def test_the_page_and_the_schema_are_current() -> None:
    assert pages.FILE.read_text() == pages.text(), "run: python -m tests.documents.schema_pages"
    text = pages.PAGE.read_text()
    assert pages.page(text) == text, "run: python -m tests.documents.schema_pages"


def test_the_schema_is_one_and_explains_every_field_but_the_type() -> None:
    schema = json.loads(pages.FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert [ref["$ref"].rpartition("/")[2] for ref in schema["oneOf"]] == [
        "KeptReport", "QubeRecord", "BackupList", "WatchReport",
    ]  # fmt: skip
    for name, part in schema["$defs"].items():
        assert set(part["required"]) == set(part["properties"]), name
        for field, said in part["properties"].items():
            assert field == "type" or said["description"], (name, field)
    assert "klass" not in json.dumps(schema)


def test_no_link_of_the_page_leads_nowhere() -> None:
    text = pages.PAGE.read_text()
    linked = set(re.findall(r"\]\(#([a-z]+)\)", text))
    headings = {heading.lower() for heading in re.findall(r"^##+ (\S+)$", text, re.MULTILINE)}
    assert linked <= headings and "types" in linked
