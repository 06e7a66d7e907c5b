"""Does healing stay within little memory, and how much longer does it take than peft in memory?

Question   Seconds a token and peak memory of ``streamcollapse heal`` in a memory cgroup, beside peft with both models
           in memory and no limit (baselines/peft_distil.py): the same windows, rank, layers, tokens a step and loss.
Target     Within --limit (3 GiB for 1.5B), in at most 1.5 times peft's time a token of a step.
Method     A real model without a quarter of its layers, by block influence, which takes no search. One round over
           --steps steps of --batch-tokens. Time is that of the steps alone: of ours what its phase takes, less its
           judgements, in proportion to what they compute; of peft that of its training. The teacher's pass, which both
           make once, is told beside it. Memory is sampled from outside (measure.py), the cgroup's with its page cache.

    python benchmarks/bench_heal_limit.py --model NAME --models DIR [--limit 3GiB] [--steps 2] [--batch-tokens 16384]
                                          [--loss-tokens N] [--work DIR] [--threads N] [--save FILE]

``--work`` keeps peft's environment. Needs root and cgroups of version 1. Exits 1 when the target is missed. The last
line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from about import report
from groups import NoGroupError, memory_group
from measure import run
from peers import BASELINES, PeerError, python_with
from real_models import MODELS, add_options, chosen_model

from streamcollapse import Healing, RunSettings, SearchOptions, inspect, prune
from streamcollapse.repair.climb import plan_climb
from streamcollapse.run.heal_text import HealText, heal_text
from streamcollapse.run.opened import open_job
from streamcollapse.settings.run import Repair
from streamcollapse.units import parse_bytes

MOST = 1.5  # times as long as peft
LENGTH = 512


def healed(source: Path, pruned: Path, text: HealText, given: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Ours, in the cgroup."""
    tokens = sum(text.tokens)
    asked = ["heal", pruned, "--teacher", source, "--out", place / "healed", "--tokens", tokens, "--length", LENGTH]
    asked += ["--batch-tokens", given.batch_tokens, "--judge-every", 1000]
    asked += ["--loss-tokens", given.loss_tokens] if given.loss_tokens else []
    program = [sys.executable, "-m", "streamcollapse", *map(str, asked), "--no-verdict", "--json"]
    with memory_group(parse_bytes(given.limit)) as group:
        measured = run(group.launching(program), os.environ | {"OMP_NUM_THREADS": f"{given.threads}"})
        peak = group.peak_bytes
    phases = {phase["name"]: phase["seconds"] for phase in measured.document["usage"]["phases"]}
    learned, held_out = text.tokens
    upward = 2 * held_out / (4 * learned)  # two judgements go up once; a step goes up, up again and twice as far down
    return {
        "seconds": phases["heal"] / (1.0 + upward),
        "teacher_seconds": phases["teacher"],
        "tokens": learned,
        "peak_anonymous_rss": measured.peak_anonymous_rss,
        "peak_of_the_group": peak,
        "losses": measured.document["healing"]["losses"],
        "bytes_read": sum(phase["bytes_read"] for phase in measured.document["usage"]["phases"]),
    }


def by_peft(source: Path, pruned: Path, text: HealText, lowest: int, given: argparse.Namespace) -> dict[str, Any]:
    """peft's, without a limit. Raises PeerError."""
    python = python_with(("peft",), False, given.work / "peft")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(text.learn, file)
        file.flush()
        asked = [python, BASELINES / "peft_distil.py", source, pruned, file.name, "--lowest", lowest]
        asked += ["--batch-tokens", given.batch_tokens, "--threads", given.threads]
        asked += ["--loss-tokens", given.loss_tokens] if given.loss_tokens else []
        measured = run([*map(str, asked)], os.environ | {"OMP_NUM_THREADS": f"{given.threads}"})
    document = measured.document
    return {
        "seconds": document["parts"]["learn"],
        "teacher_seconds": document["parts"]["teacher"],
        "tokens": document["tokens"],
        "peak_anonymous_rss": measured.peak_anonymous_rss,
        "losses": document["losses"],
        "versions": document["versions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--limit", default="3GiB")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--loss-tokens", type=int)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    source = chosen_model(given)
    if source is None:
        parser.error(f"--model: one of {', '.join(MODELS)}")
    print(__doc__.split("\n\n")[1])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        layers = math.ceil(0.75 * inspect(source).num_layers)
        how = SearchOptions(strategy="block-influence", target_layers=layers)
        plan = prune(source, place / "pruned", how, settings=RunSettings(repair=Repair("none"))).plan
        windows = math.ceil(given.steps * given.batch_tokens / LENGTH)
        asked = Healing(source, tokens=(windows + max(windows // 16, 2)) * LENGTH, length=LENGTH)
        text = heal_text(open_job(place / "pruned", RunSettings()), asked)
        lowest = plan_climb(plan.layers, plan.num_source_layers).start
        try:
            found = {"streamcollapse": healed(source, place / "pruned", text, given, place)}
            found["peft"] = by_peft(source, place / "pruned", text, lowest, given)
        except (NoGroupError, PeerError) as error:
            raise SystemExit(str(error)) from None
    each = {name: one["seconds"] / one["tokens"] for name, one in found.items()}
    ratio = each["streamcollapse"] / each["peft"]
    print({name: f"{1000 * value:.2f} ms a token" for name, value in each.items()}, f"{ratio:.2f} times", flush=True)
    body = {"model": given.model, "layers": layers, "lowest": lowest, "limit": given.limit, "target": MOST}
    report("heal-limit", {**body, "batch_tokens": given.batch_tokens, "ratio": ratio, "runs": found}, given.save)
    sys.exit(0 if ratio <= MOST else 1)


if __name__ == "__main__":
    main()
