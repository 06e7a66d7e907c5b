"""The verb apply."""

from typing import Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, print_json
from streamcollapse.run.first_checks import check_out, check_source
from streamcollapse.settings.declared import declared
from streamcollapse.settings.heal import AlsoHeal
from streamcollapse.settings.run import Judging, Output, Repair, RunSettings

_SETTINGS = (
    "device",
    "ram_budget",
    "vram_budget",
    *declared(Output),
    *declared(Judging),
    *declared(Repair),
    *declared(AlsoHeal),
    "trust_remote_code",
)


@o.grouped
def apply(
    source: o.Source,
    plan: o.PlanIn,
    out: o.Out,
    settings: Annotated[RunSettings, o.Only(_SETTINGS)],
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N|-N|N%",
            help="Another size that the plan's search passed: a number of layers, how many fewer "
            "than the source's, or a share of them.",
        ),
    ] = None,
    max_loss: o.MaxLoss = None,
    dry_run: o.DryRun = False,
    verbose: o.Verbose = False,
    as_json: o.Json = False,
) -> None:
    """Write the pruned checkpoint that PLAN makes of SOURCE into the new directory DIR."""
    check_source(source)
    check_out(source, out, settings.streaming, settings.output)
    from streamcollapse.cli import tables
    from streamcollapse.jobs.apply import run_apply
    from streamcollapse.jobs.prepare import prepare_apply
    from streamcollapse.merge.plan import Plan
    from streamcollapse.searches.course import sized_plan

    with live_progress(as_json or dry_run, verbose) as listener:
        whole = Plan.load(plan)
        chosen = whole if layers is None else sized_plan(whole, layers)
        prepared = prepare_apply(source, chosen, out, settings, listener)
        prepared = prepared if as_json and not dry_run else prepared.timed(even_if_short=dry_run)
        pruned = None if dry_run else run_apply(prepared)
    if pruned is None:
        print_json(prepared.to_json()) if as_json else tables.show_prepared(prepared, verbose)
    else:
        print_json({"out": str(pruned.out), **pruned.report}) if as_json else tables.show_pruned(pruned)
        o.end_by_loss(pruned, max_loss)
