"""Plans and results as text for people: what a checkpoint is, what a run did."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from streamcollapse.cli.screen import memory_shown, needs_table, strip
from streamcollapse.cli.status import expected_words
from streamcollapse.cli.text import lines_of, plain_console, unicode
from streamcollapse.errors import printable
from streamcollapse.searches.course import course
from streamcollapse.searches.strategy import cells
from streamcollapse.searches.words import decision_line, is_exchange, is_scale, method_of, said_of, spoken_strategy
from streamcollapse.units import format_bytes, format_seconds

if TYPE_CHECKING:  # for their names alone: importing them takes seconds
    from streamcollapse.jobs.apply import Pruned
    from streamcollapse.jobs.inspect import Inspection
    from streamcollapse.jobs.prepare import Prepared
    from streamcollapse.merge.plan import Plan
    from streamcollapse.output.report import Report
    from streamcollapse.output.verdict import Judgement
    from streamcollapse.resources.meter import Usage


def plan_strip(plan: Plan) -> Text:
    """The plan's stack; numbers are cells that cover several source layers."""
    return strip(cells(plan.layers, plan.num_source_layers), unicode=unicode())


def plan_rows(plan: Plan) -> list[tuple[str, str | Text]]:
    """What a plan makes of its source, and how it came to that."""
    rows: list[tuple[str, str | Text]] = [
        ("layers", f"{plan.num_source_layers} -> {plan.num_layers}"),
        ("stack", plan_strip(plan)),
    ]
    search = plan.search
    if search is None:
        return [*rows, ("changes", said_of(plan)), *_trained_rows(plan)]
    strategy, options = spoken_strategy(search.options), search.options
    rows.append(("method", method_of(options)))
    if strategy.implied_by and options.has_target:
        rows.append(("threshold", f"{options.threshold:.6g}, found for the target"))
    decisions = [d for d in search.decisions if not is_scale(d) and not is_exchange(d)]
    accepted, counted = sum(d.accepted for d in decisions), "layers are counted from 0"
    if strategy.verdict == "merged":
        counted += ", in the stack as it then was"
    if strategy.by_rounds:
        rows.append(("merges", f"{accepted} taken, the best of each round; {counted}"))
    else:
        rows.append(("candidates", f"{len(decisions)} tested, {accepted} {strategy.verdict}; {counted}"))
    rows += [("", decision_line(d, search)) for d in decisions if d.accepted]
    rows += [("", decision_line(d, search)) for d in search.decisions if is_exchange(d)]
    if scales := [d for d in search.decisions if is_scale(d)]:
        changed = sum(rule != "scale 1" for rule in {d.l: d.rule for d in scales}.values())
        rows.append(("rescaled", f"{changed} layers: similarity {scales[-1].similarity or 0.0:.4f}"))
    rejected = [d for d in decisions if d.similarity is not None and not d.accepted]
    if rejected:
        best = max(rejected, key=lambda d: d.similarity or -1.0)
        rows.append(("best rejected", decision_line(best, search)))
    rows += [("", decision_line(d, search)) for d in search.decisions if d.reason is not None]
    return [*rows, *_trained_rows(plan)]


def _trained_rows(plan: Plan) -> list[tuple[str, str | Text]]:
    """What was fitted anew, and how much nearer each layer came to what the source hands on; and what was healed."""
    rows = list[tuple[str, str | Text]]()
    if plan.repair is not None:
        rows.append(("repaired", plan.repair.in_words()))
        for layer in plan.repair.layers:
            what = "unchanged" if layer.how is None else f"error {layer.before:.4f} -> {layer.after:.4f}, {layer.how}"
            rows.append(("", f"layer {plan.layers[layer.position].base}: {what}"))
    return rows if plan.heal is None else [*rows, ("healed", plan.heal.in_words())]


def show_plan(plan: Plan, path: Path) -> None:
    """The outcome of a search, and where the plan is."""
    plain_console().print(lines_of([*plan_rows(plan), *_more_sizes(plan), ("plan", str(path))]))


def _more_sizes(plan: Plan) -> list[tuple[str, str | Text]]:
    """What else can be had of the search of ``plan``."""
    sizes = [len(layers) for layers in course(plan)[1:-1]]
    which = f"{sizes[-1]} to {sizes[0]} layers" if len(sizes) > 1 else f"{sizes[0]} layers" if sizes else ""
    return [("more sizes", f"{which}: streamcollapse apply with --layers")] if sizes else []


def show_inspection(found: Inspection) -> None:
    """The figures of ``inspect``."""
    console = plain_console()
    console.print(lines_of(_inspection_rows(found)))
    least = "" if found.budgets else ", at the least"
    by = "" if found.strategy is None else f" by {found.strategy}, the default,"
    console.print(f"\nmemory that pruning{by} needs, beyond the interpreter's own{least}:")
    console.print(needs_table(_needs_of(found), found.budgets))


def _needs_of(found: Inspection) -> list[tuple[str, str, int, str]]:
    return [(need.phase, need.what, need.num_bytes, need.memory) for need in found.needs]


def _inspection_rows(found: Inspection) -> list[tuple[str, str | Text]]:
    smallest, largest = min(found.layer_bytes), max(found.layer_bytes)
    per_layer = format_bytes(largest)
    if smallest != largest:
        per_layer = f"{format_bytes(smallest)} to {per_layer}"
    dtypes = ", ".join(f"{name} {format_bytes(size)}" for name, size in sorted(found.dtypes.items()))
    return [
        ("checkpoint", found.path),
        ("family", f"{found.family} ({found.model_type})"),
        ("layers", f"{found.num_layers}, {per_layer} each"),
        ("parameters", f"{found.parameters:,}"),
        ("weights", f"{format_bytes(found.num_bytes)} in {found.num_tensors} tensors, {found.num_shards} shards"),
        ("dtypes", dtypes),
        ("outside the stack", f"{format_bytes(found.outside_bytes)} (embedding, head, final norm)"),
        ("embeddings", "tied" if found.tied_embeddings else "not tied"),
        ("would compute on", f"{found.compute_device} in {found.compute_dtype}"),
    ]


def show_pruned(pruned: Pruned) -> None:
    """The outcome of ``prune`` or ``apply``."""
    report = pruned.report
    before, after = report["bytes"]["before"], report["bytes"]["after"]
    rows: list[tuple[str, str | Text]] = [
        *plan_rows(pruned.plan),
        *_more_sizes(pruned.plan),
        ("parameters", f"{report['parameters']['before']:,} -> {report['parameters']['after']:,}"),
        ("weights", f"{format_bytes(before)} -> {format_bytes(after)} (ratio {100 * report['ratio']:.1f} %)"),
        *work_rows(report),
    ]
    if judgement := report.get("held_out"):
        rows += verdict_rows(judgement)
    rows.append(("pruned model", str(pruned.out)))
    plain_console().print(lines_of(rows))


def work_rows(report: Report) -> list[tuple[str, str | Text]]:
    """What a run cost."""
    usage = report["usage"]
    phases = ", ".join(f"{p['name']} {format_seconds(p['seconds'])}" for p in usage["phases"])
    return [
        ("time", f"{format_seconds(usage['seconds'])} ({phases})"),
        ("read, written", f"{format_bytes(usage['bytes_read'])}, {format_bytes(usage['bytes_written'])}"),
        ("memory", memory_line(usage)),
    ]


def verdict_rows(judgement: Judgement) -> list[tuple[str, str | Text]]:
    """How good a result is."""
    from streamcollapse.output.verdict import is_broken, told

    style = "bold red" if is_broken(judgement) else "green" if judgement["verdict"] == "usable" else "yellow"
    where = f"on {judgement['tokens']} tokens of held-out text ({printable(judgement['text'])})"
    return [("verdict", Text(told(judgement), style)), ("", where)]


def memory_line(usage: Usage) -> str:
    """Peaks of a run in words."""
    anonymous = usage["peak_anonymous_rss"]
    text = f"peak RSS {format_bytes(usage['peak_rss'])}"
    if anonymous is not None:
        text += f", of it anonymous {format_bytes(anonymous)}"
    if usage["peak_vram"] is not None:
        text += f", peak VRAM {format_bytes(usage['peak_vram'])}"
    return text


def show_prepared(prepared: Prepared, verbose: bool = False) -> None:
    """What a dry run found: nothing was written. ``verbose``: with what memory is held for, phase by phase."""
    found = prepared.inspection
    console = plain_console()
    console.print(lines_of(_inspection_rows(found)))
    console.print()
    if found.needs:
        console.print(memory_shown(_needs_of(found), found.budgets, verbose))
    rows: list[tuple[str, str | Text]] = []
    if prepared.samples is not None and prepared.options is not None:
        samples, most = prepared.samples, prepared.most_candidates
        rows.append(("method", method_of(prepared.options)))
        rows += [("target", prepared.space.told)] if prepared.space is not None and prepared.space.told else []
        rows.append(("calibration", f"{samples.num_samples} samples, {samples.num_tokens} tokens, padding included"))
        rows += [("candidates", f"{most} at most")] if most else []
    if (text := prepared.fit_text) is not None:
        rows.append(("repair", f"{prepared.settings.repair.chosen}, on {sum(text.tokens)} tokens: {text.name}"))
    if (lessons := prepared.lessons) is not None:
        what = f"{lessons.schedule.steps} steps of {lessons.course.tokens} tokens, {lessons.course.trained:,} numbers"
        rows.append(("heals", f"{what} trained at the most"))
    rows += [("time", expected_words(prepared.expected))] if prepared.expected is not None else []
    low, high = prepared.smallest_output, prepared.largest_output
    size = format_bytes(low) if low == high else f"{format_bytes(low)} to {format_bytes(high)}"
    rows.append(("output", size))
    if prepared.disk_free is not None and prepared.disk_free < high:
        rows.append(("disk", f"{format_bytes(prepared.disk_free)} free, which the largest output would not fit"))
    rows += [("ignored", text) for text in prepared.ignored]
    rows += [("dry run", "everything checks out; nothing was written")]
    console.print()
    console.print(lines_of(rows))
