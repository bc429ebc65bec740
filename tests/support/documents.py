"""What a program wrote as JSON, held against the schema of all documents."""

import json
from functools import cache
from typing import Any

import jsonschema

from tests.documents.schema_pages import schema


@cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema(closed=True))


def checked(text: str, kind: str) -> dict[str, Any]:
    """The document of this `type` that the text is; fails if it is none, or has more than the schema."""
    document: dict[str, Any] = json.loads(text)
    assert document["type"] == kind
    _validator().validate(document)
    return document
