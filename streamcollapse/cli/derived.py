"""The command line's options, made from the declarations of the settings.

A verb that is ``grouped`` takes the settings; the command line that it becomes has the options that make them. A
parameter annotated with ``Only`` takes a part of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from streamcollapse.cli.screen import one_line_errors
from streamcollapse.settings.declared import REQUIRED, Declared, declared, make


@dataclass(frozen=True)
class Only:
    """Of a group of settings only ``keys`` are options."""

    keys: tuple[str, ...]


def option(setting: Declared) -> inspect.Parameter:
    """The option of ``setting``, as a parameter of a verb."""
    said, kind, required = setting.said, setting.kind, setting.default is REQUIRED
    flags = [setting.flag]
    more: dict[str, Any] = {"help": _help(setting)}
    if kind is bool:
        flags = [f"{setting.flag}/{said.off}" if said.off else setting.flag]
        python: Any = bool if setting.default is not None else bool | None
    elif kind in (int, float):
        python = kind if setting.default is not None else kind | None
    else:
        python = str if setting.default is not None else str | None
    if said.letter:
        flags.append(f"-{said.letter}")
    if said.default is not None or setting.default is None:
        more["show_default"] = setting.default_text
    if metavar := said.metavar or "|".join(setting.choices):
        more["metavar"] = metavar
    annotation = Annotated[python, typer.Option(*flags, rich_help_panel=setting.panel, **more)]
    default = setting.default
    if python is str:
        default = str(default)
    parameter = inspect.Parameter(setting.key, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
    return parameter if required else parameter.replace(default=default)


def _help(setting: Declared) -> str:
    """The sentence for --help, with the paper's letter and the range. Ranges are checked with the settings, which are
    made from files of jobs and from Python as well, so that the message is the same."""
    text = setting.said.help
    if setting.said.letter:
        text = f"{setting.said.letter}: {text[0].lower()}{text[1:]}"
    least, most = setting.least, setting.most
    if most is not None:
        return f"{text} From {least:g} to {most:g}."
    return text if least in (None, 1, -1) else f"{text} At least {least:g}."


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """``verb`` with options in the place of each parameter that is a class of settings, and with errors in one line."""
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, tuple[type, dict[str, Declared]]] = {}
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(verb).parameters.items():
        cls, keys = _group(hints[name])
        if cls is None:
            parameters[name] = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            continue
        settings = {key: one for key, one in declared(cls).items() if keys is None or key in keys}
        groups[name] = cls, settings
        parameters |= {key: option(one) for key, one in settings.items()}

    @wraps(verb)
    def run(**given: Any) -> None:
        with one_line_errors():
            made = {name: _made(cls, settings, given) for name, (cls, settings) in groups.items()}
            verb(**given, **made)

    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return run


def _group(hint: Any) -> tuple[type | None, Iterable[str] | None]:
    """The class of settings that ``hint`` is, if it is one, and which of them."""
    if get_origin(hint) is Annotated:
        cls, *notes = get_args(hint)
        only = next((note.keys for note in notes if isinstance(note, Only)), None)
        return (cls, only) if only is not None else (None, None)
    return (hint, None) if inspect.isclass(hint) and declared_or_nothing(hint) else (None, None)


def declared_or_nothing(cls: type) -> bool:
    """Whether ``cls`` declares settings."""
    return hasattr(cls, "__pydantic_fields__") and bool(declared(cls))


def _made(cls: type, settings: dict[str, Declared], given: dict[str, Any]) -> Any:
    values = {key: given.pop(key) for key in settings}
    return make(cls, values)
