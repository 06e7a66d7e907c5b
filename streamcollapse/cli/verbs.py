"""The verbs: parse, call the library, print. Everything heavy is imported when a verb runs, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.grouped import grouped
from streamcollapse.cli.screen import live_progress, one_line_errors, print_json
from streamcollapse.settings import Calibration, Compute, Output, Streaming
from streamcollapse.strategy.collapse import CollapseOptions

PlanOut = Annotated[
    Path,
    typer.Option(
        "--plan", readable=False, metavar="FILE", help="Where to write the plan.", rich_help_panel="The output"
    ),
]
PlanIn = Annotated[
    Path, typer.Argument(readable=False, metavar="PLAN", help="Plan that search made of the same source.")
]
TextFile = Annotated[Path, typer.Option("--text", readable=False, metavar="FILE", help="UTF-8 text to predict.")]
Window = Annotated[
    int | None,
    typer.Option("--window", help="Tokens per window.", show_default="the model's context, at most 2048"),
]
Stride = Annotated[
    int | None,
    typer.Option(
        "--stride",
        help="Tokens from the beginning of a window to that of the next; each token is predicted once, with what the "
        "window has before it.",
        show_default="windows do not overlap",
    ),
]
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
TextTokens = Annotated[
    int | None, typer.Option("--max-tokens", help="Use only the first tokens of the text.", show_default="all")
]


@grouped
def prune(
    source: o.Source,
    out: o.Out,
    method: CollapseOptions,
    samples: Calibration,
    compute: Compute,
    streaming: Streaming,
    output: Output,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Prune SOURCE by layer collapse into the new directory DIR: reference pass, search, write."""
    from streamcollapse.cli import tables
    from streamcollapse.jobs import preview as previews
    from streamcollapse.jobs import prune as jobs

    if dry_run:
        preview = previews.preview_search(source, method, samples, compute, streaming, trust_remote_code, out, output)
        print_json(preview.to_json()) if as_json else tables.show_preview(preview)
        return
    with live_progress(quiet=as_json) as listener:
        pruned = jobs.prune(
            source,
            out,
            method,
            calibration=samples,
            compute=compute,
            streaming=streaming,
            output=output,
            trust_remote_code=trust_remote_code,
            listener=listener,
        )
    print_json({"out": str(pruned.out), **pruned.report}) if as_json else tables.show_pruned(pruned)


@grouped
def search(
    source: o.Source,
    plan: PlanOut,
    method: CollapseOptions,
    samples: Calibration,
    compute: Compute,
    streaming: Streaming,
    overwrite: o.OverwriteFile = o.OUTPUT.overwrite,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Search SOURCE for merges and write the plan; no weights are written."""
    from streamcollapse.cli import plans, tables
    from streamcollapse.jobs import preview as previews
    from streamcollapse.jobs import prune as jobs

    previews.check_plan_path(plan, overwrite)
    if dry_run:
        preview = previews.preview_search(source, method, samples, compute, streaming, trust_remote_code)
        print_json(preview.to_json()) if as_json else tables.show_preview(preview)
        return
    with live_progress(quiet=as_json) as listener:
        found = jobs.search(
            source,
            method,
            calibration=samples,
            compute=compute,
            streaming=streaming,
            trust_remote_code=trust_remote_code,
            listener=listener,
            save_as=plan,
        )
    print_json(found.to_json()) if as_json else plans.show_plan(found, plan)


def strategies(as_json: o.Json = False) -> None:
    """List the strategies of a search and the metrics it may judge by: what each does, where it is from, its cost."""
    from streamcollapse.cli.plans import show_metrics, show_strategies
    from streamcollapse.strategy.catalogue import METRICS, STRATEGIES

    if as_json:
        listed = {name: vars(one) for name, one in STRATEGIES.items()}
        print_json({"strategies": listed, "metrics": {name: vars(one) for name, one in METRICS.items()}})
    else:
        show_strategies(STRATEGIES)
        show_metrics(METRICS)


@grouped
def apply(
    source: o.Source,
    plan: PlanIn,
    out: o.Out,
    output: Output,
    device: o.Device = o.COMPUTE.device,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Write the pruned checkpoint that PLAN makes of SOURCE into the new directory DIR."""
    from streamcollapse.cli import tables
    from streamcollapse.jobs import preview as previews
    from streamcollapse.jobs import prune as jobs
    from streamcollapse.merge.plan import Plan

    parsed, compute = Plan.load(plan), Compute(device)
    if dry_run:
        preview = previews.preview_apply(source, parsed, out, compute, output, trust_remote_code)
        print_json(preview.to_json()) if as_json else tables.show_preview(preview)
        return
    with live_progress(quiet=as_json) as listener:
        pruned = jobs.apply(
            source,
            parsed,
            out,
            compute=compute,
            output=output,
            trust_remote_code=trust_remote_code,
            listener=listener,
        )
    print_json({"out": str(pruned.out), **pruned.report}) if as_json else tables.show_pruned(pruned)


def resume(
    work_dir: Annotated[
        Path, typer.Argument(readable=False, metavar="WORK_DIR", help="Work directory of a run that was broken off.")
    ],
    as_json: o.Json = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Go on with the prune, apply or convert that was broken off, from what WORK_DIR holds."""
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
    from streamcollapse.cli import tables
    from streamcollapse.jobs.inspect import inspect as run

    found = run(source, compute=compute, trust_remote_code=trust_remote_code)
    print_json(found.to_json()) if as_json else tables.show_inspection(found)


@grouped
def perplexity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=o.CHECKPOINT)],
    text: TextFile,
    compute: Compute,
    plan: ScoredPlan = None,
    window: Window = None,
    stride: Stride = None,
    max_tokens: TextTokens = None,
    as_json: o.Json = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Perplexity of MODEL on a text, with weights streamed; with --plan of what PLAN makes of it, unwritten."""
    from streamcollapse.cli import tables
    from streamcollapse.jobs.perplexity import perplexity as run
    from streamcollapse.merge.plan import Plan

    parsed = None if plan is None else Plan.load(plan)
    with live_progress(quiet=as_json) as listener:
        score = run(
            model,
            text,
            window=window,
            stride=stride,
            max_tokens=max_tokens,
            plan=parsed,
            compute=compute,
            trust_remote_code=trust_remote_code,
            listener=listener,
        )
    print_json(tables.score_json(score)) if as_json else tables.show_score(score, model)
