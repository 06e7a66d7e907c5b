"""What convert and verify found, as text for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from streamcollapse.cli.tables import memory_line
from streamcollapse.cli.text import lines_of, plain_console
from streamcollapse.units import format_bytes, format_seconds

if TYPE_CHECKING:  # for their names alone: importing them takes seconds
    from streamcollapse.jobs.convert import Conversion
    from streamcollapse.jobs.verify import Verification


def show_conversion(found: Conversion) -> None:
    """The outcome of ``convert``, or what it would do."""
    before, after = (
        ", ".join(f"{name} {format_bytes(size)}" for name, size in sorted(sizes.items()))
        for sizes in (found.before, found.after)
    )
    shards = next(iter(found.shards)) if len(found.shards) == 1 else f"{len(found.shards)} shards"
    rows: list[tuple[str, str | Text]] = [
        ("checkpoint", found.source),
        ("weights", f"{found.num_tensors} tensors: {before} -> {after}"),
        ("files", shards),
    ]
    if found.usage:
        usage = found.usage
        rows += [
            ("time", format_seconds(usage["seconds"])),
            ("read, written", f"{format_bytes(usage['bytes_read'])}, {format_bytes(usage['bytes_written'])}"),
            ("memory", memory_line(usage)),
            ("converted", found.out),
        ]
    else:
        rows.append(("dry run", "everything checks out; nothing was written"))
    plain_console().print(lines_of(rows))


def show_verification(found: Verification) -> None:
    """The outcome of ``verify``: all that it looked at is right."""
    digests = f"{found.digests} shards are what the report says" if found.digests else "none recorded"
    rows: list[tuple[str, str | Text]] = [
        ("checkpoint", found.path),
        ("layers", f"{found.layers}, names and shapes as the config says"),
        ("weights", f"{found.tensors} tensors, {format_bytes(found.num_bytes)}, no NaN or infinity"),
        ("digests", digests),
    ]
    if found.source is not None:
        rows.append(("recomputed", f"{found.recomputed} tensors from {found.source}, equal bit by bit"))
    plain_console().print(lines_of(rows))
