"""How good are the smaller models, strategy by strategy and rule by rule?

Question   Perplexity of held-out text with about 10, 25, 33 and 50 % of the layers gone, for every strategy with each
of
           its rules, beside the time and the bytes that finding the plan took.
Ceiling    The dense model's own perplexity: the table gives by how much log-perplexity (the mean loss, in nats) rises.
Targets    At 25 % and at 50 % the recommended setting raises it by at most 0.7 times what ``laco`` with the rule
           ``sequential`` does at its best C and I, and by no more than the better of block-influence and angular.
Method     The calibration samples are those that a user gets without asking; the text that is scored is not among them.
           Every search of a model shares a work directory, so that a candidate is evaluated once: time and bytes are
           those of what was new, told for the strategies in the order of the table and to be read with that in mind.
           ``laco`` is searched over the grid of C and I with its threshold found for the number of layers, and for
           ``sequential`` over a grid of thresholds too, since several can give one number and the found one need not
           be the best; a run counts for the number of layers that it gives. A setting that cannot prune as little as is
           wanted is left out. Plans are scored without being written. Nothing is random.

    python benchmarks/quality.py [--source DIR] [--text FILE] [--tokens 20000] [--quick] [--save FILE]

Without --source the model and the text that come with the package. The last line of stdout is one JSON document; exit
code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from about import report

from streamcollapse import Compute, Plan, Streaming, inspect, perplexity, search
from streamcollapse.errors import OptionError
from streamcollapse.strategy.collapse import CollapseOptions

SHARES = (0.10, 0.25, 0.33, 0.50)
THRESHOLDS = [round(0.99 - 0.02 * i, 2) for i in range(30)]
WINDOW = 256
RECOMMENDED = {"strategy": "greedy", "rule": "first,sequential"}
WANTED = 0.7  # of what the paper's procedure loses
AT = (0.25, 0.50)


def settings(quick: bool) -> Iterator[dict[str, Any]]:
    """Every strategy with each of its rules."""
    for c in (4,) if quick else (2, 3, 4, 5, 6):
        for i in (1, 2) if quick else (1, 2, 3, 4):
            yield {"strategy": "laco", "rule": "sequential", "layers_per_merge": c, "interval": i}
    for rule in ("rdsc", "mean", "first", "best"):
        yield {"strategy": "laco", "rule": rule}
    for rule in ("first", "sequential", "mean", "first,sequential", "best"):
        yield {"strategy": "greedy", "rule": rule}
    for rule in ("sequential", "mean"):
        yield {"strategy": "rule-based", "rule": rule}
    yield {"strategy": "block-influence"}
    yield {"strategy": "angular"}


class Scores:
    """Losses of plans on one text, each computed once."""

    def __init__(self, source: Path, text: Path, tokens: int) -> None:
        self._source, self._text, self._tokens = source, text, tokens
        self._known: dict[str, float] = {}

    def of(self, plan: Plan | None) -> float:
        key = "" if plan is None else repr([layer.key for layer in plan.layers])
        if key not in self._known:
            score = perplexity(self._source, self._text, window=WINDOW, max_tokens=self._tokens, plan=plan)
            self._known[key] = score.nll
        return self._known[key]


def one(
    source: Path, options: CollapseOptions, counts: list[int], work: Path, scores: Scores, dense: float
) -> dict[str, Any] | None:
    """What ``options`` come to; None where they cannot prune that little, or to no number of layers in ``counts``."""
    began = time.perf_counter()
    try:
        plan = search(source, options, compute=Compute(), streaming=Streaming(work_dir=work))
    except OptionError as error:
        print(f"{options.strategy} {options.rule}, {options.target_layers} layers: {error}", flush=True)
        return None
    seconds = time.perf_counter() - began
    assert plan.search is not None
    if options.target_layers is None and plan.num_layers not in counts:
        return None
    loss = scores.of(plan)
    laco = options.strategy == "laco"
    return {
        "strategy": options.strategy,
        "rule": options.rule,
        "C": options.layers_per_merge if laco else None,
        "I": options.interval if laco else None,
        "threshold": plan.search.threshold if laco else None,
        "wanted_layers": options.target_layers,
        "layers": plan.num_layers,
        "nll": loss,
        "rise": loss - dense,
        "seconds": seconds,
        "dropped_or_mixed": [layer.base for layer in plan.layers if not layer.untouched],
        "kept": [layer.base for layer in plan.layers if layer.untouched],
    }


def best(rows: list[dict[str, Any]], wanted: int, **which: str) -> dict[str, Any] | None:
    """The row with the least rise that has exactly ``wanted`` layers."""
    fitting = [r for r in rows if r["layers"] == wanted and all(r[key] == value for key, value in which.items())]
    return min(fitting, key=lambda row: float(row["rise"]), default=None)


def judged(rows: list[dict[str, Any]], num_layers: int) -> list[dict[str, Any]]:
    """The targets, and whether they are met."""
    found = []
    for share in AT:
        wanted = num_layers - round(share * num_layers)
        ours = best(rows, wanted, **RECOMMENDED)
        paper = best(rows, wanted, strategy="laco", rule="sequential")
        others = [r for name in ("block-influence", "angular") if (r := best(rows, wanted, strategy=name))]
        if ours is None or paper is None or not others:
            found.append({"share": share, "layers": wanted, "met": None})
            continue
        limit = min(WANTED * paper["rise"], *(row["rise"] for row in others))
        found.append(
            {
                "share": share,
                "layers": wanted,
                "ours": ours["rise"],
                "laco": paper["rise"],
                "laco_at": {key: paper[key] for key in ("C", "I", "threshold")},
                "of_laco": ours["rise"] / paper["rise"],
                "drops": min(row["rise"] for row in others),
                "met": ours["rise"] <= limit,
            }
        )
    return found


def show(rows: list[dict[str, Any]], num_layers: int) -> None:
    counts = [num_layers - round(share * num_layers) for share in SHARES]
    print(f"{'rise of the loss at':<44}" + "".join(f"{count:>10}" for count in counts) + " layers")
    names = dict.fromkeys((row["strategy"], row["rule"]) for row in rows)
    for strategy, rule in names:
        cells = [best(rows, count, strategy=strategy, rule=rule) for count in counts]
        line = "".join(f"{'-' if cell is None else format(cell['rise'], '.4f'):>10}" for cell in cells)
        print(f"{strategy + ' ' + rule:<44}{line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000, help="of the text that is scored")
    parser.add_argument("--quick", action="store_true", help="a smaller grid of C and I")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    print(__doc__.split("\n\n")[1])
    data = Path(str(resources.files("streamcollapse.data")))
    source = given.source or data / "wiki-llama-24l"
    scores = Scores(source, given.text or data / "text" / "wiki_eval.txt", given.tokens)
    num_layers, dense = inspect(source).num_layers, scores.of(None)
    rows: list[dict[str, Any]] = []
    counts = [num_layers - round(share * num_layers) for share in SHARES]
    print(f"{source.name}: {num_layers} layers, loss {dense:.4f}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for setting in settings(given.quick):
            tries = [CollapseOptions(**setting, target_layers=count) for count in counts]
            if (setting["strategy"], setting.get("rule")) == ("laco", "sequential"):
                tries += [CollapseOptions(**setting, threshold=threshold) for threshold in THRESHOLDS]
            for options in tries:
                row = one(source, options, counts, Path(work) / "work", scores, dense)
                if row is None:
                    continue
                rows.append(row)
                about = {key: row[key] for key in ("strategy", "rule", "C", "I", "layers", "rise", "seconds")}
                print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    show(rows, num_layers)
    targets = judged(rows, num_layers)
    for target in targets:
        print(target)
    body = {"model": source.name, "layers": num_layers, "nll": dense, "tokens": given.tokens, "window": WINDOW,
            "recommended": RECOMMENDED, "targets": targets, "rows": rows}  # fmt: skip
    report("quality", body, given.save)
    sys.exit(1 if any(target["met"] is False for target in targets) else 0)


if __name__ == "__main__":
    main()
