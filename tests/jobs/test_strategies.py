"""Every strategy against a plain one in memory, and targets against all thresholds."""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamcollapse import Calibration, Compute, Output, Plan, SearchOptions, Streaming, apply, prune, resume, search
from streamcollapse.errors import ModelError, OptionError
from streamcollapse.jobs.prepare import prepare_search
from streamcollapse.progress import DecisionMade, Event, PhaseStarted, WarningRaised
from streamcollapse.searches.candidate import Target
from streamcollapse.searches.registry import complete, strategies
from streamcollapse.searches.strategies.rule_based import groups_from_the_top
from streamcollapse.searches.strategy import SearchSpace
from streamcollapse.settings.run import Repair, RunSettings
from tests.checkpoints import llama_config, save_model
from tests.families import FAMILIES
from tests.in_memory import in_memory_greedy, in_memory_search
from tests.jobs.test_prune import SAMPLES

FLOAT32 = Compute("cpu", "float32")
SENTENCES = Calibration("sentences")
GREEDY: dict[str, Any] = {"strategy": "greedy", "rescale": False}


def decisions_of(plan: Plan) -> list[Any]:
    assert plan.search is not None
    return list(plan.search.decisions)


@pytest.mark.parametrize("rules", [("first", "sequential"), ("mean",), ("first", "sequential", "mean")])
def test_greedy_equals_a_plain_greedy_search_in_memory(llama: Path, tmp_path: Path, rules: tuple[str, ...]) -> None:
    options = SearchOptions(rule=",".join(rules), target_layers=4, **GREEDY)
    settings = RunSettings(calibration=SENTENCES, compute=FLOAT32, repair=Repair("none"))
    pruned = prune(llama, tmp_path / "out", options, settings=settings)
    expected = in_memory_greedy(llama, SAMPLES, rules=rules, rounds=4)
    ours = decisions_of(pruned.plan)
    assert [d.similarity for d in ours] == pytest.approx([d[2] for d in expected.decisions], abs=1e-5)
    for decision, tried in zip(ours, expected.tried, strict=True):
        if len(rules) == 1:
            assert decision.tried is None
        else:
            assert list(decision.tried) == list(rules)
            assert list(decision.tried.values()) == pytest.approx(tried, abs=1e-5)
            assert decision.tried[decision.rule] == decision.similarity
    weights = expected.model.state_dict()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-5, rtol=1e-5)


def test_greedy_stays_in_its_range_and_stops_at_its_threshold(llama: Path) -> None:
    options = SearchOptions(rule="first,sequential", lowest=3, highest=6, target_layers=6, **GREEDY)
    plan = search(llama, options, settings=RunSettings(calibration=SENTENCES, compute=FLOAT32))
    expected = in_memory_greedy(llama, SAMPLES, rules=("first", "sequential"), rounds=2, low=3, high=6)
    assert [d.similarity for d in decisions_of(plan)] == pytest.approx([d[2] for d in expected.decisions], abs=1e-5)
    assert [layer.base for layer in plan.layers if not 2 <= layer.base < 6] == [0, 1, 6, 7]
    everywhere = replace(options, lowest=1, highest=None, target_layers=4)
    best = [d.similarity for d in decisions_of(search(llama, everywhere, settings=RunSettings(calibration=SENTENCES)))]
    threshold = (best[1] + best[2]) / 2
    stopped = search(
        llama, replace(everywhere, target_layers=None, threshold=threshold), settings=RunSettings(calibration=SENTENCES)
    )
    assert [d.accepted for d in decisions_of(stopped)] == [True, True, False]
    assert stopped.num_layers == 6


def test_each_strategy_has_its_own_samples(llama: Path) -> None:
    """Without any setting but the target: greedy, with scales, on passages; resumed and asked for by name alike."""
    samples = {}
    for options in (SearchOptions(lowest=7, target_layers=7), SearchOptions(2, lowest=6, target_layers=7)):
        plan, named = (
            search(llama, options, settings=RunSettings(calibration=Calibration(name)))
            for name in (None, strategies()[complete(options).strategy].samples)
        )
        assert plan == named
        assert plan.search is not None
        strategy = complete(options).strategy
        assert plan.search.options.strategy == strategy
        assert not plan.search.options.rescale
        samples[strategy] = plan.search.calibration_sha256
    assert samples["greedy"] != samples["laco"]


def test_no_bit_of_greedy_depends_on_how_many_share_a_sweep(llama_bf16: Path) -> None:
    options = SearchOptions(rule="best", target_layers=5, **GREEDY)
    plans = [
        search(
            llama_bf16,
            options,
            settings=RunSettings(calibration=SENTENCES, compute=Compute("cpu", dtype), streaming=Streaming(lookahead)),
        )
        for dtype in ("float32", "bfloat16")
        for lookahead in (1, 3, 50, None)
    ]
    assert all(plan == plans[0] for plan in plans[:4])
    assert all(plan == plans[4] for plan in plans[4:])


@torch.no_grad()
def hidden_states(directory: Path) -> list[tuple[torch.Tensor, ...]]:
    """What enters each layer and what leaves the last one, for each sample, by the model itself."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    left: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(
        lambda m, i, out: left.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = []
    for sample in SAMPLES:
        ids = tokenizer(sample, return_tensors="pt")["input_ids"]
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        found.append((*(s[0].double() for s in states[:-1]), left.pop()[0].double()))
    return found


def test_block_influence_drops_what_the_models_own_states_say(llama: Path, tmp_path: Path) -> None:
    states = hidden_states(llama)
    influence = []
    for i in range(8):
        cosines = [torch.nn.functional.cosine_similarity(s[i], s[i + 1], dim=-1) for s in states]
        influence.append(1 - float(torch.cat(cosines).mean()))
    plan = search(
        llama, SearchOptions(strategy="block-influence", target_layers=5), settings=RunSettings(compute=FLOAT32)
    )
    order = sorted(range(8), key=influence.__getitem__)
    assert [d.l - 1 for d in decisions_of(plan)] == order
    assert [1 - d.similarity for d in decisions_of(plan)] == pytest.approx([influence[i] for i in order], abs=1e-6)
    assert [layer.base for layer in plan.layers] == sorted(order[3:])
    assert all(layer.untouched for layer in plan.layers)
    apply(llama, plan, tmp_path / "out")
    kept = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for layer, base in zip(ours.model.layers, sorted(order[3:]), strict=True):
        for one, other in zip(layer.parameters(), kept.model.layers[base].parameters(), strict=True):
            assert torch.equal(one, other)


def test_angular_drops_the_block_that_turns_the_last_token_least(llama: Path) -> None:
    states = hidden_states(llama)
    distances = []
    for start in range(8 - 3 + 1):
        cosines = [torch.nn.functional.cosine_similarity(s[start][-1], s[start + 3][-1], dim=-1) for s in states]
        distances.append(sum(math.acos(float(c)) for c in cosines) / len(cosines) / math.pi)
    plan = search(llama, SearchOptions(strategy="angular", target_layers=5), settings=RunSettings(compute=FLOAT32))
    assert [1 - d.similarity for d in decisions_of(plan)] == pytest.approx(distances, abs=1e-6)
    best = min(range(6), key=distances.__getitem__)
    assert [layer.base for layer in plan.layers] == [i for i in range(8) if not best <= i < best + 3]


def test_rule_based_merges_the_papers_groups(tmp_path: Path, llama: Path) -> None:
    options = SearchOptions(layers_per_merge=2, interval=1, lowest=2, strategy="rule-based", rule="mean")
    pruned = prune(llama, tmp_path / "out", options, settings=RunSettings(compute=FLOAT32))
    assert [(d.l, d.merged) for d in decisions_of(pruned.plan)] == [(7, 1), (4, 1)]
    # Algorithm 1 with everything accepted, whose pointer is made to stop at the same places
    plain = in_memory_search(llama, SAMPLES, c=2, i=3, threshold=-1.0, rule="mean", high=9, low=2)
    assert [d[:2] for d in plain.decisions] == [(7, 1), (4, 1)]
    assert [d.similarity for d in decisions_of(pruned.plan)] == pytest.approx([d[2] for d in plain.decisions], abs=1e-5)
    assert [layer.base for layer in pruned.plan.layers] == [0, 1, 2, 3, 5, 6]


def test_layers_that_are_unlike_are_not_merged_by_the_rule(tmp_path: Path) -> None:
    source = save_model(FAMILIES["qwen 3 moe, dense and sparse"](), tmp_path / "source", gain=1.5)
    options = SearchOptions(layers_per_merge=2, interval=1, strategy="rule-based", rule="mean")
    with pytest.raises(ModelError, match=r"layers \d+-\d+ cannot be merged: .*; raise `lowest`, or lower `highest`"):
        prune(source, tmp_path / "out", options, settings=RunSettings(compute=FLOAT32))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_the_papers_groups_of_32_layers() -> None:
    options = complete(SearchOptions(4, 4, lowest=13, highest=32, strategy="rule-based"))
    steps = groups_from_the_top(SearchSpace(options, Target(None, None, (1,) * 32, 32)))
    assert [(s.pointer, s.pointer + s.merged) for s in steps] == [(29, 32), (21, 24), (13, 16)]
    assert len(steps[-1].layers) == 23


def test_a_target_is_what_the_best_threshold_gives(llama: Path) -> None:
    options = SearchOptions(layers_per_merge=3, interval=1, rule="mean")
    seen = [
        d.similarity
        for d in decisions_of(search(llama, replace(options, threshold=1.0), settings=RunSettings(compute=FLOAT32)))
    ]
    thresholds = {-1.0, 1.0}
    while True:  # every threshold at which anything changes
        plans = [
            search(llama, replace(options, threshold=t), settings=RunSettings(compute=FLOAT32))
            for t in sorted(thresholds)
        ]
        new = {d.similarity for plan in plans for d in decisions_of(plan)} - thresholds
        if not new or len(thresholds) > 60:
            break
        thresholds |= new
    counts = {plan.num_layers for plan in plans}
    assert len(counts) > 3
    assert seen
    for wanted in range(2, 8):
        told: list[Event] = []
        found = search(
            llama, replace(options, target_layers=wanted), settings=RunSettings(compute=FLOAT32), listener=told.append
        )
        best = min((count for count in counts if count >= wanted), default=8)
        assert found.num_layers == best, wanted
        assert found.search is not None
        again = search(
            llama, replace(options, threshold=found.search.options.threshold), settings=RunSettings(compute=FLOAT32)
        )
        assert again.layers == found.layers, "the threshold that was found gives the same"
        low = any(isinstance(e, WarningRaised) and "is below 0.45, the lowest of the paper's" in e.text for e in told)
        assert low == (found.search.options.threshold < 0.45)
        assert any(isinstance(e, WarningRaised) and "no threshold gives exactly" in e.text for e in told) == (
            best != wanted and min(counts) < wanted
        )


@pytest.mark.parametrize("strategy", sorted(strategies()))
def test_a_ratio_is_never_exceeded(llama: Path, tmp_path: Path, strategy: str) -> None:
    rule = "mean" if strategy == "laco" else None
    for ratio in (0.02, 0.05, 0.11):
        options = SearchOptions(2, 1, strategy=strategy, rule=rule, target_ratio=ratio)
        if ratio < 0.03:
            with pytest.raises(OptionError, match="less than a layer has, and nothing would be pruned"):
                search(llama, options, settings=RunSettings(calibration=SENTENCES, compute=FLOAT32))
            continue
        settings = RunSettings(calibration=SENTENCES, compute=FLOAT32, repair=Repair("none"))
        pruned = prune(llama, tmp_path / f"{ratio}", options, settings=settings)
        assert pruned.report["ratio"] <= ratio
        if strategy in ("greedy", "block-influence"):
            layer = (pruned.report["parameters"]["before"] - pruned.report["parameters"]["after"]) / max(
                8 - pruned.plan.num_layers, 1
            )
            if pruned.plan.num_layers < 8:
                assert pruned.report["ratio"] + layer / pruned.report["parameters"]["before"] > ratio


@pytest.mark.parametrize("strategy", sorted(strategies()))
def test_a_search_that_is_broken_off_goes_on(llama: Path, tmp_path: Path, strategy: str) -> None:
    options = SearchOptions(3, 1, strategy=strategy, target_layers=5)
    settings = RunSettings(FLOAT32, SENTENCES, output=Output("30kB"), repair=Repair("none"))
    expected = prune(llama, tmp_path / "expected", options, settings=settings)

    def stop(event: Event) -> None:
        if isinstance(event, DecisionMade):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="resume with: streamcollapse resume"):
        prune(llama, tmp_path / "out", options, settings=settings, listener=stop)
    again = resume(tmp_path / ".out.work")
    assert isinstance(again, type(expected))
    assert again.plan == expected.plan
    assert Plan.load(tmp_path / "out" / "streamcollapse_plan.json") == expected.plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "gready"}, "strategy 'gready' is unknown; did you mean greedy"),
        (
            {"strategy": "angular"},
            "goes on until a target; give `target_layers`, `target_ratio`, `target_memory` or `max_loss`",
        ),
        ({"target_layers": 4, "target_ratio": 0.2}, "are both given"),
        ({"target_ratio": 1.0}, "target ratio is 1.0; it must be less than 1"),
        ({"target_ratio": "half"}, "target ratio is 'half'; it must be a valid number"),
        ({"target_layers": 2.5}, "target layers is '2.5'; give how many stay"),
        ({"strategy": "rule-based", "rule": "best"}, "takes one rule"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        complete(SearchOptions(**changes))


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (SearchOptions(3, 1, threshold=0.9), []),
        (SearchOptions(threshold=0.9, merges_per_round=2), []),
        (SearchOptions(3, strategy="greedy"), [r"layers per merge \(C\) = 3 is ignored by strategy greedy"]),
        (SearchOptions(4, 1, strategy="greedy"), [r"interval \(I\) = 1 "]),
        (SearchOptions(3, merges_per_round=2), ["merges per round = 2 .* strategy laco"]),
        (SearchOptions(3, strategy="rule-based", threshold=0.9), [r"threshold \(T\) = 0.9 .* strategy rule-based"]),
        (SearchOptions(threshold=0.9, target_layers=7), [r"threshold \(T\) = 0.9 .* where there is a target"]),
        (SearchOptions(3, strategy="angular", target_layers=7, threshold=0.9), [r"\(C\) = 3", r"\(T\) = 0.9"]),
    ],
)
def test_settings_that_make_no_difference_are_said(llama: Path, options: SearchOptions, lines: list[str]) -> None:
    told: list[Event] = []
    with contextlib.suppress(KeyboardInterrupt):
        search(
            llama,
            options,
            settings=RunSettings(calibration=SENTENCES),
            listener=lambda event: _stop_at_the_phase(event, told),
        )
    said = [event.text for event in told if isinstance(event, WarningRaised)]
    assert len(said) == len(lines)
    assert all(re.search(line, text) for line, text in zip(lines, said, strict=True))


def _stop_at_the_phase(event: Event, told: list[Event]) -> None:
    told.append(event)
    if isinstance(event, PhaseStarted):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SearchOptions(9), r"9 layers \(C\) below layer 8 \(H\) would be into layer -1, below 1 \(L\)"),
        (SearchOptions(2, lowest=7), r"into layer 6, below 7 \(L\), counted from 1; lower `layers_per_merge`"),
        (SearchOptions(2, lowest=3, highest=3, strategy="rule-based"), "into layer 2, below 3"),
        (SearchOptions(strategy="rule-based", target_ratio=0.01), "nothing would be pruned"),
        (SearchOptions(lowest=3, highest=3), r"layers 3 \(L\) to 3 \(H\), counted from 1, have no two neighbours"),
    ],
)
def test_nothing_to_merge_is_said_before_anything_is_done(
    llama: Path, tmp_path: Path, options: SearchOptions, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        prune(llama, tmp_path / "out", options, settings=RunSettings(calibration=SENTENCES))
    assert [p.name for p in tmp_path.iterdir()] == []
    with pytest.raises(OptionError, match=message):
        prepare_search(llama, options, RunSettings(calibration=SENTENCES))


def test_a_single_layer_cannot_go(tmp_path: Path) -> None:
    save_model(llama_config(1), tmp_path / "one")
    for options in (SearchOptions(), SearchOptions(2), SearchOptions(strategy="rule-based")):
        with pytest.raises(OptionError, match="the model has one layer"):
            prune(tmp_path / "one", tmp_path / "out", options, settings=RunSettings(calibration=SENTENCES))


def test_a_target_beyond_the_model(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="target layers is 9, but the model has 8 layers"):
        prune(llama, tmp_path / "out", SearchOptions(strategy="laco", target_layers=9))
    with pytest.raises(OptionError, match="target layers is '0'; give how many stay"):
        SearchOptions(target_layers=0)
    assert [p.name for p in tmp_path.iterdir()] == []
