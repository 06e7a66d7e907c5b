"""How probable continuations are, streamed: all requests and all stacks share each visit to a layer.

Knows token ids, not tokenizers. What requests begin with alike is computed once (``packed``), where the model's code
takes that; else each runs as a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from streamcollapse.arch.skeleton import LayerCall
from streamcollapse.forward.batches import Batch, groups, make_batches
from streamcollapse.forward.head import Head
from streamcollapse.forward.model import StreamedModel
from streamcollapse.forward.packed import pack, packed_entry
from streamcollapse.forward.stacks import Heads, States, climb, walks_of
from streamcollapse.forward.walk import Stack, schedule
from streamcollapse.merge.plan import PlanLayer
from streamcollapse.progress import PhaseStarted


@dataclass(frozen=True)
class Continued:
    """Token ids: what is ``given``, one at the least, and the ``continuation`` whose probability is asked for."""

    given: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def entering(self) -> tuple[int, ...]:
        """What the model sees: all but the last token."""
        return (*self.given, *self.continuation[:-1])


@dataclass(frozen=True)
class Likelihood:
    """``log_likelihood`` of a continuation, in nats; ``is_greedy``: each of its tokens is the most probable one."""

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class _Call:
    """A call of a layer: the ``token_ids`` of its rows, and where each of its sequences is, by number: the row, and
    the columns of its tokens. ``enter`` gives what enters layer 0, [N, T, D], and how layers are called."""

    tokens: int
    places: dict[int, tuple[int, list[int]]]
    enter: Callable[[], tuple[torch.Tensor, Sequence[LayerCall]]]


Done = Callable[[int, int, Likelihood], None]  # the number of a stack, that of a request, and what it came to


@torch.inference_mode()
def streamed_likelihoods(
    model: StreamedModel,
    stacks: Sequence[tuple[Sequence[PlanLayer], bool]],
    requests: Sequence[Continued],
    vocabulary: int,
    sizes: tuple[int, int],
    packs: int | None,
    done: Done,
) -> None:
    """``done`` is told of each of ``requests`` with each of ``stacks`` of the source's layers (with whether norms are
    mixed), as they come to their end, pass after pass.

    ``sizes``: how many tokens go through a layer at once, and bytes of hidden states that are held at once. ``packs``:
    the tokens of a packed row, None where the model's code takes none (``takes_packed``). Raises NonFiniteError when a
    weight is not finite.
    """
    most_tokens, most_bytes = sizes
    sequences = list(dict.fromkeys(request.entering for request in requests))
    numbers = {sequence: number for number, sequence in enumerate(sequences)}
    asked: dict[int, list[int]] = {}
    for number, request in enumerate(requests):
        asked.setdefault(numbers[request.entering], []).append(number)
    calls = _plain(model, sequences, most_tokens) if packs is None else _packed(model, sequences, packs, most_tokens)
    heads = Heads(model, vocabulary, [layers[-1].after for layers, _ in stacks])
    a_token = model.hidden_size * model.placement.dtype.itemsize * (len(stacks) + 1)

    def score(group: Sequence[_Call], ours: Sequence[int], finished: Sequence[int], hidden: States) -> None:
        for head, ones in heads.of([ours[one] for one in finished], hidden[0][0, :1]):
            for left_NTD, call in zip(hidden, group, strict=True):
                _judge(head, left_NTD, call, (requests, asked), [partial(done, one) for one in ones])

    passes = list(groups(calls, lambda call: call.tokens * a_token, most_bytes))
    walks = walks_of([layers for layers, _ in stacks], [norms for _, norms in stacks])
    visits = sum(len(schedule([Stack(tuple(stacks[n][0]), 0) for n in ours])) for _, ours in walks)
    model.listener(PhaseStarted("evaluate", visits * len(passes)))
    for group in passes:
        for norms, ours in walks:
            entries = [call.enter() for call in group]
            text = [hidden for hidden, _ in entries], [calls for _, calls in entries]
            del entries
            climb(model, [Stack(tuple(stacks[n][0]), 0) for n in ours], norms, text, partial(score, group, ours))


def _packed(model: StreamedModel, sequences: Sequence[tuple[int, ...]], a_row: int, most: int) -> list[_Call]:
    found, alone = list[_Call](), list[int]()
    for row in pack(sequences, a_row):
        if len(row.columns) == 1:  # which needs no mask
            alone += row.columns
        else:
            places = {number: (0, columns) for number, columns in row.columns.items()}
            found.append(_Call(len(row.token_ids), places, partial(packed_entry, model, row, sequences)))
    return [*found, *_plain(model, sequences, most, alone)]


def _plain(
    model: StreamedModel, sequences: Sequence[tuple[int, ...]], most: int, numbers: Sequence[int] | None = None
) -> list[_Call]:
    """Those with ``numbers`` (None: all), each in a row of its own."""
    every = range(len(sequences)) if numbers is None else numbers
    longest_first = sorted(every, key=lambda n: -len(sequences[n]))  # as batches have them
    ordered, found = iter(longest_first), list[_Call]()
    for batch in make_batches([sequences[n] for n in longest_first], most):
        places = {next(ordered): (row, [*range(length)]) for row, length in enumerate(batch.lengths)}
        found.append(_Call(batch.input_ids_NT.numel(), places, partial(_entry, model, batch)))
    return found


def _entry(model: StreamedModel, batch: Batch) -> tuple[torch.Tensor, Sequence[LayerCall]]:
    recording = model.record([batch])[0]
    return recording.hidden_NTD, recording.calls


def _judge(
    head: Head,
    left_NTD: torch.Tensor,
    call: _Call,
    requests: tuple[Sequence[Continued], dict[int, list[int]]],
    told: Sequence[Callable[[int, Likelihood], None]],
) -> None:
    """``told`` of all requests whose sequences are in ``call``, by what left the top layer."""
    every, asked = requests
    for some in groups(_wanted(call, every, asked), lambda one: len(one[1]), head.tokens):
        places = sorted({place for _, pairs in some for place, _ in pairs})
        at = {place: n for n, place in enumerate(places)}
        rows, columns = (torch.tensor(one, device=left_NTD.device) for one in zip(*places, strict=True))
        flat = [(at[place], word) for _, pairs in some for place, word in pairs]
        at_P, words_P = (torch.tensor(one, device=left_NTD.device) for one in zip(*flat, strict=True))
        logs, best = (one.tolist() for one in head.likelihoods(left_NTD[rows, columns], at_P, words_P))
        first = 0
        for number, pairs in some:
            its = slice(first, first + len(pairs))
            first += len(pairs)
            for tell in told:
                tell(number, Likelihood(sum(logs[its]), all(best[its])))


_Pairs = list[tuple[tuple[int, int], int]]  # a row and a column, and the word that should come next


def _wanted(call: _Call, every: Sequence[Continued], asked: dict[int, list[int]]) -> list[tuple[int, _Pairs]]:
    """Each request of ``call`` by its number, with what it asks for."""
    found = list[tuple[int, _Pairs]]()
    for sequence, (row, columns) in call.places.items():
        for number in asked[sequence]:
            request = every[number]
            places = columns[len(request.given) - 1 :]
            pairs = [((row, column), word) for column, word in zip(places, request.continuation, strict=True)]
            found.append((number, pairs))
    return found
