"""What quality.py searches with: the calibration samples, and every setting in order."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from streamcollapse import Calibration
from streamcollapse.settings.catalogue import METRICS
from streamcollapse.settings.run import SAMPLES
from streamcollapse.settings.search import SearchOptions

SHARES = (0.10, 0.25, 0.33, 0.50)
THRESHOLDS = [round(0.99 - 0.04 * i, 2) for i in range(15)]
RECOMMENDED = {"strategy": "greedy", "rule": "first", "metric": "kl", "rescale": False, "merges_per_round": 1}
PAPER = {"layers_per_merge": 4, "interval": 2}  # of a 7B, Table 8
EVEN = {"layers_per_merge": 3, "interval": 3}  # reaches the numbers of layers that are wanted, but for odd ones
AT = (0.25, 0.50)
SEED = 0  # of the noise; grow_model.py has its own
DATA = Path(str(resources.files("streamcollapse.data")))


def samples(folder: Path) -> dict[str, Calibration]:
    """The calibration samples by name."""
    sentences = (DATA / "text" / "wiki_calibration.txt").read_text(encoding="utf-8").strip().split("\n")
    text = (DATA / "text" / "wiki_eval.txt").read_text(encoding="utf-8")
    ends = re.findall(r"[A-Z][^.!?\n]{60,300}[.!?](?=\s)", text[len(text) // 2 :])  # far behind what is scored
    dice = random.Random(SEED)
    noisy = ["".join(dice.choice("abcdefghijklmnopqrstuvwxyz ,.#%0123") if dice.random() < 0.2 else c for c in line)
             for line in sentences[:20]]  # fmt: skip
    found = {name: Calibration(name) for name in SAMPLES}
    for count in (5, 20, 50, 200):
        found[f"{count} sentences"] = _file(folder, f"{count}", [*sentences, *ends][:count])
    return found | {"20 noisy sentences": _file(folder, "noisy", noisy)}


def _file(folder: Path, name: str, texts: list[str]) -> Calibration:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Calibration(path)


@dataclass(frozen=True)
class Setting:
    """What to search with, and on which samples. ``shares``: it takes what others have evaluated. ``thresholds``: on
    top of the numbers of layers. ``everywhere``: at all shares of the layers."""

    method: dict[str, Any]
    samples: str = "sentences"
    shares: bool = False
    thresholds: bool = False
    everywhere: bool = False
    repair: str = "none"

    def tries(self, counts: dict[float, int]) -> list[SearchOptions]:
        wanted = counts.values() if self.everywhere else [counts[share] for share in AT]
        plain = {"rescale": False} | self.method
        found = [SearchOptions(**plain, target_layers=count) for count in wanted]
        return found + [SearchOptions(**plain, threshold=t) for t in THRESHOLDS if self.thresholds]


DEFAULT = Setting(RECOMMENDED, "passages", everywhere=True, repair="auto")


def settings(quick: bool) -> Iterator[Setting]:
    """The grid of the paper's procedure, every strategy with each of its rules, and what is varied one by one."""
    for c in (4,) if quick else (2, 3, 4, 6):
        for i in (1, 2) if quick else (1, 2, 3, 4):
            paper = {"strategy": "laco", "rule": "sequential", "layers_per_merge": c, "interval": i}
            yield Setting(paper, "sentences", shares=True, thresholds=True)
            yield Setting(paper, "passages", shares=True)
    for rule in ("sequential", "rdsc", "mean", "first", "best"):
        for pace in (PAPER, EVEN):
            yield Setting({"strategy": "laco", "rule": rule, **pace}, everywhere=True)
    for rule in ("first", "sequential", "rdsc", "mean", "best"):
        yield Setting({"strategy": "greedy", "rule": rule}, everywhere=True)
    for rule in ("sequential", "rdsc", "mean", "first"):
        yield Setting({"strategy": "rule-based", "rule": rule}, everywhere=True)
    for strategy in ("block-influence", "angular"):
        for name in ("sentences", "passages"):
            yield Setting({"strategy": strategy}, name, everywhere=True)
    for metric in METRICS:
        yield Setting({"strategy": "laco", "rule": "sequential", "metric": metric, **EVEN})
        yield Setting({"strategy": "greedy", "rule": "first", "metric": metric})
    greedy = {"strategy": "greedy", "rule": "first", "metric": "kl"}
    yield Setting(greedy | {"merges_per_round": 3})
    yield Setting(greedy | {"rescale": True})
    if not quick:
        for name in ("5 sentences", "20 sentences", "20 noisy sentences", "50 sentences", "200 sentences", "passages"):
            yield Setting({"strategy": "laco", "rule": "sequential", **EVEN}, name)
            yield Setting(greedy, name)
        scaled = {"metric": "kl", "rescale": True}
        for strategy, rule in (("laco", "sequential"), ("block-influence", "first"), ("greedy", "first,sequential")):
            yield Setting(
                {"strategy": strategy, "rule": rule, **scaled, **(EVEN if strategy == "laco" else {})}, "passages"
            )
        yield Setting(RECOMMENDED | {"merges_per_round": 3}, "passages")
    yield Setting(RECOMMENDED, "passages", everywhere=True)
    yield Setting(RECOMMENDED | {"rescale": True}, "passages")
    yield DEFAULT
