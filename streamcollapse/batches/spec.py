"""A file of jobs (YAML): sources times settings, as tasks. Everything in it is checked before anything is done.

out: pruned
calibration: samples.txt
jobs:
  - source: checkpoints/*
    layers_per_merge: [3, 4]
    threshold: [0.65, 0.75]
  - source: org/name@revision
    verb: convert
    dtype: bfloat16
"""

import glob
import itertools
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from streamcollapse.batches.tasks import Convert, Describe, Liken, Predict, Prune, Task, Work
from streamcollapse.errors import JobsError, OptionError
from streamcollapse.run.text_names import is_of_hub
from streamcollapse.searches.registry import OWNED, complete, strategy_of
from streamcollapse.settings.catalogue import BEST
from streamcollapse.settings.declared import Declared, declared, make, unknown
from streamcollapse.settings.heal import AlsoHeal
from streamcollapse.settings.run import (
    COMPUTE_DTYPES,
    SAMPLES,
    Calibration,
    Compute,
    EvaluationText,
    Judging,
    Output,
    Repair,
    RunSettings,
)
from streamcollapse.settings.search import SearchOptions
from streamcollapse.storage.index import is_hub_id

MOST_TASKS = 10_000
_MOST_BYTES = 1_000_000
_SETTINGS: dict[str, Declared] = {
    **declared(SearchOptions),
    **declared(Calibration),
    **declared(Judging),
    **declared(Repair),
    **declared(AlsoHeal),
    **{key: one for key, one in declared(RunSettings).items() if key in ("compute_dtype", "max_shard_size")},
}
_LETTERS = {one.said.letter: key for key, one in _SETTINGS.items() if one.said.letter}
_LIKENING = ("layers_per_merge", "rule", "rdsc_scale", "metric", "lowest", "highest", "merge_norms")
_KNOWN: dict[str, Collection[str]] = {  # settings by verb
    "prune": _SETTINGS.keys(),
    "convert": {"dtype", "max_shard_size"},
    "perplexity": {*declared(EvaluationText), "compute_dtype"},
    "similarity": {*_LIKENING, *declared(Calibration), "compute_dtype"},
    "report": {"compute_dtype"},
}
_ANY = {name for names in _KNOWN.values() for name in names}
_GLOB = "*?["


@dataclass(frozen=True)
class Jobs:
    """What a file of jobs asks for: ``out`` is where, None if the file does not say."""

    tasks: tuple[Task, ...]
    out: Path | None


def read_jobs(path: Path) -> Jobs:
    """The tasks of the file ``path``, in its order. Relative paths in it start at its own directory.

    Raises JobsError for anything that is not as it must be, naming the job.
    """
    document, base = _load(path), path.resolve().parent
    if not isinstance(document, dict) or not isinstance(document.get("jobs"), list) or not document["jobs"]:
        raise JobsError(f"{path}: needs a list of jobs under the key jobs, each with a source")
    out = document.get("out")
    if out is not None and not isinstance(out, str):
        raise JobsError(f"{path}: out is {out}, not a directory's name")
    common = {key: value for key, value in document.items() if key not in ("jobs", "out")}
    wanted: dict[tuple[str, Work, str], None] = {}
    for number, job in enumerate(document["jobs"], 1):
        try:
            for source, work, shard_size in _expand(job, common, base):
                wanted[source, work, shard_size] = None
                if len(wanted) > MOST_TASKS:
                    raise JobsError(f"more than {MOST_TASKS} results; split the file")
        except (JobsError, OptionError) as error:
            raise JobsError(f"{path}: job {number}: {error}") from error
    return Jobs(_named(list(wanted), path), None if out is None else base / out)


class _Loader(yaml.SafeLoader):
    """Plain data only, and no key twice: the second one would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
                seen.add(key.value)
        return dict(super().construct_mapping(node, deep))


def _load(path: Path) -> Any:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise JobsError(f"{path}: is larger than {_MOST_BYTES} bytes, no file of jobs")
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise JobsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" at line {mark.line + 1}"
        said = getattr(error, "problem", None) or type(error).__name__
        raise JobsError(f"{path}: not YAML{line}: {said}") from error


def _expand(job: Any, common: Mapping[str, Any], base: Path) -> Iterator[tuple[str, Work, str]]:
    """Each source of ``job`` with each of its settings."""
    if not isinstance(job, dict) or "source" not in job:
        raise JobsError("needs a source")
    verb = job.get("verb", "prune")
    if not isinstance(verb, str) or verb not in _KNOWN:
        raise JobsError(f"verb {unknown(verb, _KNOWN)}")
    known = _KNOWN[verb]
    own = _settings({key: value for key, value in job.items() if key not in ("source", "verb")}, known)
    shared = {k: v for k, v in _settings(common, _ANY).items() if k in known}
    grid = {**shared, **own}
    sources = [found for given in _listed(job["source"]) for found in _sources(given, base)]
    if not sources:
        raise JobsError("needs a source")
    works = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        works.append(_work(verb, chosen, base))
        if len(works) > MOST_TASKS:
            raise JobsError(f"more than {MOST_TASKS} settings; split the file")
    for source in sources:
        for work, shard_size in works:
            yield source, work, shard_size


def _settings(given: Mapping[Any, Any], known: Collection[str]) -> dict[str, list[Any]]:
    """``given`` under the settings' own names, with lists for grids."""
    settings: dict[str, list[Any]] = {}
    for key, value in given.items():
        name = _LETTERS.get(key, str(key).replace("-", "_"))
        if name not in known:
            raise JobsError(f"setting {unknown(key, sorted(known))}")
        if name in settings:
            raise JobsError(f"setting {key} is given twice")
        settings[name] = _listed(value)
        if not settings[name]:
            raise JobsError(f"{name} is an empty list; give it a value")
    return settings


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _work(verb: str, chosen: Mapping[str, Any], base: Path) -> tuple[Work, str]:
    """One setting of a job, and the size of its shards."""
    output = make(Output, chosen)
    if verb == "convert":
        dtype = chosen.get("dtype")
        if dtype not in (None, *COMPUTE_DTYPES):
            raise OptionError(f"dtype {unknown(dtype, COMPUTE_DTYPES, quoted=True)}")
        return Convert(dtype), str(output.max_shard_size)
    if verb == "perplexity":
        if "text" not in chosen:
            raise JobsError("perplexity needs a text")
        text = make(EvaluationText, {**chosen, "text": _file(chosen["text"], base, "text")})
        return Predict(text, make(Compute, chosen).dtype), str(output.max_shard_size)
    if verb == "report":
        return Describe(make(Compute, chosen).dtype), str(output.max_shard_size)
    if verb == "similarity":
        chosen = {"rule": BEST, "strategy": "laco", **chosen}
    method = complete(make(SearchOptions, chosen))
    calibration = make(Calibration, chosen)
    file = str(calibration.file or ("sentences" if verb == "similarity" else strategy_of(method).samples))
    if file not in SAMPLES:
        file = str(_texts(file, base, "calibration file"))
    if verb == "similarity":
        likening = Liken(method, Calibration(file, calibration.max_tokens), make(Compute, chosen).dtype)
        return likening, str(output.max_shard_size)
    judging = make(Judging, chosen)
    held_out = None if judging.held_out is None else _file(judging.held_out, base, "held-out text")
    repair = make(Repair, chosen)
    heal = make(AlsoHeal, chosen)
    work = Prune(
        method,
        Calibration(file, calibration.max_tokens),
        make(Compute, chosen).dtype,
        Judging(held_out, judging.verdict),
        replace(repair, file=_texts(repair.file, base, "text to repair on")),
        replace(heal, file=_texts(heal.file, base, "text to heal on")),
    )
    return work, str(output.max_shard_size)


def _texts(name: str | Path | None, base: Path, what: str) -> str | None:
    """The path of a text that a job names, or the pattern of several. Raises JobsError where there is none."""
    if name is None or is_of_hub(name):
        return None if name is None else str(name)
    if any(sign in str(name) for sign in "*?["):
        return str(base / str(name))
    return _file(name, base, what)


def _file(name: Any, base: Path, what: str) -> str:
    """The path of a file that a job names. Raises JobsError where there is none."""
    path = base / str(name)
    if not path.is_file():
        raise JobsError(f"{path}: there is no such {what}")
    return str(path)


def _sources(given: Any, base: Path) -> list[str]:
    """The checkpoints that ``given`` means: a directory, a pattern, or an id on the Hub."""
    if not isinstance(given, str) or not given:
        raise JobsError(f"source is {given}, not a path, a pattern or an id on the Hub")
    path = os.path.join(base, os.path.expanduser(given))  # noqa: PTH111, PTH118 - patterns are no paths
    if os.path.lexists(path):
        return [os.path.normpath(path)]
    if any(mark in given for mark in _GLOB):
        matches = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 - the pattern may be absolute
        found = [os.path.normpath(match) for match in matches if (Path(match) / "config.json").is_file()]
        if not found:
            raise JobsError(f"{given}: no directory with a config.json matches")
        return found
    if is_hub_id(given):
        return [given]
    raise JobsError(f"{path}: does not exist, and is no id on the Hub")


def _named(wanted: Sequence[tuple[str, Work, str]], path: Path) -> tuple[Task, ...]:
    short = _short_names([source for source, _, _ in wanted])
    tasks: dict[str, Task] = {}
    for source, work, shard_size in wanted:
        name = f"{short[source]}-{_label(work)}"
        if name in tasks:
            raise JobsError(f"{path}: two jobs would write {name}; give them different settings or files")
        tasks[name] = Task(name, source, work, shard_size)
    return tuple(tasks.values())


def _short_names(sources: Sequence[str]) -> dict[str, str]:
    """The last part of each source's name, or as many more as tell them apart."""
    parts = {source: source.replace("@", "-").rstrip("/").split("/") for source in dict.fromkeys(sources)}
    for depth in range(1, max(map(len, parts.values())) + 1):
        names = {source: "-".join(filter(None, split[-depth:])) for source, split in parts.items()}
        if len(set(names.values())) == len(names):
            break
    return names


def _label(work: Work) -> str:
    """The settings in a name: the paper's letters and the rule, and what else is not the default."""
    if isinstance(work, Convert):
        return work.dtype or "safetensors"
    if isinstance(work, Describe):
        return "report" if work.compute_dtype == "auto" else f"report-{work.compute_dtype}"
    if isinstance(work, Predict):
        text = work.text
        of = [Path(text.file).stem, text.window, text.stride, text.max_tokens, work.compute_dtype]
        return "-".join(["perplexity", *(str(one) for one in of if one not in (None, "auto"))])
    if isinstance(work, Liken):
        return f"similarity-{_searched(work.options, work.calibration, work.compute_dtype)}"
    repair = f"-repair-{work.repair.method}" if work.repair.method else ""
    return _searched(work.options, work.calibration, work.compute_dtype) + repair


def _searched(options: SearchOptions, calibration: Calibration, compute_dtype: str) -> str:
    default, strategy = SearchOptions(), strategy_of(options)
    parts = [] if strategy.implied_by else [strategy.name]  # which its letters say
    if strategy.uses("layers_per_merge", options):
        parts += [f"C{options.layers_per_merge}", f"I{options.interval}"]
    if options.target_layers is not None:
        parts.append(f"N{options.target_layers}".replace("%", "percent"))
    elif options.target_memory is not None:
        parts += [f"{options.target_memory}", f"{options.context}tokens", options.kv_dtype]
    elif options.target_ratio is not None:
        parts.append(f"ratio{options.target_ratio:g}")
    elif options.max_loss is not None:
        parts.append(f"loss{options.max_loss:g}")
    elif strategy.uses("threshold", options):
        parts.append(f"T{options.threshold:g}")
    if "rule" in strategy.defaults:
        parts.append(options.rule.replace(",", "+"))
    usual = {**OWNED, **strategy.defaults}
    parts += [options.metric] if options.metric != usual["metric"] else []
    parts += ["scale" + "+".join(f"{scale:g}" for scale in options.scales)] if options.rdsc_scale != 1.0 else []
    parts += [f"L{options.lowest}"] if options.lowest != default.lowest else []
    parts += [f"H{options.highest}"] if options.highest is not None else []
    parts += ["norms"] if options.merge_norms else []
    if options.rescale != usual["rescale"]:
        parts.append("rescaled" if options.rescale else "unscaled")
    parts += [options.effort] if options.effort != usual["effort"] else []
    parts += [f"{options.merges_per_round}at-once"] if options.merges_per_round > 1 else []
    file = calibration.file
    if file is not None and file != strategy.samples:
        name = str(file).rpartition("/")[2] if is_of_hub(file) else Path(file).stem
        parts.append(re.sub(r"[^\w.+-]+", "_", name))
    parts += [f"{calibration.max_tokens}tokens"] if calibration.max_tokens != Calibration().max_tokens else []
    parts += [compute_dtype] if compute_dtype != "auto" else []
    return "-".join(parts)
