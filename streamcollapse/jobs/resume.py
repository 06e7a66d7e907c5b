"""Goes on with a run that was broken off, from what its work directory holds."""

from pathlib import Path

from streamcollapse.jobs.apply import Pruned, run_apply
from streamcollapse.jobs.convert import Conversion, convert
from streamcollapse.jobs.heal import run_heal
from streamcollapse.jobs.prepare import prepare_apply, prepare_prune
from streamcollapse.jobs.prepare_heal import prepare_heal
from streamcollapse.jobs.prune import run_prune
from streamcollapse.progress import Listener, silent
from streamcollapse.run.request import saved_request
from streamcollapse.settings.search import SearchOptions


def resume(
    work_dir: str | Path, *, is_timed: bool = False, trust_remote_code: bool = False, listener: Listener = silent
) -> Pruned | Conversion:
    """Go on with the ``prune``, ``apply``, ``heal`` or ``convert`` whose work directory is ``work_dir``, to its end.

    ``is_timed``: tell the listener first how long the whole job takes, by a probe of a few seconds, where it is
    not short. No candidate is evaluated twice, and no finished shard is written again. Raises StreamCollapseError.
    """
    asked = saved_request(Path(work_dir), trust_remote_code)
    source, out, settings = asked.source, asked.out, asked.settings
    if asked.verb == "convert":
        return convert(source, out, dtype=asked.dtype, output=settings.output, listener=listener)
    if asked.healing is not None:
        healing = prepare_heal(source, out, asked.healing, settings, listener)
        return run_heal(healing.timed() if is_timed else healing)
    if asked.plan is not None:
        writing = prepare_apply(source, asked.plan, out, settings, listener)
        return run_apply(writing.timed(even_if_short=False) if is_timed else writing)
    prepared = prepare_prune(source, out, asked.options or SearchOptions(), settings, listener)
    return run_prune(prepared.timed(even_if_short=False) if is_timed else prepared)
