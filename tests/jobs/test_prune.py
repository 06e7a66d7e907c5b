"""The whole job against a plain in-memory search, and the output as transformers sees it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPT2Config, JambaConfig

from streamcollapse import Calibration, Compute, Output, Plan, SearchOptions, apply, prune, resume, search
from streamcollapse.errors import ModelError, OutputError, PlanError
from streamcollapse.jobs import apply as module
from streamcollapse.merge.plan import PlanLayer
from streamcollapse.progress import DecisionMade, StackChanged, TimeExpected, WarningRaised
from streamcollapse.run.opened import open_job
from streamcollapse.run.samples import calibration_samples, load_samples
from streamcollapse.settings.run import RunSettings
from tests.checkpoints import VOCABULARY, edit_tensors, save_llama, save_model
from tests.in_memory import in_memory_search
from tests.methods import without_last

FLOAT32 = Compute("cpu", "float32")
SAMPLES = load_samples(Calibration())
QUICK = SearchOptions(strategy="block-influence", target_layers=6)  # where it is not the search that is tried


def _thresholds(directory: Path, rule: str, **settings: Any) -> list[float]:
    """Thresholds between the similarities that occur, so that some merges pass and some do not."""
    seen = in_memory_search(directory, SAMPLES, c=3, i=1, threshold=1.0, rule=rule, **settings).decisions
    values = sorted(d[2] for d in seen)
    return [(values[1] + values[2]) / 2, (values[-2] + values[-1]) / 2]


@pytest.mark.parametrize(
    ("rule", "scale", "norms"),
    [
        ("sequential", 1.0, False),
        ("rdsc", 1.0, False),
        ("rdsc", 0.3, False),
        ("mean", 1.0, False),
        ("first", 1.0, False),
        ("mean", 1.0, True),
    ],
)
def test_decisions_and_weights_equal_the_in_memory_search(
    llama: Path, tmp_path: Path, rule: str, scale: float, norms: bool
) -> None:
    for number, threshold in enumerate(_thresholds(llama, rule, scale=scale, norms=norms)):
        settings = {"rule": rule, "threshold": threshold, "rdsc_scale": scale, "merge_norms": norms}
        options = SearchOptions(layers_per_merge=3, interval=1, **settings)  # type: ignore[arg-type]
        pruned = prune(llama, tmp_path / str(number), options, settings=RunSettings(compute=FLOAT32))
        expected = in_memory_search(llama, SAMPLES, c=3, i=1, threshold=threshold, rule=rule, scale=scale, norms=norms)
        assert pruned.plan.search is not None
        ours = pruned.plan.search.decisions
        assert [(d.l, d.merged, d.accepted) for d in ours] == [(x[0], x[1], x[3]) for x in expected.decisions]
        assert any(d.accepted for d in ours)
        assert not all(d.accepted for d in ours)
        for decision, (_, _, similarity, _) in zip(ours, expected.decisions, strict=True):
            assert decision.similarity == pytest.approx(similarity, abs=1e-5)
        weights = expected.model.state_dict()
        written = load_file(tmp_path / str(number) / "model.safetensors")
        assert written.keys() == weights.keys()
        for name, tensor in written.items():
            torch.testing.assert_close(tensor, weights[name], atol=1e-5, rtol=1e-5)


def test_rules_in_competition_equal_the_in_memory_search(llama: Path, tmp_path: Path) -> None:
    """Every rule is tried for each candidate, the most similar counts, and the decision says what each had."""
    competing = [("sequential", 1.0), ("mean", 1.0), ("rdsc", 0.2), ("rdsc", 1.0), ("first", 1.0)]
    options = SearchOptions(3, 1, rule="sequential,mean,rdsc,first", rdsc_scale=(0.2, 1.0))
    assert [v.label for v in options.variants] == ["sequential", "mean", "rdsc:0.2", "rdsc:1.0", "first"]
    winners = set()
    for threshold in (0.3, 0.7):
        expected = in_memory_search(llama, SAMPLES, c=3, i=1, threshold=threshold, rule="", competing=competing)
        pruned = prune(
            llama,
            tmp_path / str(threshold),
            replace(options, threshold=threshold),
            settings=RunSettings(compute=FLOAT32),
        )
        assert pruned.plan.search is not None
        assert Plan.from_json(json.loads(json.dumps(pruned.plan.to_json()))) == pruned.plan
        decisions = pruned.plan.search.decisions
        assert [(d.l, d.merged, d.accepted) for d in decisions] == [(x[0], x[1], x[3]) for x in expected.decisions]
        for decision, tried in zip(decisions, expected.tried, strict=True):
            assert decision.tried is not None
            assert list(decision.tried.values()) == pytest.approx(tried, abs=1e-5)
            assert decision.similarity == max(decision.tried.values())  # type: ignore[type-var]
            assert decision.rule is not None
            assert decision.tried[decision.rule] == decision.similarity
            winners.add(decision.rule)
        written = load_file(tmp_path / str(threshold) / "model.safetensors")
        for name, tensor in expected.model.state_dict().items():
            torch.testing.assert_close(written[name], tensor, atol=1e-5, rtol=1e-5)
    assert len(winners) > 1, "else nothing was shown"


@pytest.mark.parametrize(
    "config",
    [
        lambda: GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=6, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
        ),
        lambda: Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            bos_token_id=0,
            eos_token_id=1,
        ),
    ],
    ids=["gpt2", "gemma2"],
)
def test_other_families_end_to_end(tmp_path: Path, config: Any) -> None:
    source = save_model(config(), tmp_path / "source", gain=1.5)
    options = SearchOptions(layers_per_merge=2, interval=2, threshold=-1.0, rule="mean")
    pruned = prune(source, tmp_path / "out", options, settings=RunSettings(compute=FLOAT32))
    expected = in_memory_search(source, SAMPLES, c=2, i=2, threshold=-1.0, rule="mean")
    assert pruned.plan.search is not None
    # transformers alternates layer kinds by position while the candidate keeps those of its bases, so the in-memory
    # search of a family with unlike layers is only followed as far as layers, not similarities, are concerned
    assert [d.l for d in pruned.plan.search.decisions] == [d[0] for d in expected.decisions]
    _check_output(tmp_path / "out", pruned.plan)


def _check_output(out: Path, plan: Plan) -> None:
    """No missing and no unexpected key, a cache that works, and the hidden states that the search evaluated."""
    model, loading = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("The river was", return_tensors="pt")["input_ids"]
    with_cache = model.generate(inputs, max_new_tokens=12, do_sample=False, use_cache=True)
    without = model.generate(inputs, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)
    assert plan.search is not None
    accepted = [d for d in plan.search.decisions if d.accepted]
    if accepted:
        assert _similarity_of(model, tokenizer, out) == pytest.approx(accepted[-1].similarity, abs=1e-5)


def _similarity_of(model: Any, tokenizer: Any, out: Path) -> float:
    """What the search measures, for the reloaded model against the reloaded source."""
    report = json.loads((out / "streamcollapse_report.json").read_text())
    source = AutoModelForCausalLM.from_pretrained(report["source"]["path"], dtype=torch.float32).eval()
    similarities = []
    for sample in SAMPLES:
        ids = tokenizer(sample, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            a, b = (m(ids, output_hidden_states=True).hidden_states[-1].flatten().double() for m in (model, source))
        similarities.append(float(torch.nn.functional.cosine_similarity(a, b, dim=0)))
    return sum(similarities) / len(similarities)


def test_the_output_directory(llama_bf16: Path, tmp_path: Path) -> None:
    (source := shutil.copytree(llama_bf16, tmp_path / "source"))
    (source / "LICENSE.txt").write_text("licence")
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Model\n")
    (source / "modeling_own.py").write_text("raise SystemExit")
    options = SearchOptions(layers_per_merge=3, interval=1, threshold=-1.0)
    out = tmp_path / "out"
    pruned = prune(
        source, out, options, settings=RunSettings(compute=Compute("cpu", "float32"), output=Output("100KB"))
    )
    names = {p.name for p in out.iterdir()}
    shards = {n for n in names if n.endswith(".safetensors")}
    assert len(shards) > 1
    assert names - shards == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "LICENSE.txt",
        "README.md",
        "model.safetensors.index.json",
        "streamcollapse_plan.json",
        "streamcollapse_report.json",
    }
    # the embedding alone exceeds the limit and has a shard of its own
    assert sum((out / s).stat().st_size > 101_000 for s in shards) == 2
    assert Plan.load(out / "streamcollapse_plan.json") == pruned.plan
    _check_output(out, pruned.plan)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    card = (out / "README.md").read_text()
    for expected in (
        "base_model: source",
        "license: apache-2.0",
        "language: en",
        "C = 3, I = 1, L = 1, H = 8, T = -1.0",
    ):
        assert expected in card
    report = json.loads((out / "streamcollapse_report.json").read_text())
    assert report == json.loads(json.dumps(pruned.report))
    assert report["layers"] == {"before": 8, "after": pruned.plan.num_layers}
    total = sum(t.numel() for s in shards for t in load_file(out / s).values())
    assert report["parameters"]["after"] == total
    assert report["ratio"] == pytest.approx(1 - total / report["parameters"]["before"])
    assert report["bytes"]["after"] == 2 * total == report["usage"]["bytes_written"]
    assert [p["name"] for p in report["usage"]["phases"]] == ["reference", "search", "write", "verdict"]
    assert all(p["seconds"] > 0 and p["peak_rss"] > 0 and p["bytes_read"] > 0 for p in report["usage"]["phases"])
    assert report["versions"]["torch"].startswith("2.")
    assert report["compute"] == {"device": "cpu", "dtype": "float32"}
    assert report["options"]["search"]["layers_per_merge"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_the_two_readings_of_rdsc_on_trained_weights(bundled: Path) -> None:
    similarities = {}
    for rule in ("sequential", "rdsc"):
        plan = search(
            bundled, SearchOptions(interval=1, threshold=1.0, rule=rule), settings=RunSettings(compute=FLOAT32)
        )
        assert plan.search is not None
        similarities[rule] = [d.similarity for d in plan.search.decisions[:19]]  # l = 20 down to 2
    assert similarities["sequential"][0] == pytest.approx(0.942, abs=1e-3)
    assert similarities["rdsc"][0] == pytest.approx(0.244, abs=1e-3)
    assert all(0.93 < (s or 0) < 0.98 for s in similarities["sequential"])
    assert all(0.1 < (s or 0) < 0.67 for s in similarities["rdsc"])


@pytest.mark.parametrize("source", ["llama", "llama_bf16"])
def test_a_threshold_of_one_changes_no_byte(source: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(source)
    pruned = prune(
        directory,
        tmp_path / "out",
        SearchOptions(strategy="laco", threshold=1.0, rule="first"),
        settings=RunSettings(compute=FLOAT32),
    )
    assert pruned.report["ratio"] == 0
    assert all(layer.untouched for layer in pruned.plan.layers)
    before, after = ({}, {})
    for where, tensors in ((directory, before), (tmp_path / "out", after)):
        for shard in where.glob("*.safetensors"):
            tensors.update(load_file(shard))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


def test_a_similarity_that_equals_the_threshold_is_not_above_it(tmp_path: Path) -> None:
    """Layers that add nothing: every candidate is exactly as similar as can be, and T = 1 still takes none."""
    source = save_llama(tmp_path / "m", num_layers=6)

    def silence(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor.zero_()

    edit_tensors(source, silence)
    plan = search(
        source, SearchOptions(layers_per_merge=2, interval=1, threshold=1.0), settings=RunSettings(compute=FLOAT32)
    )
    assert plan.search is not None
    assert {d.similarity for d in plan.search.decisions} == {1.0}
    assert not any(d.accepted for d in plan.search.decisions)
    assert plan.num_layers == 6


def test_search_and_apply_are_the_halves_of_prune(llama_bf16: Path, tmp_path: Path) -> None:
    options = SearchOptions(layers_per_merge=3, interval=1, threshold=-1.0, rule="rdsc", rdsc_scale=0.4)
    plan = search(llama_bf16, options, settings=RunSettings(compute=FLOAT32))
    plan.save(tmp_path / "plan.json")
    apply(llama_bf16, Plan.load(tmp_path / "plan.json"), tmp_path / "halves", settings=RunSettings(compute=FLOAT32))
    whole = prune(llama_bf16, tmp_path / "whole", options, settings=RunSettings(compute=FLOAT32))
    assert whole.plan == plan
    one, other = (load_file(tmp_path / d / "model.safetensors") for d in ("halves", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_mixed_weights_are_rounded_once_from_the_source(llama_bf16: Path, tmp_path: Path) -> None:
    # Powers of two as coefficients: every product is exact, so the order of the additions is all that counts.
    options = SearchOptions(3, 1, threshold=-1.0, rule="rdsc", rdsc_scale=0.25)
    pruned = prune(llama_bf16, tmp_path / "out", options, settings=RunSettings(compute=FLOAT32))
    source: dict[str, torch.Tensor] = {}
    for shard in llama_bf16.glob("*.safetensors"):
        source |= load_file(shard)
    written = load_file(tmp_path / "out" / "model.safetensors")
    deepest = max(pruned.plan.layers, key=lambda layer: len(layer.mix))
    assert len(deepest.mix) > 3, "no layer was merged twice"
    position = pruned.plan.layers.index(deepest)
    name = "mlp.up_proj.weight"
    total = torch.zeros(48, 32)
    for layer, coefficient in sorted(deepest.mix.items()):
        total = total + coefficient * source[f"model.layers.{layer}.{name}"].float()
    assert torch.equal(written[f"model.layers.{position}.{name}"], total.bfloat16())


def test_the_library_tells_what_it_does(llama: Path, tmp_path: Path) -> None:
    events: list[Any] = []
    options = SearchOptions(layers_per_merge=3, interval=1, threshold=0.9, rule="first")
    pruned = prune(llama, tmp_path / "out", options, settings=RunSettings(compute=FLOAT32), listener=events.append)
    assert pruned.plan.search is not None
    decisions = [e for e in events if isinstance(e, DecisionMade)]
    assert [(d.pointer, d.similarity) for d in decisions] == [(d.l, d.similarity) for d in pruned.plan.search.decisions]
    stacks = [e.cells for e in events if isinstance(e, StackChanged)]
    assert stacks[0] == (1,) * 8
    assert all(sum(cells) == 8 for cells in stacks)
    assert len(stacks[-1]) == pruned.plan.num_layers


def _widen(tensors: dict[str, torch.Tensor]) -> None:
    """The feed-forward of layer 4 gets two units more that do nothing."""
    prefix = "model.layers.4.mlp"
    for name in ("gate_proj", "up_proj"):
        tensors[f"{prefix}.{name}.weight"] = torch.cat([tensors[f"{prefix}.{name}.weight"], torch.zeros(2, 32)])
    down = tensors[f"{prefix}.down_proj.weight"]
    tensors[f"{prefix}.down_proj.weight"] = torch.cat([down, torch.zeros(32, 2)], dim=1)


def _retype(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.4.mlp.up_proj.weight"
    tensors[name] = tensors[name].double()


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (_widen, r"mlp.\w+.weight is .* in source layer 3, .*50.* in source layer 4"),
        (_retype, r"mlp.up_proj.weight is \[48, 32\] float32 in source layer 3, \[48, 32\] float64 in source layer 4"),
    ],
)
def test_unlike_layers_are_passed_over_with_the_reason(tmp_path: Path, edit: Any, reason: str) -> None:
    """Only candidates that would put something of layer 4 into another layer are passed over; the rest goes on."""
    source = save_llama(tmp_path / "m", num_layers=6)
    options = SearchOptions(layers_per_merge=2, interval=1, threshold=-1.0)
    plain = search(source, options, settings=RunSettings(compute=FLOAT32))
    edit_tensors(source, edit)
    plan = search(source, options, settings=RunSettings(compute=FLOAT32))
    assert plan.search is not None
    assert plain.search is not None
    assert [(d.l, d.accepted) for d in plan.search.decisions] == [(4, False), (3, True), (2, True), (1, True)]
    first, second = plan.search.decisions[:2]
    assert first.similarity is None
    assert first.reason is not None
    assert re.fullmatch(reason, first.reason)
    assert second.reason is None
    assert plan.layers[-2].mix == {4: 1.0}
    apply(source, plan, tmp_path / "out", settings=RunSettings(compute=FLOAT32))


def test_weights_that_do_not_fit_the_config(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "m", num_layers=4)

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.down_proj.weight"] = torch.zeros(32, 40)

    edit_tensors(source, shorten)
    with pytest.raises(ModelError, match=r"layer 2: mlp.down_proj.weight has shape \[32, 40\], the config gives"):
        search(source, settings=RunSettings(compute=FLOAT32))
    edit_tensors(source, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(ModelError, match=r"tensor model.norm.weight has shape \[31\], the config gives \[32\]"):
        search(source, settings=RunSettings(compute=FLOAT32))


def test_a_candidate_that_overflows_is_passed_over(llama: Path) -> None:
    options = SearchOptions(layers_per_merge=3, interval=1, threshold=-1.0, rule="rdsc", rdsc_scale=1e30)
    plan = search(llama, options, settings=RunSettings(compute=FLOAT32))
    assert plan.search is not None
    assert plan.num_layers == 8
    assert {d.reason for d in plan.search.decisions} == {"its similarity by cosine is not finite"}


def test_a_report_names_its_source_from_everywhere(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama.parent)
    options = SearchOptions(strategy="block-influence", target_layers=6)
    report = prune(llama.name, tmp_path / "out", options, settings=RunSettings(compute=FLOAT32)).report
    assert report["source"]["path"] == str(llama)


def test_a_write_that_fails_keeps_the_search(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OutputError("no space")

    options = SearchOptions(strategy="laco", threshold=0.9)
    expected = prune(llama, tmp_path / "expected", options, settings=RunSettings(compute=FLOAT32))
    monkeypatch.setattr(module, "write_weights", full)
    work = tmp_path / ".out.work"
    with pytest.raises(OutputError, match=rf"no space; .* resume with: streamcollapse resume {work}$"):
        prune(llama, tmp_path / "out", options, settings=RunSettings(compute=FLOAT32))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", ".out.work", "expected"]
    monkeypatch.undo()
    monkeypatch.setattr("streamcollapse.jobs.expected._SHORT", 0.0)
    seen: list[object] = []
    again = resume(work, is_timed=True, listener=seen.append)
    assert any(isinstance(event, TimeExpected) for event in seen)
    assert again.plan == expected.plan
    assert {p["name"]: p["bytes_read"] for p in again.report["usage"]["phases"]}["search"] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "out"]


def test_finished_shards_are_taken_up_if_they_are_whole(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    small = RunSettings(compute=FLOAT32, output=Output(max_shard_size="40kB"))
    prune(llama, tmp_path / "expected", QUICK, settings=small)
    monkeypatch.setattr(module, "write_companions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(llama, tmp_path / "out", QUICK, settings=small)
    monkeypatch.undo()
    first, *others = sorted((tmp_path / ".out.partial").glob("*.safetensors"))
    assert len(others) > 1
    raw = bytearray(first.read_bytes())
    raw[-1] ^= 1
    first.write_bytes(raw)
    times = {path.name: path.stat().st_mtime_ns for path in others}
    resume(tmp_path / ".out.work")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in times} == times, "not written again"
    for path in (tmp_path / "expected").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_stack_whose_layers_kinds_follow_from_their_position_is_refused(tmp_path: Path) -> None:
    """Jamba alternates attention and Mamba by a period in its config, which a shorter stack cannot express."""
    config = JambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=1,
        attn_layer_period=3,
        attn_layer_offset=1,
        expert_layer_period=10,
        expert_layer_offset=9,
        use_mamba_kernels=False,
        mamba_d_state=4,
        mamba_dt_rank=4,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    source = save_model(config, tmp_path / "m", gain=1.0)
    options = SearchOptions(layers_per_merge=2, interval=1, threshold=-1.0, rule="first")
    with pytest.raises(ModelError, match=r"^layer 4 of the pruned model would not be like layer 5 of the source"):
        prune(source, tmp_path / "out", options, settings=RunSettings(compute=FLOAT32))
    job = open_job(source, RunSettings(FLOAT32))
    layers = tuple(PlanLayer(base, {base: 1.0}) for base in (0, 2, 3, 4, 5))
    plan = Plan("by hand", 6, job.checkpoint.fingerprint(), layers)
    with pytest.raises(ModelError, match="the pruned model could not be loaded again"):
        apply(source, plan, tmp_path / "out", settings=RunSettings(compute=FLOAT32))
    assert not (tmp_path / "out").exists()


def test_what_the_source_is_called(llama: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--meta-llama--Llama-2-7b-hf" / "snapshots" / "0123abc"
    shutil.copytree(llama, snapshot)
    assert open_job(snapshot, RunSettings(FLOAT32)).name == "meta-llama/Llama-2-7b-hf"
    assert open_job(llama, RunSettings(FLOAT32)).name == "model"


def test_nothing_merged_is_said(llama: Path, tmp_path: Path) -> None:
    events: list[Any] = []
    search(
        llama,
        SearchOptions(strategy="laco", threshold=1.0),
        settings=RunSettings(compute=FLOAT32),
        listener=events.append,
    )
    assert [e.text for e in events if isinstance(e, WarningRaised)] == [
        "no merge was accepted: the result is the source as it is"
    ]


def test_an_older_output_survives_a_failed_overwrite(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_companions", interrupted)
    with pytest.raises(KeyboardInterrupt, match="resume with: streamcollapse resume"):
        prune(llama, tmp_path / "out", QUICK, settings=RunSettings(compute=FLOAT32, output=Output(overwrite=True)))
    assert (tmp_path / "out" / "old").read_text() == "old"


def test_a_plan_of_another_source_writes_nothing(llama: Path, llama_bf16: Path, tmp_path: Path) -> None:
    plan = without_last("other", 8, open_job(llama_bf16, RunSettings(FLOAT32)).checkpoint.fingerprint())
    with pytest.raises(PlanError, match="made for another source"):
        apply(llama, plan, tmp_path / "out", settings=RunSettings(compute=FLOAT32))
    assert not any(tmp_path.iterdir())


def test_trusted_code_comes_along(llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(llama, tmp_path / "source")
    (source / "own.py").write_text("")
    prune(source, tmp_path / "out", QUICK, settings=RunSettings(compute=FLOAT32, trust_remote_code=True))
    assert (tmp_path / "out" / "own.py").is_file()


def test_samples_are_cut_to_the_model_s_context(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 1000)
    job = open_job(llama, RunSettings(FLOAT32))
    samples = calibration_samples(job, Calibration(tmp_path / "long.txt", max_tokens=1000), "laco")
    assert samples.batches[0].lengths == (128,)
    assert calibration_samples(job, Calibration(tmp_path / "long.txt", max_tokens=9), "laco").num_tokens == 9


@pytest.mark.gpu
def test_cuda_decides_as_the_cpu(bundled: Path, tmp_path: Path) -> None:
    options = SearchOptions(interval=1, threshold=0.9)
    gpu = prune(bundled, tmp_path / "gpu", options, settings=RunSettings(compute=Compute("cuda", "float32")))
    cpu = prune(bundled, tmp_path / "cpu", options, settings=RunSettings(compute=FLOAT32))
    assert gpu.plan.layers == cpu.plan.layers
    assert gpu.report["usage"]["peak_vram"] > 0
    one, other = (load_file(tmp_path / d / "model.safetensors") for d in ("gpu", "cpu"))
    assert all(torch.equal(one[n], other[n]) for n in one)
