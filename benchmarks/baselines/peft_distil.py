"""Distillation of a pruned model by peft, with both models in memory: what healing is held against.

    python peft_distil.py TEACHER PRUNED WINDOWS.json --lowest N [--rank 16] [--batch-tokens 16384] [--call-tokens 512]
                          [--loss-tokens N] [--rate 5e-4] [--dtype bfloat16] [--threads N]

WINDOWS.json: a list of windows of token ids. The teacher goes over all of them first, and of it are kept what leaves
its final norm, and its head. Then adapters on every linear module of layer N and those above learn by the divergence
from the teacher's next-token distributions (of N tokens of a step, spread evenly; all unless told otherwise), in one
round, by AdamW, gradients added up over calls. Graphs are kept whole, with no checkpoints. Needs torch, transformers
and peft. The last line of stdout is one JSON document; its part ``learn`` is the training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM
from usage import Usage


@torch.no_grad()
def taught(teacher: Any, windows: list[list[int]]) -> list[torch.Tensor]:
    """What leaves the final norm, [T, D], of each window."""
    return [teacher.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0] for ids in windows]


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """The sum over tokens of KL(theirs || ours), of logits [T, V]."""
    log_p, log_q = log_softmax(theirs.float(), -1), log_softmax(ours.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum()


def learn(
    model: Any, head: Any, windows: list[list[int]], states: list[torch.Tensor], given: argparse.Namespace
) -> list[float]:
    """The loss of each step."""
    length = len(windows[0])
    a_step, a_call = (max(tokens // length, 1) for tokens in (given.batch_tokens, given.call_tokens))
    every = 1 if given.loss_tokens is None else max(given.batch_tokens // given.loss_tokens, 1)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=given.rate, fused=True)
    losses = []
    for first in range(0, len(windows), a_step):
        some = range(first, min(first + a_step, len(windows)))
        counted = sum(len(range(every // 2, length, every)) for _ in some)
        optimiser.zero_grad()
        total = 0.0
        for begin in range(some.start, some.stop, a_call):
            which = range(begin, min(begin + a_call, some.stop))
            left = model.base_model.model.model(torch.tensor([windows[n] for n in which]), use_cache=False)
            ours = left.last_hidden_state[:, every // 2 :: every].flatten(0, 1)
            with torch.no_grad():
                theirs = head(torch.cat([states[n][every // 2 :: every] for n in which]))
            loss = divergence(model.base_model.model.lm_head(ours), theirs) / counted
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(total)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("pruned", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("--lowest", type=int, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--call-tokens", type=int, default=512)
    parser.add_argument("--loss-tokens", type=int)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    usage, windows = Usage(), json.loads(given.windows.read_text(encoding="utf-8"))
    dtype = getattr(torch, given.dtype)
    with usage.part("teacher"):
        teacher = AutoModelForCausalLM.from_pretrained(given.teacher, dtype=dtype).eval()
        states, head = taught(teacher, windows), teacher.lm_head
        del teacher
    with usage.part("load"):
        torch.manual_seed(0)
        pruned = AutoModelForCausalLM.from_pretrained(given.pruned, dtype=dtype)
        above = list(range(given.lowest, pruned.config.num_hidden_layers))
        how = LoraConfig(
            r=given.rank, lora_alpha=2 * given.rank, target_modules="all-linear", layers_to_transform=above
        )
        model = get_peft_model(pruned, how)
    with usage.part("learn"):
        losses = learn(model, head, windows, states, given)
    tokens = sum(map(len, windows))
    usage.report(("torch", "transformers", "peft"), did="peft", tokens=tokens, losses=losses)


if __name__ == "__main__":
    main()
