"""Tasks whose results are figures, not checkpoints: a perplexity, how alike layers are, a page about other results."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from streamcollapse.batches.tasks import Describe, Liken, Predict
from streamcollapse.errors import CalibrationError, CheckpointError, OptionError
from streamcollapse.jobs.perplexity import perplexity
from streamcollapse.jobs.report import report
from streamcollapse.jobs.similarity import similarity
from streamcollapse.merge.plan import PLAN_FILE, Plan
from streamcollapse.progress import Listener
from streamcollapse.run.opened import open_job
from streamcollapse.settings.run import Comparing, Output, RunSettings
from streamcollapse.storage.checkpoint import Checkpoint
from streamcollapse.storage.disk import disk_errors, write_whole

FIGURES_FILE = "streamcollapse_figures.json"
PAGE_FILE = "streamcollapse_page.html"


def check_figures(work: Predict | Liken | Describe, source: Path, settings: RunSettings) -> None:
    """Raise what is wrong with ``source``, or with the text, before a weight is read."""
    job = open_job(source, settings)
    file = work.text.file if isinstance(work, Predict) else None
    if file is not None and not Path(file).is_file():
        raise CalibrationError(f"{file}: there is no such file")
    if isinstance(work, Liken) and job.num_layers < 2:
        raise OptionError("the model has one layer, which nothing can be compared with")


def make_figures(
    work: Predict | Liken | Describe, source: Path, out: Path, settings: RunSettings, listener: Listener
) -> dict[str, Any]:
    """Write what ``work`` finds out about ``source`` to FIGURES_FILE in the directory ``out``; the most important of
    it."""
    if isinstance(work, Predict):
        score = perplexity(source, work.text, settings=settings, listener=listener)
        finite = score.perplexity if math.isfinite(score.perplexity) else None
        document = asdict(score) | {"perplexity": finite}
        said = {"perplexity": finite, "loss": score.nll, "tokens": score.tokens, "window": score.window}
    elif isinstance(work, Describe):
        return _page(source, out, settings, listener)
    else:
        found = similarity(source, work.options, settings=settings, listener=listener)
        document, said = found.to_json(), {"most_alike": _most_alike(found.hidden_cosines)}
    with disk_errors(out):
        out.mkdir(exist_ok=True)
    write_whole(out / FIGURES_FILE, json.dumps(document, indent=1, allow_nan=False) + "\n")
    usage = document["usage"]
    return said | {key: usage[key] for key in ("bytes_read", "peak_rss", "peak_vram")}


def _page(source: Path, out: Path, settings: RunSettings, listener: Listener) -> dict[str, Any]:
    """A page about all results of ``source`` beside ``out``."""
    fingerprint = Checkpoint(source).fingerprint()
    beside = sorted(out.parent.glob(f"*/{PLAN_FILE}"))
    plans = [path.parent for path in beside if Plan.load(path).fingerprint == fingerprint]
    if not plans:
        raise CheckpointError(f"{out.parent}: has no result of {source} that a page could be about")
    with disk_errors(out):
        out.mkdir(exist_ok=True)
    conditions = Comparing(source=source, samples=False)
    settings = replace(settings, output=Output(overwrite=True))
    report(plans, out / PAGE_FILE, conditions=conditions, settings=settings, listener=listener)
    return {"results": len(plans)}


def _most_alike(cosines: list[float]) -> int:
    """The 0-based layer that changes its input least."""
    return max(range(len(cosines)), key=lambda layer: cosines[layer])
