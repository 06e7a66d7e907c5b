"""Results as text for people: what a checkpoint is, what a run did."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from streamcollapse.cli.plans import method_line, plan_rows
from streamcollapse.cli.screen import needs_table
from streamcollapse.cli.text import lines_of, plain_console
from streamcollapse.units import format_bytes, format_seconds

if TYPE_CHECKING:  # for their names alone: importing them takes seconds
    from streamcollapse.jobs.apply import Pruned
    from streamcollapse.jobs.inspect import Inspection
    from streamcollapse.jobs.prepare import Prepared
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
