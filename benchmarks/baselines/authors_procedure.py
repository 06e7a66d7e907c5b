"""Layer collapse as the paper describes and its authors run it: the whole model in memory.

Algorithm 1 of LaCo (arXiv 2402.11187), written out: a deep copy of the model for every candidate, merged with the rule
of the authors' released notebook, which takes each difference against the base as already updated; original and
candidate both run in full on one sample at a time; the candidate is kept if the mean cosine of the flattened last
hidden states exceeds T. Only the model that is being pruned and the candidate are held beside the original, which is
less than the notebook holds.

    python authors_procedure.py SOURCE OUT --calibration FILE [--layers-per-merge 4] [--interval 2] [--threshold 0.65]
                                           [--dtype bfloat16] [--threads N]

Needs torch and transformers. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from usage import Usage, samples


def merged_copy(model: Any, base: int, followers: int) -> Any:
    """A copy of ``model`` in which the ``followers`` layers after 0-based layer ``base`` are merged into it.

    b <- b + (k - b) for each follower k and every matrix; the norms stay the base's.
    """
    candidate = copy.deepcopy(model)
    layers = candidate.model.layers
    merged = dict(layers[base].named_parameters())
    for follower in range(base + 1, base + followers + 1):
        for name, weight in layers[follower].named_parameters():
            if weight.dim() > 1:
                merged[name].data.add_(weight.data - merged[name].data)
    for follower in range(base + followers, base, -1):
        del layers[follower]
    candidate.config.num_hidden_layers = len(layers)
    return candidate


def last_hidden(model: Any, tokens: Any) -> torch.Tensor:
    return model(**tokens, output_hidden_states=True, use_cache=False).hidden_states[-1].flatten().double()


def similarity(original: Any, candidate: Any, inputs: list[Any]) -> float:
    """Mean over the samples of the cosine between both models' last hidden states."""
    cosines = []
    for tokens in inputs:
        a, b = last_hidden(original, tokens), last_hidden(candidate, tokens)
        cosines.append(float(torch.dot(a, b) / (a.norm() * b.norm())))
    return sum(cosines) / len(cosines)


def layer_collapse(model: Any, inputs: list[Any], C: int, I: int, T: float) -> tuple[Any, list[dict[str, Any]]]:  # noqa: E741
    """Algorithm 1 with L = 1 and H = all layers; ``l`` counts from 1."""
    pruned, decisions = model, []
    l = len(model.model.layers) - C  # noqa: E741
    while l >= 1:
        K = min(C - 1, len(pruned.model.layers) - l)
        candidate = merged_copy(pruned, l - 1, K)
        s = similarity(model, candidate, inputs)
        decisions.append({"l": l, "merged": K, "similarity": s, "accepted": s > T})
        if s > T:
            pruned = candidate
            l -= I  # noqa: E741
            if l > len(pruned.model.layers):
                l = len(pruned.model.layers) - C  # noqa: E741
        else:
            l -= 1  # noqa: E741
        del candidate
    return pruned, decisions


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="one sample a line")
    parser.add_argument("--layers-per-merge", type=int, default=4)
    parser.add_argument("--interval", type=int, default=2)
    parser.add_argument("--threshold", type=float, default=0.65)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    usage = Usage()
    with usage.part("load"):
        model = AutoModelForCausalLM.from_pretrained(given.source, dtype=getattr(torch, given.dtype)).eval()
        tokenizer = AutoTokenizer.from_pretrained(given.source)
        inputs = [tokenizer(text, return_tensors="pt") for text in samples(given.calibration)]
        inputs = [{key: tokens[key] for key in ("input_ids", "attention_mask")} for tokens in inputs]
    before = len(model.model.layers)
    with usage.part("search"):
        pruned, decisions = layer_collapse(model, inputs, given.layers_per_merge, given.interval, given.threshold)
    with usage.part("write"):
        pruned.save_pretrained(given.out)
        tokenizer.save_pretrained(given.out)
    usage.report(
        ("torch", "transformers"),
        did="layer collapse with the whole model in memory, a deep copy per candidate",
        dtype=given.dtype,
        threads=torch.get_num_threads(),
        layers={"before": before, "after": len(pruned.model.layers)},
        decisions=decisions,
    )


if __name__ == "__main__":
    main()
