"""What bench_repair.py and bench_heal.py share: runs of the command on a real model, judged on text of three kinds.

A row of a result has by how much the loss rises over the original's, before and after, and what share of that is taken
back, by kind of text.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from about import environment
from real_models import add_options, chosen_model, held_out
from real_search import stack_of

from streamcollapse import Plan, RunSettings, SearchOptions, Streaming, search
from streamcollapse.run.held_out import held_out_perplexities, held_out_text
from streamcollapse.run.opened import Job, open_job
from streamcollapse.storage.disk import write_whole

CUTS = "greedy standard, exchanges"  # the rows of a result file of bench_real.py, found as the default finds them


def options(about: str | None, more: dict[str, dict[str, Any]]) -> argparse.Namespace:
    """The options of both, and ``more`` by name."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "bundled")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--cuts", type=Path, help="results of bench_real.py of the same model")
    for name, how in more.items():
        parser.add_argument(name, **how)
    parser.add_argument("--tokens", type=int, default=4096, help="of each text that judges")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--note", help="said in the results, such as what else the machine did")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE")
    given = parser.parse_args()
    if not given.table and given.save is None:
        parser.error("--save is missing")
    return given


def opened(benchmark: str, given: argparse.Namespace, **more: Any) -> tuple[Path, Job, dict[str, Any]]:
    """The model's directory, the model, and the document of results, which goes on where ``--save`` is there."""
    torch.set_num_threads(given.threads)
    source = chosen_model(given) or Path(str(resources.files("streamcollapse.data"))) / "wiki-llama-24l"
    job = open_job(source, RunSettings())
    document: dict[str, Any] = {"benchmark": benchmark, "date": datetime.now(UTC).date().isoformat()}
    document |= {"environment": environment(given.threads), "note": given.note, "model": given.model}
    document |= {"num_layers": job.num_layers, "tokens": given.tokens, **more, "dense": {}, "rows": []}
    if given.save.exists():
        document |= json.loads(given.save.read_text(encoding="utf-8"))
    return source, job, document


def add_row(document: dict[str, Any], row: dict[str, Any], save: Path) -> None:
    """A row is known."""
    document["rows"].append(row)
    write_whole(save, json.dumps(document, indent=1) + "\n")


def cut(job: Job, source: Path, layers: int, cuts: Path | None, setting: str = CUTS) -> Plan:
    """The plan of ``layers`` layers, without a repair: the row of ``setting`` in ``cuts``."""
    if cuts is None:
        return search(source, SearchOptions(strategy="block-influence", target_layers=layers))
    rows = json.loads(cuts.read_text(encoding="utf-8"))["rows"]
    row = next(row for row in rows if (row["setting"], row["layers"]) == (setting, layers))
    return Plan(job.name, job.num_layers, job.checkpoint.fingerprint(), stack_of(row["plan"]))


def command(arguments: Iterable[str | Path], threads: int) -> dict[str, Any]:
    """What ``streamcollapse`` says with ``arguments``, without a verdict."""
    done = subprocess.run(
        [sys.executable, "-m", "streamcollapse", *map(str, arguments), "--no-verdict", "--json"],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def cost(usage: dict[str, Any], *names: str) -> dict[str, Any]:
    """Seconds, also of each, and bytes read of the phases ``names``, and the peak of the process."""
    chosen = [phase for phase in usage["phases"] if phase["name"] in names]
    return {
        "seconds": sum(phase["seconds"] for phase in chosen),
        "phases": {phase["name"]: phase["seconds"] for phase in chosen},
        "bytes_read": sum(phase["bytes_read"] for phase in chosen),
        "peak_rss": usage["peak_rss"],
    }


def scored(job: Job, plans: list[Plan], tokens: int, folder: Path) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The original's loss on each kind of text, and by how much it rises with each of ``plans``."""
    dense: dict[str, float] = {}
    found: list[dict[str, float]] = [{} for _ in plans]
    for kind, contents in held_out().items():
        file = folder / f"{kind}.txt"
        file.write_text(contents, encoding="utf-8")
        before, *after = held_out_perplexities(job, held_out_text(job, file, tokens), plans, Streaming())
        dense[kind] = before.nll
        for one, result in zip(found, after, strict=True):
            one[kind] = result.nll - before.nll
    return dense, found


def taken_back(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The share of the rise ``before`` that is gone ``after``, by kind of text."""
    return {kind: 1.0 - rise / before[kind] for kind, rise in after.items()}


def mean(by_kind: dict[str, float]) -> float:
    """Over the kinds of text."""
    return sum(by_kind.values()) / len(by_kind)


def shares(back: dict[str, float]) -> str:
    """As tables have them."""
    return " / ".join(f"{100 * share:.0f}" for share in back.values()) + " %"
