"""StreamCollapse: prune the depth of language models that do not fit in memory, by streamed layer collapse.

    from streamcollapse import SearchOptions, prune

    pruned = prune("Llama-2-7b-hf", "llama-2-23l", SearchOptions(target_layers="75%"))

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamcollapse.batches.run import batch as batch
    from streamcollapse.errors import StreamCollapseError as StreamCollapseError
    from streamcollapse.jobs.apply import Pruned as Pruned
    from streamcollapse.jobs.apply import apply as apply
    from streamcollapse.jobs.bench import bench as bench
    from streamcollapse.jobs.compare import compare as compare
    from streamcollapse.jobs.convert import Conversion as Conversion
    from streamcollapse.jobs.convert import convert as convert
    from streamcollapse.jobs.evaluate import evaluate as evaluate
    from streamcollapse.jobs.heal import heal as heal
    from streamcollapse.jobs.inspect import inspect as inspect
    from streamcollapse.jobs.perplexity import perplexity as perplexity
    from streamcollapse.jobs.planning import compose_plans as compose_plans
    from streamcollapse.jobs.planning import export_plan as export_plan
    from streamcollapse.jobs.planning import make_plan as make_plan
    from streamcollapse.jobs.prune import prune as prune
    from streamcollapse.jobs.report import report as report
    from streamcollapse.jobs.resume import resume as resume
    from streamcollapse.jobs.search import search as search
    from streamcollapse.jobs.similarity import Similarities as Similarities
    from streamcollapse.jobs.similarity import similarity as similarity
    from streamcollapse.jobs.speed import speed as speed
    from streamcollapse.jobs.verify import Verification as Verification
    from streamcollapse.jobs.verify import verify as verify
    from streamcollapse.merge.plan import Plan as Plan
    from streamcollapse.output.results import Comparison as Comparison
    from streamcollapse.searches.course import sized_plan as sized_plan
    from streamcollapse.settings.evaluate import Evaluating as Evaluating
    from streamcollapse.settings.heal import Healing as Healing
    from streamcollapse.settings.run import BenchConditions as BenchConditions
    from streamcollapse.settings.run import Calibration as Calibration
    from streamcollapse.settings.run import Cluster as Cluster
    from streamcollapse.settings.run import Comparing as Comparing
    from streamcollapse.settings.run import Compute as Compute
    from streamcollapse.settings.run import EvaluationText as EvaluationText
    from streamcollapse.settings.run import Output as Output
    from streamcollapse.settings.run import RunSettings as RunSettings
    from streamcollapse.settings.run import Streaming as Streaming
    from streamcollapse.settings.search import SearchOptions as SearchOptions
    from streamcollapse.storage.checkpoint import Checkpoint as Checkpoint

_NAMES = {
    "batches.run": ["batch"],
    "errors": ["StreamCollapseError"],
    "jobs.apply": ["Pruned", "apply"],
    "jobs.bench": ["bench"],
    "jobs.compare": ["compare"],
    "jobs.convert": ["Conversion", "convert"],
    "jobs.evaluate": ["evaluate"],
    "jobs.heal": ["heal"],
    "jobs.inspect": ["inspect"],
    "jobs.perplexity": ["perplexity"],
    "jobs.planning": ["compose_plans", "export_plan", "make_plan"],
    "jobs.prune": ["prune"],
    "jobs.report": ["report"],
    "jobs.resume": ["resume"],
    "jobs.search": ["search"],
    "jobs.similarity": ["Similarities", "similarity"],
    "jobs.speed": ["speed"],
    "jobs.verify": ["Verification", "verify"],
    "merge.plan": ["Plan"],
    "output.results": ["Comparison"],
    "searches.course": ["sized_plan"],
    "settings.evaluate": ["Evaluating"],
    "settings.heal": ["AlsoHeal", "Healing"],
    "settings.run": [
        "BenchConditions",
        "Calibration",
        "Cluster",
        "Comparing",
        "Compute",
        "EvaluationText",
        "Judging",
        "Output",
        "Repair",
        "RunSettings",
        "Streaming",
    ],
    "settings.search": ["SearchOptions"],
    "storage.checkpoint": ["Checkpoint"],
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = list(_HOMES)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version(__name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
