"""The verb that looks at a model's layers: similarity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from streamcollapse.cli import options as o
from streamcollapse.cli.screen import live_progress, print_json
from streamcollapse.cli.text import lines_of, plain_console
from streamcollapse.errors import OutputError
from streamcollapse.run.first_checks import check_source
from streamcollapse.settings.catalogue import BEST
from streamcollapse.settings.search import SearchOptions

if TYPE_CHECKING:
    from streamcollapse.jobs.similarity import Similarities

Folder = Annotated[
    Path,
    typer.Option("--out", readable=False, metavar="DIR", help="New directory for similarity.json and the pictures."),
]
Largest = Annotated[
    int, typer.Option("--layers-per-merge", "-C", help="C: the largest group that is tried as one layer.")
]
Rules = Annotated[str, typer.Option("--rule", metavar="RULE,..", help="Rules to merge by, with commas, or best: all.")]
MetricName = Annotated[str, typer.Option("--metric", help="What similarity is, as in a search.")]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write over the figures and pictures that are in DIR.")]


@o.grouped
def similarity(
    source: o.Source,
    out: Folder,
    settings: o.Searching,
    method: Annotated[SearchOptions, o.Only(("rdsc_scale", "merge_norms"))],
    layers_per_merge: Largest = 4,
    rule: Rules = BEST,
    metric: MetricName = "cosine",
    overwrite: Overwrite = False,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Say how alike the layers of SOURCE are: their weights, their hidden states, and every merge of 2 to C of them."""
    check_source(source)
    from streamcollapse.jobs.similarity import SIMILARITY_FILE
    from streamcollapse.jobs.similarity import similarity as run
    from streamcollapse.storage.index import local_path
    from streamcollapse.storage.staging import check_output

    check_output(out, local_path(source), overwrite)
    if overwrite and out.exists() and not (out / SIMILARITY_FILE).is_file():
        raise OutputError(f"{out}: holds no {SIMILARITY_FILE}; choose another --out")
    method = method.but(layers_per_merge=layers_per_merge, rule=rule, metric=metric)
    with live_progress(as_json, verbose) as listener:
        found = run(source, method, settings=settings, listener=listener)
    try:
        out.mkdir(exist_ok=overwrite)
        for older in out.glob("merges-*.png"):
            older.unlink()
    except OSError as error:
        raise OutputError(f"{out}: cannot be created: {error.strerror or error}") from error
    found.save(out)
    pictures = _draw(found, out)
    print_json({"out": str(out), "pictures": pictures, **found.to_json()}) if as_json else _show(found, out, pictures)


def _draw(found: Similarities, out: Path) -> list[str]:
    """The names of the pictures that were drawn; none without matplotlib."""
    from streamcollapse.cli import plots

    if not plots.has_matplotlib():
        return []
    between = {name.removesuffix(".weight"): row for name, row in found.weight_distances.items()}
    plots.plot_lines(between, ("layer, and the next", "L2 distance of weights"), out / "weights.png")
    states = {"cosine, flattened": found.hidden_cosines, "1 - block influence": [1 - x for x in found.block_influence]}
    plots.plot_lines(states, ("layer", "hidden states before and after"), out / "hidden_states.png")
    names = ["weights.png", "hidden_states.png"]
    for rule, rows in found.merges.items():
        names.append(f"merges-{rule.replace(':', '-')}.png")
        plots.plot_merges(rows, f"{rule}, {found.metric}", out / names[-1])
    return names


def _show(found: Similarities, out: Path, pictures: list[str]) -> None:
    """The best merge of each size and the least influential layers."""
    console = plain_console()
    table = Table(
        "rule", "layers merged", "best from layer", "similarity", "worst", caption="layers are counted from 0"
    )
    for rule, rows in found.merges.items():
        for size, row in rows.items():
            known = [(value, start) for start, value in enumerate(row) if value is not None]
            if known:
                value, start = max(known, key=lambda pair: (pair[0], -pair[1]))
                table.add_row(rule, str(size), str(start), f"{value:.4f}", f"{min(known)[0]:.4f}")
    console.print(table)
    least = sorted(range(found.num_layers), key=lambda i: found.block_influence[i])[:5]
    lines: list[tuple[str, str | Text]] = [
        ("least influence", ", ".join(f"layer {i} ({found.block_influence[i]:.3f})" for i in least)),
        ("written", ", ".join(str(out / name) for name in ("similarity.json", *pictures))),
    ]
    if not pictures:
        lines.append(("pictures", "none: they need matplotlib (pip install 'streamcollapse[plot]')"))
    console.print(lines_of(lines))
