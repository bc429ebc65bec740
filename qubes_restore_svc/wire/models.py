"""The models that every message of ours is made of: strict and frozen.

Strategy: one class a message, told apart by `type`; a field is a type of `names.py`, a bounded list of such,
or another model. Unknown keys are refused, nothing is coerced, and a validation error never quotes what it
refused (it may be a passphrase, or meant for a terminal).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    ValidationError,
)

from qubes_restore_svc.errors import ERROR_KINDS, ProtocolViolation, RestoreError
from qubes_restore_svc.wire.names import (
    MAX_COUNT,
    MAX_PASSPHRASE,
    MAX_TEXT,
    Count,
    ErrorKind,
    FreeText,
    shortened,
    strip_control,
)

#: The names of all fields: what an error may repeat.
_FIELDS: set[str] = set()


class Model(BaseModel, populate_by_name=True):
    """What all models share: strict, frozen, closed, and silent about the values they refuse.

    `klass` is called `class` in JSON, which is no name for anything in Python.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        _FIELDS.update(field.serialization_alias or name for name, field in cls.model_fields.items())


MAX_FRAME = 4 << 20  #: the largest message of all, bytes


class Message(Model):
    """Base of the messages; `max_size` is the largest frame such a message may take, in bytes."""

    max_size: ClassVar[int] = 64 << 10

    @classmethod
    def word(cls) -> str:
        """Its type, as it is on the wire."""
        return str(cls.model_fields["type"].default)


#: The version of both protocols. No `Literal`: pydantic, strict or not, lets `true` match one of a number.
ProtocolVersion = Annotated[int, Field(strict=True, ge=1, le=1)]


def _encodable(passphrase: SecretStr) -> SecretStr:
    try:
        passphrase.get_secret_value().encode()
    except UnicodeEncodeError:
        raise ValueError("not a text that UTF-8 can carry") from None
    return passphrase


#: A passphrase; a model that has one reveals it when it becomes JSON, and nowhere else.
Passphrase = Annotated[
    SecretStr,
    Field(max_length=MAX_PASSPHRASE),
    AfterValidator(_encodable),
    PlainSerializer(SecretStr.get_secret_value, return_type=str, when_used="json"),
]


class ErrorInfo(Model):
    """An error of the other side. Only `kind` is a promise; the rest is for people."""

    kind: ErrorKind
    reason: FreeText
    advice: FreeText = ""
    qube: FreeText | None = None
    volume: FreeText | None = None
    chunk: Count | None = None

    @classmethod
    def of(cls, error: RestoreError) -> "ErrorInfo":
        """The message form of `error`; over-long texts are shortened."""

        def cut(text: str) -> str:
            return shortened(text, MAX_TEXT)

        return cls(
            kind=error.kind,
            reason=cut(error.reason),
            qube=None if error.qube is None else cut(error.qube),
            volume=None if error.volume is None else cut(error.volume),
            chunk=error.chunk if error.chunk is None or 0 <= error.chunk <= MAX_COUNT else None,
            advice=cut(error.advice),
        )

    def without_place(self) -> "ErrorInfo":
        """The same, for a place that says itself which qube and volume it is about."""
        return self.model_copy(update={"qube": None, "volume": None})

    def within(self, length: int, *, advice: bool) -> "ErrorInfo":
        """The same with texts of at most `length` characters, and without advice if there is to be none."""
        texts = {
            "reason": shortened(self.reason, length),
            "advice": shortened(self.advice, length) if advice else "",
        }
        return self.model_copy(update=texts)

    def to_error(self) -> RestoreError:
        """The error again, in the class of its kind (`RestoreError` itself for a kind not known here)."""
        cls = ERROR_KINDS.get(self.kind, RestoreError)
        return cls(self.reason, qube=self.qube, volume=self.volume, chunk=self.chunk, advice=self.advice)


_M = TypeVar("_M", bound=Message)
_Form = TypeVar("_Form", bound=Model)


def encode_message(message: Message) -> bytes:
    """The payload of the frame for `message`; raises ProtocolViolation if it is too large for its kind."""
    payload = message.model_dump_json(by_alias=True).encode()
    check_size(type(message), len(payload))
    return payload


def encoded_size(part: Model) -> int:
    """Bytes that a message, or a part of one, takes."""
    return len(part.model_dump_json(by_alias=True).encode())


def fullest(forms: Iterable[_Form], fits: Callable[[_Form], bool]) -> _Form:
    """The first of some forms that fits, each smaller than the one before; the last one if none fits."""
    for form in forms:
        if fits(form):
            break
    return form


def validated(kind: type[_M], untrusted_object: Mapping[str, object]) -> _M:
    """The message of this kind that a JSON object is; raises ProtocolViolation if it is none."""
    try:
        return kind.model_validate(untrusted_object)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # A location can hold a key that the other side made up, which is as untrusted as any value.
        where = ".".join(
            str(part) if isinstance(part, int) or part in _FIELDS else "?" for part in first["loc"]
        )
        what = strip_control(first["msg"][:200])
        raise ProtocolViolation(
            f"a message that does not validate ({kind.word()}{where and '.'}{where}: {what})"
        ) from None


def check_size(kind: type[Message], size: int) -> None:
    """Raises ProtocolViolation if a payload of `size` bytes is too large for a message of this kind."""
    if size > kind.max_size:
        raise ProtocolViolation(
            f"a message of {size} bytes, more than the {kind.max_size} that one of its kind may have"
        )
