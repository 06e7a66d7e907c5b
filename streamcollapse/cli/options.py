"""The options that several verbs share, each declared once. Defaults come from the library's own settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamcollapse.settings import COMPUTE_DTYPES, IO_MODES, SAMPLES, Calibration, Compute, Output, Streaming
from streamcollapse.strategy.catalogue import STRATEGIES
from streamcollapse.strategy.collapse import CollapseOptions

COLLAPSE, CALIBRATION, COMPUTE, OUTPUT = CollapseOptions(), Calibration(), Compute(), Output()
STREAMING = Streaming()

_METHOD = "The method"
_RUN = "The run"
_OUTPUT = "The output"

CHECKPOINT = "Directory of a Hugging Face checkpoint, or its id on the Hub: org/name or org/name@revision."

Source = Annotated[str, typer.Argument(metavar="SOURCE", help=CHECKPOINT)]
Out = Annotated[
    Path,
    typer.Option(
        "--out", readable=False, metavar="DIR", help="New directory for the pruned checkpoint.", rich_help_panel=_OUTPUT
    ),
]

LayersPerMerge = Annotated[
    int | None,
    typer.Option(
        "--layers-per-merge",
        "-C",
        help="C: layers combined in each merge of laco, 2 or more.",
        show_default=str(COLLAPSE.layers_per_merge),
        rich_help_panel=_METHOD,
    ),
]
Interval = Annotated[
    int | None,
    typer.Option(
        "--interval",
        "-I",
        help="I: layers the pointer of laco moves down after a merge.",
        show_default=str(COLLAPSE.interval),
        rich_help_panel=_METHOD,
    ),
]
Lowest = Annotated[
    int, typer.Option("--lowest", "-L", help="L: lowest layer to merge into, from 1.", rich_help_panel=_METHOD)
]
Highest = Annotated[
    int | None,
    typer.Option(
        "--highest", "-H", help="H: layer at which the range ends.", show_default="all layers", rich_help_panel=_METHOD
    ),
]
Threshold = Annotated[
    float,
    typer.Option(
        "--threshold", "-T", help="T: keep a merge if its similarity is above this, -1 to 1.", rich_help_panel=_METHOD
    ),
]
Rule = Annotated[
    str | None,
    typer.Option(
        "--rule",
        show_default="the strategy's: first for greedy, sequential for laco",
        metavar="RULE,..",
        help="How a group of layers becomes one. first: drop the followers. sequential: its last layer, with the norms "
        "of its first: what the authors' released code computes. rdsc: the paper's Eq. (1), base + sum of differences, "
        "which usually destroys trained models. mean: equal weights. Of several with commas, or best (all of them), "
        "the most similar counts for each candidate.",
        rich_help_panel=_METHOD,
    ),
]
MetricName = Annotated[
    str | None,
    typer.Option(
        "--metric",
        show_default="the strategy's; cosine for laco, kl for greedy",
        metavar="NAME",
        help="What similarity is: of last hidden states (cosine, token-cosine, cka-linear, cka-kernel), or of what "
        "the head makes of them (nll, kl). 1 is the same.",
        rich_help_panel=_METHOD,
    ),
]
Rescale = Annotated[
    bool | None,
    typer.Option(
        "--rescale/--no-rescale",
        help="At the end, find a scale for each layer that stays, so that the result is most similar.",
        show_default="rescale for greedy, else not",
        rich_help_panel=_METHOD,
    ),
]
MergesPerRound = Annotated[
    int,
    typer.Option(
        "--merges-per-round",
        help="Merges that --strategy greedy takes in a round, if they have no layer in common.",
        rich_help_panel=_METHOD,
    ),
]
RdscScale = Annotated[
    str,
    typer.Option(
        "--rdsc-scale",
        metavar="NUMBER,..",
        help="Factor of the differences under --rule rdsc; 1 is Eq. (1). Several compete.",
        rich_help_panel=_METHOD,
    ),
]
MergeNorms = Annotated[
    bool,
    typer.Option(
        "--merge-norms/--keep-norms",
        help="Merge normalisation weights too, or keep those of the first layer.",
        rich_help_panel=_METHOD,
    ),
]
Strategy = Annotated[
    str | None,
    typer.Option(
        "--strategy",
        metavar="NAME",
        help=f"How the layers are found: {', '.join(STRATEGIES)}. The verb strategies says what each does, and costs.",
        show_default="greedy, or laco where -C or -I is given",
        rich_help_panel=_METHOD,
    ),
]
TargetLayers = Annotated[
    int | None,
    typer.Option(
        "--target-layers",
        help="Prune to this many layers, whatever the threshold.",
        show_default="as far as the threshold allows",
        rich_help_panel=_METHOD,
    ),
]
TargetRatio = Annotated[
    float | None,
    typer.Option(
        "--target-ratio",
        help="Prune as much as goes up to this share of the parameters.",
        show_default="as far as the threshold allows",
        rich_help_panel=_METHOD,
    ),
]
Samples = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help=f"Samples: .txt with one a line, or .jsonl with a field text; {' or '.join(SAMPLES)}, which ship with the "
        "package.",
        show_default="passages for greedy, else sentences",
        rich_help_panel=_METHOD,
    ),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", help="Cut each calibration sample to this many tokens.", rich_help_panel=_METHOD)
]
Device = Annotated[
    str, typer.Option("--device", metavar="auto|cpu|cuda[:N]", help="Where to compute.", rich_help_panel=_RUN)
]
ComputeDtype = Annotated[
    str,
    typer.Option(
        "--compute-dtype",
        metavar="|".join(("auto", *COMPUTE_DTYPES)),
        help="Precision of the forward pass; auto: the checkpoint's where the hardware multiplies it, else float32.",
        rich_help_panel=_RUN,
    ),
]
Lookahead = Annotated[
    str,
    typer.Option(
        "--lookahead",
        metavar="auto|N",
        help="Candidates evaluated in one pass over the weights; auto weighs reading against computing. "
        "Changes no result.",
        rich_help_panel=_RUN,
    ),
]
Prefetch = Annotated[
    int,
    typer.Option("--prefetch", help="Layers read ahead of the computation. Changes no result.", rich_help_panel=_RUN),
]
Io = Annotated[
    str,
    typer.Option(
        "--io",
        metavar="|".join(IO_MODES),
        help="How weights are read: in place, through or past the page cache; auto measures. Changes no result.",
        rich_help_panel=_RUN,
    ),
]
RamBudget = Annotated[
    str | None,
    typer.Option(
        "--ram-budget",
        metavar="SIZE",
        help="Memory to stay within, beyond the interpreter's own.",
        show_default="what is free, less a tenth",
        rich_help_panel=_RUN,
    ),
]
VramBudget = Annotated[
    str | None,
    typer.Option(
        "--vram-budget",
        metavar="SIZE",
        help="GPU memory to stay within.",
        show_default="what is free, less a tenth",
        rich_help_panel=_RUN,
    ),
]
WorkDir = Annotated[
    Path | None,
    typer.Option(
        "--work-dir",
        readable=False,
        metavar="DIR",
        help="Keep what is found out here: after a crash to go on, and for another search on the same source and "
        "samples.",
        show_default="beside the output, until it is done",
        rich_help_panel=_RUN,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.", rich_help_panel=_RUN),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, and no progress.", rich_help_panel=_RUN)]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.", rich_help_panel=_RUN),
]
MaxShardSize = Annotated[
    str,
    typer.Option("--max-shard-size", metavar="SIZE", help="Largest shard of weights.", rich_help_panel=_OUTPUT),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace DIR once the new one is complete.", rich_help_panel=_OUTPUT),
]
OverwriteFile = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an older file once the new one is complete.", rich_help_panel=_OUTPUT),
]
