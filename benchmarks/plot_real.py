"""Draw what bench_real.py found: the rise of the loss against the layers that are gone.

    python benchmarks/plot_real.py RESULT.json... --out PICTURE.png

A panel for each model (all files of it together), a line for each setting, at the number of layers that it gave.
Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from real_tables import rise, title, together

mpl.use("Agg")
from matplotlib import pyplot as plt


def lines(document: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Points of (layers gone, rise in nats) by setting."""
    found: dict[str, dict[int, float]] = {}
    for row in document["rows"]:
        loss = rise(row)
        if loss is not None and row["layers"] < document["layers"]:
            found.setdefault(row["setting"], {})[document["layers"] - row["layers"]] = loss
    return {setting: sorted(points.items()) for setting, points in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    documents = together([json.loads(path.read_text(encoding="utf-8")) for path in given.results])
    names = list(dict.fromkeys(row["setting"] for document in documents for row in document["rows"]))
    size = (5.5 * len(documents), 5.0)
    figure, panels = plt.subplots(1, len(documents), figsize=size, layout="constrained", squeeze=False)
    for axes, document in zip(panels[0], documents, strict=True):
        for setting, points in lines(document).items():
            effort, scaled = setting.startswith("greedy"), setting.endswith("scales")
            color = "black" if "repair" in setting else f"C{names.index(setting) % 10}"
            style = {"color": color, "linestyle": "none" if scaled else "-"}
            axes.plot(
                *zip(*points, strict=True),
                marker="*" if scaled else ".",
                label=setting,
                linewidth=2.0 if effort else 1.0,
                **style,
            )
        axes.set(xlabel="layers gone", ylabel="rise of the loss, nats", yscale="log")
        axes.set_title(f"{title(document)}, {document['layers']} layers")
        axes.grid(alpha=0.3, which="both")
    handles = {label: h for axes in panels[0] for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize="small", loc="outside lower center", ncols=5)
    figure.savefig(given.out, dpi=120)


if __name__ == "__main__":
    main()
