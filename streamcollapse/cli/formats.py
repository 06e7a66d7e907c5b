"""The verbs that look at what a checkpoint is stored as, whatever the model: convert and verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.derived import grouped
from streamcollapse.cli.screen import live_progress, one_line_errors, print_json
from streamcollapse.run.first_checks import check_out, check_source
from streamcollapse.settings.run import COMPUTE_DTYPES, Output, Streaming

ConvertedOut = Annotated[
    Path, typer.Option("--out", readable=False, metavar="DIR", help="New directory for the converted checkpoint.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="|".join(COMPUTE_DTYPES),
        help="Precision of every floating-point tensor.",
        show_default="what each tensor is stored in",
    ),
]


@grouped
def convert(
    source: o.Source,
    out: ConvertedOut,
    output: Output,
    dtype: Dtype = None,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> None:
    """Write SOURCE as safetensors into the new directory DIR: from PyTorch files, in another precision or shard
    size."""
    check_source(source)
    check_out(source, out, Streaming(), output)
    from streamcollapse.cli import stored
    from streamcollapse.jobs.convert import prepare_convert, run_convert

    with live_progress(quiet=as_json or dry_run) as listener:
        prepared = prepare_convert(source, out, dtype=dtype, output=output, listener=listener)
        found = prepared.found if dry_run else run_convert(prepared)
    print_json(found.to_json()) if as_json else stored.show_conversion(found)


def verify(
    directory: Annotated[str, typer.Argument(metavar="DIR", help=o.CHECKPOINT)],
    source: Annotated[
        str | None,
        typer.Option("--source", metavar="SOURCE", help="What DIR was pruned from.", show_default="not compared"),
    ] = None,
    as_json: o.Json = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Check the files of DIR: index, shapes, digests, every weight; with --source, that it is what its plan makes of
    it, bit by bit."""
    with one_line_errors():
        from streamcollapse.cli import stored
        from streamcollapse.jobs.verify import verify as run

        with live_progress(quiet=as_json) as listener:
            found = run(directory, source, trust_remote_code=trust_remote_code, listener=listener)
        print_json(found.to_json()) if as_json else stored.show_verification(found)
