"""The verb resume."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, one_line_errors, print_json


def resume(
    work_dir: Annotated[
        Path, typer.Argument(readable=False, metavar="WORK_DIR", help="Work directory of an interrupted run.")
    ],
    as_json: o.Json = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Resume an interrupted prune, apply or convert from its work directory."""
    with one_line_errors():
        from streamcollapse.cli import tables
        from streamcollapse.cli.verbs.convert import show_conversion
        from streamcollapse.jobs.convert import Conversion
        from streamcollapse.jobs.resume import resume as run

        with live_progress(quiet=as_json) as listener:
            found = run(work_dir, trust_remote_code=trust_remote_code, listener=listener)
        if isinstance(found, Conversion):
            print_json(found.to_json()) if as_json else show_conversion(found)
        else:
            print_json({"out": str(found.out), **found.report}) if as_json else tables.show_pruned(found)
