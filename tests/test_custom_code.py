"""Models that bring their own code, with the traits of Baichuan2: a packed matrix for query, key and value, rotary
positions or ALiBi, a normalised head. They run with --trust-remote-code only."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from streamcollapse import SearchOptions, inspect, perplexity, prune
from streamcollapse.errors import ModelError
from streamcollapse.settings.run import Calibration, Compute, RunSettings
from tests.checkpoints import BUNDLED
from tests.families import OWN_CODE
from tests.in_memory import in_memory_search

CODE = Path(__file__).parent / "custom_code"
FLOAT32 = Compute("cpu", "float32")
TEXTS = [
    "The river rises in the hills and runs east.",
    "A ship sailed.",
    "In the year of the war, the old town burned.",
]


@pytest.fixture(params=OWN_CODE)
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint whose code is in its directory; saved without transformers, as its authors might."""
    modeling = importlib.import_module("tests.custom_code.modeling_packed")
    torch.manual_seed(0)
    config = modeling.PackedConfig(positions=OWN_CODE[request.param], bos_token_id=0, eos_token_id=1, pad_token_id=0)
    model = modeling.PackedForCausalLM(config)
    with torch.no_grad():
        tensors = {n: (4.0 * p if p.dim() > 1 else p + 0.2 * torch.randn_like(p)) for n, p in model.named_parameters()}
    directory = tmp_path / "packed"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    document: dict[str, Any] = config.to_dict() | {
        "architectures": ["PackedForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_packed.PackedConfig",
            "AutoModelForCausalLM": "modeling_packed.PackedForCausalLM",
        },
    }
    (directory / "config.json").write_text(json.dumps(document))
    for file in (*CODE.glob("*_packed.py"), BUNDLED / "tokenizer.json", BUNDLED / "tokenizer_config.json"):
        shutil.copy(file, directory)
    return directory


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code that transformers runs is copied somewhere first: not into this user's home."""
    dynamic = importlib.import_module("transformers.dynamic_module_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def test_without_the_flag_nothing_runs(packed: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for file in packed.glob("*.py"):
        file.write_text(f"{file.read_text()}\n\nopen({str(canary)!r}, 'w').close()\n")
    with pytest.raises(ModelError, match=r"runs code of its own .* pass `trust_remote_code`"):
        prune(packed, tmp_path / "out", settings=RunSettings(compute=FLOAT32))
    assert not canary.exists()
    assert not (tmp_path / "out").exists()
    inspect(packed, settings=RunSettings(trust_remote_code=True))
    assert canary.exists(), "with the flag it does"


@pytest.mark.parametrize("rule", ["sequential", "mean"])
def test_with_the_flag_it_is_pruned_like_any_other(packed: Path, rule: str, tmp_path: Path) -> None:
    expected = in_memory_search(packed, TEXTS, c=3, i=1, threshold=0.8, rule=rule, trust_remote_code=True)
    calibration = tmp_path / "calibration.txt"
    calibration.write_text("\n".join(TEXTS) + "\n")
    options = SearchOptions(layers_per_merge=3, interval=1, threshold=0.8, rule=rule)
    out = tmp_path / "out"
    result = prune(
        packed,
        out,
        options,
        settings=RunSettings(calibration=Calibration(str(calibration)), compute=FLOAT32, trust_remote_code=True),
    )
    assert result.plan.search is not None
    for mine, theirs in zip(result.plan.search.decisions, expected.decisions, strict=True):
        assert (mine.l, mine.merged, mine.accepted) == (theirs[0], theirs[1], theirs[3])
        assert mine.similarity == pytest.approx(theirs[2], abs=1e-5)
    assert {f.name for f in out.glob("*.py")} == {"configuration_packed.py", "modeling_packed.py"}
    pruned, info = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(pruned).__module__.startswith("transformers_modules."), "the code that came with the checkpoint"
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        torch.testing.assert_close(pruned(ids).logits, expected.model(ids).logits, atol=1e-4, rtol=1e-4)
    assert pruned.eval().generate(ids, max_new_tokens=3, do_sample=False).shape[1] > 4
    with pytest.raises(ModelError, match="trust_remote_code"):
        inspect(out)


def test_the_normalised_head_is_used(packed: Path, tmp_path: Path) -> None:
    """Rows of the head twice as long change nothing."""
    text = tmp_path / "text.txt"
    text.write_text("The river rises in the hills and runs east. " * 20)
    first = perplexity(packed, text, settings=RunSettings(compute=FLOAT32, trust_remote_code=True))
    model = AutoModelForCausalLM.from_pretrained(packed, trust_remote_code=True)
    tensors = {n: p.detach() * (2.0 if n == "lm_head.weight" else 1.0) for n, p in model.named_parameters()}
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    second = perplexity(packed, text, settings=RunSettings(compute=FLOAT32, trust_remote_code=True))
    assert second.perplexity == pytest.approx(first.perplexity, rel=1e-5)
