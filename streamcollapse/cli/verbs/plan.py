"""The verbs that make plans without a search."""

from pathlib import Path
from typing import Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import print_json
from streamcollapse.settings.search import SearchOptions

plan = typer.Typer(
    name="plan", help="Make plans by hand, and put them together.", no_args_is_help=True, add_completion=False
)

Target = Annotated[Path, typer.Option("--plan", readable=False, metavar="FILE", help="Where to write the plan.")]
PlanFile = Annotated[Path, typer.Argument(readable=False, metavar="PLAN")]


@plan.command()
@o.grouped
def make(
    source: o.Source,
    to: Target,
    method: Annotated[SearchOptions, o.Only(("merge_norms",))],
    settings: o.Trust,
    drop: Annotated[
        str | None,
        typer.Option(
            "--drop",
            metavar="LAYERS",
            help="Leave these out: 21-29 or 3,5,9, from 0 as in tensor names.",
            show_default="none",
        ),
    ] = None,
    merge: Annotated[
        list[str] | None,
        typer.Option(
            "--merge",
            metavar="LAYERS:RULE",
            help="One layer for these: 12-15:mean, or 12-15:rdsc:0.25. Repeatable.",
            show_default="none",
        ),
    ] = None,
    overwrite: o.OverwriteFile = False,
    as_json: o.Json = False,
) -> None:
    """Write a plan for SOURCE by hand, such as a published list of layers."""
    from streamcollapse.cli.tables import show_plan
    from streamcollapse.jobs.planning import make_plan
    from streamcollapse.run.first_checks import check_plan_path

    check_plan_path(to, overwrite)
    trusted = settings.trust_remote_code
    made = make_plan(source, drop, merge or (), merge_norms=method.merge_norms, trust_remote_code=trusted)
    made.save(to)
    print_json(made.to_json()) if as_json else show_plan(made, to)


@plan.command()
@o.grouped
def compose(
    first: PlanFile, second: PlanFile, to: Target, overwrite: o.OverwriteFile = False, as_json: o.Json = False
) -> None:
    """Write one plan against the source of the first PLAN, for what the second makes of its result."""
    from streamcollapse.cli.tables import show_plan
    from streamcollapse.jobs.planning import compose_plans, save_composed
    from streamcollapse.run.first_checks import check_plan_path

    check_plan_path(to, overwrite)
    made = compose_plans(first, second)
    save_composed(made, first, second, to)
    print_json(made.to_json()) if as_json else show_plan(made, to)


@plan.command()
@o.grouped
def export(
    source: o.Source,
    made: Annotated[Path, typer.Argument(readable=False, metavar="PLAN", help="Plan of this source.")],
    out: Annotated[Path, typer.Option("--out", readable=False, metavar="FILE", help="Where to write it.")],
    settings: o.Trust,
    to: Annotated[str, typer.Option("--to", metavar="mergekit", help="The tool to write it for.")] = "mergekit",
    overwrite: o.OverwriteFile = False,
    as_json: o.Json = False,
) -> None:
    """Write PLAN in the words of another tool, which then builds the same model of SOURCE."""
    from streamcollapse.jobs.planning import export_plan
    from streamcollapse.merge.plan import Plan
    from streamcollapse.run.first_checks import check_plan_path
    from streamcollapse.storage.disk import write_whole
    from streamcollapse.storage.staging import make_parents

    check_plan_path(out, overwrite, "out")
    make_parents(out)
    write_whole(out, export_plan(source, Plan.load(made), to, trust_remote_code=settings.trust_remote_code))
    print_json({"out": str(out)}) if as_json else print(f"{out}: mergekit-yaml {out} DIR builds the model")
