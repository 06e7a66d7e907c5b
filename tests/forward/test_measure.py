"""Every metric against a plain one in memory, for heads of several kinds."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from streamcollapse import Calibration, Compute, SearchOptions, Streaming, search
from streamcollapse.errors import CalibrationError, NonFiniteError, OptionError
from streamcollapse.forward import head, measure
from streamcollapse.progress import Event, LayerDone, Listener, silent
from streamcollapse.settings.catalogue import METRICS
from streamcollapse.settings.run import RunSettings
from tests.checkpoints import edit_tensors, save_model
from tests.families import FAMILIES
from tests.in_memory import in_memory_search
from tests.jobs.test_prune import SAMPLES
from tests.methods import method

FLOAT32 = Compute("cpu", "float32")


def similarities(source: Path, metric: str, listener: Listener = silent, **settings: Any) -> list[float | None]:
    options = SearchOptions(layers_per_merge=3, interval=1, threshold=0.9, rule="mean", metric=metric)
    found = search(source, options, settings=RunSettings(FLOAT32, **settings), listener=listener)
    assert found.search is not None
    assert found.search.options.metric == metric
    return [decision.similarity for decision in found.search.decisions]


@pytest.mark.parametrize("metric", [*METRICS])
@pytest.mark.parametrize("blocks", ["whole", "rows", "tokens", "words", "head in one piece", "nothing kept"])
def test_equals_a_plain_search_in_memory(
    llama: Path, metric: str, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks != "whole":
        if not METRICS[metric].by_logits:
            pytest.skip("makes no logits")
        if blocks == "nothing kept":
            monkeypatch.setattr(measure, "KEPT_BYTES", 0)
        if blocks == "head in one piece":
            monkeypatch.setattr(head, "logits_tokens", lambda vocabulary, grain: 7)
            monkeypatch.setattr(head.Head, "_is_cut_at_will", lambda self, example: False)
        monkeypatch.setattr(head, "BLOCK_TOKENS", 45 if blocks == "rows" else 7)
        if blocks in ("words", "nothing kept"):
            monkeypatch.setattr(head, "PART_BYTES", 4 * 7 * 300)
    expected = in_memory_search(llama, SAMPLES, c=3, i=1, threshold=0.9, rule="mean", metric=metric)
    assert similarities(llama, metric) == pytest.approx([d[2] for d in expected.decisions], abs=2e-5)


@pytest.mark.parametrize("family", ["gpt 2, learned positions, tied", "gemma 2, sliding and full, softcapped"])
@pytest.mark.parametrize("metric", ["nll", "kl"])
def test_heads_of_other_kinds(tmp_path: Path, family: str, metric: str) -> None:
    source = save_model(FAMILIES[family](), tmp_path / "model")
    expected = in_memory_search(source, SAMPLES, c=3, i=1, threshold=0.9, rule="mean", metric=metric)
    assert similarities(source, metric) == pytest.approx([d[2] for d in expected.decisions], abs=2e-5)


def test_metrics_share_a_work_directory_and_the_reference_pass_but_no_similarity(llama: Path, tmp_path: Path) -> None:
    layers: list[int] = []

    def listener(event: Event) -> None:
        if isinstance(event, LayerDone):
            layers.append(event.layer_index)

    alone = {metric: similarities(llama, metric) for metric in ("cosine", "kl")}
    assert alone["cosine"] != alone["kl"]
    for metric in ("cosine", "kl", "cosine", "kl"):
        layers.clear()
        streaming = Streaming(work_dir=tmp_path / "work")
        assert similarities(llama, metric, streaming=streaming, listener=listener) == alone[metric]
    assert layers == []


def test_samples_that_are_too_short(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a\n")
    short = Calibration(tmp_path / "short.txt", max_tokens=1)
    for metric in ("nll", "cka-linear", "cka-kernel"):
        with pytest.raises(CalibrationError, match=f"metric {metric} needs samples of two tokens or more"):
            similarities(llama, metric, calibration=short)
    assert all(s is not None and math.isfinite(s) for s in similarities(llama, "kl", calibration=short))


def test_a_head_that_is_not_finite_is_named(llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "bad"))
    edit_tensors(source, lambda tensors: tensors["lm_head.weight"].fill_(math.nan))
    with pytest.raises(NonFiniteError, match=r"lm_head\.weight"):
        similarities(source, "kl")
    assert None not in similarities(source, "cosine"), "which the head has no part in"


def test_thresholds_of_each_metric() -> None:
    assert method(metric="nll", threshold=1.5).threshold == 1.5, "a candidate may predict better"
    with pytest.raises(OptionError, match=r"\(T\) is 1.5; similarity by kl lies between -1 and 1"):
        method(metric="kl", threshold=1.5)
    with pytest.raises(OptionError, match="metric 'wasserstein' is unknown; choose one of cosine, token-cosine, nll"):
        SearchOptions(metric="wasserstein")


def test_sums_over_a_large_vocabulary_are_exact_to_float32() -> None:
    log_p, log_q = torch.log_softmax(3.0 * torch.randn(2, 80, 49_152, generator=torch.manual_seed(0)), dim=-1)
    expected = float((log_p.double().exp() * log_q.double()).sum())
    assert float(head.inner(log_p.exp(), log_q)) == pytest.approx(expected, rel=5e-6)
