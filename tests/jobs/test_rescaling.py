"""Scales for the layers that stay, and several merges a round, against plain evaluations in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamcollapse import Calibration, Compute, Plan, SearchOptions, Streaming, prune, search
from streamcollapse.merge.record import Decision
from streamcollapse.progress import Event, PhaseStarted, RoundStarted
from streamcollapse.searches.rescale import GAIN, LEAST, MOST, STEP
from streamcollapse.settings.run import Repair, RunSettings
from tests.in_memory import mean_similarity, mixed_model
from tests.jobs.test_prune import SAMPLES

SENTENCES = Calibration("sentences")

FLOAT32 = Compute("cpu", "float32")
Layers = list[tuple[int, dict[int, float]]]


@pytest.fixture
def judge(llama: Path) -> Callable[[Layers], float]:
    """exp(-KL) of a stack, in memory."""
    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    token_ids = [tokenizer(sample, return_tensors="pt")["input_ids"] for sample in SAMPLES]
    return lambda layers: mean_similarity(mixed_model(original, layers), original, token_ids, "kl")


def layers_of(plan: Plan) -> Layers:
    return [(layer.base, dict(layer.mix)) for layer in plan.layers]


def decisions_of(plan: Plan) -> list[Decision]:
    assert plan.search is not None
    return list(plan.search.decisions)


def test_rounds_end_at_the_last_that_is_told(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds() -> list[RoundStarted]:
        seen: list[Event] = []
        options = SearchOptions(strategy="block-influence", target_layers=6, rescale=True, effort="thorough")
        search(llama, options, settings=RunSettings(FLOAT32, SENTENCES), listener=seen.append)
        start = seen.index(PhaseStarted("scales"))
        return [event for event in seen[start:] if isinstance(event, RoundStarted)]

    free = rounds()
    assert {one.most for one in free} == {24}
    assert 1 < len(free) < 24
    monkeypatch.setattr("streamcollapse.searches.rescale._MOST_ROUNDS", {True: 1, False: 1})
    assert [(one.number, one.most) for one in rounds()] == [(1, 1)]


@pytest.mark.parametrize(
    "options",
    [
        SearchOptions(strategy="greedy", target_layers=5, lowest=2, highest=7, effort="thorough"),
        SearchOptions(layers_per_merge=3, rule="mean", target_layers=4, metric="kl"),
        SearchOptions(strategy="block-influence", target_layers=5, metric="kl"),
    ],
    ids=lambda options: options.strategy,
)
def test_no_step_makes_the_result_more_similar(
    llama: Path, judge: Callable[[Layers], float], options: SearchOptions
) -> None:
    before, after = (
        search(llama, replace(options, rescale=on), settings=RunSettings(calibration=SENTENCES, compute=FLOAT32))
        for on in (False, True)
    )
    decisions = decisions_of(after)
    assert decisions[: len(decisions_of(before))] == decisions_of(before)
    assert [layer.base for layer in after.layers] == [layer.base for layer in before.layers]
    told = decisions[-1].similarity
    assert told == pytest.approx(judge(layers_of(after)), abs=1e-5)
    assert told > judge(layers_of(before)) + GAIN
    in_range = [x.base >= options.lowest - 1 and max(x.mix) < (options.highest or 8) for x in before.layers]
    scales = []
    for found, final, may in zip(before.layers, after.layers, in_range, strict=True):
        factors = {round(final.mix[s] / found.mix[s], 9) for s in found.mix}
        assert len(factors) == 1, "all sources of a layer have one scale"
        scales.append(factors.pop())
        assert may or scales[-1] == 1.0
    for position, may in enumerate(in_range):
        for step in (STEP, -STEP):
            changed = [scale + step * (i == position) for i, scale in enumerate(scales)]
            if may and LEAST <= changed[position] <= MOST:
                layers = [
                    (x.base, {s: c * f for s, c in x.mix.items()}) for x, f in zip(before.layers, changed, strict=True)
                ]
                assert judge(layers) < told + GAIN + 1e-5


def test_what_is_found_is_what_is_written_and_depends_on_no_sweep(llama_bf16: Path, tmp_path: Path) -> None:
    options = SearchOptions(strategy="greedy", target_layers=5, rescale=True)
    plans = [
        search(llama_bf16, options, settings=RunSettings(calibration=SENTENCES, streaming=Streaming(lookahead)))
        for lookahead in (1, 4, None)
    ]
    assert plans[0] == plans[1] == plans[2]
    settings = RunSettings(calibration=SENTENCES, repair=Repair("none"))
    pruned = prune(llama_bf16, tmp_path / "out", options, settings=settings)
    assert pruned.plan == plans[0]
    source = {name: tensor for shard in llama_bf16.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    written = load_file(tmp_path / "out" / "model.safetensors")
    scaled = [(i, layer) for i, layer in enumerate(pruned.plan.layers) if not layer.untouched]
    assert scaled
    for i, layer in scaled:
        name = "model.layers.{}.mlp.up_proj.weight"
        expected = sum(c * source[name.format(s)].float() for s, c in layer.mix.items()).bfloat16()
        assert torch.equal(written[name.format(i)], expected)
        norm = "model.layers.{}.input_layernorm.weight"
        assert torch.equal(written[norm.format(i)], source[norm.format(layer.base)])


def test_nothing_is_scaled_where_nothing_was_merged(llama: Path) -> None:
    plan = search(
        llama, SearchOptions(strategy="laco", threshold=1.0, rescale=True), settings=RunSettings(compute=FLOAT32)
    )
    assert all(layer.untouched for layer in plan.layers)
    assert plan.num_layers == 8


@pytest.mark.parametrize("target", [5, None])
def test_several_merges_a_round(llama: Path, judge: Callable[[Layers], float], target: int | None) -> None:
    options = SearchOptions(
        strategy="greedy", rule="first,mean", merges_per_round=2, target_layers=target, rescale=False
    )
    if target is None:
        options = replace(options, threshold=0.9)
    plan = search(llama, options, settings=RunSettings(calibration=SENTENCES, compute=FLOAT32))
    one_by_one = search(
        llama, replace(options, merges_per_round=1), settings=RunSettings(calibration=SENTENCES, compute=FLOAT32)
    )
    decisions = [d for d in decisions_of(plan) if d.accepted]
    assert decisions[0] == decisions_of(one_by_one)[0]
    first, second = decisions[:2]
    assert abs(first.l - second.l) >= 2, "no layer in common"
    last = decisions[-1].similarity
    assert last == pytest.approx(judge(layers_of(plan)), abs=1e-5), "the similarity is that of all merges together"
    if target is None:
        assert last is not None
        assert last > 0.9
    else:
        assert plan.num_layers == target, "three merges in rounds of two"
