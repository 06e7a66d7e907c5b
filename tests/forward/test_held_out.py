from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamcollapse import Compute, Plan, RunSettings, apply, make_plan
from streamcollapse.errors import CalibrationError, NonFiniteError
from streamcollapse.forward import perplexity as module
from streamcollapse.forward.perplexity import Perplexity, Window, streamed_perplexities, streamed_perplexity
from streamcollapse.merge.plan import PlanLayer, original_layers
from streamcollapse.run.held_out import (
    SHIPPED,
    held_out_perplexities,
    held_out_text,
    held_out_tokens,
    plans_on,
    shipped_text,
)
from streamcollapse.run.opened import open_job
from streamcollapse.run.samples import load_samples
from streamcollapse.settings.run import Calibration, Streaming
from streamcollapse.storage.source import TensorSource
from tests.streams import plain_stream

FLOAT32 = RunSettings(compute=Compute("cpu", "float32"))
WINDOWS = [Window([1, *range(n, n + 20)], 19) for n in range(2, 60, 7)] + [Window([1, 5, 9, 2], 3)]


class Counted:
    """A source that notes what is read of it."""

    def __init__(self, source: TensorSource) -> None:
        self._source, self.reads = source, list[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        self.reads.append(name)
        return self._source.read(name, device)


def _dropped(*gone: int) -> tuple[PlanLayer, ...]:
    return tuple(layer for layer in original_layers(8) if layer.base not in gone)


def _merged(start: int) -> tuple[PlanLayer, ...]:
    """Layer ``start`` and the next as one."""
    return tuple(
        PlanLayer(layer.base, {start: 0.5, start + 1: 0.75}) if layer.base == start else layer
        for layer in _dropped(start + 1)
    )


STACKS = [original_layers(8), _dropped(3), _dropped(0, 5), _merged(2), _merged(6), _dropped(3), _merged(2)]
NORMS = [False, False, True, False, False, True, False]


@pytest.mark.parametrize("held", [module.MAX_HIDDEN_BYTES, 1])
def test_several_stacks_in_one_walk_are_what_each_is_alone(
    llama: Path, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_HIDDEN_BYTES", held)  # all windows at once, or one call of them
    job = open_job(llama, FLOAT32)
    model = job.model(plain_stream(job))
    alone = [streamed_perplexity(model, s, n, WINDOWS, 4096) for s, n in zip(STACKS, NORMS, strict=True)]
    assert streamed_perplexities(model, STACKS, NORMS, WINDOWS, 4096) == alone
    assert len({one.nll for one in alone}) == len(STACKS) - 2, "two of them are there twice"
    assert {one.tokens for one in alone} == {sum(window.predicted for window in WINDOWS)}


def test_each_tensor_of_the_source_is_read_once_for_all(llama: Path) -> None:
    job = open_job(llama, FLOAT32)
    counted = Counted(job.checkpoint)
    streamed_perplexities(job.model(plain_stream(job, counted)), STACKS, NORMS, WINDOWS, 4096)  # type: ignore[arg-type]
    layers = [name for name in counted.reads if ".layers." in name]
    assert sorted(layers) == sorted(set(layers))
    assert len(layers) == sum(len(job.architecture.layout.layer_names(i)) for i in range(8))


def test_norms_that_are_merged_and_norms_that_are_not_take_a_walk_each(bundled: Path) -> None:
    job = open_job(bundled, FLOAT32)
    model, stacks = job.model(plain_stream(job)), [original_layers(24), *[_whole(24, 4, 5)] * 2]
    norms = [False, False, True]
    alone = [streamed_perplexity(model, s, n, WINDOWS, 4096) for s, n in zip(stacks, norms, strict=True)]
    assert streamed_perplexities(model, stacks, norms, WINDOWS, 4096) == alone
    assert len({one.nll for one in alone}) == 3


def _whole(layers: int, first: int, second: int) -> tuple[PlanLayer, ...]:
    merged = PlanLayer(first, {first: 0.5, second: 0.5})
    kept = [merged if x.base == first else x for x in original_layers(layers)]
    return tuple(x for x in kept if x.base != second)


def test_plans_on_the_held_out_text_are_what_the_written_models_come_to_in_memory(
    bundled: Path, tmp_path: Path
) -> None:
    plans = [make_plan(bundled, "9-11"), make_plan(bundled, "2,20")]
    job = open_job(bundled, FLOAT32)
    text = held_out_text(job, max_tokens=700)
    found = held_out_perplexities(job, text, plans, Streaming())
    assert [p["name"] for p in job.meter.summary()["phases"]] == ["held out"]
    directories = [bundled]
    for number, plan in enumerate(plans):
        apply(bundled, plan, tmp_path / str(number), settings=FLOAT32)
        directories.append(tmp_path / str(number))
    for directory, score in zip(directories, found, strict=True):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        total = 0.0
        for window in text.windows:
            row = torch.tensor([window.token_ids])
            with torch.inference_mode():
                total += model(row, labels=row).loss.item() * window.predicted
        assert score.tokens == sum(window.predicted for window in text.windows)
        assert score.nll == pytest.approx(total / score.tokens, rel=1e-5)


def test_the_shipped_text_is_none_that_searches_calibrate_on(bundled: Path) -> None:
    text = shipped_text()
    assert 60_000 < len(text) < 90_000
    for name in ("sentences", "passages"):
        assert all(sample[:100] not in text for sample in load_samples(Calibration(name)))
    job = open_job(bundled, FLOAT32)
    shipped = held_out_text(job)
    assert shipped.name == SHIPPED
    assert 1700 < sum(window.predicted for window in shipped.windows) <= 2048
    assert shipped.longest == 512
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    for number, window in enumerate(shipped.windows):
        assert window.token_ids[0] == tokenizer.bos_token_id
        words = tokenizer.decode(window.token_ids[1:])
        where = text.find(words[20:80]) / len(text)
        assert where == pytest.approx(number / len(shipped.windows), abs=0.06), "spread over the text"


def test_windows_are_no_longer_than_the_model_takes(llama: Path) -> None:
    assert held_out_text(open_job(llama, FLOAT32)).longest == 128


def test_a_text_of_one_s_own(bundled: Path, tmp_path: Path) -> None:
    job = open_job(bundled, FLOAT32)
    path = tmp_path / "a <b>.txt"
    path.write_text("The city was founded in 1850 near the river.")
    text = held_out_text(job, path)
    (window,) = text.windows
    assert text.name == "a <b>.txt"
    assert window.token_ids == AutoTokenizer.from_pretrained(bundled)(path.read_text())["input_ids"]
    assert held_out_text(job, path, max_tokens=4).longest == 4
    path.write_text("")
    with pytest.raises(CalibrationError, match=r"a <b>\.txt: the text has no token to predict"):
        held_out_text(job, path)


def test_tokens_are_fewer_where_the_vocabulary_is_large() -> None:
    assert [held_out_tokens(words) for words in (4096, 49_152, 128_256, 262_144, 1_000_000)] == [
        2048,
        2048,
        2048,
        1024,
        1024,
    ]


def test_a_plan_that_overflows_is_infinitely_bad_and_spares_the_others(llama: Path) -> None:
    job = open_job(llama, RunSettings(compute=Compute("cpu", "float16")))
    huge = PlanLayer(3, {3: 1e4})  # finite in the checkpoint's float32
    plan, good = (
        Plan("m", 8, job.checkpoint.fingerprint(), layers)
        for layers in (tuple(huge if x.base == 3 else x for x in original_layers(8)), _dropped(3))
    )
    text = held_out_text(job, max_tokens=200)
    before, after, other = plans_on(job.model(plain_stream(job)), text, [plan, good], job)
    assert (after.nll, after.perplexity) == (math.inf, math.inf)
    assert math.isfinite(before.nll)
    assert math.isfinite(other.nll)
    assert isinstance(after, Perplexity)
    with pytest.raises(NonFiniteError, match="overflow float16"):
        streamed_perplexity(job.model(plain_stream(job)), plan.layers, False, text.windows, job.vocabulary)
