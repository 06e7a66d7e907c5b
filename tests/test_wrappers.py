"""Models of images and text: the language model's decoder stack is pruned, everything else goes through untouched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from streamcollapse import SearchOptions, prune
from streamcollapse.settings.run import Calibration, Compute, RunSettings
from tests.checkpoints import BUNDLED
from tests.families import NUM_LAYERS, WRAPPERS
from tests.in_memory import in_memory_search

TEXTS = [
    "The river rises in the hills and runs east.",
    "A ship sailed.",
    "In the year of the war, the old town burned.",
]


@pytest.mark.parametrize("depth", [2, NUM_LAYERS])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_language_model_alone_is_pruned(wrapper: str, depth: int, tmp_path: Path) -> None:
    """Also where the encoder of images has just as many layers."""
    torch.manual_seed(0)
    source, out = tmp_path / "source", tmp_path / "out"
    model = AutoModelForImageTextToText.from_config(WRAPPERS[wrapper](depth))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "layers" in name:
                parameter.mul_(1.5)
    model.save_pretrained(source)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / file, source)
    calibration = tmp_path / "calibration.txt"
    calibration.write_text("\n".join(TEXTS) + "\n")
    for threshold in (0.7, 0.3, -1.0):
        expected = in_memory_search(
            source, TEXTS, c=3, i=1, threshold=threshold, rule="mean", loader=AutoModelForImageTextToText
        )
        if any(accepted for *_, accepted in expected.decisions):
            break
    options = SearchOptions(layers_per_merge=3, interval=1, threshold=threshold, rule="mean")
    result = prune(
        source,
        out,
        options,
        settings=RunSettings(calibration=Calibration(str(calibration)), compute=Compute("cpu", "float32")),
    )
    assert result.plan.search is not None
    for mine, theirs in zip(result.plan.search.decisions, expected.decisions, strict=True):
        assert (mine.l, mine.merged, mine.accepted) == (theirs[0], theirs[1], theirs[3])
        assert mine.similarity == pytest.approx(theirs[2], abs=1e-5)
    assert result.plan.num_layers < NUM_LAYERS
    pruned, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert pruned.config.get_text_config().num_hidden_layers == result.plan.num_layers
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    others = [name for name in before if "language_model" not in name]
    assert others
    assert all(torch.equal(before[name], after[name]) for name in others)
