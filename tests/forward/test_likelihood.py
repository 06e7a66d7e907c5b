"""Log-likelihoods of continuations, streamed, against the model's own forward pass, sequence by sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from streamcollapse.forward.likelihood import Continued, Likelihood, streamed_likelihoods
from streamcollapse.forward.packed import pack, takes_packed
from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.run.opened import Job, open_job
from streamcollapse.settings.run import Compute, RunSettings
from tests.checkpoints import VOCABULARY, save_model
from tests.families import CHECKS, FAMILIES, MORE_FAMILIES, SMALL
from tests.in_memory import mixed_model
from tests.streams import plain_stream

# whose arguments do not say by position what a token sees, or which look at neighbours
UNPACKED = ("mpt, alibi", "jamba, state space", "qwen 3 next, linear attention")
ROOMY = 1 << 30


def requests() -> list[Continued]:
    """Questions that begin alike, with several answers; one that another begins with; and some that stand alone."""
    g = torch.Generator().manual_seed(5)

    def words(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, VOCABULARY, (count,), generator=g).tolist())

    shots, found = words(9), list[Continued]()
    for length in (6, 4, 11):
        question = words(length)
        found += [Continued((*shots, *question), words(n)) for n in (1, 1, 3, 7)]
    found += [Continued(shots, words(2)), Continued(shots[:1], shots[1:]), Continued(words(1), words(1))]
    return [*found, found[2], Continued(words(5), words(20))]


def in_memory(model: Any, asked: list[Continued]) -> list[Likelihood]:
    found = []
    for one in asked:
        ids = torch.tensor([[*one.given, *one.continuation]])
        with torch.inference_mode():
            logs = model(ids, use_cache=False).logits[0].double().log_softmax(-1)[len(one.given) - 1 : -1]
        words = torch.tensor(one.continuation)
        chosen = logs.gather(1, words[:, None]).sum().item()
        found.append(Likelihood(chosen, bool((logs.argmax(-1) == words).all())))
    return found


def streamed(
    job: Job,
    asked: list[Continued],
    stacks: list[tuple[tuple[PlanLayer, ...], bool]] | None = None,
    packs: bool = True,
    sizes: tuple[int, int] = (40, ROOMY),
) -> list[list[Likelihood]]:
    stacks = stacks or [(original_layers(job.num_layers), False)]
    found: list[dict[int, Likelihood]] = [{} for _ in stacks]

    def done(stack: int, number: int, likelihood: Likelihood) -> None:
        assert number not in found[stack]
        found[stack][number] = likelihood

    model = job.model(plain_stream(job))
    streamed_likelihoods(model, stacks, asked, job.vocabulary, sizes, sizes[0] if packs else None, done)
    return [[one[n] for n in range(len(asked))] for one in found]


def same(ours: list[Likelihood], theirs: list[Likelihood]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)
        assert one.is_greedy == other.is_greedy


def opened(config: Any, place: Path) -> tuple[Job, Any]:
    directory = save_model(config, place, gain=1.0)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return open_job(directory, RunSettings(Compute("cpu", "float32"))), model


def trial(job: Job, base: int) -> bool:
    model, view = job.model(plain_stream(job)), job.original()
    with torch.inference_mode(), model.onload(view, base) as weights:
        return takes_packed(model, base, weights, range(5, 15))


@pytest.mark.parametrize("family", CHECKS["evaluated"])
def test_equals_the_model_s_own_log_likelihoods(family: str, tmp_path: Path) -> None:
    job, model = opened((FAMILIES | MORE_FAMILIES)[family](), tmp_path / "m")
    asked = requests()
    expected = in_memory(model, asked)
    same(streamed(job, asked, packs=False)[0], expected)
    packs = all(trial(job, base) for base in range(job.num_layers))
    assert packs == (family not in UNPACKED)
    if packs:
        same(streamed(job, asked)[0], expected)


def test_a_layer_that_mixes_neighbours_is_found_by_trial(tmp_path: Path) -> None:
    kinds = ["conv", "full_attention", "conv", "conv", "full_attention", "conv"]
    job, model = opened(hf.Lfm2Config(**SMALL, layer_types=kinds), tmp_path / "m")
    assert [trial(job, base) for base in range(6)] == [kind == "full_attention" for kind in kinds]
    asked = requests()
    same(streamed(job, asked, packs=False)[0], in_memory(model, asked))


def test_stacks_share_a_pass_and_each_is_what_it_is_alone(tmp_path: Path) -> None:
    job, model = opened(FAMILIES["llama"](), tmp_path / "m")
    asked, whole = requests(), original_layers(6)
    mixed = (*whole[:2], PlanLayer(2, {2: 0.5, 3: 0.5}), *whole[4:])
    stacks = [(whole, False), ((*whole[:2], *whole[4:]), False), (mixed, False)]
    found = streamed(job, asked, stacks)
    for ours, (layers, _) in zip(found, stacks, strict=True):
        theirs = mixed_model(model, [(layer.base, dict(layer.mix)) for layer in layers])
        same(ours, in_memory(theirs, asked))
        assert ours == streamed(job, asked, [(layers, False)])[0]


def test_one_pass_reads_each_weight_once_and_less_memory_takes_more_passes(tmp_path: Path) -> None:
    """A thousand requests: the layers go by once, whatever their number."""
    job, _ = opened(FAMILIES["llama"](), tmp_path / "m")
    asked = [Continued((3, 5, 7 + n % 50), (2 + n // 50, 9, n % 7)) for n in range(1000)]
    before = job.meter.bytes_read
    many = streamed(job, asked, sizes=(256, ROOMY))
    once = job.meter.bytes_read - before
    layers = sum(job.source.info(name).num_bytes for i in range(6) for name in job.architecture.layout.layer_names(i))
    outside = job.checkpoint.num_bytes - layers
    assert layers <= once <= layers + 40 * outside  # embedding rows and the norm, for each row of requests
    few = streamed(job, asked, sizes=(256, 40_000))
    assert job.meter.bytes_read - before - once > 3 * layers
    assert few == many


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=30), st.integers(4, 40))
def test_packed_rows_hold_every_sequence(sequences: list[list[int]], most: int) -> None:
    rows = pack(sequences, most)
    where = {number: row for row in rows for number in row.columns}
    assert sorted(where) == [*range(len(sequences))]
    for number, row in where.items():
        columns, tree = row.columns[number], row.tree()
        assert [row.token_ids[c] for c in columns] == sequences[number]
        assert [row.positions[c] for c in columns] == [*range(len(columns))]
        for n, column in enumerate(columns):
            assert tree[column].nonzero()[:, 0].tolist() == columns[: n + 1], "its own sequence, up to itself"
    for row in rows:
        assert len(row.token_ids) <= max(most, max(len(sequences[n]) for n in row.columns))
        assert sorted({column for columns in row.columns.values() for column in columns}) == [*range(len(row.tree()))]
