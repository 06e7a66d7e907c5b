"""How long does an evaluation take within a budget of memory, beside the harness's own model in memory?

Question   Time and memory of tasks of lm-evaluation-harness by ``streamcollapse evaluate`` within a budget, and by the
           harness with the whole model in memory; and whether both come to the same.
Goal       At 1.5B at most 1.3 times the time of the model in memory, with a third of its memory.
Method     Tasks made from text that ships (eval_tasks.py), ``--count`` questions each, on a model of real_models.py.
           Each is a process of its own with as many threads, in turns, ``--rounds`` of them; seconds and memory are
           those of the process, with imports and the making of requests, which both have. The harness runs with each
           of ``--batch-sizes``, and the fastest counts.

    python benchmarks/bench_evaluate.py --model NAME --models DIR --save FILE [--count 100] [--ram-budget 2GiB]
                                        [--dtype bfloat16] [--batch-sizes 1 8 32] [--rounds 1] [--threads N]
                                        [--note TEXT]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from about import environment
from eval_tasks import make_tasks
from measure import Measured, run
from peers import BASELINES
from real_models import add_options, chosen_model

from streamcollapse.storage.disk import write_whole


def row(program: str, measured: Measured, results: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What ``program`` took, and what it came to: values by task and metric."""
    values = {
        f"{task} {metric.partition(',')[0]}": value
        for task, found in results.items()
        for metric, value in found.items()
        if isinstance(value, float) and "stderr" not in metric
    }
    peaks = {"peak_rss": measured.peak_rss, "peak_anonymous_rss": measured.peak_anonymous_rss}
    return {"program": program, **more, "seconds": measured.seconds, **peaks, "values": values}


def ours(source: Path, place: Path, names: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """A run of the command."""
    command = [sys.executable, "-m", "streamcollapse", "evaluate", str(source), "--tasks", ",".join(names)]
    command += [
        "--include-path",
        str(place),
        "--compute-dtype",
        given.dtype,
        "--ram-budget",
        given.ram_budget,
        "--json",
    ]
    measured = run(command, quiet(given.threads))
    document = measured.document
    phases = {phase["name"]: phase["seconds"] for phase in document["usage"]["phases"]}
    return row("streamcollapse", measured, document["models"][0]["results"], phases=phases)


def theirs(source: Path, place: Path, names: list[str], given: argparse.Namespace, batch: int) -> dict[str, Any]:
    """A run of the harness with the model in memory."""
    command = [sys.executable, str(BASELINES / "lm_eval_in_memory.py"), str(source), str(place), ",".join(names)]
    command += ["--dtype", given.dtype, "--batch-size", str(batch), "--threads", str(given.threads)]
    measured = run(command, quiet(given.threads))
    found = measured.document
    phases = {"loading": found["loading"], "evaluating": found["evaluating"]}
    return row("lm-eval hf", measured, found["results"], batch_size=batch, phases=phases)


def quiet(threads: int) -> dict[str, str]:
    """The environment of both."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100, help="questions of each task")
    parser.add_argument("--ram-budget", default="2GiB")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--note", help="said in the results, such as what else the machine did")
    given = parser.parse_args()
    print((__doc__ or "").split("\n\n")[1])
    source = chosen_model(given)
    if source is None:
        parser.error("--model is missing")
    document: dict[str, Any] = {"benchmark": "evaluate", "date": datetime.now(UTC).date().isoformat()}
    document |= {"environment": environment(given.threads), "note": given.note, "model": given.model}
    document |= {"count": given.count, "ram_budget": given.ram_budget, "dtype": given.dtype, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        names = make_tasks(place, given.count)
        for _ in range(given.rounds):
            for found in (
                ours(source, place, names, given),
                *(theirs(source, place, names, given, batch) for batch in given.batch_sizes),
            ):
                document["rows"].append(found)
                write_whole(given.save, json.dumps(document, indent=1) + "\n")
                told = {name: value for name, value in found.items() if name != "values"}
                print(json.dumps(told), flush=True)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
