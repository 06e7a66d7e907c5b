"""Layer collapse written out plainly: the whole model in memory, a deep copy per candidate, every pass in full.

Independent of the library: it shares no code with it, and follows the paper's Algorithm 1 line by line.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


@dataclass
class Outcome:
    model: PreTrainedModel
    decisions: list[tuple[int, int, float | None, bool]] = field(default_factory=list)
    tried: list[list[float | None]] = field(default_factory=list)  # of each rule that competed


def mixed_model(original: PreTrainedModel, layers: Sequence[tuple[int, dict[int, float]]]) -> PreTrainedModel:
    """``original`` with these layers: base, and coefficients of source layers for all but the norms."""
    result, sources = copy.deepcopy(original), find_layers(original)
    kept = []
    with torch.no_grad():
        for base, mix in layers:
            layer = copy.deepcopy(sources[base])
            for name, parameter in layer.named_parameters():
                if "norm" not in name and "ln_" not in name:
                    parameter.copy_(sum(c * dict(sources[s].named_parameters())[name] for s, c in mix.items()))
            kept.append(layer)
    stack = find_layers(result)
    del stack[:]
    stack.extend(kept)
    result.config.get_text_config().num_hidden_layers = len(kept)
    return result


def find_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    for decoder in (model.get_decoder(), model.base_model):  # transformers 4 has no decoder for some families
        for name in ("layers", "h", "blocks"):
            if hasattr(decoder, name):
                return getattr(decoder, name)
    raise AssertionError("no layers")


def merged_model(
    model: PreTrainedModel,
    l: int,  # noqa: E741
    k: int,
    rule: str,
    scale: float,
    norms: bool,
) -> PreTrainedModel | None:
    """The candidate, or None where the layers to be merged do not have the same parameters."""
    shapes = [{n: p.shape for n, p in layer.named_parameters()} for layer in find_layers(model)[l - 1 : l + k]]
    alike = [other == shapes[0] for other in shapes]
    if not {"first": True, "sequential": alike[-1]}.get(rule, all(alike)):
        return None
    result = copy.deepcopy(model)
    layers = find_layers(result)
    base = layers[l - 1]
    followers = [layers[l - 1 + i] for i in range(1, k + 1)]
    with torch.no_grad():
        followers = [follower for follower, like in zip(followers, alike[1:], strict=True) if like]
        for name, parameter in base.named_parameters():
            if ("norm" in name or "ln_" in name) and not norms:
                continue
            others = [dict(f.named_parameters())[name] for f in followers]
            if rule == "rdsc":
                original = parameter.clone()
                for other in others:
                    parameter.add_(scale * (other - original))
            elif rule == "sequential":
                for other in others:
                    parameter.add_(other - parameter)
            elif rule == "mean":
                parameter.copy_(torch.stack([parameter, *others]).mean(0))
            else:
                assert rule == "first"
        config = result.config.get_text_config()
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:l] + config.layer_types[l + k :]
        for _ in range(k):
            del layers[l]
        config.num_hidden_layers = len(layers)
    return result


def last_hidden(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, output_hidden_states=True, use_cache=False).hidden_states[-1][0]


def mean_similarity(
    candidate: PreTrainedModel, original: PreTrainedModel, token_ids: Sequence[torch.Tensor], metric: str = "cosine"
) -> float:
    """The mean over samples; of a metric of tokens the mean over all tokens; of one in nats exp(-it)."""
    values, weights = [], []
    for ids in token_ids:
        if metric in ("nll", "kl"):
            values.append(nats(candidate, original, ids, metric))
            weights.append(ids.shape[1] - (metric == "nll"))
            continue
        a, b = last_hidden(candidate, ids).double(), last_hidden(original, ids).double()
        if metric.startswith("cka"):
            values.append(float(hsic(a, b, metric) / (hsic(a, a, metric) * hsic(b, b, metric)).sqrt()))
        else:
            a, b = (a, b) if metric == "token-cosine" else (a.flatten()[None], b.flatten()[None])
            values.append(float(torch.nn.functional.cosine_similarity(a, b, dim=1).mean()))
        weights.append(len(a) if metric == "token-cosine" else 1)
    mean = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    return math.exp(-mean) if metric in ("nll", "kl") else mean


@torch.no_grad()
def nats(candidate: PreTrainedModel, original: PreTrainedModel, ids: torch.Tensor, metric: str) -> float:
    """How much the loss rises, as the models say it, or the divergence of their distributions."""
    if metric == "nll":
        losses = [float(model(input_ids=ids, labels=ids, use_cache=False).loss) for model in (candidate, original)]
        return losses[0] - losses[1]
    p, q = (model(input_ids=ids, use_cache=False).logits[0].double().softmax(-1) for model in (original, candidate))
    return float((p * (p / q).log()).sum(-1).mean())


def hsic(a: torch.Tensor, b: torch.Tensor, metric: str) -> torch.Tensor:
    """tr(K H L H) of two sets of rows (Gretton et al. 2005, up to a factor)."""
    n = len(a)
    centring = torch.eye(n, dtype=torch.float64) - torch.full((n, n), 1 / n, dtype=torch.float64)
    kernels = []
    for x in (a, b):
        if metric == "cka-linear":
            kernels.append(x @ x.T)
        else:
            distances = torch.nn.functional.pdist(x)
            squares = (x[:, None] - x[None]).square().sum(-1)
            kernels.append((-squares / (2 * distances.square().median())).exp())
    return torch.trace(kernels[0] @ centring @ kernels[1] @ centring)


def in_memory_search(
    directory: Path,
    samples: Sequence[str],
    *,
    c: int,
    i: int,
    threshold: float,
    rule: str,
    scale: float = 1.0,
    low: int = 1,
    high: int | None = None,
    norms: bool = False,
    trust_remote_code: bool = False,
    loader: Any = AutoModelForCausalLM,
    competing: Sequence[tuple[str, float]] = (),
    metric: str = "cosine",
) -> Outcome:
    """``competing``: rules with their scales, instead of ``rule``; the most similar counts."""
    original = loader.from_pretrained(directory, dtype=torch.float32, trust_remote_code=trust_remote_code).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    token_ids = [tokenizer(sample, return_tensors="pt")["input_ids"] for sample in samples]
    outcome = Outcome(copy.deepcopy(original))
    l = (high or len(find_layers(original))) - c  # noqa: E741
    while l >= low:
        count = len(find_layers(outcome.model))
        k = min(c - 1, count - l)
        tried = [merged_model(outcome.model, l, k, *one, norms) for one in competing or [(rule, scale)]]
        scores = [None if model is None else mean_similarity(model, original, token_ids, metric) for model in tried]
        outcome.tried.append(scores)
        best = max(range(len(scores)), key=lambda i: -2.0 if scores[i] is None else scores[i])  # type: ignore[return-value]
        candidate, similarity = tried[best], scores[best]
        accepted = similarity is not None and similarity > threshold
        outcome.decisions.append((l, k, similarity, accepted))
        if accepted:
            outcome.model = candidate
            l -= i  # noqa: E741
            if l > len(find_layers(outcome.model)):
                l = len(find_layers(outcome.model)) - c  # noqa: E741
        else:
            l -= 1  # noqa: E741
    return outcome


def in_memory_greedy(
    directory: Path,
    samples: Sequence[str],
    *,
    rules: Sequence[str],
    rounds: int,
    low: int = 1,
    high: int | None = None,
    metric: str = "kl",
) -> Outcome:
    """In each round every pair of neighbours by each of ``rules``; the most similar model is kept."""
    original = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    token_ids = [tokenizer(sample, return_tensors="pt")["input_ids"] for sample in samples]
    outcome = Outcome(copy.deepcopy(original))
    bases = list(range(1, len(find_layers(original)) + 1))  # of each layer that is left, and the last one it stands for
    reach = list(bases)
    for _ in range(rounds):
        best: tuple[float, int, PreTrainedModel, str] | None = None
        scores: dict[int, list[float | None]] = {}  # by place, of each rule
        for l in range(1, len(bases)):  # noqa: E741
            if bases[l - 1] < low or reach[l] > (high or len(find_layers(original))):
                continue
            for rule in rules:
                model = merged_model(outcome.model, l, 1, rule, 1.0, False)
                assert model is not None
                similarity = mean_similarity(model, original, token_ids, metric)
                scores.setdefault(l, []).append(similarity)
                if best is None or similarity > best[0] + 1e-9:
                    best = (similarity, l, model, rule)
        assert best is not None
        outcome.decisions.append((best[1], 1, best[0], True))
        outcome.tried.append(scores[best[1]])
        outcome.model = best[2]
        position = best[1]
        reach[position - 1] = max(reach[position - 1], reach[position]) if best[3] != "first" else reach[position - 1]
        del bases[position], reach[position]
    return outcome
