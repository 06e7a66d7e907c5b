"""The command line's options, made from the declarations of the settings, and those that are no settings and that
several verbs share.

A verb that is ``grouped`` takes the settings; the command line that it becomes has the options that make them. A
parameter annotated with ``Only`` takes a part of them.
"""

import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from streamcollapse.cli.screen import one_line_errors
from streamcollapse.settings.declared import REQUIRED, Declared, declared, is_group, make
from streamcollapse.settings.run import Calibration, Compute, RunSettings, Streaming

if TYPE_CHECKING:
    from streamcollapse.jobs.apply import Pruned

LOST_TOO_MUCH = 3  # the exit code


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
    annotation = Annotated[python, typer.Option(*flags, rich_help_panel=setting.owner.panel, **more)]
    default = setting.default
    if python is str:
        default = str(default)
    parameter = inspect.Parameter(setting.key, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
    return parameter if required else parameter.replace(default=default)


def _help(setting: Declared) -> str:
    """The sentence for --help, with the paper's letter and the range. Ranges are checked with the settings, which are
    made from files of jobs and from Python as well, so that the message is the same."""
    text = escape(setting.said.help)  # typer reads it as markup
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
        with one_line_errors(bool(given.get("as_json"))):
            made: dict[str, Any] = {
                name: make(cls, {key: given.pop(key) for key in settings}) for name, (cls, settings) in groups.items()
            }
            verb(**given, **made)

    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return run


def _group(hint: Any) -> tuple[type | None, Iterable[str] | None]:
    """The class of settings that ``hint`` is, if it is one, and which of them."""
    cls, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    only = next((note.keys for note in notes if isinstance(note, Only)), None)
    return (cls, only) if is_group(cls) else (None, None)


_RUN = "The run"
_OUTPUT = "The output"

CHECKPOINT = "Directory of a Hugging Face checkpoint, or its id on the Hub: org/name or org/name@revision."

Source = Annotated[str, typer.Argument(metavar="SOURCE", help=CHECKPOINT)]
Model = Annotated[str, typer.Argument(metavar="MODEL", help=CHECKPOINT)]
Out = Annotated[
    Path,
    typer.Option("--out", readable=False, metavar="DIR", help="New directory for the result.", rich_help_panel=_OUTPUT),
]
PlanIn = Annotated[
    Path,
    typer.Argument(
        readable=False, metavar="PLAN", help="Plan of the same source: of search, or of plan make or compose."
    ),
]
PlanOut = Annotated[
    Path,
    typer.Option("--plan", readable=False, metavar="FILE", help="Where to write the plan.", rich_help_panel=_OUTPUT),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, and no progress.", rich_help_panel=_RUN)]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say for what memory is held, phase by phase.", rich_help_panel=_RUN)
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.", rich_help_panel=_RUN),
]
OverwriteFile = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an older file once the new one is complete.", rich_help_panel=_OUTPUT),
]

Trust = Annotated[RunSettings, Only(("trust_remote_code",))]
Computing = Annotated[RunSettings, Only(("device", "compute_dtype", "trust_remote_code"))]
EVALUATING = ("io", "prefetch", "ram_budget", "vram_budget", "work_dir")
Evaluated = Annotated[RunSettings, Only((*declared(Compute), *EVALUATING, "trust_remote_code"))]
SEARCHING = (*declared(Calibration), *declared(Compute), *declared(Streaming), "trust_remote_code")
Searching = Annotated[RunSettings, Only(SEARCHING)]


MaxLoss = Annotated[
    float | None,
    typer.Option(metavar="NATS", help="Exit code 3 where the loss on held-out text rises by more, in nats per token."),
]


def end_by_loss(pruned: "Pruned", max_loss: float | None) -> None:
    """End with LOST_TOO_MUCH where the loss on held-out text rose by more than was allowed; the output stays."""
    from streamcollapse.output.verdict import exceeds, told

    judgement = pruned.report.get("held_out")
    if judgement is not None and exceeds(judgement, max_loss):
        print(f"error: more than --max-loss {max_loss:g}: {told(judgement)}; the output is kept", file=sys.stderr)
        raise typer.Exit(LOST_TOO_MUCH)
