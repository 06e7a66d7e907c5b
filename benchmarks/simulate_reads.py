"""How much does a search read? Layers and decisions only, no tensors, through the search's own code.

Question   Bytes that reference pass, search and write read, in multiples of the checkpoint, for models of 32 to 126
           layers, beside a full pass per candidate and a suffix per candidate.
Method     Outcomes of candidates are drawn (accept rate p), come in runs, or follow a fixed pattern; CollapseState,
           likely_states and schedule are the ones that a real search uses. Every layer counts as the same size;
           embedding and head are left out. A merged layer of several sources reads all of them; with --resident R the
           top R source layers are read once.

    python benchmarks/simulate_reads.py [--nodes 32] [--resident 0] [--seeds 5] [--layers 32 40 80 126]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from streamcollapse.forward.schedule import Stack, schedule
from streamcollapse.merge.plan import Decision, PlanLayer, StackKey, stack_key
from streamcollapse.strategy.collapse import CollapseOptions, CollapseState
from streamcollapse.strategy.lookahead import Depth, Odds, likely_states

Outcome = Callable[[CollapseState], bool]


class Drawn:
    """Outcomes of rate ``p`` that depend on the candidate alone, so that looking ahead sees what comes."""

    def __init__(self, p: float, seed: int) -> None:
        self._p, self._seed = p, seed

    def __call__(self, state: CollapseState) -> bool:
        return random.Random(f"{self._seed}:{stack_key(state.layers)}:{state.pointer}").random() < self._p


class Patterned:
    """Outcomes by the number of candidates decided before, which the pointer and the merges so far give."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern

    def __call__(self, state: CollapseState) -> bool:
        assert state.options.highest is not None
        merges = sum(1 for layer in state.layers if len(layer.mix) > 1 or not layer.untouched)
        return self._pattern[(state.options.highest - state.pointer + merges) % len(self._pattern)] == "A"


Unit = int | StackKey  # a source layer, or an accepted merged layer that was kept when it was built


def units_of(layer: PlanLayer, kept: set[StackKey]) -> set[Unit]:
    """What has to be read for ``layer``. The norms that a copied layer takes from its base are left out."""
    key = stack_key((layer,))
    return {key} if key in kept else set(layer.mix)


def simulate(
    num_layers: int, options: CollapseOptions, outcome: Outcome, nodes: int, resident: int, keep: bool
) -> dict[str, float]:
    """Layers read by one search, in multiples of ``num_layers``, and what plainer searches would have read."""
    state, odds = CollapseState.start(num_layers, options), Odds(options.threshold)
    known: dict[StackKey, bool] = {}
    read = full = suffix = candidates = sweeps = 0
    held: set[Unit] = set()
    kept: set[StackKey] = set()
    top = set(range(num_layers - resident, num_layers))

    def outcome_of(s: CollapseState) -> bool | None:
        candidate = s.candidate()
        assert candidate is not None
        return known.get(stack_key(candidate.layers))

    while candidate := state.candidate():
        key = stack_key(candidate.layers)
        if key not in known:
            states = likely_states(state, odds, Depth(nodes), outcome_of)
            stacks = []
            for s in states:
                c = s.candidate()
                assert c is not None
                stacks.append(Stack(c.layers, c.position))
                known[stack_key(c.layers)] = outcome(s)
            needed = set().union(*(units_of(visit.layer, kept) for visit in schedule(stacks)))
            read += len(needed - held)
            held |= needed & top
            sweeps += 1
        candidates += 1
        full += len(candidate.layers)
        suffix += len(candidate.layers) - candidate.position
        accepted = known[key]
        odds.learn(Decision(candidate.pointer, candidate.merged, None, accepted))
        if accepted and keep and len(candidate.merged_layer.mix) > 1:
            kept.add(stack_key((candidate.merged_layer,)))
        state = state.after(accepted)
    write = sum(len(layer.mix) for layer in state.layers)
    return {
        "search": read / num_layers,
        "job": (num_layers + read + write) / num_layers,
        "full_pass_each": (num_layers + full + write) / num_layers,
        "suffix_each": (num_layers + suffix + write) / num_layers,
        "candidates": candidates,
        "sweeps": sweeps,
        "layers_after": len(state.layers),
    }


def patterns(seeds: int) -> Iterator[tuple[str, float | None, list[Outcome]]]:
    for p in (0.1, 0.3, 0.5, 0.7, 0.9):
        yield f"rate {p}", p, [Drawn(p, seed) for seed in range(seeds)]
    for pattern in ("AR", "ARR", "AAR", "AAAARRRR", "A" * 8 + "R" * 16):
        yield f"pattern {pattern}", pattern.count("A") / len(pattern), [Patterned(pattern)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--resident", type=int, default=0)
    parser.add_argument(
        "--keep",
        action="store_true",
        help="what keeping accepted mixed layers would save (the engine reads their sources)",
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="+", default=[32, 40, 80, 126])
    parser.add_argument("--rule", default="mean", help="mean reads every source of a merged layer, the most there is")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for num_layers in arguments.layers:
        for name, rate, outcomes in patterns(arguments.seeds):
            runs = []
            for c, i, outcome in itertools.product((2, 3, 4, 6, 8), (1, 2, 4), outcomes):
                options = CollapseOptions(layers_per_merge=c, interval=i, rule=arguments.rule)
                runs.append(
                    (
                        (c, i),
                        simulate(num_layers, options, outcome, arguments.nodes, arguments.resident, arguments.keep),
                    )
                )
            jobs = [run["job"] for _, run in runs]
            worst = max(runs, key=lambda item: item[1]["job"])
            wide = [run["job"] for (c, _), run in runs if c >= 3 and (rate or 0) >= 0.3]
            row = {
                "layers": num_layers,
                "outcomes": name,
                "median": statistics.median(jobs),
                "worst": worst[1]["job"],
                "worst_at": {"C": worst[0][0], "I": worst[0][1]},
                "worst_with_c3_and_rate_0.3": max(wide, default=None),
                "suffix_each": statistics.median(run["suffix_each"] for _, run in runs),
                "full_pass_each": statistics.median(run["full_pass_each"] for _, run in runs),
            }
            rows.append(row)
            print(
                f"{num_layers:>4} layers  {name:<34} job {row['median']:5.2f}  worst {row['worst']:5.2f} "
                f"(C={worst[0][0]}, I={worst[0][1]})  suffix each {row['suffix_each']:6.2f}  "
                f"full pass each {row['full_pass_each']:6.2f}",
                flush=True,
            )
    print(json.dumps({"benchmark": "simulate_reads", **vars(arguments), "rows": rows}))


if __name__ == "__main__":
    main()
