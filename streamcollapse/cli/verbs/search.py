"""The verb search."""

from dataclasses import replace
from typing import Annotated

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, print_json
from streamcollapse.run.first_checks import check_plan_path, check_source
from streamcollapse.settings.declared import declared
from streamcollapse.settings.run import Output, Repair, RunSettings
from streamcollapse.settings.search import SearchOptions


@o.grouped
def search(
    source: o.Source,
    plan: o.PlanOut,
    method: SearchOptions,
    settings: Annotated[RunSettings, o.Only((*o.SEARCHING, "held_out", *declared(Repair)))],
    overwrite: o.OverwriteFile = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Search SOURCE for merges and write the plan; no weights are written."""
    check_source(source)
    check_plan_path(plan, overwrite)
    from streamcollapse.cli import tables
    from streamcollapse.jobs.prepare import prepare_search
    from streamcollapse.jobs.search import run_search

    settings = replace(settings, output=Output(overwrite=overwrite))
    with live_progress(as_json or dry_run, verbose) as listener:
        prepared = prepare_search(source, method, settings, plan, listener)
        prepared = prepared if as_json and not dry_run else prepared.timed(even_if_short=dry_run)
        found = None if dry_run else run_search(prepared)
    if found is None:
        print_json(prepared.to_json()) if as_json else tables.show_prepared(prepared, verbose)
    else:
        print_json(found.to_json()) if as_json else tables.show_plan(found, plan)
