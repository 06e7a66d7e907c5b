"""Plans and strategies as text for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from streamcollapse.cli.screen import strip
from streamcollapse.cli.text import lines_of, plain_console, unicode
from streamcollapse.errors import printable
from streamcollapse.searches.registry import strategies
from streamcollapse.searches.strategy import Strategy
from streamcollapse.searches.strategy import method_line as strategy_line
from streamcollapse.settings.search import SearchOptions

if TYPE_CHECKING:  # for their names alone: importing them takes seconds
    from streamcollapse.merge.plan import Decision, Plan, SearchRecord


def decision_line(decision: Decision, search: SearchRecord) -> str:
    """One decision in words."""
    if is_scale(decision):
        return f"layer {decision.l - 1}: {decision.rule}, similarity {decision.similarity or 0.0:.4f}"
    strategy = _strategy(search)
    layers = strategy.layers_of(decision)
    if decision.similarity is None:
        return f"{layers}: skipped, {printable(decision.reason)}"
    by = "" if decision.rule is None else f" by {printable(decision.rule)}"
    return f"{layers}: similarity {decision.similarity:.4f}{strategy.verdict_of(decision, search.options)}{by}"


def _strategy(search: SearchRecord) -> Strategy:
    """The strategy of a search; where this machine does not have it, the default speaks for it."""
    return strategies().get(search.options.strategy, next(iter(strategies().values())))


def is_scale(decision: Decision) -> bool:
    """Whether it is about the scale of a layer, not a merge."""
    return decision.rule is not None and decision.rule.startswith("scale ")


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
    strategy, options = _strategy(search), search.options
    rows.append(("method", method_line(options)))
    if strategy.implied_by and options.has_target:
        rows.append(("threshold", f"{options.threshold:.6g}, found for the target"))
    decisions = [d for d in search.decisions if not is_scale(d)]
    accepted, counted = sum(d.accepted for d in decisions), "layers are counted from 0"
    if strategy.verdict == "merged":
        counted += ", in the stack as it then was"
    if strategy.by_rounds:
        rows.append(("merges", f"{accepted} taken, the best of each round; {counted}"))
    else:
        rows.append(("candidates", f"{len(decisions)} tested, {accepted} {strategy.verdict}; {counted}"))
    rows += [("", decision_line(d, search)) for d in decisions if d.accepted]
    if scales := [d for d in search.decisions if is_scale(d)]:
        changed = sum(rule != "scale 1" for rule in {d.l: d.rule for d in scales}.values())
        rows.append(("rescaled", f"{changed} layers: similarity {scales[-1].similarity or 0.0:.4f}"))
    rejected = [d for d in decisions if d.similarity is not None and not d.accepted]
    if rejected:
        best = max(rejected, key=lambda d: d.similarity or -1.0)
        rows.append(("best rejected", decision_line(best, search)))
    rows += [("", decision_line(d, search)) for d in search.decisions if d.reason is not None]
    return rows


def method_line(options: SearchOptions) -> str:
    """The settings that make a difference to the result, in one line."""
    strategy = strategies().get(options.strategy)
    return printable(options.strategy if strategy is None else strategy_line(strategy, options))


def show_plan(plan: Plan, path: Path) -> None:
    """The outcome of a search, and where the plan is."""
    plain_console().print(lines_of([*plan_rows(plan), ("plan", str(path))]))
