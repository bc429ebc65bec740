"""The JSON Schema of all documents, and what docs/documents.md lists, made from the models.

python -m tests.documents.schema_pages      writes both
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from qubes_restore_svc.local.documents import BackupList, QubeRecord
from qubes_restore_svc.report_file import KeptReport
from qubes_restore_svc.watch.documents import WatchReport
from qubes_restore_svc.wire.documents import Document
from qubes_restore_svc.wire.models import Model
from tests.client.client_pages import (
    described,
    fields_of,
    meanings_of_fields,
    names_in,
    parts_of,
    table_text,
    types_text,
    with_parts,
)

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "documents.md"
FILE = ROOT / "docs" / "schema" / "documents-1.json"

DOCUMENTS: tuple[type[Document], ...] = (KeptReport, QubeRecord, BackupList, WatchReport)
_ANY_OF_THEM: TypeAdapter[Document] = TypeAdapter(
    Annotated[KeptReport | QubeRecord | BackupList | WatchReport, Field(discriminator="type")]
)


_LINK = re.compile(r"\[(.*?)\]\(.*?\)")


class _AlwaysThere(GenerateJsonSchema):
    """Every field is always written, so that a default says nothing; a title would repeat the name."""

    def field_is_required(self, field: object, total: bool) -> bool:
        return True

    def default_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, _: object) -> bool:
        return False


def schema(*, closed: bool = False) -> dict[str, Any]:
    """The schema. `closed`: without room for fields of later versions, which the published one has."""
    made = _ANY_OF_THEM.json_schema(mode="serialization", schema_generator=_AlwaysThere)
    del made["discriminator"]  # OpenAPI's
    for model in dict.fromkeys((*DOCUMENTS, *parts_of(DOCUMENTS))):
        part = made["$defs"][model.__name__]
        for name, meaning in meanings_of_fields(model).items():
            part["properties"][name]["description"] = _LINK.sub(r"\1", meaning)
        if not closed:
            del part["additionalProperties"]
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:qubes-restore-svc:documents-1",
        "title": "What qubes-restore-svc writes as JSON",
    }
    return head | made


def text() -> str:
    """What the published file says."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def page(current: str) -> str:
    """The page with what is made of it made anew."""
    parts = [part for part in parts_of(DOCUMENTS) if part not in DOCUMENTS]
    used = {name for model in (*DOCUMENTS, *parts) for name in names_in(model)}
    made = {model.model_fields["type"].default: _fields(model) for model in DOCUMENTS}
    made["parts"] = "\n".join(
        f"### {model.__name__}\n\n{_about(model)}\n\n{_fields(model)}" for model in parts
    )
    made["types"] = types_text(used)
    return with_parts(current, {name: _of_clients(content) for name, content in made.items()})


def _of_clients(content: str) -> str:
    """The kinds of errors stand on the other page, and the report has a heading of its own."""
    return content.replace("](#errors)", "](clients.md#errors)").replace("](#keptreport)", "](#the-report)")


def _about(model: type[Model]) -> str:
    return " ".join((model.__doc__ or "").split())


def _fields(model: type[Model]) -> str:
    meanings = {"type": "which document this is", **meanings_of_fields(model)}
    rows = [[f"`{name}`", described(hint), meanings[name]] for name, hint, _ in fields_of(model)]
    return table_text(["field", "is", "meaning"], sorted(rows, key=_place))


def _place(row: list[str]) -> int:
    first = ("`type`", "`schema_version`", "`tool_version`")
    return first.index(row[0]) if row[0] in first else len(first)


if __name__ == "__main__":
    FILE.write_text(text())
    PAGE.write_text(page(PAGE.read_text()))
