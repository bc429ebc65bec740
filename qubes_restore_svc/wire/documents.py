"""The JSON that is kept or printed: the report, the record of a qube (`qube.json`), the list of a backup.

Strategy: each is a model, told apart by `type`, and made of the models that messages are made of. So one
thing has one name in all of them, and the JSON Schema that is published is made from the models. Every field
is always there; `null` says that there is nothing to say.
"""

import json
from typing import Annotated

from pydantic import Field

from qubes_restore_svc import __version__
from qubes_restore_svc.wire.models import Model
from qubes_restore_svc.wire.names import FreeText

#: The version of the schema of all documents. It rises when a field goes, or changes its name or its meaning;
#: not when one comes.
SchemaVersion = Annotated[int, Field(strict=True, ge=1, le=1)]

_FIRST = ("type", "schema_version", "tool_version")


class Document(Model):
    """What all documents have."""

    schema_version: SchemaVersion = 1  #: rises when a field goes, or changes its name or its meaning
    tool_version: FreeText = __version__  #: which version of qubes-restore-svc wrote it

    def text(self) -> str:
        """The document as it is written: indented, as UTF-8 has it, with a line feed at its end."""
        fields = self.model_dump(mode="json", by_alias=True)
        return json.dumps(dict.fromkeys(_FIRST) | fields, indent=2, ensure_ascii=False) + "\n"
