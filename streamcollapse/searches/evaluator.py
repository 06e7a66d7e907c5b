"""Evaluated candidates: remembered by what they are, found by sweeps over the weights. Knows no strategy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy
from functools import cache, cached_property

import torch

from streamcollapse.forward.measure import Measure, make_measure, sweep
from streamcollapse.forward.reference import Reference, beginning
from streamcollapse.forward.walk import Stack
from streamcollapse.merge.plan import PlanLayer, stack_key
from streamcollapse.merge.view import mismatch
from streamcollapse.progress import CandidatesDone, WarningRaised
from streamcollapse.resources.device import give_back_memory
from streamcollapse.run.evaluations import Evaluation, EvaluationKey, Memory
from streamcollapse.run.opened import Run
from streamcollapse.searches.candidate import Candidate
from streamcollapse.settings.catalogue import EFFORTS, METRICS
from streamcollapse.settings.search import SearchOptions

SAVE_SECONDS = 20.0  # the most that an interrupt loses of a round, where reading takes less


class Evaluator:
    """Evaluates the candidates of a search, as many in a sweep as ``lookahead`` says (None: as pays) and there is
    memory for.

    ``room``: how many that is, fewer once a device's memory has run out; ``is_fixed``: whether the user said it.
    """

    def __init__(
        self, run: Run, reference: Reference, memory: Memory, options: SearchOptions, lookahead: int | None
    ) -> None:
        self._run, self._reference, self._memory = run, reference, memory
        self.room, self.is_fixed = lookahead or run.memory.candidates, lookahead is not None
        self._merge_norms, self._metric = options.merge_norms, options.metric
        self._effort = EFFORTS[options.effort]
        self._tokens = self._effort.head_tokens(run.job.vocabulary) if METRICS[options.metric].by_logits else None
        self._judged_by = self._metric if self._tokens is None else f"{self._metric}/{self._tokens}"
        self._head = cache(run.model.head)
        self._is_scout = False
        self._seconds: float | None = None  # for a candidate of the last sweep
        self._measure: Measure | None = None  # made when there is something to measure

    def _key(self, candidate: Candidate) -> EvaluationKey:
        return self._judged_by, stack_key(candidate.layers)

    @cached_property
    def scout(self) -> Evaluator | None:
        """An evaluator by the first tokens of each sample, that says at a fraction of the cost what is worth scoring;
        None where the effort wants none, or samples are that short."""
        tokens = self._effort.scouting
        if tokens is None or max(max(batch.lengths) for batch in self._reference.batches) <= tokens:
            return None
        scout = copy(self)
        scout._is_scout = True
        scout._reference = beginning(self._run.model, self._reference, tokens)
        scout._tokens = None if self._tokens is None else self._tokens // 2
        scout._judged_by = f"{self._judged_by}/{tokens}"
        scout._seconds = scout._measure = None
        return scout

    @cached_property
    def by_more_tokens(self) -> Evaluator:
        """An evaluator by the distributions of as many tokens as exchanges compare; this one, where it is of all."""
        if self._tokens is None:
            return self
        finer, tokens = copy(self), self._effort.exchange_tokens(self._run.job.vocabulary)
        finer._tokens, finer._judged_by = tokens, f"{self._metric}/{tokens}"
        finer._seconds = finer._measure = None
        return finer

    def known(self, candidate: Candidate) -> Evaluation | None:
        """What is known of ``candidate``: it was evaluated, or cannot be."""
        key = self._key(candidate)
        found = self._memory.get(key)
        if found is None:
            reason = mismatch(self._run.job.source, self._run.job.architecture.layout, candidate.merged_layer)
            if reason is not None:
                found = Evaluation(None, reason)
                self._memory.add({key: found})
        return found

    def scores(self, candidates: Sequence[Candidate], layers: Sequence[PlanLayer]) -> list[Evaluation]:
        """The evaluations of ``candidates``, from memory or from as few sweeps as there is memory for and as keeps what
        is known from waiting long for what is not: after each sweep it is saved.

        ``layers``: the stack that they would change, whose mixed layers the next candidates will have too.
        """
        while new := [candidate for candidate in candidates if self.known(candidate) is None]:
            some, start = new[: min(self.room, self._in_time())], time.perf_counter()
            self.evaluate(some, layers)
            self._seconds = (time.perf_counter() - start) / len(some)
        return [one for candidate in candidates if (one := self.known(candidate)) is not None]

    def _in_time(self) -> int:
        """How many candidates a sweep of ``SAVE_SECONDS`` serves, or of as long as it takes to read the model."""
        pace = self._run.meter.pace
        if self.is_fixed or not pace.runs:
            return self.room
        layers = self._run.job.num_layers
        seconds = self._seconds or layers / 2 * pace.computing / pace.runs  # half of the stack, without the head
        reading = layers * pace.reading / max(pace.layers, 1)
        return max(int(max(SAVE_SECONDS, reading) / max(seconds, 1e-9)), 1)

    def evaluate(self, candidates: Sequence[Candidate], layers: Sequence[PlanLayer]) -> None:
        """Evaluate ``candidates`` in one sweep; where the device has not the memory for all, as many as it has."""
        self._run.stored.set_stack(layers)
        while (similarities := self._try_sweep(candidates)) is None:
            candidates = candidates[: max(len(candidates) // 2, 1)]
            self.room = min(self.room, len(candidates))
        self._run.job.checkpoint.check_unchanged()  # before anything is believed that was computed from it
        self.learn(candidates, similarities)
        known = [] if self._is_scout else [one for one in similarities if one is not None]
        self._run.listener(CandidatesDone(len(candidates), max(known, default=None)))

    def _try_sweep(self, candidates: Sequence[Candidate]) -> list[float | None] | None:
        """The similarities of ``candidates``; None where the device's memory ran out and less can be asked of it."""
        run = self._run
        try:
            if self._measure is None:
                self._measure = make_measure(
                    self._metric, run.model, self._reference, run.job.vocabulary, self._tokens, self._head
                )
            stacks = [Stack(candidate.layers, candidate.start) for candidate in candidates]
            return sweep(run.model, stacks, self._merge_norms, self._reference, self._measure, run.stored)
        except torch.OutOfMemoryError:
            if len(candidates) == 1 and not run.stream.keep_none():
                raise
        # Not before the error is gone, whose traceback holds what the sweep had made.
        give_back_memory(run.job.placement.device)
        run.listener(WarningRaised("GPU memory ran out; going on with fewer candidates in a pass"))
        return None

    def learn(self, candidates: Sequence[Candidate], similarities: Sequence[float | None]) -> None:
        """What a sweep has said of ``candidates``."""
        found = {}
        for candidate, similarity in zip(candidates, similarities, strict=True):
            reason = None if similarity is not None else f"its similarity by {self._metric} is not finite"
            found[self._key(candidate)] = Evaluation(similarity, reason)
        self._memory.add(found)
