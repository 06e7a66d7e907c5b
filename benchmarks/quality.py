"""How good are the smaller models, strategy by strategy and rule by rule?

Question   Perplexity of held-out text with about 10, 25, 33 and 50 % of the layers gone, for every strategy with each
           of its rules and metrics, beside the time and the bytes that finding the plan took; and what C, I and T, the
           calibration samples, the metric, and dropping instead of merging make of it.
Ceiling    The dense model's own perplexity: the table gives by how much log-perplexity (the mean loss, in nats) rises.
Targets    At 25 % and at 50 % the recommended setting raises it by at most 0.7 times what ``laco`` with the rule
           ``sequential`` does at its best C, I and T, and by no more than the better of block-influence and angular,
           each with the calibration samples that suit it best.
Method     Models: the bundled one, and one of another family (grow_model.py). Samples: the ten sentences that a user
           gets without asking (``sentences``), or 24 passages of 256 tokens (``passages``), from after the text that is
           scored; for the ablation 5 to 140 sentences, and twenty of them in noise. ``laco`` is searched over the grid
           of C and I with its threshold found for the number of layers, and for ``sequential`` on the sentences over a
           grid of thresholds too, since several can give one number and the found one need not be the best; a run
           counts for the number of layers that it gives. These share a work directory, so that a candidate is
           evaluated once: their time and bytes are those of what was new. All others start with nothing. A setting that
           cannot prune as little as is wanted is left out. Plans are scored without being written.

    python benchmarks/quality.py [--model bundled|grown] [--source DIR] [--tokens 12000] [--quick] [--save FILE]

On other samples than the ten sentences only 25 % and 50 % are tried, but for the recommended setting.

``--source``: a grown model that is there already. The last line of stdout is one JSON document; exit code 1 if a target
is missed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from about import report
from grow_model import HELD_OUT, grow_into
from transformers import AutoTokenizer

from streamcollapse import Calibration, Plan, Streaming, inspect, perplexity, search
from streamcollapse.errors import OptionError
from streamcollapse.progress import Event, LayerDone
from streamcollapse.strategy.catalogue import METRICS
from streamcollapse.strategy.collapse import CollapseOptions

SHARES = (0.10, 0.25, 0.33, 0.50)
THRESHOLDS = [round(0.99 - 0.04 * i, 2) for i in range(15)]
WINDOW, PASSAGES, PASSAGE = 256, 24, 256
RECOMMENDED = {"strategy": "greedy", "rule": "first,sequential", "metric": "kl", "rescale": True}
WANTED = 0.7  # of what the paper's procedure loses
AT = (0.25, 0.50)
DATA = Path(str(resources.files("streamcollapse.data")))


def samples(folder: Path, source: Path) -> dict[str, Calibration]:
    """The calibration samples by name."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = (DATA / "text" / "wiki_eval.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, verbose=False)["input_ids"][HELD_OUT:]
    passages = [tokenizer.decode(ids[i * PASSAGE : (i + 1) * PASSAGE]) for i in range(PASSAGES)]
    sentences = (DATA / "text" / "wiki_calibration.txt").read_text(encoding="utf-8").strip().split("\n")
    dice = random.Random(0)
    noisy = ["".join(dice.choice("abcdefghijklmnopqrstuvwxyz ,.#%0123") if dice.random() < 0.2 else c for c in line)
             for line in sentences[:20]]  # fmt: skip
    found = {"sentences": Calibration(), "passages": _file(folder, "passages", passages)}
    for count in (5, 20, 50, 100, 140):
        found[f"{count} sentences"] = _file(folder, f"{count}", sentences[:count])
    return found | {"20 noisy sentences": _file(folder, "noisy", noisy)}


def _file(folder: Path, name: str, texts: list[str]) -> Calibration:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Calibration(path, 2 * PASSAGE)


def settings(quick: bool) -> Iterator[tuple[dict[str, Any], str, bool]]:
    """Every strategy with each of its rules, what it is calibrated on, and whether it shares what was evaluated."""
    for c in (4,) if quick else (2, 3, 4, 6):
        for i in (1, 2) if quick else (1, 2, 3, 4):
            for name in ("sentences", "passages"):
                yield {"strategy": "laco", "rule": "sequential", "layers_per_merge": c, "interval": i}, name, True
    for rule in ("sequential", "rdsc", "mean", "first", "best"):
        yield {"strategy": "laco", "rule": rule}, "sentences", False
    for rule in ("first", "sequential", "mean", "first,sequential", "best"):
        yield {"strategy": "greedy", "rule": rule, "metric": "kl"}, "sentences", False
    for metric in METRICS:
        yield {"strategy": "greedy", "metric": metric}, "sentences", False
        yield {"strategy": "laco", "metric": metric}, "sentences", False
    for strategy in ("laco", "greedy"):
        yield {"strategy": strategy, "metric": "kl", "rescale": True}, "sentences", False
    yield {"strategy": "greedy", "metric": "kl", "merges_per_round": 3}, "sentences", False
    for rule in ("sequential", "mean"):
        yield {"strategy": "rule-based", "rule": rule}, "sentences", False
    for strategy in ("block-influence", "angular"):
        for name in ("sentences", "passages"):
            yield {"strategy": strategy}, name, False
    if not quick:
        for name in ("5 sentences", "20 sentences", "20 noisy sentences", "50 sentences", "140 sentences"):
            for strategy in ("laco", "greedy"):
                yield {"strategy": strategy}, name, False
        yield {"strategy": "greedy", "metric": "kl"}, "passages", False
        yield {"strategy": "laco", "metric": "kl", "rescale": True}, "passages", False
        yield {"strategy": "block-influence", "metric": "kl", "rescale": True}, "passages", False
    yield RECOMMENDED, "passages", False


class Scores:
    """Losses of plans on the held-out text, each computed once."""

    def __init__(self, source: Path, tokens: int) -> None:
        self._source, self._text, self._tokens = source, DATA / "text" / "wiki_eval.txt", tokens
        self._known: dict[str, float] = {}

    def of(self, plan: Plan | None) -> float:
        key = "" if plan is None else repr([layer.key for layer in plan.layers])
        if key not in self._known:
            score = perplexity(self._source, self._text, window=WINDOW, max_tokens=self._tokens, plan=plan)
            self._known[key] = score.nll
        return self._known[key]


class Trials:
    """Runs of settings on one model."""

    def __init__(self, source: Path, scores: Scores, folder: Path) -> None:
        self._source, self._scores, self._folder = source, scores, folder
        self._samples = samples(folder, source)
        self._dense = scores.of(None)
        self._bytes = inspect(source).num_bytes

    def run(self, options: CollapseOptions, name: str, shares: bool, counts: list[int]) -> dict[str, Any] | None:
        """What ``options`` come to; None where they cannot prune that little, or to no number of layers in
        ``counts``."""
        began, read = time.perf_counter(), 0

        def listener(event: Event) -> None:
            nonlocal read
            if isinstance(event, LayerDone):
                read += event.num_bytes

        streaming = Streaming(work_dir=self._folder / f"work-{name}" if shares else None)
        try:
            plan = search(
                self._source, options, calibration=self._samples[name], streaming=streaming, listener=listener
            )
        except OptionError as error:
            print(f"{options.strategy} {options.rule}, {options.target_layers} layers: {error}", flush=True)
            return None
        seconds = time.perf_counter() - began
        assert plan.search is not None
        if options.target_layers is None and plan.num_layers not in counts:
            return None
        loss, laco = self._scores.of(plan), options.strategy == "laco"
        return {
            "strategy": options.strategy,
            "rule": options.rule,
            "metric": None if options.strategy in ("block-influence", "angular") and not options.rescale
            else options.metric,
            "rescale": options.rescale,
            "merges_per_round": options.merges_per_round,
            "samples": name,
            "C": options.layers_per_merge if laco else None,
            "I": options.interval if laco else None,
            "threshold": plan.search.threshold if laco else None,
            "wanted_layers": options.target_layers,
            "layers": plan.num_layers,
            "nll": loss,
            "rise": loss - self._dense,
            "seconds": None if shares else seconds,
            "model_reads": None if shares else read / self._bytes,
            "plan": [[layer.base, {str(s): c for s, c in layer.mix.items()}] for layer in plan.layers],
        }  # fmt: skip


def best(rows: list[dict[str, Any]], wanted: int, **which: Any) -> dict[str, Any] | None:
    """The row with the least rise that has exactly ``wanted`` layers."""
    fitting = [r for r in rows if r["layers"] == wanted and all(r[key] == value for key, value in which.items())]
    return min(fitting, key=lambda row: float(row["rise"]), default=None)


def judged(rows: list[dict[str, Any]], num_layers: int) -> list[dict[str, Any]]:
    """The targets, and whether they are met."""
    found = []
    for share in AT:
        wanted = num_layers - round(share * num_layers)
        ours = best(rows, wanted, **RECOMMENDED, samples="passages")
        paper = best(rows, wanted, strategy="laco", rule="sequential", metric="cosine", rescale=False)
        names = ("block-influence", "angular")
        others = [r for name in names if (r := best(rows, wanted, strategy=name, rescale=False))]
        if ours is None or paper is None or not others:
            found.append({"share": share, "layers": wanted, "met": None})
            continue
        limit = min(WANTED * paper["rise"], *(row["rise"] for row in others))
        at = {key: paper[key] for key in ("C", "I", "threshold", "samples")}
        found.append(
            {
                "share": share,
                "layers": wanted,
                "ours": ours["rise"],
                "laco": paper["rise"],
                "laco_at": at,
                "of_laco": ours["rise"] / paper["rise"],
                "drops": min(row["rise"] for row in others),
                "met": ours["rise"] <= limit,
            }
        )
    return found


def show(rows: list[dict[str, Any]], counts: list[int]) -> None:
    """The rise of the loss, a line for each setting; ``laco`` on shared evaluations at its best C and I."""
    print(f"{'rise of the loss at':<76}" + "".join(f"{count:>8}" for count in counts) + " layers")
    keys = ("strategy", "rule", "metric", "rescale", "merges_per_round", "samples")
    for values in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        cells = [best(rows, count, **dict(zip(keys, values, strict=True))) for count in counts]
        line = "".join(f"{'-' if cell is None else format(cell['rise'], '.4f'):>8}" for cell in cells)
        name = " ".join(
            [str(v) for v in values[:3] if v]
            + ["rescaled"] * values[3] + [f"{values[4]} at once"] * (values[4] > 1) + [f"({values[5]})"]
        )  # fmt: skip
        print(f"{name:<76}{line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["bundled", "grown"], default="bundled")
    parser.add_argument("--source", type=Path)
    parser.add_argument("--tokens", type=int, default=12_000, help="of the text that is scored")
    parser.add_argument("--quick", action="store_true", help="a smaller grid of C and I, no ablation of the samples")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    if given.tokens > HELD_OUT:
        parser.error(f"--tokens is {given.tokens}; {HELD_OUT} are held out")
    print(__doc__.split("\n\n")[1])
    with tempfile.TemporaryDirectory() as temporary:
        source = given.source or DATA / "wiki-llama-24l"
        if given.model == "grown" and given.source is None:
            source = grow_into(Path(temporary) / "grown")
        scores = Scores(source, given.tokens)
        num_layers, dense = inspect(source).num_layers, scores.of(None)
        rows: list[dict[str, Any]] = []
        counts = [num_layers - round(share * num_layers) for share in SHARES]
        print(f"{given.model}: {num_layers} layers, loss {dense:.4f}", flush=True)
        trials = Trials(source, scores, Path(temporary))
        for setting, name, shares in settings(given.quick):
            all_of_them = name == "sentences" or setting == RECOMMENDED
            wanted = counts if all_of_them else [num_layers - round(share * num_layers) for share in AT]
            tries = [CollapseOptions(**setting, target_layers=count) for count in wanted]
            if shares and name == "sentences":
                tries += [CollapseOptions(**setting, threshold=threshold) for threshold in THRESHOLDS]
            for options in tries:
                row = trials.run(options, name, shares, counts)
                if row is not None:
                    rows.append(row)
                    print(", ".join(f"{key} {value}" for key, value in row.items() if key != "plan"), flush=True)
    show(rows, counts)
    targets = judged(rows, num_layers)
    for target in targets:
        print(target)
    body = {"model": given.model, "layers": num_layers, "nll": dense, "tokens": given.tokens, "window": WINDOW,
            "recommended": RECOMMENDED, "targets": targets, "rows": rows}  # fmt: skip
    report("quality", body, given.save)
    sys.exit(1 if any(target["met"] is False for target in targets) else 0)


if __name__ == "__main__":
    main()
