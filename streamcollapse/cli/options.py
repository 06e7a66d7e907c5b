"""Arguments and options that several verbs share and that are no settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_RUN = "The run"
_OUTPUT = "The output"

CHECKPOINT = "Directory of a Hugging Face checkpoint, or its id on the Hub: org/name or org/name@revision."

Source = Annotated[str, typer.Argument(metavar="SOURCE", help=CHECKPOINT)]
Model = Annotated[str, typer.Argument(metavar="MODEL", help=CHECKPOINT)]
Out = Annotated[
    Path,
    typer.Option(
        "--out", readable=False, metavar="DIR", help="New directory for the pruned checkpoint.", rich_help_panel=_OUTPUT
    ),
]
PlanIn = Annotated[
    Path, typer.Argument(readable=False, metavar="PLAN", help="Plan that search made of the same source.")
]
PlanOut = Annotated[
    Path,
    typer.Option("--plan", readable=False, metavar="FILE", help="Where to write the plan.", rich_help_panel=_OUTPUT),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.", rich_help_panel=_RUN),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, and no progress.", rich_help_panel=_RUN)]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.", rich_help_panel=_RUN),
]
OverwriteFile = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an older file once the new one is complete.", rich_help_panel=_OUTPUT),
]
