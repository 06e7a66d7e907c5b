"""How alike layers are, against the model's own weights and hidden states in memory."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from streamcollapse import Compute, SearchOptions, Similarities, Streaming, search, similarity
from streamcollapse.cli import plots
from streamcollapse.cli.main import app
from streamcollapse.errors import NonFiniteError, OptionError
from streamcollapse.settings.run import RunSettings
from tests.checkpoints import edit_tensors, save_llama, save_model
from tests.families import FAMILIES
from tests.in_memory import mean_similarity, merged_model
from tests.jobs.test_prune import SAMPLES

FLOAT32 = Compute("cpu", "float32")


@pytest.fixture(scope="module")
def found(llama: Path) -> Similarities:
    options = SearchOptions(layers_per_merge=3, rule="best", rdsc_scale=0.5, metric="token-cosine")
    return similarity(llama, options, settings=RunSettings(compute=FLOAT32))


def test_weights_are_as_far_apart_as_they_are(llama: Path, found: Similarities) -> None:
    weights = load_file(llama / "model.safetensors")
    name = "model.layers.{}.{}"
    suffixes = {key.split(".", 3)[3] for key in weights if key.startswith("model.layers.") and weights[key].dim() > 1}
    assert {"self_attn.q_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"} < suffixes
    assert found.weight_distances.keys() == suffixes
    for suffix, row in found.weight_distances.items():
        pairs = [(weights[name.format(i, suffix)], weights[name.format(i + 1, suffix)]) for i in range(7)]
        assert row == pytest.approx([float((a - b).double().norm()) for a, b in pairs])


def top_states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What leaves the top layer, before the final norm. [T, D]"""
    left: list[Any] = []
    hook = model.model.layers[-1].register_forward_hook(lambda module, given, out: left.append(out))
    model(ids)
    hook.remove()
    return (left[0][0] if isinstance(left[0], tuple) else left[0]).reshape(ids.shape[1], -1)


@torch.no_grad()
def test_hidden_states_and_merges(llama: Path, found: Similarities) -> None:
    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    token_ids = [tokenizer(sample, return_tensors="pt")["input_ids"] for sample in SAMPLES]
    flat, tokens = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for ids in token_ids:
        states = [original(ids, output_hidden_states=True).hidden_states[i][0].double() for i in range(8)]
        states.append(top_states(original, ids).double())
        for i in range(8):
            a, b = states[i], states[i + 1]
            flat[i] += torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) / len(token_ids)
            tokens[i] += torch.cosine_similarity(a, b, dim=1).sum()
    assert found.hidden_cosines == pytest.approx(flat.tolist(), abs=1e-5)
    count = sum(ids.shape[1] for ids in token_ids)
    assert found.block_influence == pytest.approx((1 - tokens / count).tolist(), abs=1e-5)
    assert found.merges.keys() == {"rdsc", "sequential", "mean", "first"}
    for rule, rows in found.merges.items():
        assert {size: len(row) for size, row in rows.items()} == {2: 7, 3: 6}
        for size, start in ((2, 0), (2, 6), (3, 2), (3, 5)):
            model = merged_model(original, start + 1, size - 1, rule, 0.5, False)
            assert model is not None
            expected = mean_similarity(model, original, token_ids, "token-cosine")
            assert rows[size][start] == pytest.approx(expected, abs=1e-5)


def test_what_is_read(llama_bf16: Path) -> None:
    size = sum(file.stat().st_size for file in llama_bf16.glob("*.safetensors"))
    options = SearchOptions(layers_per_merge=4, rule="first,mean")
    once = similarity(llama_bf16, options)
    phases = {phase["name"]: phase["bytes_read"] for phase in once.usage["phases"]}
    assert phases["reference"] <= size
    assert phases["search"] == 0, "every merge went up together with the original"
    for lookahead in (1, 7):
        more = similarity(llama_bf16, options, settings=RunSettings(streaming=Streaming(lookahead)))
        assert (more.merges, more.block_influence) == (once.merges, once.block_influence)


@pytest.mark.parametrize("metric", ["cosine", "kl"])
def test_a_merge_is_as_similar_as_a_search_finds_it(llama_bf16: Path, metric: str) -> None:
    """To the last bit, though here the original was on its way up too."""
    method = {"layers_per_merge": 3, "interval": 1, "rule": "mean", "metric": metric, "threshold": 1.0}
    plan = search(llama_bf16, SearchOptions(**method))
    merges = similarity(llama_bf16, SearchOptions(**method)).merges["mean"][3]
    assert plan.search is not None
    decisions = plan.search.decisions
    assert len(decisions) == 5
    assert [d.similarity for d in decisions] == [merges[d.l - 1] for d in decisions]


def test_layers_that_cannot_be_one(tmp_path: Path) -> None:
    source = save_model(FAMILIES["qwen 3 moe, dense and sparse"](), tmp_path / "model")
    found = similarity(source, SearchOptions(layers_per_merge=2, rule="mean"), settings=RunSettings(compute=FLOAT32))
    rows = found.merges["mean"][2]
    assert rows[0] is None, "layer 1 is dense, its neighbours are not"
    assert any(value is not None for value in rows)
    assert None in next(
        row for name, row in found.weight_distances.items() if "mlp.up_proj" in name or "experts" in name
    )


@pytest.mark.parametrize("rule", ["first", "mean", "sequential"])
def test_a_weight_that_is_no_number_is_named_as_the_source_has_it(llama: Path, tmp_path: Path, rule: str) -> None:
    name = "model.layers.5.self_attn.q_proj.weight"
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    edit_tensors(source, lambda tensors: tensors[name].fill_(math.nan))
    with pytest.raises(NonFiniteError, match=f"tensor {re.escape(name)} has"):
        similarity(source, SearchOptions(layers_per_merge=3, rule=rule), settings=RunSettings(compute=FLOAT32))


def test_a_range_too_small_for_a_search_can_be_looked_at(llama: Path, tmp_path: Path) -> None:
    small = similarity(save_llama(tmp_path / "model", 3), SearchOptions(layers_per_merge=4, rule="mean"))
    assert sorted(small.merges["mean"]) == [2, 3]
    top = similarity(
        llama, SearchOptions(layers_per_merge=4, rule="mean", lowest=7), settings=RunSettings(compute=FLOAT32)
    )
    assert [value is not None for value in top.merges["mean"][2]] == [False] * 6 + [True]


def test_one_layer_has_no_neighbour(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="one layer"):
        similarity(save_llama(tmp_path / "model", 1))


def test_the_verb_writes_figures_and_pictures(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(plots, "has_matplotlib", lambda: True)
    for name in ("plot_lines", "plot_merges"):
        monkeypatch.setattr(plots, name, lambda *given: drawn.append(given[-1].name))
    out = tmp_path / "figures"
    asked = ["similarity", str(llama), "--out", str(out), "--rule", "first,mean", "-C", "2"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0
    assert "least influence" in done.output
    document: dict[str, Any] = json.loads((out / "similarity.json").read_text())
    assert document["format"] == "streamcollapse.similarity/1"
    assert set(document["merges"]) == {"first", "mean"}
    assert drawn == ["weights.png", "hidden_states.png", "merges-first.png", "merges-mean.png"]
    before = (out / "similarity.json").read_bytes()
    again = CliRunner().invoke(app, asked)
    assert again.exit_code == 1
    assert "exists; choose another --out" in again.stderr
    assert (out / "similarity.json").read_bytes() == before
    (out / "merges-rdsc.png").write_text("an older one")
    assert CliRunner().invoke(app, [*asked, "--overwrite"]).exit_code == 0
    assert [file.name for file in out.iterdir()] == ["similarity.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    refused = CliRunner().invoke(app, [*asked[:3], str(tmp_path / "mine"), "--overwrite"])
    assert refused.exit_code == 1
    assert "mine: holds no similarity.json; choose another --out" in refused.stderr


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures are an extra")
    plots.plot_lines({"a": [1.0, None, 2.0], "b": [0.0, 1.0]}, ("x", "y"), tmp_path / "lines.png")
    plots.plot_merges({2: [0.5, None, 0.7], 3: [0.1, 0.2]}, "mean", tmp_path / "merges.png")
    for name in ("lines.png", "merges.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
