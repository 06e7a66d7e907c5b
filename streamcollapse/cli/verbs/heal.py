"""The verb heal."""

from typing import Annotated

import typer

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, print_json
from streamcollapse.run.first_checks import check_out, check_source
from streamcollapse.settings.declared import declared
from streamcollapse.settings.heal import Healing
from streamcollapse.settings.run import Compute, Judging, Output, RunSettings, Streaming

_STREAMING = tuple(key for key in declared(Streaming) if key != "lookahead")
_SETTINGS = (*declared(Compute), *_STREAMING, *declared(Output), *declared(Judging), "trust_remote_code")


@o.grouped
def heal(
    pruned: Annotated[str, typer.Argument(metavar="PRUNED", help=o.CHECKPOINT)],
    out: o.Out,
    healing: Healing,
    settings: Annotated[RunSettings, o.Only(_SETTINGS)],
    verbose: o.Verbose = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> None:
    """Heal the checkpoint PRUNED by distillation from SOURCE, into the new directory DIR.

    Weights are streamed up and down the stack, so that one layer is in memory, whatever the model's size.
    """
    check_source(pruned)
    check_source(healing.teacher)
    check_out(pruned, out, settings.streaming, settings.output)
    from streamcollapse.cli import heal_tables
    from streamcollapse.jobs.heal import run_heal
    from streamcollapse.jobs.prepare_heal import prepare_heal

    with live_progress(quiet=as_json or dry_run, verbose=verbose) as listener:
        prepared = prepare_heal(pruned, out, healing, settings, listener).timed()
        healed = None if dry_run else run_heal(prepared)
    if healed is None:
        print_json(prepared.to_json()) if as_json else heal_tables.show_prepared(prepared, verbose)
    else:
        print_json({"out": str(healed.out), **healed.report}) if as_json else heal_tables.show_healed(healed)
