"""The verb prune."""

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, print_json
from streamcollapse.run.first_checks import check_out, check_source
from streamcollapse.settings.run import RunSettings
from streamcollapse.settings.search import SearchOptions


@o.grouped
def prune(
    source: o.Source,
    out: o.Out,
    method: SearchOptions,
    settings: RunSettings,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Prune SOURCE by layer collapse into the new directory DIR: reference pass, search, repair, write."""
    check_source(source)
    check_out(source, out, settings.streaming, settings.output)
    from streamcollapse.cli import tables
    from streamcollapse.jobs.prepare import prepare_prune
    from streamcollapse.jobs.prune import run_prune

    with live_progress(as_json or dry_run, verbose) as listener:
        prepared = prepare_prune(source, out, method, settings, listener)
        prepared = prepared if as_json and not dry_run else prepared.timed(even_if_short=dry_run)
        pruned = None if dry_run else run_prune(prepared)
    if pruned is None:
        print_json(prepared.to_json()) if as_json else tables.show_prepared(prepared, verbose)
    else:
        print_json({"out": str(pruned.out), **pruned.report}) if as_json else tables.show_pruned(pruned)
        o.end_by_loss(pruned, method.max_loss)
