"""Results as text for people: what a checkpoint is, what a run did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from streamcollapse.cli.plans import decision_line, method_line, plan_rows, plan_strip
from streamcollapse.cli.plots import sparkline
from streamcollapse.cli.screen import needs_table, strip
from streamcollapse.cli.text import lines_of, plain_console, unicode
from streamcollapse.errors import printable
from streamcollapse.units import format_bytes, format_seconds

if TYPE_CHECKING:  # for their names alone: importing them takes seconds
    from streamcollapse.jobs.apply import Pruned
    from streamcollapse.jobs.bench import Bench
    from streamcollapse.jobs.inspect import Inspection
    from streamcollapse.jobs.perplexity import Score
    from streamcollapse.jobs.prepare import Prepared
    from streamcollapse.jobs.speed import Speed
    from streamcollapse.resources.meter import Usage


def show_inspection(found: Inspection) -> None:
    """The figures of ``inspect``."""
    smallest, largest = min(found.layer_bytes), max(found.layer_bytes)
    per_layer = format_bytes(largest)
    if smallest != largest:
        per_layer = f"{format_bytes(smallest)} to {per_layer}"
    dtypes = ", ".join(f"{name} {format_bytes(size)}" for name, size in sorted(found.dtypes.items()))
    rows: list[tuple[str, str | Text]] = [
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
    console = plain_console()
    console.print(lines_of(rows))
    least = "" if found.budgets else ", at the least"
    by = "" if found.strategy is None else f" by {found.strategy}, the default,"
    console.print(f"\nmemory that pruning{by} needs, beyond the interpreter's own{least}:")
    show_needs(console, found)


def show_needs(console: Console, found: Inspection) -> None:
    """What each phase holds in memory."""
    rows = [(need.phase, need.what, need.num_bytes, need.memory) for need in found.needs]
    console.print(needs_table(rows, found.budgets))


def show_pruned(pruned: Pruned) -> None:
    """The outcome of ``prune`` or ``apply``."""
    report = pruned.report
    before, after = report["bytes"]["before"], report["bytes"]["after"]
    usage = report["usage"]
    phases = ", ".join(f"{p['name']} {format_seconds(p['seconds'])}" for p in usage["phases"])
    rows: list[tuple[str, str | Text]] = [
        *plan_rows(pruned.plan),
        ("parameters", f"{report['parameters']['before']:,} -> {report['parameters']['after']:,}"),
        ("weights", f"{format_bytes(before)} -> {format_bytes(after)} (ratio {100 * report['ratio']:.1f} %)"),
        ("time", f"{format_seconds(usage['seconds'])} ({phases})"),
        ("read, written", f"{format_bytes(usage['bytes_read'])}, {format_bytes(usage['bytes_written'])}"),
        ("memory", memory_line(usage)),
        ("pruned model", str(pruned.out)),
    ]
    plain_console().print(lines_of(rows))


def memory_line(usage: Usage) -> str:
    """Peaks of a run in words."""
    anonymous = usage["peak_anonymous_rss"]
    text = f"peak RSS {format_bytes(usage['peak_rss'])}"
    if anonymous is not None:
        text += f", of it anonymous {format_bytes(anonymous)}"
    if usage["peak_vram"] is not None:
        text += f", peak VRAM {format_bytes(usage['peak_vram'])}"
    return text


def show_score(score: Score, path: str) -> None:
    """The outcome of ``perplexity``."""
    rows: list[tuple[str, str | Text]] = [
        ("checkpoint", path),
        ("perplexity", f"{score.perplexity:.4f}"),
        ("mean loss", f"{score.nll:.5f} nats per token, {score.bits_per_byte:.5f} bits per byte"),
        ("tokens", f"{score.tokens:,} predicted, in windows of {score.window}, one every {score.stride}"),
        ("layers", str(score.layers)),
        ("time", format_seconds(score.usage["seconds"])),
    ]
    plain_console().print(lines_of(rows))


def show_prepared(prepared: Prepared) -> None:
    """What a dry run found: nothing was written."""
    show_inspection(prepared.inspection)
    rows: list[tuple[str, str | Text]] = []
    if prepared.samples is not None and prepared.options is not None:
        samples, most = prepared.samples, prepared.most_candidates
        rows.append(("method", method_line(prepared.options)))
        rows.append(("calibration", f"{samples.num_samples} samples, {samples.num_tokens} tokens, padding included"))
        rows += [("candidates", f"{most} at most")] if most else []
    low, high = prepared.smallest_output, prepared.largest_output
    size = format_bytes(low) if low == high else f"{format_bytes(low)} to {format_bytes(high)}"
    rows.append(("output", size))
    if prepared.disk_free is not None and prepared.disk_free < high:
        rows.append(("disk", f"{format_bytes(prepared.disk_free)} free, which the largest output would not fit"))
    rows += [("ignored", text) for text in prepared.ignored]
    rows += [("dry run", "everything checks out; nothing was written")]
    plain_console().print()
    plain_console().print(lines_of(rows))


_PEAKS = {
    "peak_rss": "peak resident",
    "peak_anonymous_rss": "of it, anonymous",
    "peak_file_rss": "of it, mapped files",
    "peak_group": "peak of the control group",
    "peak_vram": "peak GPU, allocated",
    "peak_vram_reserved": "peak GPU, reserved",
    "peak_vram_device": "peak GPU, whole device",
}


def show_bench(found: Bench) -> None:
    """What each phase took, against what the disk can do, and memory over time."""
    report, console = found.report, plain_console()
    usage = report["usage"]
    phases = usage["phases"]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("", *(phase["name"] for phase in phases)):
        table.add_column(heading, no_wrap=True, justify="right" if heading else "left")
    table.add_row("time", *(format_seconds(p["seconds"]) for p in phases))
    table.add_row("waiting for weights", *(format_seconds(p["seconds_waiting"]) for p in phases))
    table.add_row("read", *(format_bytes(p["bytes_read"]) for p in phases))
    rates = [p["bytes_read"] / p["seconds_reading"] if p["seconds_reading"] else None for p in phases]
    table.add_row("read rate", *(_rate(rate) for rate in rates))
    table.add_row("written", *(format_bytes(p["bytes_written"]) for p in phases))
    for key, words in _PEAKS.items():
        if any(phase[key] is not None for phase in phases):
            table.add_row(words, *(_size(phase[key]) for phase in phases))
    console.print(table)
    probed = ", ".join(f"{mode} {_rate(rate)}" for mode, rate in found.read_rates.items())
    points = [(t, float(s.rss)) for t, s in found.timeline]
    rows: list[tuple[str, str | Text]] = [
        ("layers", f"{report['layers']['before']} -> {report['layers']['after']}"),
        (
            "cold reads here",
            probed if found.read_ceiling else "not measured: too small, or too much of it in the page cache",
        ),
        ("in page cache", f"{100 * found.cached_before:.0f} % of the checkpoint when the job began"),
        ("read through", f"{usage['memory']['io']}, {usage['memory']['resident_layers']} layers resident"),
    ]
    if found.copy_rate is not None:
        rows.append(("copies to the GPU", _rate(found.copy_rate)))
    rows += [
        ("total", f"{format_seconds(usage['seconds'])}, {format_bytes(usage['bytes_read'])} read"),
        ("resident memory", f"{sparkline(points, 60, unicode())}  up to {format_bytes(usage['peak_rss'])}"),
    ]
    console.print()
    console.print(lines_of(rows))


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate / 1e9:.2f} GB/s"


def _size(size: int | None) -> str:
    return "-" if size is None else format_bytes(size)


def show_speed(found: Sequence[Speed]) -> None:
    """Models side by side, as in the paper's Table 5; the first against the last."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("model", "layers", "weights", "memory", "tokens/s", "from", "to"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "model" else "right")
    for model in found:
        sizes = (format_bytes(model.weights), format_bytes(model.memory))
        rates = (model.tokens_per_second, min(model.runs), max(model.runs))
        table.add_row(printable(model.path), str(model.layers), *sizes, *(f"{rate:.2f}" for rate in rates))
    first, last = found[0], found[-1]
    if first is not last:
        faster = first.tokens_per_second / last.tokens_per_second
        table.add_row(
            "ratio",
            f"{first.layers / last.layers:.2f}",
            f"{first.weights / last.weights:.2f}",
            f"{first.memory / max(last.memory, 1):.2f}",
            f"{faster:.2f}",
        )
    console = plain_console()
    console.print(table)
    console.print(
        f"{first.new_tokens} tokens, greedy, on {first.device} in {first.dtype}; median of {len(first.runs)} runs",
        style="dim",
        markup=False,
    )


def score_json(score: Score) -> dict[str, Any]:
    """The score as JSON types; an infinite perplexity is null."""
    return {
        "perplexity": score.perplexity if score.perplexity != float("inf") else None,
        "nll": score.nll,
        "tokens": score.tokens,
        "window": score.window,
        "usage": score.usage,
    }


def show_demo(pruned: Pruned, before: Score, after: Score) -> None:
    """The demo's outcome: every decision, and before against after."""
    console = plain_console()
    assert pruned.plan.search is not None
    for decision in pruned.plan.search.decisions:
        console.print(Text(decision_line(decision, pruned.plan.search), "green" if decision.accepted else "dim"))
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("", "stack", "layers", "weights", "perplexity"):
        table.add_column(heading, no_wrap=True)
    whole = strip([1] * pruned.plan.num_source_layers, unicode=unicode())
    layers, sizes = pruned.report["layers"], pruned.report["bytes"]
    for name, stack, count, size, score in (
        ("before", whole, layers["before"], sizes["before"], before),
        ("after", plan_strip(pruned.plan), layers["after"], sizes["after"], after),
    ):
        table.add_row(name, stack, str(count), format_bytes(size), f"{score.perplexity:.2f}")
    console.print(table)
    console.print("In the stack, a number is that many layers collapsed into one.", style="dim")
    console.print(f"\nThe pruned model is in {pruned.out.resolve()}", markup=False)
