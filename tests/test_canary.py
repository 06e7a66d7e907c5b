"""Code that comes with a checkpoint, in every place where some could hide: without --trust-remote-code none of it
runs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

from streamcollapse import Compute, SearchOptions, apply, convert, inspect, perplexity, prune, search, verify
from streamcollapse.errors import StreamCollapseError
from streamcollapse.settings.run import RunSettings
from tests.checkpoints import edit_json, save_llama
from tests.storage.test_torchfile import Hostile

FLOAT32 = Compute("cpu", "float32")
CLASSES = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
}


def code(canary: Path) -> str:
    return f"import pathlib\npathlib.Path({str(canary)!r}).write_text('tweet')\n"


def plant(source: Path, place: str, canary: Path) -> None:
    if place == "config":
        edit_json(source / "config.json", lambda c: c.update(auto_map=CLASSES))
    elif place == "config of an unknown type":
        edit_json(source / "config.json", lambda c: c.update(auto_map=CLASSES, model_type="evil"))
    elif place == "tokenizer":
        edit_json(
            source / "tokenizer_config.json", lambda c: c.update(auto_map=CLASSES, tokenizer_class="EvilTokenizer")
        )
    elif place == "chat template":
        steps = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
        (source / "chat_template.jinja").write_text(steps)
        edit_json(source / "tokenizer_config.json", lambda c: c.update(chat_template=steps))
    elif place == "generation config":
        document = {"custom_generate": str(source), "trust_remote_code": True, "auto_map": CLASSES}
        (source / "generation_config.json").write_text(json.dumps(document))
        (source / "custom_generate").mkdir()
        (source / "custom_generate" / "generate.py").write_text(code(canary))
    elif place == "pickle":
        tensors = {"model.norm.weight": Hostile(exec, code(canary))}
        torch.save(tensors, source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    (source / "evil.py").write_text(code(canary))
    (source / "conftest.py").write_text(code(canary))
    (source / "setup.py").write_text(code(canary))


def test_the_canary_sings(tmp_path: Path) -> None:
    """The code that is planted does leave a trace where it runs."""
    exec(code(tmp_path / "canary"))
    assert (tmp_path / "canary").exists()


PLACES = ["config", "config of an unknown type", "tokenizer", "chat template", "generation config", "pickle"]


@pytest.mark.parametrize("place", PLACES)
def test_no_code_of_a_checkpoint_runs(tmp_path: Path, place: str) -> None:
    source, canary, text = save_llama(tmp_path / "source", num_layers=4), tmp_path / "canary", tmp_path / "text.txt"
    plant(source, place, canary)
    text.write_text("The river rises in the hills. " * 20)
    options, out = SearchOptions(layers_per_merge=2, threshold=-1.0), tmp_path / "out"
    jobs = [
        lambda: inspect(source),
        lambda: prune(source, out, options, settings=RunSettings(compute=FLOAT32)),
        lambda: apply(
            source,
            search(source, options, settings=RunSettings(compute=FLOAT32)),
            tmp_path / "applied",
            settings=RunSettings(compute=FLOAT32),
        ),
        lambda: perplexity(source, text, settings=RunSettings(compute=FLOAT32)),
        lambda: convert(source, tmp_path / "converted", dtype="bfloat16"),
        lambda: verify(out, source),
        lambda: inspect(out),
    ]
    for job in jobs:
        with contextlib.suppress(StreamCollapseError):
            job()
        assert not canary.exists()
    assert not list(out.glob("*.py")), "it is not passed on either"
