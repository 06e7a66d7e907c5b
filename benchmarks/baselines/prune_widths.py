"""What pruners of the width give at as many parameters: neurons of the feed-forwards go, the layers stay.

    python prune_widths.py SOURCE TEXTS.json --method NAME --parameters N [--dtype bfloat16] [--threads N]

NAME:
    optipfair      optipfair's pruning of gated feed-forwards, by the weights and by what the text makes of them
    torch-pruning  torch-pruning with Taylor importance of groups, as LLM-Pruner (arXiv 2305.11627) has it: gradients of
                   the text's loss

The share of neurons is about the least that leaves at most N parameters; the document says how many are left.
TEXTS.json: see texts.py. Needs torch, transformers and the package. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import torch
from texts import Texts, Windows, losses, parameters
from transformers import AutoModelForCausalLM
from usage import Usage

SAMPLES = 16  # windows whose gradients or activations are taken


def share(model: Any, wanted: int) -> float:
    """Of the neurons of every feed-forward, as many as have to go."""
    neurons = sum(layer.mlp.down_proj.in_features for layer in model.model.layers)
    each = sum(p.numel() for layer in model.model.layers for p in layer.mlp.parameters()) / neurons
    return (parameters(model) - wanted) / each / neurons


def optipfair(model: Any, fit: Windows, wanted: int) -> Any:
    """By magnitudes, with activations of the text."""
    from optipfair import prune_model

    loader = [{"input_ids": torch.tensor([ids])} for ids in fit[:SAMPLES]]
    percent = 100.0 * share(model, wanted)
    while True:
        found = prune_model(
            copy.deepcopy(model), "MLP_GLU", "MAW", pruning_percentage=percent, dataloader=loader, show_progress=False
        )
        if parameters(found) <= wanted:
            return found
        percent += 0.2


def torch_pruning(model: Any, fit: Windows, wanted: int) -> Any:
    """By the first term of Taylor's series of the loss."""
    import torch_pruning as tp

    model.train()
    for ids in fit[:SAMPLES]:
        tokens = torch.tensor([ids])
        (model(tokens, labels=tokens, use_cache=False).loss / SAMPLES).backward()
    model.eval()
    width = model.model.layers[0].mlp.gate_proj.out_features
    goes = math.ceil(share(model, wanted) * width) / width
    pruner = tp.pruner.BasePruner(
        model,
        torch.tensor([fit[0][:32]]),
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=0.0,
        pruning_ratio_dict={layer.mlp.gate_proj: goes for layer in model.model.layers},
        ignored_layers=[model.lm_head],
        output_transform=lambda output: output.logits,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    model.zero_grad()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--method", choices=("optipfair", "torch-pruning"), required=True)
    parser.add_argument("--parameters", type=int, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    usage, texts = Usage(), Texts.read(given.texts)
    with usage.part("load"):
        model = AutoModelForCausalLM.from_pretrained(given.source, dtype=getattr(torch, given.dtype)).eval()
    with usage.part("mend"):
        prune = optipfair if given.method == "optipfair" else torch_pruning
        model = prune(model, texts.fit, given.parameters)
    with usage.part("judge"):
        found = losses(model, texts)
    facts = {"layers": len(model.model.layers), "parameters": parameters(model), "rounds": None, "rate": None}
    usage.report(("torch", "transformers", given.method), method=given.method, losses=found, **facts)


if __name__ == "__main__":
    main()
