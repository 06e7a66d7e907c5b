"""What a setting is: declared once, as a field of a class made by ``settings``, and checked whenever one is made.

The field's type and bounds are pydantic's; ``Setting`` adds what people read: help, the paper's letter, how a default
is said that is no value. The command line, files of jobs, plans, saved requests and docs/options.md are made from these
declarations. Imports nothing heavy, so that --help is quick.
"""

import dataclasses
import difflib
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from streamcollapse.errors import OptionError
from streamcollapse.units import parse_bytes

Made = TypeVar("Made")
Panel = Literal["The method", "The run", "The output"]

REQUIRED: Any = dataclasses.MISSING  # as the default of a setting that has none
_LONGEST = 60  # characters of a value that a message repeats
FROM_STRATEGY: Any = None  # not given: the strategy's own default is filled in when a search is prepared


@dataclass(frozen=True)
class Setting:
    """What people read of a setting.

    ``help``: a sentence. ``letter``: the paper's. ``default``: words, where the default is no value. ``metavar``: what
    stands for the value in --help. ``key``: the name users know, where it is not the field's. ``off``: the flag that
    says no, for a setting that is a flag.
    """

    help: str
    letter: str = ""
    default: str | None = None
    metavar: str | None = None
    key: str = ""
    off: str | None = None


@dataclass(frozen=True)
class Declared:
    """A setting of the class ``owner`` with everything that its declaration says; ``kind`` is its type without None,
    ``least`` and ``most`` the bounds that belong to its range, ``choices`` the values there are, where they are few."""

    owner: Any
    name: str
    key: str
    kind: Any
    default: Any
    said: Setting
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Its name in messages, with the paper's letter."""
        words = self.key.replace("_", " ")
        return f"{words} ({self.said.letter})" if self.said.letter else words

    @property
    def flag(self) -> str:
        """Its option on the command line."""
        return f"--{self.key.replace('_', '-')}"

    @property
    def default_text(self) -> str:
        """The default in words."""
        if self.said.default is not None:
            return self.said.default
        if self.default is FROM_STRATEGY:
            return "the strategy's"
        if self.default is REQUIRED:
            return "required"
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        return str(self.default)


@dataclass_transform(frozen_default=True)
def settings(panel: Panel) -> Callable[[type[Made]], type[Made]]:
    """A frozen dataclass whose fields are checked: raises OptionError, in one line, for what a field does not allow.
    ``panel``: the heading in --help under which its options stand."""
    return lambda cls: _checked(cls, panel)


def _checked(cls: type[Made], panel: Panel) -> type[Made]:
    made = checked_dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))(cls)
    check = made.__init__

    names = list(made.__dataclass_fields__)

    @wraps(check)
    def init(self: Made, *values: Any, **given: Any) -> None:
        given = dict(zip(names, values, strict=False)) | given
        # None is "not given", also for a setting whose default the strategy fills in.
        try:
            check(self, **{name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            raise OptionError(_said(made, error)) from None

    made.__init__ = init  # type: ignore[assignment]
    made.panel = panel  # type: ignore[attr-defined]
    return made  # type: ignore[return-value]


def declared(cls: type) -> dict[str, Declared]:
    """The settings that ``cls`` declares, and those of the classes of settings that it has, by the names users know."""
    return _all_declared(cls)


@cache
def _all_declared(cls: Any) -> dict[str, Declared]:
    hints = get_type_hints(cls, include_extras=True)
    found: dict[str, Declared] = {}
    for field in dataclasses.fields(cls):
        if is_group(hints[field.name]):
            found |= declared(hints[field.name])
        elif (one := _declared(cls, field, hints[field.name])) is not None:
            found[one.key] = one
    return found


def is_group(kind: Any) -> bool:
    """Whether ``kind`` is a class of settings."""
    return isinstance(kind, type) and hasattr(kind, "panel")


def _declared(cls: Any, field: dataclasses.Field[Any], hint: Any) -> Declared | None:
    notes = list(_notes(hint))
    said = next((note for note in notes if isinstance(note, Setting)), None)
    if said is None:
        return None
    default = field.default.default if isinstance(field.default, FieldInfo) else field.default
    bounds = [note for each in notes for note in (each.metadata if isinstance(each, FieldInfo) else [each])]
    least = next((note.ge for note in bounds if getattr(note, "ge", None) is not None), None)
    most = next((note.le for note in bounds if getattr(note, "le", None) is not None), None)
    choices = next((note.choices for note in notes if isinstance(note, OneOf)), ())
    kind = str if any(isinstance(note, FromText) for note in notes) else _plain(hint)
    return Declared(cls, field.name, said.key or field.name, kind, default, said, least, most, choices)


def make(cls: type[Made], chosen: Mapping[str, Any]) -> Made:
    """A ``cls``, with the classes of settings that it has, of those of ``chosen`` that are their own, by the names
    users know."""
    groups = {name: hint for name, hint in get_type_hints(cls).items() if is_group(hint)}
    own = {one.name: chosen[key] for key, one in declared(cls).items() if one.owner is cls and key in chosen}
    return cls(**own, **{name: make(group, chosen) for name, group in groups.items()})


def _notes(hint: Any) -> Iterable[Any]:
    if get_origin(hint) is Annotated:
        inner, *notes = get_args(hint)
        yield from notes
        yield from _notes(inner)
    elif type(None) in get_args(hint):
        for part in get_args(hint):
            yield from _notes(part)


def _plain(hint: Any) -> Any:
    """The type of a value that is given as text: without None and notes; of several types, text."""
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        parts = [_plain(part) for part in get_args(hint) if part is not type(None)]
        return parts[0] if len(parts) == 1 else str
    return hint


def _said(cls: type, error: ValidationError) -> str:
    """The first of the errors in one line."""
    first = error.errors(include_url=False)[0]
    known = {one.name: one for one in declared(cls).values()}
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "unexpected_keyword_argument":
        return f"setting {unknown(name, known)}"
    label = known[name].label if name in known else name
    what = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    what = what.replace("Input should be", "it must be", 1)
    value = repr(first["input"])
    value = value if len(value) <= _LONGEST else f"{value[:_LONGEST]}…"
    return f"{label} is {value}; {what}"


def unknown(name: object, known: Iterable[str], quoted: bool = False) -> str:
    """The line for ``name``, which is none of ``known``: the likeliest that was meant, and all that there are."""
    text = str(name)
    return f"{repr(text) if quoted else text} is unknown; {meant(name, known)}"


def meant(name: object, known: Iterable[str]) -> str:
    """What to choose instead of ``name``."""
    choices = list(known)
    near = difflib.get_close_matches(str(name), choices, 1, 0.6)
    question = f"did you mean {near[0]}? " if near else ""
    return f"{question}choose one of {', '.join(choices)}"


def _whole(value: Any) -> Any:
    """Whole numbers of other libraries as ints; anything else as it is, to be refused."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return value
    return operator.index(value)


def _size(value: str | int) -> str | int:
    parse_bytes(value)
    return value


@dataclass(frozen=True)
class FromText:
    """A note on a setting that is also given as text, which ``parse`` reads."""

    parse: Callable[[str], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._read, handler(source))

    def _read(self, value: Any) -> Any:
        return self.parse(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class OneOf:
    """A note on a setting of which only ``choices`` are values."""

    choices: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        if value not in self.choices:
            raise ValueError(meant(value, self.choices))
        return value


def _budget(value: str | int) -> str | int:
    if str(value).strip().isdecimal() and int(value) < 1024:
        raise ValueError(f"that is a number of bytes; did you mean {str(value).strip()}GiB?")
    return _size(value)


Whole = Annotated[int, BeforeValidator(_whole)]
Size = Annotated[str | int, AfterValidator(_size)]
BudgetSize = Annotated[str | int, AfterValidator(_budget)]  # a bare small number is a forgotten unit
