"""A small trained model of another family than the bundled one, made from what the package has.

A decoder of GPT-NeoX's kind (LayerNorm with biases, parallel residuals, partial rotary positions, two matrices in the
feed-forward) learns the next-token distributions of the bundled model, on the second half of the packaged articles and
on text that the bundled model writes itself. Deterministic for a seed and a number of threads; about twelve minutes on
two cores. the first 30,000 tokens of the articles are not trained on: `quality.py` scores on them.

    python benchmarks/grow_model.py DIR [--steps 400] [--layers 16] [--seed 0]
"""

from __future__ import annotations

import argparse
import time
from importlib import resources
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, PreTrainedModel

DATA = Path(str(resources.files("streamcollapse.data")))
TEACHER = DATA / "wiki-llama-24l"
HELD_OUT = 30_000  # tokens; more than quality.py scores
WINDOW, BATCH, WIDTH = 128, 16, 128


@torch.inference_mode()
def written(teacher: PreTrainedModel, rows: int) -> torch.Tensor:
    """Text that the teacher writes: [rows, WINDOW]"""
    start = torch.randint(2, 4096, (rows, 1))
    made: torch.Tensor = teacher.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        min_new_tokens=WINDOW - 1, max_new_tokens=WINDOW - 1, pad_token_id=0,
    )  # fmt: skip
    return made


def grow(layers: int, steps: int, rows: int) -> PreTrainedModel:
    """The student after ``steps``, in bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    text = (DATA / "text" / "wiki_eval.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][HELD_OUT:])
    own = torch.cat([written(teacher, 128) for _ in range(rows // 128)])
    config = GPTNeoXConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=4, num_hidden_layers=layers,
        vocab_size=4096, max_position_embeddings=512, tie_word_embeddings=False,
        bos_token_id=teacher.config.bos_token_id, eos_token_id=teacher.config.eos_token_id,
    )  # fmt: skip
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    began = time.perf_counter()
    for step in range(steps):
        warm = min((step + 1) / 50, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * warm * (1.0 - 0.95 * step / steps)
        starts = torch.randint(0, len(ids) - WINDOW, (BATCH // 2,))
        real = torch.stack([ids[start : start + WINDOW] for start in starts])
        batch = torch.cat([real, own[torch.randint(0, len(own), (BATCH // 2,))]])
        with torch.inference_mode():
            target = functional.log_softmax(teacher(batch, use_cache=False).logits, dim=-1)
        found = functional.log_softmax(student(batch, use_cache=False).logits, dim=-1)
        loss = functional.kl_div(found, target.clone(), reduction="sum", log_target=True) / batch.numel()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step}: KL to the teacher {loss.item():.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    return student.eval().to(torch.bfloat16)


def grow_into(out: Path, layers: int = 16, steps: int = 400, rows: int = 512, seed: int = 0) -> Path:
    """Write the checkpoint ``out``."""
    torch.manual_seed(seed)
    grow(layers, steps, rows).save_pretrained(out)
    AutoTokenizer.from_pretrained(TEACHER).save_pretrained(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=512, help="sequences that the bundled model writes")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    grow_into(given.out, given.layers, given.steps, given.rows, given.seed)


if __name__ == "__main__":
    main()
