"""Draw what quality.py found: perplexity of held-out text against the share of layers that is gone.

    python benchmarks/plot_quality.py RESULT.json... --out PICTURE.png

A panel for each result; a line for each strategy at the best of its settings, and one for the recommended setting, at
the numbers of layers that quality.py wants.
Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
from quality_settings import SHARES

mpl.use("Agg")
from matplotlib import pyplot as plt

NAMES = ("laco", "greedy", "rule-based", "block-influence", "angular")


def lines(document: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Points of (share of layers gone, perplexity) by what they are of."""
    counts = {document["layers"] - round(share * document["layers"]) for share in SHARES}
    rows, recommended = [row for row in document["rows"] if row["layers"] in counts], document["recommended"]
    plain = [row for row in rows if not row["rescale"]]
    kinds = {f"{name}, best setting": [row for row in plain if row["strategy"] == name] for name in NAMES}
    kinds["recommended"] = [
        row
        for row in rows
        if row["samples"] == "passages" and all(row[key] == value for key, value in recommended.items())
    ]
    found = {}
    for kind, of_kind in kinds.items():
        best: dict[int, float] = {}
        for row in of_kind:
            best[row["layers"]] = min(row["nll"], best.get(row["layers"], math.inf))
        points = [(1 - count / document["layers"], math.exp(nll)) for count, nll in best.items()]
        found[kind] = sorted([(0.0, math.exp(document["nll"])), *points])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    size = (6 * len(given.results), 4.5)
    figure, panels = plt.subplots(1, len(given.results), figsize=size, layout="constrained", squeeze=False)
    for axes, path in zip(panels[0], given.results, strict=True):
        document = json.loads(path.read_text(encoding="utf-8"))
        for kind, points in lines(document).items():
            wide = kind == "recommended"
            axes.plot(*zip(*points, strict=True), marker=".", label=kind, linewidth=2.5 if wide else 1.2)
        dense = math.exp(document["nll"])
        highest = max(perplexity for points in lines(document).values() for _, perplexity in points)
        top = min(2.2 * dense, dense + 1.05 * (highest - dense))
        axes.set(xlabel="share of layers gone", ylabel="perplexity", xlim=(0, 0.52), ylim=(0.98 * dense, top))
        axes.set_title(f"{document['model']}, {document['layers']} layers")
        axes.grid(alpha=0.3)
    panels[0][0].legend()
    figure.savefig(given.out, dpi=120)


if __name__ == "__main__":
    main()
