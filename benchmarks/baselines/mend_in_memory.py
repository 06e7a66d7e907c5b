"""What others do with a model that loses layers, written out with transformers and the whole model in memory.

    python mend_in_memory.py SOURCE TEXTS.json --method NAME --layers N [--rounds R] [--rate RATE] [--dtype bfloat16]
                             [--threads N]

NAME:
    replaceme   ReplaceMe (arXiv 2505.02819), least squares: the block of layers of which the hidden states before and
                after are most alike goes, and a linear map of the MLP's output before it, solved in float64 without a
                ridge, is folded into its down_proj.
    streamline  LLM-Streamline (2403.19135) on one machine: one layer takes the place of the most alike block and one
                layer more; it begins as the first of these and learns the hidden states after them (Adam, mean square).
    lora        the layers of least block influence go, and peft's adapters (rank 16, all linear modules) learn the text
                (AdamW, next-token loss).

The result has N layers. Default rates have not been tuned: bench_mending.py tries several.
TEXTS.json: see texts.py. Needs torch and transformers, and peft for lora. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from texts import Texts, Windows, losses, parameters
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM
from usage import Usage

RATES = {"replaceme": 0.0, "streamline": 1e-4, "lora": 3e-4}
ROUNDS = {"replaceme": 0, "streamline": 8, "lora": 2}
A_STEP = 4  # windows
SEED = 0


def states(model: Any, ids: list[int]) -> tuple[torch.Tensor, ...]:
    """What enters each layer, [T, D], and at last what leaves the final norm."""
    found = model.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    return tuple(one[0] for one in found)


@torch.no_grad()
def likeness(model: Any, fit: Windows, apart: int) -> list[float]:
    """The mean cosine between what enters layer i and what enters layer i + ``apart``, for every i but the last: what
    leaves the top comes after the final norm."""
    sums, tokens = torch.zeros(len(model.model.layers) - apart), 0
    for ids in fit:
        entering = states(model, ids)
        for i in range(len(sums)):
            sums[i] += float(cosine_similarity(entering[i].float(), entering[i + apart].float(), dim=-1).sum())
        tokens += len(ids)
    return (sums / tokens).tolist()


def keep(model: Any, which: Iterable[int]) -> None:
    """Only these layers stay."""
    chosen = list(which)
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in chosen)
    model.config.num_hidden_layers = len(chosen)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in chosen]


@torch.no_grad()
def replaceme(model: Any, fit: Windows, gone: int) -> None:
    """Fold the least squares of the block that goes into the down_proj before it."""
    alike = likeness(model, fit, gone)
    first = max(range(1, len(alike)), key=lambda i: alike[i])
    mlp, outputs = model.model.layers[first - 1].mlp, list[torch.Tensor]()
    hook = mlp.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    width = model.config.hidden_size
    gram, cross = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
    for ids in fit:
        entering = states(model, ids)
        made = outputs.pop().double()
        lacking = entering[first + gone].double() - (entering[first].double() - made)
        gram += made.T @ made
        cross += made.T @ lacking
    hook.remove()
    mapped = torch.linalg.lstsq(gram, cross).solution
    weight = mlp.down_proj.weight
    weight.copy_((mapped.T @ weight.double()).to(weight.dtype))
    keep(model, [i for i in range(len(model.model.layers)) if not first <= i < first + gone])


def streamline(model: Any, fit: Windows, gone: int, rounds: int, rate: float) -> None:
    """Train one layer in the place of the most alike block and one more."""
    alike = likeness(model, fit, gone + 1)
    first = max(range(len(alike)), key=lambda i: alike[i])
    with torch.no_grad():
        pairs = [(entering[first], entering[first + gone + 1]) for entering in (states(model, ids) for ids in fit)]
    learner = copy.deepcopy(model.model.layers[first]).float()
    optimiser = torch.optim.Adam(learner.parameters(), lr=rate)
    steps, done = rounds * math.ceil(len(fit) / A_STEP), 0
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(rounds):
        order = torch.randperm(len(fit), generator=generator).tolist()
        for begin in range(0, len(fit), A_STEP):
            for group in optimiser.param_groups:
                group["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * done / steps))
            optimiser.zero_grad()
            for number in order[begin : begin + A_STEP]:
                entering, wanted = (one.float()[None] for one in pairs[number])
                positions = torch.arange(entering.shape[1])[None]
                turned = model.model.rotary_emb(entering, positions)
                left = learner(entering, position_embeddings=turned, position_ids=positions)
                left = left if torch.is_tensor(left) else left[0]
                (torch.nn.functional.mse_loss(left, wanted) / A_STEP).backward()
            optimiser.step()
            done += 1
    model.model.layers[first] = learner.to(model.dtype)
    keep(model, [i for i in range(len(model.model.layers)) if not first < i <= first + gone])


def lora(model: Any, fit: Windows, gone: int, rounds: int, rate: float) -> Any:
    """Without the layers of least influence, and adapters that learn the text, merged."""
    from peft import LoraConfig, get_peft_model

    alike = likeness(model, fit, 1)
    drop = sorted(range(len(alike)), key=lambda i: -alike[i])[:gone]
    keep(model, [i for i in range(len(model.model.layers)) if i not in drop])
    torch.manual_seed(SEED)
    how = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, how)
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=rate)
    steps, done = rounds * math.ceil(len(fit) / A_STEP), 0
    generator = torch.Generator().manual_seed(SEED)
    adapted.train()
    for _ in range(rounds):
        order = torch.randperm(len(fit), generator=generator).tolist()
        for begin in range(0, len(fit), A_STEP):
            warm = min(1.0, (done + 1) / (0.1 * steps))
            for group in optimiser.param_groups:
                group["lr"] = rate * warm * 0.5 * (1.0 + math.cos(math.pi * done / steps))
            optimiser.zero_grad()
            for number in order[begin : begin + A_STEP]:
                ids = torch.tensor([fit[number]])
                (adapted(ids, labels=ids, use_cache=False).loss / A_STEP).backward()
            optimiser.step()
            done += 1
    return adapted.merge_and_unload()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--method", choices=RATES, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    rounds, rate = given.rounds or ROUNDS[given.method], given.rate or RATES[given.method]
    usage, texts = Usage(), Texts.read(given.texts)
    with usage.part("load"):
        model = AutoModelForCausalLM.from_pretrained(given.source, dtype=getattr(torch, given.dtype)).eval()
        gone = len(model.model.layers) - given.layers
    with usage.part("mend"):
        if given.method == "replaceme":
            replaceme(model, texts.fit, gone)
        elif given.method == "streamline":
            streamline(model, texts.fit, gone, rounds, rate)
        else:
            model = lora(model, texts.fit, gone, rounds, rate)
    with usage.part("judge"):
        found = losses(model, texts)
    packages = ("torch", "transformers") + (("peft",) if given.method == "lora" else ())
    facts = {"layers": len(model.model.layers), "parameters": parameters(model), "rounds": rounds, "rate": rate}
    usage.report(packages, method=given.method, losses=found, **facts)


if __name__ == "__main__":
    main()
