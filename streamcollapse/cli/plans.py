"""Plans and strategies as text for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from streamcollapse.cli.screen import strip
from streamcollapse.cli.text import lines_of, plain_console, unicode
from streamcollapse.errors import printable
from streamcollapse.strategy.catalogue import STRATEGIES, Metric, Strategy

if TYPE_CHECKING:  # for their names alone: importing them takes seconds
    from streamcollapse.merge.plan import Decision, Plan, SearchRecord
    from streamcollapse.strategy.collapse import CollapseOptions


def decision_line(decision: Decision, search: SearchRecord) -> str:
    """One decision in words."""
    layers = f"layers {decision.l}-{decision.l + decision.merged}"
    if is_scale(decision):
        return f"layer {decision.l}: {decision.rule}, similarity {decision.similarity or 0.0:.4f}"
    if search.strategy == "angular":
        layers = f"layers {decision.l}-{decision.l + decision.merged - 1}"
    elif search.strategy == "block-influence":
        layers = f"layer {decision.l}"
    elif search.strategy == "greedy":  # of the stack as it was then
        layers = f"positions {decision.l}-{decision.l + decision.merged}"
    if decision.similarity is None:
        return f"{layers}: passed over, {printable(decision.reason)}"
    by = "" if decision.rule is None else f" by {printable(decision.rule)}"
    if search.strategy in ("block-influence", "angular"):
        return f"{layers}: similarity {decision.similarity:.4f}, {'dropped' if decision.accepted else 'kept'}"
    if search.strategy == "rule-based" or (search.strategy == "greedy" and has_target(search)):
        return f"{layers}: similarity {decision.similarity:.4f}, merged{by}"
    sign, verdict = (">", "merged") if decision.accepted else ("<=", "kept apart")
    return f"{layers}: similarity {decision.similarity:.4f} {sign} {search.threshold:g}, {verdict}{by}"


def is_scale(decision: Decision) -> bool:
    """Whether it is about the scale of a layer, not a merge."""
    return decision.rule is not None and decision.rule.startswith("scale ")


def has_target(search: SearchRecord) -> bool:
    """Whether the search was told how far to prune."""
    return search.target_layers is not None or search.target_ratio is not None


def plan_strip(plan: Plan) -> Text:
    """The plan's stack; numbers are cells that cover several source layers."""
    bases = [layer.base for layer in plan.layers]
    cells = [end - base for base, end in zip(bases, [*bases[1:], plan.num_source_layers], strict=True)]
    return strip(cells, unicode=unicode())


def plan_rows(plan: Plan) -> list[tuple[str, str | Text]]:
    """What a plan makes of its source, and how it came to that."""
    rows: list[tuple[str, str | Text]] = [
        ("layers", f"{plan.num_source_layers} -> {plan.num_layers}"),
        ("stack", plan_strip(plan)),
    ]
    search = plan.search
    if search is None:
        return rows
    rows.append(("method", method_line(search)))
    if search.strategy == "laco" and has_target(search):
        rows.append(("threshold", f"{search.threshold:.6g}, found for the target"))
    decisions = [d for d in search.decisions if not is_scale(d)]
    accepted = sum(d.accepted for d in decisions)
    dropping = search.strategy in ("block-influence", "angular")
    verdict, counted = ("dropped" if dropping else "merged"), "layers are counted from 1"
    if not dropping:
        counted += ", in the stack as it then was"
    if search.strategy == "greedy":  # a decision is the best of its round
        rows.append(("merges", f"{accepted} taken, the best of each round; {counted}"))
    else:
        rows.append(("candidates", f"{len(decisions)} tested, {accepted} {verdict}; {counted}"))
    rows += [("", decision_line(d, search)) for d in decisions if d.accepted]
    if scales := [d for d in search.decisions if is_scale(d)]:
        changed = sum(rule != "scale 1" for rule in {d.l: d.rule for d in scales}.values())
        rows.append(("rescaled", f"{changed} layers: similarity {scales[-1].similarity or 0.0:.4f}"))
    rejected = [d for d in decisions if d.similarity is not None and not d.accepted]
    if rejected:
        best = max(rejected, key=lambda d: d.similarity or -1.0)
        rows.append(("best kept apart", decision_line(best, search)))
    rows += [("", decision_line(d, search)) for d in search.decisions if d.reason is not None]
    return rows


def method_line(options: CollapseOptions | SearchRecord) -> str:
    """The settings that make a difference to the result, in one line."""
    strategy, said = STRATEGIES.get(options.strategy), [options.strategy]
    takes = () if strategy is None else strategy.takes
    if "layers_per_merge" in takes:
        said.append(f"C={options.layers_per_merge} I={options.interval}")
    if options.target_layers is not None:
        said.append(f"{options.target_layers} layers")
    elif options.target_ratio is not None:
        said.append(f"ratio {options.target_ratio:g}")
    elif "threshold" in takes:
        said.append(f"T={options.threshold:g}")
    said += [f"rule {options.rule}"] if strategy is None or strategy.rule is not None else []
    said += [f"metric {options.metric}"] if strategy is None or strategy.metric is not None or options.rescale else []
    return printable(", ".join(said + ["then scales"] * options.rescale))


def show_plan(plan: Plan, path: Path) -> None:
    """The outcome of a search, and where the plan is."""
    plain_console().print(lines_of([*plan_rows(plan), ("plan", str(path))]))


def show_strategies(strategies: Mapping[str, Strategy]) -> None:
    """What each strategy does, where it is from, what it reads."""
    console = plain_console()
    for name, strategy in strategies.items():
        rows: list[tuple[str, str | Text]] = [("does", strategy.does), ("source", strategy.source)]
        rows.append(("model reads", strategy.reads))
        named = {"rule": strategy.rule, "metric": strategy.metric, "calibration": strategy.samples}
        chosen = [f"--{option} {value}" for option, value in named.items() if value is not None]
        rows.append(("default", " ".join(chosen + ["--rescale"] * strategy.rescale)))
        if strategy.needs_target:
            rows.append(("needs", "--target-layers or --target-ratio"))
        console.print(Text(name, "bold"))
        console.print(lines_of([(f"  {key}", value) for key, value in rows]))


def show_metrics(metrics: Mapping[str, Metric]) -> None:
    """What each metric compares, and where it is from."""
    console = plain_console()
    console.print(Text("metrics, of which 1 is the same", "bold"))
    console.print(lines_of([(f"  {name}", f"{metric.does} ({metric.source})") for name, metric in metrics.items()]))
