"""One search in a process of its own, which can be ended at any time: what it has decided until then is known.

    python benchmarks/real_search.py SOURCE WORK_DIR OPTIONS [LAYERS]

OPTIONS: SearchOptions as JSON. With LAYERS, a stack as JSON, only what comes after is searched for: where the options
want as many layers, its scales if they have them, else exchanges; where they want fewer, the rest of the greedy
search. Prints a JSON line for each decision that was accepted, as it is made, and one at the end with the layers of
the plan; each with what was used since the search began: seconds, processor seconds, bytes read, layers read. Where
the options are refused, the one line says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from streamcollapse import Plan, RunSettings, SearchOptions, Streaming, search
from streamcollapse.errors import OptionError
from streamcollapse.jobs.prepare import prepare_search
from streamcollapse.merge.plan import PlanLayer
from streamcollapse.progress import DecisionMade, Event, LayerDone, Listener
from streamcollapse.resources.device import heap_for
from streamcollapse.run.opened import open_run
from streamcollapse.run.saved_reference import reference_of
from streamcollapse.run.work_directory import search_work
from streamcollapse.searches.evaluator import Evaluator
from streamcollapse.searches.exchange import exchanged
from streamcollapse.searches.registry import strategy_of
from streamcollapse.searches.rescale import rescaled
from streamcollapse.searches.strategies.greedy import GreedyState
from streamcollapse.searches.strategy import SearchContext, SearchResult


@dataclass
class Searched:
    """What a search printed: its ``decisions``, and its ``end`` with the layers; without one it was ``refused``, or
    broken off when its time was over."""

    decisions: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None
    refused: str | None = None


def searched(
    source: Path, options: SearchOptions, work: Path, limit: float, found_layers: list[Any] | None = None
) -> Searched:
    """Search in another process, with as many threads as this one, for ``limit`` seconds at the most; only for
    what comes after ``found_layers``, if they are given. Raises SystemExit where it fails."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, __file__, str(source), str(work), json.dumps(options.given)]
    command += [] if found_layers is None else [json.dumps(found_layers)]
    found = Searched()
    is_over = threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | threads
        ) as process:

            def end() -> None:
                is_over.set()
                process.kill()

            timer = threading.Timer(limit, end)
            timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.endswith("\n"):  # not one that was being written when the time was over
                        _take(found, json.loads(line))
                process.wait()
            finally:
                timer.cancel()
                process.kill()
        if process.returncode != 0 and not is_over.is_set():
            errors.seek(0)
            raise SystemExit(f"{options}: the search failed: {errors.read()[-2000:]}")
    return found


def _take(found: Searched, line: dict[str, Any]) -> None:
    if "refused" in line:
        found.refused = line["refused"]
    elif "plan" in line:
        found.end = line
    else:
        found.decisions.append(line)


def main() -> None:
    source, work, given, *layers_found = sys.argv[1:]
    begun, computed = time.perf_counter(), time.process_time()
    num_bytes, layers = 0, 0

    def say(**what: Any) -> None:
        used = {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - computed}
        print(json.dumps(what | used | {"bytes_read": num_bytes, "layers_read": layers}), flush=True)

    def listener(event: Event) -> None:
        nonlocal num_bytes, layers
        if isinstance(event, LayerDone):
            num_bytes, layers = num_bytes + event.num_bytes, layers + 1
        elif isinstance(event, DecisionMade) and event.accepted:
            say(l=event.pointer, merged=event.merged, similarity=event.similarity)

    settings = RunSettings(streaming=Streaming(work_dir=work))
    options = SearchOptions(**json.loads(given))
    try:
        if layers_found:
            plan = onward(source, options, stack_of(json.loads(layers_found[0])), settings, listener)
        else:
            plan = search(source, options, settings=settings, listener=listener)
    except OptionError as error:
        say(refused=str(error))
    else:
        say(plan=[[layer.base, {str(s): c for s, c in layer.mix.items()}] for layer in plan.layers])


def stack_of(layers: list[Any]) -> tuple[PlanLayer, ...]:
    """The stack that the results of bench_real.py give as ``layers``."""
    return tuple(PlanLayer(base, {int(source): c for source, c in mix.items()}) for base, mix in layers)


def onward(
    source: str, options: SearchOptions, layers: tuple[PlanLayer, ...], settings: RunSettings, listener: Listener
) -> Plan:
    """What ``options`` find where the search has come to ``layers``: the last part of ``find_plan``."""
    prepared = prepare_search(source, options, settings, listener=listener)
    job, space, samples = prepared.job, prepared.space, prepared.samples
    assert space is not None
    assert samples is not None
    with (
        search_work(prepared.key, options, settings.streaming, prepared.memory.spill, None) as work,
        open_run(job, prepared.memory, work.path) as run,
        heap_for(prepared.memory.activations),
    ):
        reference = reference_of(run, work, samples, strategy_of(space.options).boundaries(space))
        evaluator = Evaluator(run, reference, work.memory, space.options, settings.streaming.lookahead)
        context = SearchContext(run, space, reference, evaluator, work)
        if len(layers) > space.target.fewest():
            found = further(context, layers)
        else:
            after = rescaled if options.rescale else exchanged
            found = after(context, SearchResult(space.options, layers, []))
    return Plan(job.name, job.num_layers, job.checkpoint.fingerprint(), found.layers, space.options.merge_norms)


def further(context: SearchContext, layers: tuple[PlanLayer, ...]) -> SearchResult:
    """What the greedy search makes of ``layers``, to which it had come, without what it knew of the merges it left."""
    state = GreedyState(context.space.options, context.space.target, layers)
    with patch.object(GreedyState, "start", lambda _: state):
        return strategy_of(context.space.options).run(context)


if __name__ == "__main__":
    main()
