"""Goes on with a run that was broken off, from what its work directory holds."""

from __future__ import annotations

from pathlib import Path

from streamcollapse.jobs.apply import Pruned, apply
from streamcollapse.jobs.convert import Conversion, convert
from streamcollapse.jobs.prune import prune
from streamcollapse.progress import Listener, silent
from streamcollapse.run.request import ConvertAgain, asked_before


def resume(
    work_dir: str | Path, *, trust_remote_code: bool = False, listener: Listener = silent
) -> Pruned | Conversion:
    """Go on with the ``prune``, ``apply`` or ``convert`` whose work directory is ``work_dir``, to its end.

    No candidate is evaluated twice, and no finished shard is written again. Raises StreamCollapseError.
    """
    again = asked_before(Path(work_dir), trust_remote_code)
    if isinstance(again, ConvertAgain):
        return convert(again.source, again.out, dtype=again.dtype, output=again.output, listener=listener)
    if again.plan is not None:
        return apply(again.source, again.plan, again.out, settings=again.settings, listener=listener)
    return prune(again.source, again.out, again.options, settings=again.settings, listener=listener)
