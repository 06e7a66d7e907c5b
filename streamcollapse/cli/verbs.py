"""The verbs: parse, call the library, print. Everything heavy is imported when a verb runs, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.derived import Only, grouped
from streamcollapse.cli.screen import live_progress, one_line_errors, print_json
from streamcollapse.run.first_checks import check_out, check_plan_path, check_source
from streamcollapse.settings.run import Calibration, Compute, EvaluationText, Output, RunSettings, Streaming
from streamcollapse.settings.search import SearchOptions

ScoredPlan = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        readable=False,
        metavar="PLAN",
        help="Score the pruned model that this plan makes of MODEL.",
        show_default="MODEL as it is",
    ),
]


@grouped
def prune(
    source: o.Source,
    out: o.Out,
    method: SearchOptions,
    samples: Calibration,
    compute: Compute,
    streaming: Streaming,
    output: Output,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Prune SOURCE by layer collapse into the new directory DIR: reference pass, search, write."""
    check_source(source)
    check_out(source, out, streaming, output)
    from streamcollapse.cli import tables
    from streamcollapse.jobs.prepare import prepare_prune
    from streamcollapse.jobs.prune import run_prune

    settings = RunSettings(compute, samples, streaming, output, trust_remote_code)
    with live_progress(quiet=as_json or dry_run) as listener:
        prepared = prepare_prune(source, out, method, settings, listener)
        pruned = None if dry_run else run_prune(prepared)
    if pruned is None:
        print_json(prepared.to_json()) if as_json else tables.show_prepared(prepared)
    else:
        print_json({"out": str(pruned.out), **pruned.report}) if as_json else tables.show_pruned(pruned)


@grouped
def search(
    source: o.Source,
    plan: o.PlanOut,
    method: SearchOptions,
    samples: Calibration,
    compute: Compute,
    streaming: Streaming,
    overwrite: o.OverwriteFile = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Search SOURCE for merges and write the plan; no weights are written."""
    check_source(source)
    check_plan_path(plan, overwrite)
    from streamcollapse.cli import plans, tables
    from streamcollapse.jobs.prepare import prepare_search
    from streamcollapse.jobs.prune import run_search_alone

    settings = RunSettings(compute, samples, streaming, Output(overwrite=overwrite), trust_remote_code)
    with live_progress(quiet=as_json or dry_run) as listener:
        prepared = prepare_search(source, method, settings, plan, listener)
        found = None if dry_run else run_search_alone(prepared)
    if found is None:
        print_json(prepared.to_json()) if as_json else tables.show_prepared(prepared)
    else:
        print_json(found.to_json()) if as_json else plans.show_plan(found, plan)


def strategies(as_json: o.Json = False) -> None:
    """List the strategies of a search and the metrics it may judge by: what each does, where it is from, its cost."""
    from streamcollapse.cli.plans import show_metrics, show_strategies
    from streamcollapse.searches.registry import describe
    from streamcollapse.settings.catalogue import METRICS

    if as_json:
        print_json({"strategies": describe(), "metrics": {name: vars(one) for name, one in METRICS.items()}})
    else:
        show_strategies()
        show_metrics()


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
    from streamcollapse.jobs.prepare import prepare_apply
    from streamcollapse.jobs.prune import run_apply
    from streamcollapse.merge.plan import Plan

    settings = RunSettings(compute, output=output, trust_remote_code=trust_remote_code)
    with live_progress(quiet=as_json or dry_run) as listener:
        prepared = prepare_apply(source, Plan.load(plan), out, settings, listener)
        pruned = None if dry_run else run_apply(prepared)
    if pruned is None:
        print_json(prepared.to_json()) if as_json else tables.show_prepared(prepared)
    else:
        print_json({"out": str(pruned.out), **pruned.report}) if as_json else tables.show_pruned(pruned)


def resume(
    work_dir: Annotated[
        Path, typer.Argument(readable=False, metavar="WORK_DIR", help="Work directory of an interrupted run.")
    ],
    as_json: o.Json = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Resume an interrupted prune, apply or convert from its work directory."""
    with one_line_errors():
        from streamcollapse.cli import stored, tables
        from streamcollapse.jobs.convert import Conversion
        from streamcollapse.jobs.resume import resume as run

        with live_progress(quiet=as_json) as listener:
            found = run(work_dir, trust_remote_code=trust_remote_code, listener=listener)
        if isinstance(found, Conversion):
            print_json(found.to_json()) if as_json else stored.show_conversion(found)
        else:
            print_json({"out": str(found.out), **found.report}) if as_json else tables.show_pruned(found)


@grouped
def inspect(
    source: o.Source,
    compute: Compute,
    as_json: o.Json = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Say what SOURCE is and what pruning it would need in memory; reads headers only."""
    check_source(source)
    from streamcollapse.cli import tables
    from streamcollapse.jobs.inspect import inspect as run

    found = run(source, settings=RunSettings(compute, trust_remote_code=trust_remote_code))
    print_json(found.to_json()) if as_json else tables.show_inspection(found)


@grouped
def perplexity(
    model: o.Model,
    text: EvaluationText,
    compute: Compute,
    plan: ScoredPlan = None,
    as_json: o.Json = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Perplexity of MODEL on a text, with weights streamed; with --plan of what PLAN makes of it, unwritten."""
    check_source(model)
    from streamcollapse.cli import tables
    from streamcollapse.jobs.perplexity import perplexity as run
    from streamcollapse.merge.plan import Plan

    parsed = None if plan is None else Plan.load(plan)
    settings = RunSettings(compute, trust_remote_code=trust_remote_code)
    with live_progress(quiet=as_json) as listener:
        score = run(model, text, plan=parsed, settings=settings, listener=listener)
    print_json(tables.score_json(score)) if as_json else tables.show_score(score, model)
