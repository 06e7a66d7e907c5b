"""StreamCollapse: prune the depth of language models that do not fit in memory, by streamed layer collapse.

    from streamcollapse import CollapseOptions, prune

    pruned = prune("Llama-2-7b-hf", "llama-2-23l", CollapseOptions(threshold=0.65))

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamcollapse.errors import StreamCollapseError
    from streamcollapse.jobs.convert import Conversion, convert
    from streamcollapse.jobs.inspect import inspect
    from streamcollapse.jobs.perplexity import perplexity
    from streamcollapse.jobs.planning import compose_plans, make_plan
    from streamcollapse.jobs.prune import Pruned, apply, prune, search
    from streamcollapse.jobs.resume import resume
    from streamcollapse.jobs.similarity import Similarities, similarity
    from streamcollapse.jobs.verify import Verification, verify
    from streamcollapse.merge.plan import Plan
    from streamcollapse.settings import Calibration, Compute, Output, Streaming
    from streamcollapse.storage.checkpoint import Checkpoint
    from streamcollapse.strategy.collapse import CollapseOptions

_HOMES = {
    "Calibration": "settings",
    "Checkpoint": "storage.checkpoint",
    "CollapseOptions": "strategy.collapse",
    "Compute": "settings",
    "Conversion": "jobs.convert",
    "Output": "settings",
    "Plan": "merge.plan",
    "Pruned": "jobs.prune",
    "Similarities": "jobs.similarity",
    "StreamCollapseError": "errors",
    "Streaming": "settings",
    "Verification": "jobs.verify",
    "apply": "jobs.prune",
    "compose_plans": "jobs.planning",
    "convert": "jobs.convert",
    "inspect": "jobs.inspect",
    "make_plan": "jobs.planning",
    "perplexity": "jobs.perplexity",
    "prune": "jobs.prune",
    "resume": "jobs.resume",
    "search": "jobs.prune",
    "similarity": "jobs.similarity",
    "verify": "jobs.verify",
}

__all__ = [
    "Calibration",
    "Checkpoint",
    "CollapseOptions",
    "Compute",
    "Conversion",
    "Output",
    "Plan",
    "Pruned",
    "Similarities",
    "StreamCollapseError",
    "Streaming",
    "Verification",
    "apply",
    "compose_plans",
    "convert",
    "inspect",
    "make_plan",
    "perplexity",
    "prune",
    "resume",
    "search",
    "similarity",
    "verify",
]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
