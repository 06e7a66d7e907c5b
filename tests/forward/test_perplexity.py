from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamcollapse import Calibration, SearchOptions, prune
from streamcollapse.errors import CalibrationError, OptionError, PlanError
from streamcollapse.forward import head
from streamcollapse.forward import perplexity as module
from streamcollapse.forward.perplexity import Perplexity, Window, make_windows
from streamcollapse.jobs.perplexity import perplexity
from streamcollapse.settings.run import Compute, EvaluationText, RunSettings

FLOAT32 = Compute("cpu", "float32")


def _in_memory(directory: Path, text: str, window: int) -> tuple[float, int]:
    """Windows one by one through the whole model: BOS, then the next window - 1 tokens of the text."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    total, count = 0.0, 0
    for start in range(0, len(ids), window - 1):
        row = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + window - 1]]])
        with torch.inference_mode():
            loss = model(row, labels=row).loss.item()
        total += loss * (row.shape[1] - 1)
        count += row.shape[1] - 1
    return total / count, count


@pytest.fixture
def text(tmp_path: Path, bundled: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text((bundled.parent / "text" / "wiki_eval.txt").read_text(encoding="utf-8")[:2500], encoding="utf-8")
    return path


@pytest.mark.parametrize("window", [17, 200])
def test_equals_the_in_memory_figure(bundled: Path, text: Path, window: int) -> None:
    score = perplexity(bundled, EvaluationText(text, window=window), settings=RunSettings(compute=FLOAT32))
    nll, count = _in_memory(bundled, text.read_text(encoding="utf-8"), window)
    assert score.tokens == count
    assert score.nll == pytest.approx(nll, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert score.perplexity < 200, "the bundled model is trained"


@pytest.mark.parametrize(("window", "stride"), [(64, 16), (40, 39), (33, 1)])
def test_a_sliding_window_equals_the_in_memory_figure(bundled: Path, text: Path, window: int, stride: int) -> None:
    """As transformers' guide on the perplexity of models of fixed length does it, labels masked."""
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    model = AutoModelForCausalLM.from_pretrained(bundled, dtype=torch.float32).eval()
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"][:200]
    total, count, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window - 1, len(ids))
        row = torch.tensor([[tokenizer.bos_token_id, *ids[begin:end]]])
        labels = row.clone()
        labels[:, : row.shape[1] - (end - previous)] = -100
        with torch.inference_mode():
            total += model(row, labels=labels).loss.item() * (end - previous)
        count, previous = count + end - previous, end
        if end == len(ids):
            break
    score = perplexity(
        bundled,
        EvaluationText(text, window=window, stride=stride, max_tokens=200),
        settings=RunSettings(compute=FLOAT32),
    )
    assert (score.tokens, score.stride) == (count, stride) == (200, stride)
    assert score.nll == pytest.approx(total / count, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


def test_bits_per_byte(bundled: Path, text: Path) -> None:
    score = perplexity(bundled, EvaluationText(text, window=200), settings=RunSettings(compute=FLOAT32))
    num_bytes = len(text.read_bytes())
    assert score.bits_per_byte == pytest.approx(score.nll * score.tokens / math.log(2) / num_bytes)
    assert 0.5 < score.bits_per_byte < 4


@pytest.mark.parametrize("options", [{"rule": "mean", "merge_norms": True}, {"strategy": "greedy", "target_layers": 5}])
def test_a_plan_is_scored_like_the_model_it_describes(
    llama: Path, text: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    method, samples = SearchOptions(3, 1, threshold=0.5, **options), Calibration("sentences")
    pruned = prune(llama, tmp_path / "out", method, settings=RunSettings(calibration=samples, compute=FLOAT32))
    assert pruned.plan.num_layers < 8
    written = perplexity(tmp_path / "out", EvaluationText(text, max_tokens=300), settings=RunSettings(compute=FLOAT32))
    planned = perplexity(
        llama, EvaluationText(text, max_tokens=300), plan=pruned.plan, settings=RunSettings(compute=FLOAT32)
    )
    assert planned.nll == pytest.approx(written.nll, rel=1e-9)
    assert (planned.layers, planned.tokens) == (written.layers, written.tokens)
    assert (
        planned.nll
        != perplexity(llama, EvaluationText(text, max_tokens=300), settings=RunSettings(compute=FLOAT32)).nll
    )
    with pytest.raises(PlanError, match="the plan is for a source of 8 layers, this one has"):
        perplexity(tmp_path / "out", text, plan=pruned.plan, settings=RunSettings(compute=FLOAT32))


def test_what_is_held_at_once_does_not_change_the_figure(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = perplexity(llama, EvaluationText(text, window=20, max_tokens=300), settings=RunSettings(compute=FLOAT32))
    monkeypatch.setattr(module, "MAX_HIDDEN_BYTES", 1)
    monkeypatch.setattr(head, "BLOCK_TOKENS", 7)
    pieces = perplexity(llama, EvaluationText(text, window=20, max_tokens=300), settings=RunSettings(compute=FLOAT32))
    assert pieces.tokens == whole.tokens == 300
    assert pieces.nll == pytest.approx(whole.nll, rel=1e-6)
    assert whole.usage["bytes_read"] < 2 * pieces.usage["bytes_read"]


def test_windows() -> None:
    assert make_windows([0], [1, 2, 3, 4, 5], 3) == [Window([0, 1, 2], 2), Window([0, 3, 4], 2), Window([0, 5], 1)]
    assert make_windows([], [1, 2, 3], 2) == [Window([1, 2], 1)]  # the last token has nothing before it
    sliding = make_windows([0], [1, 2, 3, 4, 5], 4, 1)
    assert sliding == [Window([0, 1, 2, 3], 3), Window([0, 2, 3, 4], 1), Window([0, 3, 4, 5], 1)]
    assert make_windows([], [1, 2, 3, 4, 5], 4, 3) == [Window([1, 2, 3, 4], 3), Window([4, 5], 1)]
    with pytest.raises(CalibrationError, match="stride is 4; with windows of 4 tokens it must be from 1 to 3"):
        make_windows([0], [1, 2, 3, 4, 5], 4, 4)
    with pytest.raises(CalibrationError, match="a window of 1 tokens leaves no room"):
        make_windows([0], [1], 1)


def test_texts_and_settings_that_cannot_be_used(llama: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(CalibrationError, match="no token to predict"):
        perplexity(llama, empty, settings=RunSettings(compute=FLOAT32))
    with pytest.raises(CalibrationError, match="cannot be read"):
        perplexity(llama, tmp_path / "none.txt", settings=RunSettings(compute=FLOAT32))
    with pytest.raises(OptionError, match="window is 129, but the model takes 128"):
        perplexity(llama, EvaluationText(empty, window=129), settings=RunSettings(compute=FLOAT32))
    with pytest.raises(OptionError, match="stride is 0; it must be greater than or equal to 1"):
        perplexity(llama, EvaluationText(empty, stride=0), settings=RunSettings(compute=FLOAT32))
    with pytest.raises(OptionError, match="window is 1; it must be greater than or equal to 2"):
        perplexity(llama, EvaluationText(empty, window=1), settings=RunSettings(compute=FLOAT32))
    assert Perplexity(1000.0, 3).perplexity == math.inf
