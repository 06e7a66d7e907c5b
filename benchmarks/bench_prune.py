"""How does the whole job compare with what one would use otherwise?

Question   Seconds and peak memory of ``streamcollapse prune`` on one checkpoint, beside
             a  the authors' procedure: the whole model in memory, a deep copy per candidate (same decisions?)
             b  accelerate's disk offload: passes over the calibration samples, beside ours
             c  mergekit: writing a model of the same layers, beside ``streamcollapse apply``
             d  AirLLM: passes, beside ours
Ceiling    The write cannot beat a plain copy of the same number of bytes. Our write, mergekit's and the copy end when
           the bytes are on the disk.
Targets    At 1.1B the job (loading or reading, search, write) 10 times faster and 5 times less memory than a; the
           start of Python and its imports, the same for both, is told beside it. From there on, a pass 1.5 times
           faster than b (a job makes many: the median of those after the first of a process is compared, and the first
           told beside it); the write at least as fast as c, and within 1.25 times the copy.
Method     A synthetic checkpoint (make_checkpoint.py), the rule sequential, C = 4, I = 2, T = 0.65, the bundled
           samples. Every run is a process of its own with the same number of threads, in the same dtype; the peers in
           environments of their own (baselines/). Rounds of all programs in turn, medians; writes several times a round
           and in changing order, since one write can take several times as long as the next. Time: the job, a
           pass and a write are what the program itself says of its parts, without the start of Python (AirLLM has split
           the checkpoint before, which is not counted). Memory: of the process tree, sampled from outside
           (measure.py); the target counts anonymous memory, since file pages can be dropped. The checkpoint is in the
           page cache (warm), or out of it with --cold, which b and d drop once more before the pass. With --limit
           every program runs in a memory cgroup of that size, page cache included, and the checkpoint is out of the
           page cache when it starts: the same conditions for all, and those that offloading is for. Before every run
           memory is used and let go of (measure.heat), so that none waits for a virtual machine's host to bring it.

    python benchmarks/bench_prune.py [--shape tinyllama-1.1b | --model NAME --models DIR] [--layers N]
                                     [--peers a,b,c,d] [--repeat 3] [--writes 3] [--cold | --limit 1GiB]
                                     [--samples 10] [--work DIR] [--scratch DIR] [--dtype auto] [--threads N]
                                     [--save FILE]

--work keeps the environments of the peers and the checkpoint between calls; --scratch says where outputs are written
and removed, by default there as well. A peer that cannot run is reported with the reason. Exits 1 when a target is
missed. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from about import environment as environment_of
from groups import NoGroupError, memory_group
from make_checkpoint import SHAPES, make_checkpoint
from measure import FailedError, Measured, chill, copy_seconds, heat, run, warm, write_sentences
from peers import APPLY, OURS, PASSES, PEERS, SETTINGS, Bench, PeerError, command, environment, peer_python
from real_models import add_options, chosen_model
from verdict import COPY, Runs, compared_decisions, judged, medians

from streamcollapse import inspect
from streamcollapse.errors import OptionError
from streamcollapse.resources.device import resolve
from streamcollapse.settings.run import Compute
from streamcollapse.units import format_bytes, parse_bytes

HEATED_BYTES = 2 << 30  # before every run; more would have been given back by the time it is wanted


def one_run(bench: Bench, name: str, python: Path) -> dict[str, Any]:
    """Run ``name`` once and remove what it wrote. Raises FailedError."""
    os.sync()
    (chill if bench.cold or bench.limit else warm)(bench.source)
    heat(HEATED_BYTES)
    try:
        if name == COPY:
            num_bytes = json.loads((bench.scratch / "report.json").read_text())["bytes"]["after"]
            return {"parts": {"write": copy_seconds(bench.source, num_bytes, bench.scratch / "copied")}}
        measured = limited_run(bench, command(bench, name, python), environment(bench, name))
        document = ours(measured.document) if name in (OURS, APPLY) else measured.document
        if name == OURS:
            shutil.copy(bench.out / "streamcollapse_plan.json", bench.plan)
            shutil.copy(bench.out / "streamcollapse_report.json", bench.scratch / "report.json")
        return {
            "job_seconds": measured.seconds,
            "peak_rss": measured.peak_rss,
            "peak_anonymous_rss": measured.peak_anonymous_rss,
            **{
                key: document[key]
                for key in ("parts", "passes", "layers", "decisions", "versions", "did", "disk_bytes_read")
                if key in document
            },
        }
    finally:
        shutil.rmtree(bench.out, ignore_errors=True)
        (bench.scratch / "copied").unlink(missing_ok=True)


def limited_run(bench: Bench, program: list[str], environment: dict[str, str]) -> Measured:
    """One run, inside a memory cgroup where there is a limit. Raises FailedError."""
    if not bench.limit:
        return run(program, environment)
    try:
        with memory_group(bench.limit) as group:
            return run(group.launching(program), environment)
    except NoGroupError as error:
        raise SystemExit(f"--limit: {error}") from None


def ours(document: dict[str, Any]) -> dict[str, Any]:
    """Our report in the words of the baselines."""
    parts = {phase["name"]: phase["seconds"] for phase in document["usage"]["phases"]}
    if "reference" in parts:
        parts = {"pass": parts.pop("reference"), **parts}
    decisions = document["options"]["search"]["decisions"]
    return {**document, "parts": parts, "decisions": decisions, "did": "streamcollapse prune"}


def available(names: list[str], bench: Bench, environments: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Interpreters of the peers that can run, and reasons for the others."""
    pythons, reasons = {}, {}
    for name in names:
        try:
            if name == "authors":
                enough_memory(bench)
            pythons[name] = peer_python(name, environments)
        except PeerError as error:
            reasons[name] = str(error)
            print(f"{name} cannot run: {error}")
    return pythons, reasons


def enough_memory(bench: Bench) -> None:
    """Raise PeerError where original, pruned model and candidate do not fit into memory together."""
    stored = sum(path.stat().st_size for path in bench.source.glob("*.safetensors"))
    needed = 3 * stored * (2 if bench.dtype == "float32" else 1)
    free = min(psutil.virtual_memory().available, bench.limit or sys.maxsize)
    if needed > free:
        raise PeerError(
            f"needs about {format_bytes(needed)} of memory for three models, {format_bytes(free)} available"
        )


def order(pythons: dict[str, Path], number: int, writes: int) -> list[str]:
    """What round ``number`` runs: every program once, then those that write, in an order that changes."""
    writers = [APPLY, *(name for name in pythons if name == "mergekit"), COPY]
    turns = [writers[(number + turn + i) % len(writers)] for turn in range(writes) for i in range(len(writers))]
    passing = [PASSES] if {"accelerate", "airllm"} & set(pythons) else []
    return [OURS, *passing, *(name for name in pythons if name != "mergekit"), *turns]


def rounds(bench: Bench, given: argparse.Namespace, environments: Path) -> tuple[Runs, dict[str, str]]:
    """``given.repeat`` rounds; a peer that fails is left out of what follows."""
    pythons, reasons = available(given.names, bench, environments)
    runs: Runs = {}
    for number in range(given.repeat):
        for name in order(pythons, number, given.writes):
            if name in reasons:
                continue
            try:
                found = one_run(bench, name, pythons.get(name, Path(sys.executable)))
            except FailedError as error:
                if name in (OURS, APPLY, PASSES):
                    raise SystemExit(f"{name}: {error}") from None
                reasons[name] = str(error)
                print(f"{name} cannot run: {error}")
                continue
            runs.setdefault(name, []).append(found)
            print(f"round {number + 1}  {name:<22}{described(found)}", flush=True)
    return runs, reasons


def described(found: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found["parts"].items())
    if "job_seconds" not in found:
        return parts
    anonymous = found["peak_anonymous_rss"]
    peak = f"{format_bytes(anonymous)} anonymous, " if anonymous else ""
    return f"{found['job_seconds']:7.2f} s  peak {peak}{format_bytes(found['peak_rss'])} resident  ({parts})"


def show(document: dict[str, Any]) -> None:
    print("median")
    for name, row in document["medians"].items():
        cells = [
            f"{key} {format_bytes(int(value)) if key.startswith('peak') else f'{value:.2f} s'}"
            for key, value in row.items()
        ]
        print(f"  {name:<22}{', '.join(cells)}")
    for target in document["targets"]:
        wanted = "" if target["wanted"] is None else f", wanted {target['wanted']:.2f}"
        verdict = {True: "met", False: "MISSED", None: "not stated here"}[target["met"]]
        print(f"  {target['target']:<52}{target['found']:6.2f}{wanted}: {verdict}")
    if decisions := document["decisions"]:
        verdict = "the same" if decisions["same"] else "DIFFERENT"
        print(f"  decisions of the authors' procedure over {decisions['candidates']} candidates: {verdict}", end="")
        difference = decisions["largest_difference"]
        print("" if difference is None else f" (similarities at most {difference:.1e} apart)")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    add_options(parser)
    parser.add_argument("--peers", default="a,b,c,d", help="letters, with commas; empty for none")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--writes", type=int, default=3, help="writes in each round")
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the page cache before every run")
    parser.add_argument("--samples", type=int, default=10, help="calibration sentences")
    parser.add_argument("--limit", help="run every program in a memory cgroup of this size")
    parser.add_argument("--work", type=Path, help="directory for environments and checkpoint, kept")
    parser.add_argument("--scratch", type=Path, help="directory for what is written and removed again")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save", type=Path, help="also write the document to this file")
    given = parser.parse_args()
    letters = {peer.letter: name for name, peer in PEERS.items()}
    wanted = [letter for letter in given.peers.split(",") if letter]
    if unknown := [letter for letter in wanted if letter not in letters]:
        parser.error(f"--peers: {unknown[0]!r} is none of {', '.join(letters)}")
    try:
        given.limit = given.limit and parse_bytes(given.limit)
    except OptionError as error:
        parser.error(f"--limit: {error}")
    given.names = [letters[letter] for letter in wanted]
    return given


def subject(given: argparse.Namespace, work: Path) -> tuple[Path, str, int]:
    """The checkpoint, made if it is not there, what it is called, and its number of layers."""
    if (source := chosen_model(given)) is not None:
        return source, given.model, inspect(source).num_layers
    shape = replace(SHAPES[given.shape], layers=given.layers or SHAPES[given.shape].layers)
    source = work / f"{given.shape}-{shape.layers}-layers"
    if not source.exists():
        make_checkpoint(source, shape)
    return source, given.shape, shape.layers


def measured(given: argparse.Namespace, work: Path, scratch: Path) -> dict[str, Any]:
    """The whole benchmark, as the document to print."""
    source, name, num_layers = subject(given, work)
    dtype = resolve(Compute("cpu", given.dtype), torch.bfloat16).dtype_name
    stored = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    cache = "cold" if given.cold else "warm"
    if given.limit:
        cache = f"in {format_bytes(given.limit)} of memory"
    print(f"checkpoint  {name}, {num_layers} layers, {format_bytes(stored)}; {cache}; {dtype}")
    about = environment_of(given.threads)
    print("environment " + ", ".join(f"{key} {value}" for key, value in about.items()))
    calibration = scratch / "calibration.txt"
    write_sentences(calibration, given.samples)
    bench = Bench(source, scratch, calibration, dtype, given.threads, given.cold, given.limit)
    runs, reasons = rounds(bench, given, work / "environments")
    median = medians(runs)
    return {
        "benchmark": "prune",
        "date": datetime.now(UTC).date().isoformat(),
        "environment": about,
        "checkpoint": {"shape": name, "layers": num_layers, "bytes": stored},
        "settings": {
            **SETTINGS,
            "rule": "sequential",
            "dtype": dtype,
            "cache": cache,
            "limit_bytes": given.limit,
            "samples": given.samples,
            "repeat": given.repeat,
            "writes": given.writes,
        },
        "runs": runs,
        "medians": median,
        "targets": judged(median, name, num_layers),
        "decisions": compared_decisions(runs),
        "cannot_run": reasons,
    }


def main() -> None:
    given = options()
    print(__doc__.split("\n\n")[1])
    for directory in filter(None, (given.work, given.scratch)):
        directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.scratch or given.work, prefix="scratch-") as scratch:
        document = measured(given, given.work or Path(scratch), Path(scratch))
    show(document)
    if given.save:
        given.save.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    missed = any(target["met"] is False for target in document["targets"])
    sys.exit(1 if missed or (document["decisions"] or {"same": True})["same"] is False else 0)


if __name__ == "__main__":
    main()
