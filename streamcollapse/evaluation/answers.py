"""What models of one source answer: each request is computed once, for all of them, and kept in a journal."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamcollapse.evaluation.trials import Trials, tried
from streamcollapse.forward.batches import MOST_CALL_TOKENS, groups
from streamcollapse.forward.generate import Wanted, streamed_generation
from streamcollapse.forward.likelihood import Continued, Likelihood, streamed_likelihoods
from streamcollapse.forward.model import StreamedModel
from streamcollapse.forward.walk import Stack, schedule
from streamcollapse.merge.plan import PlanLayer
from streamcollapse.progress import NoteMade, PhaseStarted
from streamcollapse.resources.device import heap_for
from streamcollapse.run.layer_needs import EvaluationSize, plan_evaluation
from streamcollapse.run.needs import MemoryPlan
from streamcollapse.run.opened import Job, open_stream
from streamcollapse.settings.run import Streaming
from streamcollapse.storage.disk import Journal
from streamcollapse.storage.scratch import DiskScratch, Scratch
from streamcollapse.units import format_bytes

StackLayers = tuple[tuple[PlanLayer, ...], bool]  # bottom first; and whether norms are mixed
# Tokens of a packed row: so many times the longest request, since what a row shares is computed once, and what its
# tokens attend to grows with its square.
_ROW, _LEAST_ROW, _MOST_ROW = 4, 256, 8192
_SAVED_AT_ONCE = 512  # answers: what a kill loses at the most
_Key = tuple[str, str]  # digests of a stack and of a request


@dataclass(frozen=True)
class Question:
    """A ``prompt`` of token ids, to be gone on with by at most ``most`` tokens, or up to one of the texts ``until``.
    ``goes_on`` says of the tokens so far whether none of these has come."""

    prompt: tuple[int, ...]
    most: int
    until: tuple[str, ...]
    goes_on: Callable[[Sequence[int]], bool]


class Answers:
    """The answers of ``stacks`` of the source of ``job``. Those that ``journal`` has are not computed again; what has
    no room in memory is spilled into ``place``."""

    def __init__(
        self,
        job: Job,
        stacks: Sequence[StackLayers],
        streaming: Streaming,
        journal: Journal | None = None,
        place: Path | None = None,
    ) -> None:
        self.job, self._stacks, self._streaming, self._place = job, list(stacks), streaming, place
        self._digests = [_digest([[layer.key for layer in layers], norms]) for layers, norms in stacks]
        self._likelihoods: dict[_Key, Likelihood] = {}
        self._texts: dict[_Key, list[int]] = {}
        self._journal, self._fresh = journal, list[dict[str, Any]]()
        self._trials: Trials | None = None
        for record in [] if journal is None else journal.records:
            self._learn(record)

    def likelihoods(self, requests: Sequence[Continued], stack: int) -> list[Likelihood]:
        """Those of the stack with the number ``stack``; what is not known yet is computed, for all stacks. Raises
        BudgetError, NonFiniteError."""
        keys = [_digest([request.given, request.continuation]) for request in requests]
        by_key = dict(zip(keys, requests, strict=True))
        lacking = [key for key in by_key if any((digest, key) not in self._likelihoods for digest in self._digests)]
        if lacking:
            self._compute(lacking, [by_key[key] for key in lacking])
        return [self._likelihoods[self._digests[stack], key] for key in keys]

    def generated(self, questions: Sequence[Question], stack: int) -> list[list[int]]:
        """The token ids that the stack with the number ``stack`` goes on with. Raises BudgetError, OutputError."""
        digest = self._digests[stack]
        keys = [_digest([question.prompt, question.most, question.until]) for question in questions]
        by_key = dict(zip(keys, questions, strict=True))
        lacking = [key for key in by_key if (digest, key) not in self._texts]
        if lacking:
            self._generate(stack, lacking, [by_key[key] for key in lacking])
        return [self._texts[digest, key] for key in keys]

    def _compute(self, keys: Sequence[str], requests: Sequence[Continued]) -> None:
        entering = {request.entering for request in requests}
        size = self._size(entering, len(self._stacks))
        memory, held = plan_evaluation(self.job, size, self._streaming)
        self.job.listener(memory.event)
        packs = size.row if self._tried().packs else None

        def done(stack: int, number: int, found: Likelihood) -> None:
            self._add(
                {"kind": "likelihood", "stack": self._digests[stack], "request": keys[number]}
                | {"log": found.log_likelihood, "greedy": found.is_greedy}
            )

        job = self.job
        with self._saving(), open_stream(job, memory) as stream, job.meter.phase("evaluate"):
            model = job.model(stream)
            with heap_for(memory.activations):
                streamed_likelihoods(model, self._stacks, requests, job.vocabulary, (size.call, held), packs, done)

    def _generate(self, stack: int, keys: Sequence[str], questions: Sequence[Question]) -> None:
        job, (layers, _) = self.job, self._stacks[stack]
        kept = self._tried().kept
        tokens = sum(len(question.prompt) + question.most for question in questions)
        size = self._size({question.prompt for question in questions}, 1, (kept or 0) * len(layers) * tokens)
        memory, held = plan_evaluation(job, size, self._streaming)
        job.listener(memory.event)
        at_once = held // size.a_token(job)
        parts = list(groups([*zip(keys, questions, strict=True)], lambda one: len(one[1].prompt), at_once))
        passes = sum(max(question.most for _, question in part) for part in parts)
        view = job.view(layers)
        read = format_bytes(sum(view.info(name).num_bytes for name in view.names))
        how = "" if kept else ", each with all that comes before: layers of this model take no cache"
        job.listener(NoteMade(f"{len(questions)} texts to be gone on with: up to {passes} passes over {read}{how}"))
        job.listener(PhaseStarted("generate", passes * len(schedule([Stack(tuple(layers), 0)]))))
        with self._saving(), open_stream(job, memory) as stream, job.meter.phase("generate"):
            model = job.model(stream)
            for part in parts:
                with self._scratch(memory, kept) as scratch, heap_for(memory.activations):
                    self._go_on(model, stack, part, (size.row, scratch))

    def _go_on(
        self, model: StreamedModel, stack: int, part: Sequence[tuple[str, Question]], sizes: tuple[int, Scratch | None]
    ) -> None:
        """What the stack with that number makes of ``part`` of the questions."""

        def done(number: int, found: list[int]) -> None:
            self._add({"kind": "text", "stack": self._digests[stack], "request": part[number][0], "tokens": found})

        texts = [Wanted(one.prompt, one.most, one.goes_on) for _, one in part]
        streamed_generation(model, self._stacks[stack], texts, self.job.vocabulary, sizes, done)

    def _size(self, sequences: set[tuple[int, ...]], stacks: int, kept: int = 0) -> EvaluationSize:
        longest = max(map(len, sequences))
        call = max(self.job.call_tokens, MOST_CALL_TOKENS)
        row = min(max(_ROW * longest, _LEAST_ROW), _MOST_ROW)
        return EvaluationSize(sum(map(len, sequences)), call, row, longest, stacks, kept)

    def _tried(self) -> Trials:
        self._trials = self._trials or tried(self.job, self._streaming)
        return self._trials

    @contextmanager
    def _scratch(self, memory: MemoryPlan, kept: int | None) -> Iterator[Scratch | None]:
        """Where keys and values are; None where none are kept."""
        if kept is None:
            yield None
        elif not memory.spill:
            yield Scratch(self.job.placement.device)
        else:
            with tempfile.TemporaryDirectory(prefix=".streamcollapse-", dir=self._place) as directory:
                yield DiskScratch(Path(directory))

    def _add(self, record: dict[str, Any]) -> None:
        self._learn(record)
        self._fresh.append(record)
        if len(self._fresh) >= _SAVED_AT_ONCE:
            self._save()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """What is known at the end of the body, or where it ends, is saved."""
        try:
            yield
        finally:
            self._save()

    def _save(self) -> None:
        if self._journal is not None:
            self._journal.append(self._fresh)
        self._fresh.clear()

    def _learn(self, record: Mapping[str, Any]) -> None:
        """What a record says, if it is one of an answer and can be: what cannot be is computed again."""
        stack, request = record.get("stack"), record.get("request")
        if not isinstance(stack, str) or not isinstance(request, str):
            return
        log, greedy, tokens = record.get("log"), record.get("greedy"), record.get("tokens")
        if record.get("kind") == "likelihood" and isinstance(log, float) and isinstance(greedy, bool):
            self._likelihoods[stack, request] = Likelihood(log, greedy)
        if record.get("kind") == "text" and isinstance(tokens, list) and all(type(one) is int for one in tokens):
            self._texts[stack, request] = tokens


def _digest(what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:32]
