"""How good are the smaller models, strategy by strategy and rule by rule?

Question   Perplexity of held-out text with about 10, 25, 33 and 50 % of the layers gone, for every strategy with each
           of its rules and metrics, beside the time and the bytes that finding the plan took; and what C, I and T, the
           calibration samples, the metric, and dropping instead of merging make of it.
Ceiling    The dense model's own perplexity: the table gives by how much log-perplexity (the mean loss, in nats) rises.
Targets    At 25 % and at 50 % the recommended setting raises it by at most 0.7 times what ``laco`` with the rule
           ``sequential`` does at its best C, I and T, and by no more than the better of block-influence and angular,
           each with the calibration samples that suit it best.
Method     Models: the bundled one, one of another family (grow_model.py), or a real one (real_models.py). Samples: the
           ten sentences that a user gets without asking of laco (``sentences``), or those that greedy gets
           (``passages``), which are from after the text that is scored; for the ablation 5 to 200 sentences, and twenty
           of them in noise. ``laco`` is searched over the grid of C and I with its threshold found for the number of
           layers, and for ``sequential`` on the sentences over a grid of thresholds too, since several can give one
           number and the found one need not be the best; a run counts for the number of layers that it gives. These
           share a work directory, so that a candidate is evaluated once, and no time is given for them. All others
           start with nothing. Time is processor time, of all cores together. Bytes are those of a model of which no
           layer stays in memory. A setting that cannot prune as little as is wanted is left out. Plans are scored
           without being written. Beside the rows: by each metric the similarity of every merge of four neighbours by
           the rule ``sequential``.

    python benchmarks/quality.py [--model bundled|grown|NAME] [--models DIR] [--source DIR] [--tokens 12000]
                                 [--quick | --recommended] [--rows FILE] [--save FILE]

Strategies with their rules are tried at all four shares, as is the recommended setting; the rest at 25 % and 50 %.

``--models``: where the real models are. ``--source``: a grown model that is there already. ``--rows``: where each row
is added once it is found, and looked up before it is searched: a run that was ended goes on there. The last line of
stdout is one JSON document; exit code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from about import report
from grow_model import HELD_OUT, grow_into
from quality_settings import AT, DATA, DEFAULT, RECOMMENDED, SEED, SHARES, Setting, samples, settings
from real_models import add_options, chosen_model

from streamcollapse import Plan, Streaming, inspect, perplexity, search, similarity
from streamcollapse.errors import OptionError
from streamcollapse.progress import Event, LayerDone
from streamcollapse.run.needs import MemoryPlan
from streamcollapse.settings.catalogue import METRICS
from streamcollapse.settings.run import EvaluationText, Repair, RunSettings
from streamcollapse.settings.search import SearchOptions

WINDOW = 256
WANTED = 0.7  # of what the paper's procedure loses


class Scores:
    """Losses of plans on the held-out text, each computed once."""

    def __init__(self, source: Path, tokens: int) -> None:
        self._source, self._text, self._tokens = source, DATA / "text" / "wiki_eval.txt", tokens
        self._known: dict[str, float] = {}

    def of(self, plan: Plan | None) -> float:
        key = "" if plan is None else repr([layer.key for layer in plan.layers])
        if key not in self._known:
            score = perplexity(self._source, EvaluationText(self._text, WINDOW, max_tokens=self._tokens), plan=plan)
            self._known[key] = score.nll
        return self._known[key]


class Trials:
    """Runs of settings on one model; rows that ``kept`` has are not searched again."""

    def __init__(self, source: Path, scores: Scores, counts: list[int], folder: Path, kept: Path | None) -> None:
        self._source, self._scores, self._counts, self._folder, self._kept = source, scores, counts, folder, kept
        self._samples = samples(folder)
        self._bytes = inspect(source).num_bytes
        lines = kept.read_text(encoding="utf-8").splitlines() if kept and kept.exists() else []
        self._known: dict[str, dict[str, Any] | None] = {}
        for line in lines:
            self._known |= json.loads(line)

    def run(self, options: SearchOptions, setting: Setting) -> dict[str, Any] | None:
        """What ``options`` come to; None where they cannot prune that little, or a threshold gives another number of
        layers than any of those wanted."""
        key = f"{options} on {setting.samples}" + f", repair {setting.repair}" * (setting.repair != "none")
        if key not in self._known:
            row = self._searched(options, setting)
            self._known[key] = row
            print(key if row is None else ", ".join(f"{k} {v}" for k, v in row.items() if k != "plan"), flush=True)
            if self._kept:
                with self._kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({key: row}) + "\n")
        return self._known[key]

    def _searched(self, options: SearchOptions, setting: Setting) -> dict[str, Any] | None:
        began, read = time.process_time(), 0

        def listener(event: Event) -> None:
            nonlocal read
            if isinstance(event, LayerDone):
                read += event.num_bytes

        streaming = Streaming(work_dir=self._folder / f"work-{setting.samples}" if setting.shares else None)
        calibration, repair = self._samples[setting.samples], Repair(setting.repair)
        saved = self._folder / f"plan-{len(self._known)}.json"  # with the tensors of a repair beside it
        try:
            plan = search(
                self._source,
                options,
                settings=RunSettings(calibration=calibration, streaming=streaming, repair=repair),
                listener=listener,
                save_as=saved,
            )
        except OptionError as error:
            print(error, flush=True)
            return None
        seconds = time.process_time() - began
        assert plan.search is not None
        if options.target_layers is None and plan.num_layers not in self._counts:
            return None
        loss, laco = self._scores.of(Plan.load(saved)), options.strategy == "laco"
        judges = options.rescale or options.strategy not in ("block-influence", "angular")
        return {
            "strategy": options.strategy,
            "rule": options.rule,
            "metric": options.metric if judges else None,
            "rescale": options.rescale,
            "merges_per_round": options.merges_per_round,
            "samples": setting.samples,
            "repair": setting.repair,
            "C": options.layers_per_merge if laco else None,
            "I": options.interval if laco else None,
            "threshold": plan.search.options.threshold if laco else None,
            "wanted_layers": options.target_layers,
            "layers": plan.num_layers,
            "nll": loss,
            "rise": loss - self._scores.of(None),
            "cpu_seconds": None if setting.shares else seconds,
            "model_reads": None if setting.shares else read / self._bytes,
            "plan": [[layer.base, {str(s): c for s, c in layer.mix.items()}] for layer in plan.layers],
        }


def metrics(source: Path) -> dict[str, list[float | None]]:
    """By each metric the similarity of every merge of four neighbours, the lowest first: does it tell them apart?"""
    found = {}
    for metric in METRICS:
        options = SearchOptions(4, rule="sequential", metric=metric)
        found[metric] = similarity(source, options).merges["sequential"][4]
        print(f"{metric}: " + " ".join("-" if s is None else f"{s:.4f}" for s in found[metric]), flush=True)
    return found


def best(rows: list[dict[str, Any]], wanted: int, **which: Any) -> dict[str, Any] | None:
    """The row with the least rise that has exactly ``wanted`` layers."""
    fitting = [r for r in rows if r["layers"] == wanted and all(r[key] == value for key, value in which.items())]
    return min(fitting, key=lambda row: float(row["rise"]), default=None)


def judged(rows: list[dict[str, Any]], num_layers: int) -> list[dict[str, Any]]:
    """The targets, and whether they are met."""
    found: list[dict[str, Any]] = []
    for share in AT:
        wanted = num_layers - round(share * num_layers)
        ours = best(rows, wanted, **RECOMMENDED, samples="passages", repair="auto")
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
    """The rise of the loss, a line for each setting, ``laco`` at its best C and I; in brackets the layers that stay,
    where it gives another number."""
    print(f"{'rise of the loss at':<68}" + "".join(f"{count:>12}" for count in counts) + " layers")
    keys = ("strategy", "rule", "metric", "rescale", "merges_per_round", "samples", "repair")
    for values in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        of_it = [row for row in rows if tuple(row[key] for key in keys) == values]
        line = "".join(f"{_cell(of_it, count):>12}" for count in counts)
        name = " ".join(
            [str(v) for v in values[:3] if v]
            + ["rescaled"] * values[3] + [f"{values[4]} at once"] * (values[4] > 1) + [f"({values[5]})"]
            + ["repaired"] * (values[6] != "none")
        )  # fmt: skip
        print(f"{name:<68}{line}")


def _cell(rows: list[dict[str, Any]], wanted: int) -> str:
    if exact := best(rows, wanted):
        return f"{exact['rise']:.4f}"
    near = [row for row in rows if row["wanted_layers"] == wanted]
    closest = min(near, key=lambda row: (abs(row["layers"] - wanted), row["rise"]), default=None)
    return "-" if closest is None else f"{closest['rise']:.4f} ({closest['layers']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "bundled", "grown")
    parser.add_argument("--source", type=Path)
    parser.add_argument("--tokens", type=int, default=12_000, help="of the text that is scored")
    parser.add_argument("--quick", action="store_true", help="a smaller grid of C and I, no ablation of the samples")
    parser.add_argument(
        "--recommended", action="store_true", help="what is recommended, and nothing to hold it against"
    )
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    if given.tokens > HELD_OUT:
        parser.error(f"--tokens is {given.tokens}; {HELD_OUT} are held out")
    print(__doc__.split("\n\n")[1])
    MemoryPlan.resident = lambda self, num_layers: range(0)  # type: ignore[method-assign]  # it would all stay, being small
    with tempfile.TemporaryDirectory() as temporary:
        source = given.source or chosen_model(given) or DATA / "wiki-llama-24l"
        if given.model == "grown" and given.source is None:
            source = grow_into(Path(temporary) / "grown")
        scores = Scores(source, given.tokens)
        num_layers, dense = inspect(source).num_layers, scores.of(None)
        counts = {share: num_layers - round(share * num_layers) for share in SHARES}
        print(f"{given.model}: {num_layers} layers, loss {dense:.4f}", flush=True)
        trials = Trials(source, scores, list(counts.values()), Path(temporary), given.rows)
        wanted = [DEFAULT] if given.recommended else settings(given.quick)
        tries = [(setting, options) for setting in wanted for options in setting.tries(counts)]
        found = {
            f"{options} {setting.samples} {setting.repair}": trials.run(options, setting) for setting, options in tries
        }
        rows = [row for row in found.values() if row]
        compared = {} if given.recommended else metrics(source)
    show(rows, list(counts.values()))
    targets = judged(rows, num_layers)
    for target in targets:
        print(target)
    body = {"model": given.model, "layers": num_layers, "nll": dense, "tokens": given.tokens, "window": WINDOW,
            "recommended": RECOMMENDED, "seed": SEED, "targets": targets, "similarities": compared,
            "rows": rows}  # fmt: skip
    report("quality", body, given.save)
    sys.exit(1 if any(target["met"] is False for target in targets) else 0)


if __name__ == "__main__":
    main()
