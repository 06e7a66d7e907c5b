"""From a size that is asked for to a number of layers of one model, and what it means in words."""

from streamcollapse.arch.cache import cache_elements
from streamcollapse.errors import OptionError
from streamcollapse.run.opened import Job
from streamcollapse.searches.candidate import Target
from streamcollapse.settings.search import CACHE_BITS, SearchOptions
from streamcollapse.units import format_bytes, parse_bytes

_WORTH_SAYING = 0.15  # of all parameters, outside the layers


def sized(job: Job, options: SearchOptions) -> tuple[SearchOptions, str]:
    """The complete ``options`` fitted to the model, with a number of layers where it was memory that was asked for; and
    what that means, in words.

    Raises OptionError where the model fits as it is, or no layer would.
    """
    fitted = options.for_model(job.num_layers)
    if options.target_memory is None:
        return fitted, _count_told(options.target_layers, fitted.target_layers, job.num_layers)
    asked, bits = parse_bytes(options.target_memory), CACHE_BITS[options.kv_dtype]
    caches = [count * bits // 8 for count in cache_elements(job.architecture.config, options.context)]
    weights = [_bytes(job, list(job.architecture.layout.layer_names(i))) for i in range(job.num_layers)]
    outside = job.checkpoint.num_bytes - sum(weights)
    largest = sorted((w + c for w, c in zip(weights, caches, strict=True)), reverse=True)  # whichever stay, they fit
    count = next((n for n in range(job.num_layers, 0, -1) if outside + sum(largest[:n]) <= asked), 0)
    cache = f"the cache of {options.context} tokens in {options.kv_dtype}"
    if count == job.num_layers:
        raise OptionError(
            f"target memory is {options.target_memory}; the weights, {format_bytes(job.checkpoint.num_bytes)}, and "
            f"{cache}, {format_bytes(sum(caches))}, fit as they are: nothing has to go"
        )
    if count == 0:
        raise OptionError(
            f"target memory is {options.target_memory}; what is outside the layers takes {format_bytes(outside)}, and "
            f"one layer with {cache} {format_bytes(largest[-1])}; give more"
        )
    stay = sum(weights) * count // job.num_layers + outside
    far = "; that takes more than half of the layers" if 2 * count < job.num_layers else ""
    told = (
        f"{options.target_memory}: {job.num_layers} -> {count} layers, weights of about {format_bytes(stay)} and "
        f"{cache}, {format_bytes(sum(caches) * count // job.num_layers)}{far}"
    )
    kept = {name: value for name, value in fitted.given.items() if name not in ("target_memory", "context", "kv_dtype")}
    return SearchOptions(**kept | {"target_layers": count}), told


def _count_told(asked: int | str | None, count: int | str | None, num_layers: int) -> str:
    """What a number of layers means where it is not that number. Raises OptionError where it is all of them."""
    if count == num_layers:
        raise OptionError(f"target layers is {asked}: all {num_layers} layers stay, and nothing would be pruned")
    return "" if asked == count else f"{asked}: {num_layers} -> {count} layers"


def ratio_told(target: Target) -> str:
    """What a share of all parameters means in layers. Raises OptionError where it is none, or more than half."""
    if target.ratio is None:
        return ""
    before, after = len(target.parameters), target.fewest()
    outside = 1.0 - sum(target.parameters) / target.total
    why = f", since embeddings and head are {100 * outside:.0f} %" if outside > _WORTH_SAYING else ""
    told = f"{target.ratio:g} of all parameters: {before} -> {after} layers{why}"
    if 2 * after < before:
        raise OptionError(
            f"target ratio is {told}; that takes more than half of the layers: give `target_layers={after}` if that is "
            "what is wanted"
        )
    if after == before:
        raise OptionError(f"target ratio is {told}; that is less than a layer has, and nothing would be pruned")
    return told


def _bytes(job: Job, names: list[str]) -> int:
    return sum(job.source.info(name).num_bytes for name in names)
