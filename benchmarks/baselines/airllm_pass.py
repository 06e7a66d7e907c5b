"""Forward passes over the calibration samples with AirLLM's layer streaming, on the CPU.

AirLLM first splits the checkpoint into a file per layer, which is timed on its own; the pass then reads layer by layer,
the next one ahead. All samples go through in one padded call of the decoder, so the weights are read once.

    python airllm_pass.py SOURCE SPLIT --calibration FILE [--dtype bfloat16] [--threads N] [--passes N]
                          [--cold]

SPLIT is a directory for the split checkpoint, as large as SOURCE. Needs torch, transformers and airllm. The last line
of stdout is one JSON document; its part ``pass`` is the first pass, ``passes`` are the seconds of each.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from airllm import AutoModel
from transformers import AutoTokenizer
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


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("split", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="one sample a line")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="drop the weights from the page cache before each pass")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    usage = Usage()
    with usage.part("prepare"):
        model = AutoModel.from_pretrained(
            str(given.source),
            device="cpu",
            dtype=getattr(torch, given.dtype),
            layer_shards_saving_path=str(given.split),
        )
        inputs = padded(AutoTokenizer.from_pretrained(given.source), samples(given.calibration))
    cold = given.split if given.cold else None
    hidden = usage.passes(given.passes, lambda: model.model.model(**inputs, use_cache=False).last_hidden_state, cold)
    usage.report(
        ("torch", "transformers", "airllm"),
        did="passes of the decoder over all samples in one call, layers streamed from split files",
        dtype=given.dtype,
        threads=torch.get_num_threads(),
        tokens=int(inputs["attention_mask"].sum()),
        norm_of_last_hidden=float((hidden.float() * inputs["attention_mask"].unsqueeze(-1)).norm()),
    )


if __name__ == "__main__":
    main()
