"""What models of one source answer, all of them at once: each request is computed once, and kept in a journal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from streamcollapse.forward.batches import MOST_CALL_TOKENS
from streamcollapse.forward.likelihood import Continued, Likelihood, streamed_likelihoods
from streamcollapse.forward.model import StreamedModel
from streamcollapse.forward.packed import TRIAL_TOKENS, takes_packed
from streamcollapse.merge.plan import PlanLayer
from streamcollapse.resources.device import heap_for
from streamcollapse.run.layer_needs import EvaluationSize, plan_evaluation
from streamcollapse.run.opened import Job, open_stream
from streamcollapse.settings.run import Streaming
from streamcollapse.storage.disk import Journal

StackLayers = tuple[tuple[PlanLayer, ...], bool]  # bottom first; and whether norms are mixed
_ROW, _MOST_ROW = 4, 8192  # times the longest request, so that much of a row can be shared; tokens
_SAVED_AT_ONCE = 512  # answers: what a kill loses at the most


class Answers:
    """The answers of ``stacks`` of the source of ``job``. Those that ``journal`` has are not computed again."""

    def __init__(self, job: Job, stacks: Sequence[StackLayers], streaming: Streaming, journal: Journal | None) -> None:
        self.job, self._stacks, self._streaming, self._journal = job, list(stacks), streaming, journal
        self._digests = [_digest([[layer.key for layer in layers], norms]) for layers, norms in stacks]
        self._known: dict[tuple[str, str], Likelihood] = {}
        if journal is not None:
            self._known = dict(filter(None, map(_parsed, journal.records)))

    def likelihoods(self, requests: Sequence[Continued], stack: int) -> list[Likelihood]:
        """Those of the stack with the number ``stack``; what is not known yet is computed, for all stacks. Raises
        BudgetError, NonFiniteError."""
        keys = [_digest([request.given, request.continuation]) for request in requests]
        by_key = dict(zip(keys, requests, strict=True))
        lacking = [key for key in by_key if any((digest, key) not in self._known for digest in self._digests)]
        if lacking:
            self._compute(lacking, [by_key[key] for key in lacking])
        return [self._known[self._digests[stack], key] for key in keys]

    def _compute(self, keys: Sequence[str], requests: Sequence[Continued]) -> None:
        job, fresh = self.job, list[dict[str, Any]]()
        longest = max(len(request.entering) for request in requests)
        call = max(job.call_tokens, MOST_CALL_TOKENS, min(_ROW * longest, _MOST_ROW))
        tokens = sum(len(entering) for entering in {request.entering for request in requests})
        size = EvaluationSize(tokens, call, longest, len(self._stacks))
        memory, held = plan_evaluation(job, size, self._streaming)
        job.listener(memory.event)

        def done(stack: int, number: int, found: Likelihood) -> None:
            self._known[self._digests[stack], keys[number]] = found
            fresh.append(
                {"kind": "likelihood", "stack": self._digests[stack], "request": keys[number]}
                | {"log": found.log_likelihood, "greedy": found.is_greedy}
            )
            if len(fresh) >= _SAVED_AT_ONCE:
                self._save(fresh)

        with open_stream(job, memory) as stream, job.meter.phase("evaluate"), heap_for(memory.activations):
            model = job.model(stream)
            packs = self._packs(model)
            try:
                streamed_likelihoods(model, self._stacks, requests, job.vocabulary, (call, held), packs, done)
            finally:
                self._save(fresh)

    def _save(self, fresh: list[dict[str, Any]]) -> None:
        if self._journal is not None:
            self._journal.append(fresh)
        fresh.clear()

    @torch.inference_mode()
    def _packs(self, model: StreamedModel) -> bool:
        """Whether layers of each kind take packed rows; tried with the lowest of each."""
        job = self.job
        view = job.original()
        tried = list(_lowest_of_each_kind(job))
        with model.stream.run([view.source_names(base) for base in tried]) as weights_pass:
            over = view.over(weights_pass)
            found = []
            for base in tried:
                with weights_pass.step(), model.onload(over, base) as weights:
                    found.append(takes_packed(model, base, weights, _trial_tokens(job.vocabulary)))
        return all(found)


def _lowest_of_each_kind(job: Job) -> Iterator[int]:
    kinds = getattr(job.architecture.config.text, "layer_types", None) or [""] * job.num_layers
    modules = job.architecture.skeleton.layers
    seen = set[tuple[str, type]]()
    for base in range(job.num_layers):
        kind = (str(kinds[base]), type(modules[base]))
        if kind not in seen:
            seen.add(kind)
            yield base


def _trial_tokens(vocabulary: int) -> list[int]:
    """Words from all over the vocabulary."""
    return [(n + 1) * vocabulary // (TRIAL_TOKENS + 2) for n in range(TRIAL_TOKENS)]


def _digest(what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:32]


def _parsed(record: Mapping[str, Any]) -> tuple[tuple[str, str], Likelihood] | None:
    """What a record says, if it is one of an answer and can be: what cannot be is computed again."""
    stack, request = record.get("stack"), record.get("request")
    log, greedy = record.get("log"), record.get("greedy")
    if record.get("kind") != "likelihood" or not isinstance(stack, str) or not isinstance(request, str):
        return None
    if not isinstance(log, float) or not isinstance(greedy, bool):
        return None
    return (stack, request), Likelihood(log, greedy)
