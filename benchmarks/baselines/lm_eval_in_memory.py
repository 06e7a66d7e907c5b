"""lm-evaluation-harness with its own model for transformers, all of it in memory.

    python lm_eval_in_memory.py SOURCE TASKS_DIR NAME,... --dtype DTYPE --batch-size N --threads N

The last line of stdout is one JSON document: what each task came to, and the seconds of the whole and without imports.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("place")
    parser.add_argument("tasks")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    start = time.perf_counter()
    model = HFLM(pretrained=given.source, dtype=given.dtype, device="cpu", batch_size=given.batch_size)
    loaded = time.perf_counter()
    found = simple_evaluate(
        model,
        tasks=given.tasks.split(","),
        task_manager=TaskManager(include_path=given.place, include_defaults=False),
        log_samples=False,
    )
    done = time.perf_counter()
    assert found is not None
    print(json.dumps({"results": found["results"], "loading": loaded - start, "evaluating": done - loaded}))


if __name__ == "__main__":
    main()
