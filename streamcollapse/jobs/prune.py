"""The job, top to bottom: prune a checkpoint that does not fit in memory, by layer collapse.

prepare     every check, before a weight is read (prepare.py)
reference   stream the original once, keep the hidden states at layer boundaries
search      propose merges, run each from the boundary below, keep what stays similar
repair      fit the layers before cuts to what the original hands on above them
heal        train what is left, end to end, towards the original
write       stream the merged tensors into a new checkpoint
"""

from pathlib import Path

from streamcollapse.jobs.apply import Pruned, finished, write_healed, write_pruned
from streamcollapse.jobs.healing import healed
from streamcollapse.jobs.prepare import Prepared, prepare_prune
from streamcollapse.jobs.repair import repaired
from streamcollapse.jobs.search import find_plan
from streamcollapse.progress import Listener, silent
from streamcollapse.run.opened import open_run
from streamcollapse.run.request import output_work
from streamcollapse.settings.run import RunSettings
from streamcollapse.settings.search import SearchOptions


def prune(
    source: str | Path,
    out: str | Path,
    options: SearchOptions = SearchOptions(),  # noqa: B008 - frozen
    *,
    settings: RunSettings = RunSettings(),  # noqa: B008
    listener: Listener = silent,
) -> Pruned:
    """Prune the checkpoint ``source``, a directory or a Hub id (``org/name[@revision]``), into the new directory
    ``out``.

    Raises StreamCollapseError (errors.py) for anything the input or the machine is at fault for; ``out`` then does not
    exist, or is the older directory that ``settings.output.overwrite`` would have replaced.
    """
    return run_prune(prepare_prune(source, out, options, settings, listener))


def run_prune(prepared: Prepared, resumable: bool = True) -> Pruned:
    """``prune`` as ``prepared``. Unless it is ``resumable``, the caller removes the output and all progress."""
    prepared.announce()
    assert prepared.out is not None
    with output_work(prepared.request, prepared.key, resumable) as work:
        if work.has_finished(prepared.out):
            return finished(prepared.out)
        with open_run(prepared.job, prepared.memory, work.path) as run:
            plan = repaired(prepared, find_plan(prepared, run, work), run, work)
            if prepared.lessons is None:
                return write_pruned(prepared, plan, run, work)
        return write_healed(prepared, healed(prepared.job, prepared.lessons, plan, work), work)
