"""Forward passes over the calibration samples with accelerate's disk offload, on the CPU.

Every decoder layer, the final norm and the head stay on disk and are read when they run, from the checkpoint's own
safetensors files (nothing is converted first); the embedding stays in memory, since accelerate would otherwise read all
of it for a few rows. All samples go through in one padded call, so the weights are read once.

    python accelerate_offload.py SOURCE --calibration FILE [--dtype bfloat16] [--threads N] [--passes N]
                                 [--cold]

Needs torch, transformers and accelerate. The last line of stdout is one JSON document; its part ``pass`` is the first
pass, ``passes`` are the seconds of each.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from usage import Usage, samples


def padded(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    """The samples in one call, padded on the right."""
    token_ids = [tokenizer(text)["input_ids"] for text in texts]
    input_ids = torch.zeros(len(token_ids), max(map(len, token_ids)), dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(token_ids):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


def offloaded(source: Path, dtype: torch.dtype, folder: str) -> Any:
    """The model with all but its embedding on disk; ``folder`` takes what cannot be read from the checkpoint."""
    layers = AutoConfig.from_pretrained(source).num_hidden_layers
    device_map = {"model.embed_tokens": "cpu", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}
    device_map |= {f"model.layers.{i}": "disk" for i in range(layers)}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=device_map, offload_folder=folder)
    return model.eval()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="one sample a line")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="drop the weights from the page cache before each pass")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    usage = Usage()
    with tempfile.TemporaryDirectory() as folder:
        with usage.part("prepare"):
            model = offloaded(given.source, getattr(torch, given.dtype), folder)
            inputs = padded(AutoTokenizer.from_pretrained(given.source), samples(given.calibration))
            written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        cold = given.source if given.cold else None
        hidden = usage.passes(given.passes, lambda: model.model(**inputs, use_cache=False).last_hidden_state, cold)
    usage.report(
        ("torch", "transformers", "accelerate"),
        did="passes of the decoder over all samples in one call, layers offloaded to disk",
        dtype=given.dtype,
        threads=torch.get_num_threads(),
        tokens=int(inputs["attention_mask"].sum()),
        offload_folder_bytes=written,
        norm_of_last_hidden=float((hidden.float() * inputs["attention_mask"].unsqueeze(-1)).norm()),
    )


if __name__ == "__main__":
    main()
