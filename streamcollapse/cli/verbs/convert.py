"""The verb convert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, print_json
from streamcollapse.cli.tables import memory_line
from streamcollapse.cli.text import lines_of, plain_console
from streamcollapse.run.first_checks import check_out, check_source
from streamcollapse.settings.run import COMPUTE_DTYPES, Output, Streaming
from streamcollapse.storage.index import is_gguf
from streamcollapse.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from streamcollapse.jobs.convert import Conversion


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


@o.grouped
def convert(
    source: o.Source,
    out: ConvertedOut,
    output: Output,
    dtype: Dtype = None,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> None:
    """Write SOURCE as safetensors into the new directory DIR: from PyTorch files or a GGUF file, in another precision
    or shard size."""
    if not is_gguf(source):
        check_source(source)
    check_out(source, out, Streaming(), output)
    from streamcollapse.jobs.convert import prepare_convert, run_convert

    with live_progress(quiet=as_json or dry_run) as listener:
        prepared = prepare_convert(source, out, dtype, output, listener)
        found = prepared.found if dry_run else run_convert(prepared)
    print_json(found.to_json()) if as_json else show_conversion(found)


def show_conversion(found: Conversion) -> None:
    """The outcome of ``convert``, or what it would do."""
    before, after = (
        ", ".join(f"{name} {format_bytes(size)}" for name, size in sorted(sizes.items()))
        for sizes in (found.before, found.after)
    )
    shards = next(iter(found.shards)) if len(found.shards) == 1 else f"{len(found.shards)} shards"
    rows: list[tuple[str, str | Text]] = [
        ("checkpoint", found.source),
        ("weights", f"{found.num_tensors} tensors: {before} -> {after}"),
        ("files", shards),
    ]
    if found.usage:
        usage = found.usage
        rows += [
            ("time", format_seconds(usage["seconds"])),
            ("read, written", f"{format_bytes(usage['bytes_read'])}, {format_bytes(usage['bytes_written'])}"),
            ("memory", memory_line(usage)),
            ("converted", found.out),
        ]
    else:
        rows.append(("dry run", "everything checks out; nothing was written"))
    plain_console().print(lines_of(rows))
