"""Exchanges at the end of a search: which stacks are tried, and that the end is the best of them by many tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamcollapse import Plan, RunSettings, SearchOptions, search, sized_plan
from streamcollapse.jobs.prepare import prepare_search
from streamcollapse.merge.plan import original_layers
from streamcollapse.run.opened import open_run
from streamcollapse.run.samples import load_samples
from streamcollapse.run.saved_reference import reference_of
from streamcollapse.run.work_directory import temporary_work
from streamcollapse.searches.course import course
from streamcollapse.searches.evaluator import Evaluator
from streamcollapse.searches.exchange import MOST, exchanged, is_exchanging, neighbours
from streamcollapse.searches.strategy import SearchContext, SearchResult
from streamcollapse.searches.words import is_exchange
from streamcollapse.settings.catalogue import EFFORTS
from streamcollapse.settings.run import Calibration, Compute
from tests.checkpoints import BUNDLED
from tests.in_memory import mixed_model


def tried(gone: set[int], count: int, bounds: tuple[int, int]) -> list[set[int]]:
    layers = [layer for layer in original_layers(count) if layer.base not in gone]
    return [set(range(count)) - {layer.base for layer in one.layers} for one in neighbours(layers, count, bounds)]


def test_each_run_is_tried_a_layer_up_and_a_layer_down() -> None:
    found = tried({4, 6, 7}, 12, (1, 12))
    assert found == [{5, 6, 7}, {3, 6, 7}, {4, 7, 8}, {4, 5, 6}]
    assert tried({1, 10}, 11, (1, 11)) == [{2, 10}, {1, 9}], "the first layer stays, and there is none above the last"
    assert tried({3}, 8, (3, 5)) == [{4}], "within the bounds"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, True), ({"effort": "quick"}, False), ({"effort": "thorough"}, False), ({"rule": "mean"}, False)],
)
def test_who_exchanges(changes: dict[str, str], expected: bool) -> None:
    given = {"strategy": "greedy", "rule": "first", "effort": "standard", "merges_per_round": 1, **changes}
    assert is_exchanging(SearchOptions(target_layers=5, **given)) is expected


@pytest.fixture(scope="module")
def plan() -> Plan:
    settings = RunSettings(Compute("cpu", "float32"), Calibration("sentences"))
    return search(BUNDLED, SearchOptions(target_layers=19, rescale=False), settings=settings)


def divergence(gone: set[int], batches: list[torch.Tensor], original: object) -> float:
    """From the original's next-token distributions, the mean over all tokens, in memory."""
    pruned = mixed_model(original, [(n, {n: 1.0}) for n in range(24) if n not in gone])  # type: ignore[arg-type]
    total = count = 0.0
    with torch.no_grad():
        for ids in batches:
            theirs, ours = (model(ids, use_cache=False).logits.log_softmax(-1) for model in (original, pruned))  # type: ignore[operator]
            total += float((theirs.exp() * (theirs - ours)).sum())
            count += ids.numel()
    return total / count


def test_the_end_is_the_best_of_its_neighbours(plan: Plan) -> None:
    """With this vocabulary all tokens are compared."""
    assert (EFFORTS["standard"].exchange_tokens(4096) or 0) > 10 * 64
    assert plan.search is not None
    gone = set(range(24)) - {layer.base for layer in plan.layers}
    made = [d for d in plan.search.decisions if is_exchange(d)]
    assert len(gone) == 5
    original = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    batches = [torch.tensor([tokenizer(sample)["input_ids"]]) for sample in load_samples(Calibration("sentences"))]
    here = divergence(gone, batches, original)
    if len(made) < MOST:
        others = [divergence(other, batches, original) for other in tried(gone, 24, (1, 24))]
        assert here <= min(others) + 1e-5
    if made:
        assert made[-1].similarity == pytest.approx(torch.tensor(-here).exp().item(), rel=1e-4)


def test_a_layer_that_went_in_the_wrong_place_is_exchanged() -> None:
    """From a stack that no search would come to: without its second layer, which costs more than its third."""
    settings = RunSettings(Compute("cpu", "float32"), Calibration("sentences"))
    prepared = prepare_search(BUNDLED, SearchOptions(target_layers=23, rescale=False), settings)
    space, samples = prepared.space, prepared.samples
    assert space is not None
    assert samples is not None
    start = tuple(layer for layer in original_layers(24) if layer.base != 1)
    with temporary_work(False) as work, open_run(prepared.job, prepared.memory, work.path) as run:
        reference = reference_of(run, work, samples, range(25))
        evaluator = Evaluator(run, reference, work.memory, space.options, None)
        context = SearchContext(run, space, reference, evaluator, work)
        found = exchanged(context, SearchResult(space.options, start, []))
    assert found.layers != start
    assert len(found.layers) == 23
    assert all(decision.accepted and is_exchange(decision) for decision in found.decisions)
    assert found.decisions[0].rule == "exchange: 2 instead of 1"


def test_plans_still_have_every_size(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert [len(stack) for stack in course(again)] == [24, 23, 22, 21, 20, 19]
    assert course(again)[-1] == plan.layers
    assert sized_plan(again, 21).num_layers == 21
