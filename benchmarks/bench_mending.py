"""Is a repaired or healed model better than what others make of as many parameters?

Question   By how much does the loss rise on text of three kinds that nothing has seen, with a quarter of the layers
           gone and mended as published methods do it, or with as many parameters gone from the widths?
Wanted     Ours (rows of bench_repair.py and bench_heal.py) loses less than each.
Method     A model of Llama's kind of real_models.py. The methods are written out with transformers and the whole model
           in memory (baselines/mend_in_memory.py), or are packages that prune widths (baselines/prune_widths.py), each
           in a process and an environment of its own, on the same text that a repair has by default (its held-out part
           as well), judged by transformers on the same windows as ours. Those that have a rate with several
           (``--rates``): the best counts, by the text that judges, which flatters it.

    python benchmarks/bench_mending.py --model NAME --models DIR --save FILE [--share 0.25] [--methods NAME ..]
                                       [--rates 1e-4 3e-4 1e-3] [--tokens 4096] [--repair-tokens 40000] [--work DIR]
                                       [--threads N] [--note TEXT]
    python benchmarks/bench_mending.py --table FILE [OURS ..]

``--work`` keeps environments. Each row is in FILE as soon as it is known, and a run with a FILE that is there goes on.
``--table`` prints FILE beside results OURS of bench_repair.py and bench_heal.py, in Markdown.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from peers import BASELINES, PeerError, python_with
from real_models import held_out
from real_runs import add_row, mean, opened, options
from real_settings import sizes

from streamcollapse.run.fit_text import fit_text
from streamcollapse.run.held_out import held_out_text
from streamcollapse.run.opened import Job
from streamcollapse.settings.run import Repair

# By name: the script, what its environment has beside torch and transformers, and whether it has a rate.
METHODS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "replaceme": ("mend_in_memory.py", (), False),
    "streamline": ("mend_in_memory.py", (), True),
    "lora": ("mend_in_memory.py", ("peft",), True),
    "optipfair": ("prune_widths.py", ("optipfair",), False),
    "torch-pruning": ("prune_widths.py", ("torch-pruning",), False),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "--share": {"type": float, "default": 0.25},
    "--methods": {"nargs": "+", "choices": METHODS, "default": list(METHODS), "metavar": "NAME"},
    "--rates": {"nargs": "+", "type": float, "default": [1e-4, 3e-4, 1e-3]},
    "--repair-tokens": {"type": int, "default": 40_000},
    "--work": {"type": Path, "default": Path("work")},
}


def write_texts(job: Job, tokens: int, repair_tokens: int, folder: Path) -> Path:
    """What the methods learn from and are judged by, as token ids (baselines/texts.py)."""
    text, judge = fit_text(job, Repair("auto", tokens=repair_tokens)), {}
    for kind, contents in held_out().items():
        file = folder / f"{kind}.txt"
        file.write_text(contents, encoding="utf-8")
        judge[kind] = [(w.token_ids, w.predicted) for w in held_out_text(job, file, tokens).windows]
    path = folder / "texts.json"
    path.write_text(json.dumps({"fit": [*text.fit, *text.held_out], "judge": judge}), encoding="utf-8")
    return path


def run(job: Job, texts: Path, method: str, size: list[str], work: Path, threads: int) -> dict[str, Any]:
    """What the script of ``method`` says. Raises PeerError."""
    script, packages, _ = METHODS[method]
    python = python_with(packages, False, work / ("-".join(packages) or "transformers"))
    asked = [python, BASELINES / script, job.checkpoint.directory, texts, "--method", method, "--threads", threads]
    done = subprocess.run([*map(str, asked), *size], capture_output=True, text=True)
    if done.returncode != 0:
        raise PeerError(done.stderr.strip().splitlines()[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def num_parameters(job: Job, layers: int) -> int:
    """Of the model with ``layers`` layers left; all are alike."""
    each = [job.source.info(name).num_elements for name in job.source.names]
    a_layer = sum(
        job.source.info(job.architecture.layout.name(0, suffix)).num_elements
        for suffix in job.architecture.layout.stored_whole(0).values()
    )
    return sum(each) - (job.num_layers - layers) * a_layer


def measure(job: Job, layers: int, given: Any, document: dict[str, Any]) -> None:
    """The rows that ``document`` lacks."""
    known = [(row["method"], row["layers"], row["asked_rate"]) for row in document["rows"]]
    with tempfile.TemporaryDirectory() as folder:
        texts = write_texts(job, given.tokens, given.repair_tokens, Path(folder))
        for method in given.methods:
            script, _, has_rate = METHODS[method]
            for rate in given.rates if has_rate else [None]:
                if (method, layers, rate) in known:
                    continue
                by_layers = ["--layers", f"{layers}", *(["--rate", f"{rate}"] if rate else [])]
                by_parameters = ["--parameters", f"{num_parameters(job, layers)}"]
                size = by_layers if script == "mend_in_memory.py" else by_parameters
                row: dict[str, Any] = {"method": method, "layers": layers, "asked_rate": rate}
                try:
                    row |= {"found": run(job, texts, method, size, given.work, given.threads), "why_not": None}
                except PeerError as error:
                    row |= {"found": None, "why_not": str(error)}
                add_row(document, row, given.save)
                print(method, rate or "", row["why_not"] or row["found"]["losses"], flush=True)


def table(document: dict[str, Any], ours: list[dict[str, Any]]) -> str:
    """In Markdown: the best of each method, and ours at as many layers."""
    dense = next(one["dense"] for one in ours)
    lines = ["| what | layers | parameters | rise of the loss | by kind | seconds | peak |", "|---" * 7 + "|"]

    def add(name: str, layers: int, size: str, rise: dict[str, float], seconds: float, peak: int) -> None:
        each = " / ".join(f"{value:.2f}" for value in rise.values())
        cells = [name, f"{layers}", size, f"{mean(rise):.3f}", each, f"{seconds:.0f}", f"{peak / 1e9:.2f} GB"]
        lines.append(f"| {' | '.join(cells)} |")

    sizes_told = {row["layers"] for row in document["rows"]}
    for one in ours:
        for row in one["rows"]:
            if row["layers"] in sizes_told:
                name = f"repair `{row['method']}`" if "method" in row else f"{row['way']}, {row['record']['tokens']:,}"
                costs = [row] if "method" in row else [row[part] for part in ("repair", "heal") if part in row]
                seconds, peak = sum(c["seconds"] for c in costs), max(c["peak_rss"] for c in costs)
                add(name, row["layers"], "", row["rise"], seconds, peak)
    for method in dict.fromkeys(row["method"] for row in document["rows"]):
        rows = [row["found"] for row in document["rows"] if row["method"] == method and row["found"]]
        if not rows:
            why = next(row["why_not"] for row in document["rows"] if row["method"] == method)
            lines.append(f"| {method} | does not run: {why} ||||||")
            continue
        best = min(rows, key=lambda found: mean(found["losses"]))
        rise = {kind: loss - dense[kind] for kind, loss in best["losses"].items()}
        rate = f", rate {best['rate']:g}" if best["rate"] else ""
        add(method + rate, best["layers"], f"{best['parameters']:,}", rise, best["parts"]["mend"], best["peak_rss"])
    return "\n".join(lines)


def main() -> None:
    given = options(__doc__, OPTIONS)
    if given.table:
        document, *ours = (json.loads(path.read_text(encoding="utf-8")) for path in given.table)
        print(table(document, ours))
        return
    print(__doc__.split("\n\n")[1])
    _, job, document = opened("mending", given, repair_tokens=given.repair_tokens)
    for layers in sizes(job.num_layers, (given.share,)):
        measure(job, layers, given, document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
