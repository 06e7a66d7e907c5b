"""The verb resume."""

from pathlib import Path
from typing import Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, print_json


@o.grouped
def resume(
    work_dir: Annotated[
        Path, typer.Argument(readable=False, metavar="WORK_DIR", help="Work directory of an interrupted run.")
    ],
    settings: o.Trust,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Resume an interrupted prune, apply, heal or convert from its work directory."""
    from streamcollapse.cli import heal_tables, tables
    from streamcollapse.cli.verbs.convert import show_conversion
    from streamcollapse.jobs.convert import Conversion
    from streamcollapse.jobs.resume import resume as run

    with live_progress(as_json, verbose) as listener:
        trust = settings.trust_remote_code
        found = run(work_dir, is_timed=not as_json, trust_remote_code=trust, listener=listener)
    if isinstance(found, Conversion):
        print_json(found.to_json()) if as_json else show_conversion(found)
    else:
        show = tables.show_pruned if found.plan.heal is None else heal_tables.show_healed
        print_json({"out": str(found.out), **found.report}) if as_json else show(found)
        record = found.plan.search
        o.end_by_loss(found, None if record is None else record.options.max_loss)
