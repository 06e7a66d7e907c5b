"""The verb apply."""

from __future__ import annotations

from typing import Annotated

from streamcollapse.cli import options as o
from streamcollapse.cli.derived import Only, grouped
from streamcollapse.cli.screen import live_progress, print_json
from streamcollapse.run.first_checks import check_out, check_source
from streamcollapse.settings.run import Compute, Output, RunSettings, Streaming


@grouped
def apply(
    source: o.Source,
    plan: o.PlanIn,
    out: o.Out,
    output: Output,
    compute: Annotated[Compute, Only(("device",))],
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Write the pruned checkpoint that PLAN makes of SOURCE into the new directory DIR."""
    check_source(source)
    check_out(source, out, Streaming(), output)
    from streamcollapse.cli import tables
    from streamcollapse.jobs.apply import run_apply
    from streamcollapse.jobs.prepare import prepare_apply
    from streamcollapse.merge.plan import Plan

    settings = RunSettings(compute, output=output, trust_remote_code=trust_remote_code)
    with live_progress(quiet=as_json or dry_run) as listener:
        prepared = prepare_apply(source, Plan.load(plan), out, settings, listener)
        pruned = None if dry_run else run_apply(prepared)
    if pruned is None:
        print_json(prepared.to_json()) if as_json else tables.show_prepared(prepared)
    else:
        print_json({"out": str(pruned.out), **pruned.report}) if as_json else tables.show_pruned(pruned)
