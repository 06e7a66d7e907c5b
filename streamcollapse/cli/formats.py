"""The verb that changes what a checkpoint is stored as: convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, one_line_errors, print_json
from streamcollapse.settings import COMPUTE_DTYPES, Output

ConvertedOut = Annotated[Path, typer.Option("--out", metavar="DIR", help="New directory for the converted checkpoint.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="|".join(COMPUTE_DTYPES),
        help="Precision of every floating-point tensor.",
        show_default="what each tensor is stored in",
    ),
]


def convert(
    source: o.Source,
    out: ConvertedOut,
    dtype: Dtype = None,
    max_shard_size: o.MaxShardSize = str(o.OUTPUT.max_shard_size),
    overwrite: o.Overwrite = o.OUTPUT.overwrite,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> None:
    """Write SOURCE as safetensors into the new directory DIR: from PyTorch files, in another precision or shard
    size."""
    with one_line_errors():
        from streamcollapse.cli import tables
        from streamcollapse.jobs.convert import convert as run

        with live_progress(quiet=as_json or dry_run) as listener:
            found = run(
                source,
                out,
                dtype=dtype,
                output=Output(max_shard_size, overwrite),
                dry_run=dry_run,
                listener=listener,
            )
        print_json(found.to_json()) if as_json else tables.show_conversion(found)
