"""What the code of a model takes, found by trial on its own layers: rows of many sequences, and a cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from streamcollapse.forward.generate import kept_bytes
from streamcollapse.forward.packed import TRIAL_TOKENS, takes_packed
from streamcollapse.run.memory_plan import plan_one_layer
from streamcollapse.run.opened import Job, open_stream
from streamcollapse.settings.run import Streaming


@dataclass(frozen=True)
class Trials:
    """``packs``: layers take packed rows. ``kept``: bytes of keys and values of a token in a layer, at the most; None
    where layers take no cache."""

    packs: bool
    kept: int | None


@torch.inference_mode()
def tried(job: Job, streaming: Streaming) -> Trials:
    """Tried with the lowest layer of each kind, which is read for it."""
    view, bases = job.original(), list(_lowest_of_each_kind(job))
    words = [(n + 1) * job.vocabulary // (TRIAL_TOKENS + 2) for n in range(TRIAL_TOKENS)]  # from all over
    packs, kept = list[bool](), list[int | None]()
    with open_stream(job, plan_one_layer(job, streaming)) as stream:
        model = job.model(stream)
        with stream.run([view.source_names(base) for base in bases]) as weights_pass:
            over = view.over(weights_pass)
            for base in bases:
                with weights_pass.step(), model.onload(over, base) as weights:
                    packs.append(takes_packed(model, base, weights, words))
                    kept.append(kept_bytes(model, base, weights, words))
    most = [one for one in kept if one is not None]
    return Trials(all(packs), max(most) if len(most) == len(kept) else None)


def _lowest_of_each_kind(job: Job) -> Iterator[int]:
    kinds = getattr(job.architecture.config.text, "layer_types", None) or [""] * job.num_layers
    modules = job.architecture.skeleton.layers
    seen = set[tuple[str, type]]()
    for base in range(job.num_layers):
        kind = (str(kinds[base]), type(modules[base]))
        if kind not in seen:
            seen.add(kind)
            yield base
